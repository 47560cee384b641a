"""`cohortium consortium`: a consortium's folder and the people who steer its runs."""

from datetime import UTC
from pathlib import Path
from typing import Annotated, Literal

import typer

from cohortium import bootstrap
from cohortium.cli.output import Json, Output, Quiet

app = typer.Typer(help="The consortium itself: its keys, its settings, its people.", no_args_is_help=True)

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="The consortium's folder: keys and settings.", show_default=False)
]


@app.command()
def init(
    folder: Folder,
    name: Annotated[str, typer.Option(help="The consortium's name.")] = "consortium",
    address: Annotated[
        list[str], typer.Option(metavar="HOST:PORT", help="Where hospitals reach coordinators; may be repeated.")
    ] = ["localhost:7400"],  # noqa: B006  Typer declares defaults so
    enrol_address: Annotated[
        list[str], typer.Option(metavar="HOST:PORT", help="Where hospitals enrol; may be repeated.")
    ] = ["localhost:7401"],  # noqa: B006
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Begin a consortium: its authority, its keys, its settings, and an operator. Nothing is ever overwritten."""
    written = bootstrap.create_consortium(folder, name, address, enrol_address)
    output = Output(as_json, quiet)
    output.say(f"Wrote {', '.join(map(str, written))}.")
    output.say("Keep a copy of the folder in a safe place, and the folder itself on the coordinators alone.")
    output.say(f"Next: cohortium coordinator run {folder}, and cohortium site invite NAME --consortium {folder}")
    output.result({"consortium": name, "folder": str(folder), "files": [str(file) for file in written]})


@app.command()
def grant(
    role: Annotated[Literal["operator", "researcher"], typer.Argument(help="What they may do.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Their name.", show_default=False)],
    consortium: Annotated[Path, typer.Option(metavar="FOLDER", help="The consortium's folder.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where their key and certificate go.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give a person a key and a certificate for 90 days; again, into another folder, before these end."""
    written = bootstrap.grant(bootstrap.load_consortium(consortium), role, name, out)
    output = Output(as_json, quiet)
    output.say(f"Wrote {', '.join(map(str, written))}. Hand them to {name} and to nobody else.")
    output.result({"role": role, "name": name, "files": [str(file) for file in written]})


@app.command()
def show(folder: Folder, as_json: Json = False, quiet: Quiet = False) -> None:
    """Show a consortium's settings, after a look whether its folder can be relied on. No secret is shown."""
    told = bootstrap.load_consortium(folder)
    until = told.authority.certificate.not_valid_after_utc.astimezone(UTC).date().isoformat()
    output = Output(as_json, quiet)
    output.say(f"Consortium {told.name}")
    output.pairs(
        (
            ("Hospitals reach it at", ", ".join(told.addresses)),
            ("Hospitals enrol at", ", ".join(told.enrolment)),
            ("Database", "as in the settings" if told.database else "a private PostgreSQL in this folder"),
            ("Redis", "as in the settings" if told.redis else "a private server in this folder"),
            ("Authority until", until),
        )
    )
    output.result(
        {
            "consortium": told.name,
            "addresses": list(told.addresses),
            "enrolment": list(told.enrolment),
            "authority_until": until,
        }
    )
