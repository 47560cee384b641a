"""`cohortium run`, `cohortium status` and `cohortium study submit`: a study among the hospitals of a consortium."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cohortium import bootstrap
from cohortium.cli.arguments import StudyFile
from cohortium.cli.output import Bar, Json, Output, Quiet
from cohortium.cli.results import show_outcome
from cohortium.coordinator.ports import RunEvent, RunRow, Terms
from cohortium.coordinator.result import Result
from cohortium.coordinator.result import as_json as result_json
from cohortium.core.errors import RunFailed

if TYPE_CHECKING:
    from cohortium.engines.fleet.client import RunHandle, SiteState, Standing

app = typer.Typer(help="Runs in a consortium: watch, pause, resume, cancel, fetch.", no_args_is_help=True)

Folder = Annotated[
    Path,
    typer.Option(
        "--consortium",
        envvar="COHORTIUM_CONSORTIUM",
        help="Folder with the consortium's addresses and your certificate.",
        show_default=False,
    ),
]
Name = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for result.json, model.json and report.html.", show_default="RUN-result"),
]


def submit(
    path: StudyFile,
    consortium: Folder,
    run: Annotated[str | None, typer.Option(help="A name that no run has had.", show_default="made up")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Public seed of the sites' training, for studies without an epsilon: as in a simulation.",
            min=0,
            show_default="each site draws its own",
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option(help="Seconds that a round waits for sites once enough others have answered.", min=0.1)
    ] = 60.0,
    patience: Annotated[
        float, typer.Option(help="Seconds that the run waits for enough sites before it fails.", min=0.1)
    ] = 3600.0,
    priority: Annotated[
        int, typer.Option(help="Runs of a higher priority start first; above 0 for operators only.")
    ] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the result.")] = False,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a study among the hospitals of a consortium, and fetch its result."""
    output, study = Output(as_json, quiet), bootstrap.load_study(path)
    terms = Terms(deadline=deadline, patience=patience, priority=priority)
    with bootstrap.connect(consortium) as connection:
        handle = connection.submit(study, run=run, seed=seed, terms=terms)
        output.say(f"Submitted {study.name} v{study.version} as run {handle.name}")
        if detach:
            output.result(_facts(handle.state()))
        else:
            _fetched(handle, out, output)


