"""Rows of PostgreSQL as values, and values as what PostgreSQL can hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cohortium.coordinator.ports import Applied, RunEvent, RunRow, SiteRow, Terms

RUN = (
    "run, study, owner, deadline, patience, priority, seed, status, wish, leader, epoch, round, reason, "
    "submitted, started, ended"
)
SITE = "name, identity, enrolled, revoked"


def run_row(row: Sequence[Any]) -> RunRow:
    """Returns a run from the columns `RUN`."""
    return RunRow(
        run=row[0],
        study=row[1],
        owner=row[2],
        terms=Terms(deadline=row[3], patience=row[4], priority=row[5]),
        seed=None if row[6] is None else int(row[6]),
        status=row[7],
        wish=row[8],
        leader=row[9],
        epoch=row[10],
        round=row[11],
        reason=row[12],
        submitted=row[13],
        started=row[14],
        ended=row[15],
    )


def site_row(row: Sequence[Any]) -> SiteRow:
    """Returns a site from the columns `SITE`."""
    return SiteRow(name=row[0], identity=bytes(row[1]), enrolled=row[2], revoked=row[3])


def json(facts: Mapping[str, Any]) -> str:
    """Returns facts as canonical JSON, without the one character that PostgreSQL cannot hold."""
    encoded = msgspec.json.encode(facts, order="deterministic").decode()
    if "\\u0000" in encoded:
        encoded = msgspec.json.encode(_plain(msgspec.json.decode(encoded)), order="deterministic").decode()
    return encoded


def text(value: str | None) -> str | None:
    """Returns a text that PostgreSQL can hold."""
    return None if value is None else value.replace("\0", "\ufffd")


def tidings(applied: Applied | None, events: Sequence[RunEvent]) -> dict[str, Any]:
    """Returns the parameters that say what a round and events tell of sites: one entry for each site, the last word."""
    told: dict[str, str] = {}
    for event in events:
        site = event.facts.get("site")
        if isinstance(site, str):
            told[site] = event.kind
    survivors = list(applied.survivors) if applied else []
    for site in survivors:
        # a site that was told of in the same breath keeps that word
        told.setdefault(site, "contributed")
    return {
        "kinds": [event.kind for event in events],
        "facts": [json(event.facts) for event in events],
        "ats": [event.at for event in events],
        "number": applied.number if applied else None,
        "survivors": survivors,
        "round_facts": json(applied.facts) if applied else "{}",
        "told": list(told),
        "states": list(told.values()),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
