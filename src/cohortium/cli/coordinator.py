"""`cohortium coordinator`: the consortium's own processes."""

from pathlib import Path
from typing import Annotated

import typer

from cohortium import bootstrap
from cohortium.cli.output import Json, Output, Quiet

app = typer.Typer(help="The consortium's own processes and database.", no_args_is_help=True)

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="The consortium's folder: keys and settings.", show_default=False)
]


@app.command()
def run(
    folder: Folder,
    listen: Annotated[
        str | None, typer.Option(help="host:port for sites and people.", show_default="as in consortium.yaml")
    ] = None,
    enrol: Annotated[
        str | None, typer.Option(help="host:port for enrolment.", show_default="as in consortium.yaml")
    ] = None,
    health: Annotated[
        str | None,
        typer.Option(help="host:port for /healthz, /readyz and /metrics.", show_default="as in consortium.yaml"),
    ] = None,
    log: Annotated[str, typer.Option(help="Least level of log lines: debug, info, warning, error.")] = "info",
    log_format: Annotated[str, typer.Option(help="Log lines as json or text.")] = "json",
) -> None:
    """Lead runs until stopped. Any number of these may run for one consortium, on one machine or several."""
    bootstrap.run_coordinator(folder, listen=listen, enrol=enrol, health=health, log=(log, log_format))


@app.command()
def migrate(folder: Folder, as_json: Json = False, quiet: Quiet = False) -> None:
    """Bring the database to this version's tables. With a private database, a coordinator that starts does so too."""
    applied = bootstrap.migrate(folder)
    output = Output(as_json, quiet)
    output.say(f"Applied {', '.join(applied)}" if applied else "The database is up to date.")
    output.result({"applied": applied})
