"""A site's place in a consortium: invited and revoked by an operator, taken up and looked after by the hospital."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from cohortium import bootstrap
from cohortium.cli.output import Json, Output, Quiet
from cohortium.core.errors import PolicyRefused
from cohortium.core.identity import fingerprint
from cohortium.core.invitation import MAX_TOKEN_CHARACTERS, PREFIX

Home = Annotated[Path, typer.Argument(metavar="HOME", help="The site's folder.", show_default=False)]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The site's name.", show_default=False)]
Folder = Annotated[Path, typer.Option(metavar="FOLDER", help="The consortium's folder.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Adds the commands to `cohortium site`."""
    for command in (enrol, peers, invite, revoke):
        app.command()(command)


def enrol(
    token: Annotated[
        str,
        typer.Argument(
            metavar="TOKEN",
            help="The invitation, a file that holds it, or - for standard input, which no other user here can see.",
            show_default=False,
        ),
    ],
    home: Home,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Join a consortium by its invitation. The site's keys are made here and never leave HOME."""
    done = bootstrap.enrol_site(_token(token), home)
    output = Output(as_json, quiet)
    output.say(f"Site {done.enrolled.site} has joined consortium {done.enrolled.consortium}.")
    output.say(f"Its fingerprint is {done.fingerprint}")
    output.say("Read it to the consortium's operator and to the other hospitals by telephone.")
    output.say(f"Next: cohortium site run {home}")
    output.result(
        {
            "site": done.enrolled.site,
            "consortium": done.enrolled.consortium,
            "fingerprint": done.fingerprint,
            "certificate_until": done.expires.isoformat(),
            "files": [str(path) for path in done.written],
        }
    )


def peers(
    home: Home,
    confirm: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="NAME FINGERPRINT",
            help="Record that this site's fingerprint was compared by telephone.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the other sites that this one has met, or confirm one of them."""
    output = Output(as_json, quiet)
    if confirm:
        name, told = confirm
        bootstrap.confirm_peer(home, name, told)
        output.say(f"Site {name} is confirmed.")
    enrolled, mine, known = bootstrap.site_peers(home)
    output.say(f"Site {enrolled.site} of consortium {enrolled.consortium}, fingerprint {mine}")
    rule = "as soon as it is met" if enrolled.peers == "first-use" else "only once it is confirmed"
    output.say(f"Another site counts {rule}.")
    for name, peer in sorted(known.items()):
        state = "confirmed" if peer.confirmed else "not confirmed"
        since = datetime.fromtimestamp(peer.seen, UTC).date().isoformat()
        output.pairs(((name, f"{fingerprint(peer.identity)} since {since}, {state}"),))
        if peer.other:
            output.pairs((("", f"REFUSED: the consortium now tells of {fingerprint(peer.other)}: telephone {name}"),))
    if not known:
        output.say("It has met no other site yet: that happens when its agent runs.")
    output.result(
        {
            "site": enrolled.site,
            "fingerprint": mine,
            "rule": enrolled.peers,
            "peers": {
                name: {
                    "fingerprint": fingerprint(peer.identity),
                    "confirmed": peer.confirmed,
                    "refused": fingerprint(peer.other) if peer.other else None,
                }
                for name, peer in sorted(known.items())
            },
        }
    )


def invite(
    name: Name,
    consortium: Folder,
    days: Annotated[float, typer.Option(min=0.01, max=90, help="For how long it can be used.")] = 7,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it to a new private file instead.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Invite a hospital: print a token with which it can enrol once. It is kept nowhere."""
    if out:
        bootstrap.require_new(out)
    token = bootstrap.invite_site(consortium, name, days)
    output = Output(as_json, quiet)
    if out:
        bootstrap.write_secret(out, f"{token}\n".encode())
        output.say(f"Wrote {out}: bring it to {name} on a way that you trust, and delete it.")
        output.result({"site": name, "file": str(out)})
        return
    if not as_json:
        # the token is what was asked for, so it is printed even if nothing else is
        print(token)
    output.say(f"Bring this line to {name} on a way that you trust; it enrols one site within {days:g} days.")
    output.result({"site": name, "token": token})


def revoke(
    name: Name,
    consortium: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """End a site's membership at once: its links are cut, and it gets no more certificates."""
    if not yes:
        if not sys.stdin.isatty():
            raise PolicyRefused(f"site '{name}' was not revoked: say --yes where nobody can be asked")
        if not typer.confirm(f"Revoke site {name}? It can only come back by a new invitation.", err=True):
            raise PolicyRefused(f"site '{name}' was not revoked")
    row = bootstrap.revoke_site(consortium, name)
    output = Output(as_json, quiet)
    output.say(f"Site {row.name} is revoked.")
    output.result({"site": row.name, "revoked": row.revoked.isoformat() if row.revoked else None})


def _token(told: str) -> str:
    if told == "-":
        return sys.stdin.read(MAX_TOKEN_CHARACTERS + 2)
    if told.startswith(PREFIX):
        return told
    # the name of a file is shorter than any invitation, and the system refuses to look for longer ones
    return bootstrap.read_token(told) if len(told) < 256 and Path(told).is_file() else told