@app.command("list")
def list_runs(
    consortium: Folder,
    most: Annotated[int, typer.Option(help="The most runs to list.", min=1, max=1000)] = 20,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the latest runs, newest first."""
    output = Output(as_json, quiet)
    with bootstrap.connect(consortium) as connection:
        runs = connection.runs(most)
    if runs:
        _show_runs(output, "Runs", runs)
    else:
        output.say("There are no runs yet. Submit one: cohortium study submit STUDY")
    output.result({"runs": [_facts(row) for row in runs]})


@app.command()
def watch(run: Name, consortium: Folder, as_json: Json = False, quiet: Quiet = False) -> None:
    """Show a run's progress, live, until it ends."""
    output = Output(as_json, quiet)
    with bootstrap.connect(consortium) as connection:
        handle = connection.run(run)
        row = _watched(handle, output)
    output.say(f"Run {run} {_ending(row)}")
    output.result(_facts(row))
    if row.status != "finished":
        raise RunFailed(f"run '{run}' {_ending(row)}")


@app.command()
def result(run: Name, consortium: Folder, out: Out = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Wait for a run's end, and write its result and report."""
    with bootstrap.connect(consortium) as connection:
        _fetched(connection.run(run), out, Output(as_json, quiet))


@app.command()
def pause(run: Name, consortium: Folder, as_json: Json = False, quiet: Quiet = False) -> None:
    """Let a run rest; what it has done stays."""
    _wished(run, consortium, "pause", Output(as_json, quiet))


@app.command()
def resume(run: Name, consortium: Folder, as_json: Json = False, quiet: Quiet = False) -> None:
    """Let a paused run go on."""
    _wished(run, consortium, "resume", Output(as_json, quiet))


@app.command()
def cancel(
    run: Name,
    consortium: Folder,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """End a run without a result. What it has cost patients in privacy stays spent."""
    if not yes:
        typer.confirm(f"End run {run} without a result?", abort=True)
    _wished(run, consortium, "cancel", Output(as_json, quiet))


def status(
    consortium: Folder,
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run: shows how its sites stand.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a consortium's sites, coordinators and runs, or how one run stands."""
    output, now = Output(as_json, quiet), datetime.now(UTC)  # noqa: TID251  ages are shown to people
    with bootstrap.connect(consortium) as connection:
        state = connection.state(run)
    columns = ["site", "state", "coordinator", "version"]
    sites = [[site.name, _site(site), site.coordinator or "–", site.software or "–"] for site in state.sites]
    if run is not None:
        columns += ["last word", "last round", "at (UTC)"]
        sites = [row + _stands(site.standing) for row, site in zip(sites, state.sites, strict=True)]
    output.table("Sites", columns, sites)
    coordinators = [[one.name, one.address, f"{_age(now, one.seen):.0f} s ago"] for one in state.coordinators]
    output.table("Coordinators", ["coordinator", "address", "last seen"], coordinators)
    if state.runs:
        _show_runs(output, "Runs under way" if run is None else "Run", state.runs)
    else:
        output.say("No run is under way.")
    output.result(
        {
            "sites": [_plain(asdict(site)) for site in state.sites],
            "coordinators": [_plain(asdict(one)) for one in state.coordinators],
            "runs": [_facts(row) for row in state.runs],
        }
    )


def fetched(handle: "RunHandle", output: Output) -> Result:
    """Shows a run's progress until it ends, and returns its result."""
    _watched(handle, output)
    return handle.result()


def _fetched(handle: "RunHandle", out: Path | None, output: Output) -> None:
    outcome = fetched(handle, output)
    written = bootstrap.write_result(outcome, out or Path(f"{handle.name}-result"))
    show_outcome(output, outcome)
    output.say(f"Wrote {', '.join(map(str, written))}")
    output.result(result_json(outcome) | {"files": [str(path) for path in written]})


def _watched(handle: "RunHandle", output: Output) -> RunRow:
    with output.bar(handle.name) as bar:
        return handle.watch(lambda event: _tell(event, bar, output))


def _tell(event: RunEvent, bar: Bar, output: Output) -> None:
    facts = event.facts
    match event.kind:
        case "round":
            number, objective = int(facts["number"]), facts.get("objective")
            note = f"round {number}, {len(facts['survivors'])} sites"
            note += "" if objective is None else f", objective {objective:.4g}"
            bar.step(number, number + int(facts["left"]), note)
        case "refused":
            output.say(f"{facts['site']} takes no part: {facts['reason']}")
        case "taken over":
            output.say(f"Coordinator {facts['coordinator']} took the run over in round {facts['round']}")
        case "paused" | "resumed":
            output.say(f"The run is {event.kind}")


def _wished(run: str, consortium: Path, wish: str, output: Output) -> None:
    with bootstrap.connect(consortium) as connection:
        handle = connection.run(run)
        row: RunRow = {"pause": handle.pause, "resume": handle.resume, "cancel": handle.cancel}[wish]()
    output.say(f"Asked run {run} to {wish}")
    output.result(_facts(row))


def _show_runs(output: Output, title: str, runs: tuple[RunRow, ...]) -> None:
    rows = [[row.run, row.status, str(row.round), row.leader or "–", _time(row.submitted)] for row in runs]
    output.table(title, ["run", "status", "round", "leader", "submitted (UTC)"], rows)
    for row in runs:
        if row.reason:
            output.say(f"{row.run}: {row.reason}")


def _ending(row: RunRow) -> str:
    return row.status + (f": {row.reason}" if row.reason else "")


def _site(site: "SiteState") -> str:
    if site.revoked:
        return "revoked"
    return "attached" if site.attached else "away"


def _stands(standing: "Standing | None") -> list[str]:
    return [standing.word, str(standing.round), _time(standing.at)] if standing else ["–", "–", "–"]


def _facts(row: RunRow) -> dict[str, Any]:
    facts = _plain(asdict(row))
    del facts["epoch"]
    return facts


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain_value(value) for name, value in facts.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return _plain(value) if isinstance(value, Mapping) else value


def _age(now: datetime, seen: datetime) -> float:
    return max(0.0, (now - seen).total_seconds())


def _time(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
