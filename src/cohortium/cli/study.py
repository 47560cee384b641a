"""`cohortium study`: write, check and simulate a study file."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cohortium import bootstrap
from cohortium.cli.arguments import SiteData, StudyFile, site_files
from cohortium.cli.audit import audit_privacy
from cohortium.cli.output import Json, Output, Quiet
from cohortium.cli.results import show_outcome
from cohortium.cli.run import submit
from cohortium.cli.tradeoff import tradeoff
from cohortium.coordinator.result import as_json
from cohortium.core.document import document, json_schema
from cohortium.core.errors import StudyError, nearest
from cohortium.core.features import BinaryTarget
from cohortium.core.messages import MaskedUpdate
from cohortium.core.study import Study
from cohortium.engines.local import Faults
from cohortium.guarantees import promise, protection, security
from cohortium.learning.evaluation import Comparison
from cohortium.plan import compile_study

app = typer.Typer(help="Write, check and simulate study files.", no_args_is_help=True)

Seed = Annotated[int, typer.Option(help="Seed of all keys and random choices; equal seeds give equal bits.", min=0)]


@app.command()
def new(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Where to write the study file.")] = Path("study.yaml"),
    with_data: Annotated[
        bool, typer.Option("--with-data", help="Also write its four hospitals' records beside it, as SITE.csv.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a commented study file to start from."""
    records = bootstrap.example_sites() if with_data else {}
    data = {name: path.parent / f"{name}.csv" for name in records}
    for file in (path, *data.values()):
        if file.exists() and not force:
            raise StudyError(f"{file} exists already: choose another name, or overwrite it with --force")
    bootstrap.write_file(path, bootstrap.example_study().encode())
    for name, file in data.items():
        bootstrap.write_file(file, records[name].read_bytes())
    output = Output(as_json, quiet)
    following = ["cohortium", "study", "check", str(path)]
    if data:
        following = ["cohortium", "study", "simulate", str(path), "--seed", "7"]
        following += [word for name, file in data.items() for word in ("--site", f"{name}={file}")]
    written = ", ".join(str(file) for file in (path, *data.values()))
    output.say(f"Wrote {written}. Next: {shlex.join(following)}")
    output.result({"study": str(path), "sites": {name: str(file) for name, file in data.items()}})


@app.command()
def check(path: StudyFile, as_json: Json = False, quiet: Quiet = False) -> None:
    """Say what a study guarantees, before anything runs."""
    study = bootstrap.load_study(path)
    plan = compile_study(study)
    output = Output(as_json, quiet)
    promises, promised = protection(plan), promise(plan)
    output.say(f"{study.name} v{study.version}  {plan.study_id}")
    output.pairs(promises)
    output.result(
        {
            "study": document(study),
            "study_id": plan.study_id,
            "guarantees": dict(promises),
            "security": asdict(security(plan)),
            "privacy": asdict(promised) if promised else None,
            "phases": [
                {"name": phase.name, "values": phase.values, "rounds": phase.rounds, "precision": phase.precision}
                for phase in plan.phases
            ],
        }
    )


@app.command()
def simulate(
    path: StudyFile,
    seed: Seed,
    site: SiteData,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for result.json, model.json and report.html.", show_default="STUDY-result"),
    ] = None,
    folds: Annotated[
        int,
        typer.Option(
            help="Also compare with each site alone and with pooled rows, by this many held-out folds.", min=0
        ),
    ] = 0,
    lose: Annotated[
        list[str] | None,
        typer.Option(help="Lose a site's answer in a round, as in zurich@3, to see what dropouts do; repeat it."),
    ] = None,
    homes: Annotated[
        Path | None,
        typer.Option(
            help="Folder with a home for each site, whose policy rules and whose privacy ledger is charged; made where "
            "it is missing."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a study on this machine, through the messages that a network would carry."""
    study = bootstrap.load_study(path)
    faults = _faults(study, lose or [])
    folder = out or Path(f"{study.name}-result")
    _run(study, site_files(site), seed, folder, folds, Output(as_json, quiet), faults, homes)


app.command("submit")(submit)
app.command("tradeoff")(tradeoff)
app.command("audit-privacy")(audit_privacy)


@app.command()
def describe(
    path: StudyFile,
    seed: Seed,
    site: SiteData,
    out: Annotated[
        Path | None, typer.Option(help="Folder for result.json and report.html.", show_default="STUDY-description")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Describe a study's cohort over all sites: counts, missing values, means, quantiles, histograms."""
    study = bootstrap.load_study(path)
    described = bootstrap.descriptive(study)
    _run(described, site_files(site), seed, out or Path(f"{study.name}-description"), 0, Output(as_json, quiet))


@app.command()
def schema() -> None:
    """Print the JSON Schema of study files, for editors that check and complete them."""
    print(json.dumps(json_schema(), indent=2))


def _run(
    study: Study,
    sites: dict[str, Path],
    seed: int,
    out: Path,
    folds: int,
    output: Output,
    faults: Faults | None = None,
    homes: Path | None = None,
) -> None:
    if folds == 1 or (folds and not isinstance(study.cohort.target, BinaryTarget)):
        raise StudyError(f"--folds {folds}: give 2 or more, and a study with a binary target")
    with output.bar(f"{study.name}: rounds") as bar:
        result = bootstrap.simulate(study, sites, seed=seed, progress=bar.closed, faults=faults, homes=homes)
    comparison = compared(study, sites, seed, folds, output) if folds else ()
    written = bootstrap.write_result(result, out, comparison)
    show_outcome(output, result, comparison)
    output.say(f"Wrote {', '.join(str(path) for path in written)}")
    output.result(as_json(result, comparison) | {"files": [str(path) for path in written]})


def compared(study: Study, sites: Mapping[str, Path], seed: int, folds: int, output: Output) -> tuple[Comparison, ...]:
    """Returns the held-out comparison, under a progress bar."""
    with output.bar(f"{study.name}: held-out folds") as bar:
        return bootstrap.compare(
            study, sites, seed=seed, folds=folds, progress=lambda done: bar.step(done, folds, f"fold {done} of {folds}")
        )


def _faults(study: Study, losses: list[str]) -> Faults | None:
    lost: set[tuple[str, int]] = set()
    for loss in losses:
        site, separator, number = loss.rpartition("@")
        if not separator or not number.isdecimal() or int(number) < 1:
            raise StudyError(f"--lose {loss}: write SITE@ROUND, as in --lose zurich@3")
        if site not in study.sites.include:
            raise StudyError(f"--lose {loss}: '{site}' is no site of the study{nearest(site, study.sites.include)}")
        lost.add((site, int(number)))
    if not lost:
        return None
    return lambda site, message: isinstance(message, MaskedUpdate) and (site, message.round) in lost
