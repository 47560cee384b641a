"""The `cohortium` command."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from cohortium.cli import consortium, coordinator, demo, model, run, site, study
from cohortium.cli.output import report_error
from cohortium.core.errors import CohortiumError

app = typer.Typer(
    help="Hospitals learn models and run clinical statistics together while every record stays home.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 success, 1 the work failed, 2 the study, the data or the command line is wrong, 3 refused by "
    "a policy, an approval, a consent or a budget.",
)
app.command("demo")(demo.demo)
app.add_typer(study.app, name="study")
app.add_typer(model.app, name="model")
app.add_typer(site.app, name="site")
app.add_typer(consortium.app, name="consortium")
app.add_typer(coordinator.app, name="coordinator")
app.add_typer(run.app, name="run")
app.command("status")(run.status)
app.command("predict")(model.predict)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cohortium {version('cohortium')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hospitals learn models and run clinical statistics together while every record stays home."""


def main() -> None:
    """Runs the command line; an error that Cohortium foresees is one sentence and an exit code."""
    try:
        app()
    except CohortiumError as error:
        sys.exit(report_error(error, as_json="--json" in sys.argv))
