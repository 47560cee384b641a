"""A steward's approvals: which studies the site's agent answers, and how many runs of each."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cohortium import bootstrap
from cohortium.cli.arguments import StudyFile
from cohortium.cli.output import Json, Output, Quiet
from cohortium.core.document import study_id
from cohortium.core.errors import PolicyRefused
from cohortium.guarantees import protection
from cohortium.plan import compile_study

Home = Annotated[Path, typer.Argument(metavar="HOME", help="The site's folder.", show_default=False)]
_ASK = "Approve it?"


def register(app: typer.Typer) -> None:
    """Adds the commands to `cohortium site`."""
    app.command()(approve)
    app.command()(approvals)


def approve(
    home: Home,
    path: StudyFile,
    runs: Annotated[int, typer.Option(help="How many runs may be opened from now on.", min=1, max=1_000_000)] = 1,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without being asked.")] = False,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="Take the approval back: no run is opened any more; open ones go on.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Approve a study, after a look at what it guarantees. It takes effect while the site's agent runs."""
    study, output = bootstrap.load_study(path), Output(as_json, quiet)
    if revoke:
        with bootstrap.open_approvals(home) as approved:
            was = approved.revoke(study_id(study))
        output.say(f"{study.name} is approved no longer." if was else f"{study.name} was not approved.")
        output.result({"study_id": study_id(study), "revoked": was})
        return
    plan = compile_study(study)
    output.say(f"{study.name} v{study.version}  {plan.study_id}")
    output.pairs(protection(plan))
    if not yes:
        _require_consent()
    approval = bootstrap.approve(home, study, runs)
    output.say(f"Approved for {_counted(runs)} from now on; it has had {_counted(approval.had)}.")
    output.result({"study_id": approval.study, "runs": approval.runs, "had": approval.had})


def approvals(home: Home, as_json: Json = False, quiet: Quiet = False) -> None:
    """List the studies that are approved."""
    with bootstrap.open_approvals(home) as approved:
        found = approved.all()
    output = Output(as_json, quiet)
    if found:
        rows = [
            [one.name, one.study.removeprefix("sha256:")[:12], str(one.runs - one.had), str(one.had), one.time[:16]]
            for one in found
        ]
        rows = [[*row[:-1], row[-1].replace("T", " ")] for row in rows]
        output.table(f"Studies approved at {home}", ["study", "id", "runs left", "runs had", "approved (UTC)"], rows)
    else:
        output.say(f"No study is approved at {home}.")
    output.result(
        {
            "approvals": [
                {"study_id": one.study, "name": one.name, "runs": one.runs, "had": one.had, "time": one.time}
                for one in found
            ]
        }
    )


def _require_consent() -> None:
    if not sys.stdin.isatty():
        raise PolicyRefused("nothing was approved: nobody is here to ask; read what it guarantees, and add --yes")
    if not typer.confirm(_ASK, err=True):
        raise PolicyRefused("nothing was approved")


def _counted(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"
