"""Runs in PostgreSQL, as people see them (`cohortium.coordinator.ports.Desk`)."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from cohortium.adapters.postgres import CHANNEL, Connection, Database
from cohortium.adapters.postgres_rows import RUN, json, run_row
from cohortium.coordinator.ports import Applied, RunEvent, RunRow, SiteState, Terms, Wish
from cohortium.core.errors import StudyError

_STUDY = "INSERT INTO studies (study, document) VALUES (%(study)s, %(document)b) ON CONFLICT DO NOTHING"
_SUBMIT = f"""
WITH new AS (
    INSERT INTO runs (run, study, owner, deadline, patience, priority, seed, events)
    VALUES (%(run)s, %(study)s, %(owner)s, %(deadline)s, %(patience)s, %(priority)s, %(seed)s::numeric, 1)
    ON CONFLICT DO NOTHING RETURNING run
), asked AS (
    INSERT INTO run_sites (run, site) SELECT run, unnest(%(sites)s::text[]) FROM new
), told AS (
    INSERT INTO events (run, seq, kind, facts) SELECT run, 1, 'submitted', %(facts)s::jsonb FROM new
) SELECT pg_notify('{CHANNEL}', 'runs') FROM new
"""
_DOCUMENT = "SELECT document FROM studies WHERE study = %s"
_ASKED = "SELECT site FROM run_sites WHERE run = %s"
_RUN = f"SELECT {RUN} FROM runs WHERE run = %s"
_RUNS = f"""
SELECT {RUN} FROM runs WHERE coalesce(owner = %s::text, true) AND (ended IS NULL OR NOT %s)
ORDER BY submitted DESC, run LIMIT %s
"""
_WISH = f"""
WITH wished AS (
    UPDATE runs SET wish = %(wish)s, events = events + 1 WHERE run = %(run)s AND ended IS NULL RETURNING *
), told AS (
    INSERT INTO events (run, seq, kind, facts) SELECT run, events, 'wish', %(facts)s::jsonb FROM wished
) SELECT {RUN}, pg_notify('{CHANNEL}', 'runs'), pg_notify('{CHANNEL}', 'run:' || run) FROM wished
"""
_EVENTS = "SELECT kind, facts, seq, at FROM events WHERE run = %s AND seq > %s ORDER BY seq LIMIT %s"
_APPLIED = "SELECT number, survivors, facts FROM rounds WHERE run = %s ORDER BY number"
_OUTCOME = "SELECT data FROM outcomes WHERE run = %s"
_COORDINATORS = "SELECT name, address, seen FROM coordinators ORDER BY name"
_STATES = "SELECT site, state, round, at FROM run_sites WHERE run = %s ORDER BY site"


class PostgresDesk:
    """Every call is a statement or a transaction of its own, so any process may answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def submit(
        self, run: str, study: str, document: bytes, owner: str, sites: Sequence[str], terms: Terms, seed: int | None
    ) -> RunRow:
        """Queues a run, or returns the one that the same call queued before.

        Raises:
            StudyError: the name is taken by another run.
        """
        facts = {
            "run": run,
            "study": study,
            "document": document,
            "owner": owner,
            "sites": list(dict.fromkeys(sites)),
            "deadline": terms.deadline,
            "patience": terms.patience,
            "priority": terms.priority,
            "seed": None if seed is None else str(seed),
            "facts": json({"by": owner}),
        }

        async def work(connection: Connection) -> tuple[RunRow, set[str], bytes]:
            async with connection.transaction():
                await connection.execute(_STUDY, facts)
                await connection.execute(_SUBMIT, facts)
                row = await _one(connection, _RUN, run)
                asked = {site for (site,) in await _all(connection, _ASKED, run)}
                kept = await _one(connection, _DOCUMENT, study)
            assert row is not None and kept is not None
            return run_row(row), asked, kept[0]

        row, asked, kept = await self._database.do(work)
        there = (row.study, row.owner, row.terms, row.seed, asked, kept)
        if there != (study, owner, terms, seed, set(sites), document):
            raise StudyError(f"the name '{run}' is taken by another run; choose another name")
        return row

    async def run(self, run: str) -> RunRow | None:
        """Returns a run."""
        row = await self._first(_RUN, run)
        return None if row is None else run_row(row)

    async def runs(self, most: int = 100, owner: str | None = None, *, under_way: bool = False) -> Sequence[RunRow]:
        """Returns the latest runs, newest first: of one owner or of all, and those alone that have not ended or all."""
        return [run_row(row) for row in await self._rows(_RUNS, owner, under_way, most)]

    async def wish(self, run: str, wish: Wish, by: str) -> RunRow:
        """Says what somebody wants of a run.

        Raises:
            StudyError: there is no such run, or it has ended.
        """
        facts = {"run": run, "wish": wish, "facts": json({"wish": wish, "by": by})}

        async def work(connection: Connection) -> RunRow | None:
            row = await (await connection.execute(_WISH, facts)).fetchone()
            return None if row is None else run_row(row)

        wished = await self._database.do(work)
        if wished is None:
            there = await self.run(run)
            raise StudyError(f"there is no run '{run}'" if there is None else f"run '{run}' has ended: {there.status}")
        return wished

    async def events(self, run: str, after: int = 0, most: int = 1000) -> Sequence[RunEvent]:
        """Returns a run's events after a number, in order; none appears later below one that was seen."""
        rows = await self._rows(_EVENTS, run, after, most)
        return [RunEvent(kind=kind, facts=facts, seq=seq, at=at) for kind, facts, seq, at in rows]

    async def applied(self, run: str) -> Sequence[Applied]:
        """Returns the rounds that were applied, in order."""
        rows = await self._rows(_APPLIED, run)
        return [Applied(number=number, survivors=tuple(names), facts=facts) for number, names, facts in rows]

    async def document(self, study: str) -> bytes | None:
        """Returns a study's canonical bytes."""
        row = await self._first(_DOCUMENT, study)
        return None if row is None else bytes(row[0])

    async def outcome(self, run: str) -> bytes | None:
        """Returns what a finished run left."""
        row = await self._first(_OUTCOME, run)
        return None if row is None else bytes(row[0])

    async def coordinators(self) -> Sequence[tuple[str, str, datetime]]:
        """Returns each coordinator's name, address and last sign of life."""
        return [(name, address, seen) for name, address, seen in await self._rows(_COORDINATORS)]

    async def site_states(self, run: str) -> Sequence[SiteState]:
        """Returns how a run's sites stand, by name."""
        rows = await self._rows(_STATES, run)
        return [SiteState(site=site, state=state, round=number, at=at) for site, state, number, at in rows]

    async def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        async def work(connection: Connection) -> list[tuple[Any, ...]]:
            return await _all(connection, query, *values)

        return await self._database.do(work)

    async def _first(self, query: str, *values: object) -> tuple[Any, ...] | None:
        rows = await self._rows(query, *values)
        return rows[0] if rows else None


async def _all(connection: Connection, query: str, *values: object) -> list[tuple[Any, ...]]:
    return await (await connection.execute(query, values, binary=True)).fetchall()


async def _one(connection: Connection, query: str, *values: object) -> tuple[Any, ...] | None:
    return await (await connection.execute(query, values, binary=True)).fetchone()
