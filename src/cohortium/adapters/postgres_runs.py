"""Runs in PostgreSQL, as the service leads them (`cohortium.coordinator.ports.Runs`).

A write is one statement where it can be: it changes the run's row only if this leader's epoch still stands, and
everything else hangs on that change, so it is all there or not at all, and takes one round trip. Large parts are copied
in first, under a number drawn for them, in the same transaction; nobody sees them before it ends.

The same write again, after a lost answer, writes nothing and succeeds: the run's row keeps the last write's digest.
"""

import asyncio
import hashlib
import secrets  # noqa: TID251
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import psycopg
from psycopg import errors

from cohortium.adapters.postgres import CHANNEL, Connection, Database, Work
from cohortium.adapters.postgres_rows import RUN, SITE, run_row, site_row, text, tidings
from cohortium.coordinator.ports import (
    Applied,
    Checkpoint,
    Claim,
    RunEvent,
    RunRow,
    SiteRow,
    Status,
    Superseded,
    Unavailable,
    Wish,
)
from cohortium.core.errors import ProtocolError

PIECE = 4 << 20
"""Bytes of a part in one row: measured, 1 to 32 MiB are alike, and less memory is needed for smaller ones."""
_LARGE_SECONDS = 120.0
_LISTEN_SECONDS = 15.0

_ENTER = """
INSERT INTO coordinators (name, address) VALUES (%(me)s, %(address)s)
ON CONFLICT (name) DO UPDATE SET address = excluded.address, started = excluded.started, seen = excluded.seen
"""
# a former process of this name leads nothing any more
_LEFT = "UPDATE runs SET leader = NULL WHERE leader = %(me)s AND ended IS NULL"
_OLD = """
DELETE FROM coordinators WHERE seen < clock_timestamp() - interval '1 day'
AND NOT EXISTS (SELECT FROM runs WHERE leader = coordinators.name)
"""
_BEAT = """
INSERT INTO coordinators (name, address) VALUES (%(me)s, %(address)s)
ON CONFLICT (name) DO UPDATE SET address = excluded.address, seen = clock_timestamp()
"""

# Whoever was seen since, or could not be because the database was away; a sign of life from the future, written before
# the clock was set back, is none. Runs under way come before queued ones; of these, an owner's k-th counts as if the
# k-1 before it were under way. The last WHERE is checked again under the lock. Those that others lock at this moment
# are passed over; some more than wanted are looked at for that.
_CLAIM = """
WITH live AS (
    SELECT name FROM coordinators
    WHERE abs(extract(epoch FROM clock_timestamp() - seen)) <= %(stale)s
        OR abs(extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())) <= %(stale)s
    UNION SELECT %(me)s
), busy AS (
    SELECT owner, count(*) AS runs FROM runs
    WHERE ended IS NULL AND (status <> 'queued' OR leader IN (SELECT name FROM live)) GROUP BY owner
), wanting AS (
    SELECT run, owner, priority, submitted, status <> 'queued' AS begun FROM runs
    WHERE ended IS NULL AND (leader IS NULL OR leader NOT IN (SELECT name FROM live)
        OR leader = %(me)s AND run <> ALL(%(held)s::text[]))
), turns AS (
    SELECT run, begun, priority, submitted, coalesce(busy.runs, 0)
        + row_number() OVER (PARTITION BY owner, begun ORDER BY priority DESC, submitted, run) AS turn
    FROM wanting LEFT JOIN busy USING (owner)
), next AS (
    SELECT array_agg(run) AS runs FROM (
        SELECT run FROM turns
        WHERE begun OR turn <= %(share)s::bigint * (SELECT count(*) FROM live)
        ORDER BY begun DESC, priority DESC, CASE WHEN begun THEN 0 ELSE turn END, submitted, run
        LIMIT %(most)s::integer + 64
    ) AS turns
), taken AS (
    SELECT runs.run, row_number() OVER () AS place FROM (
        SELECT runs.run FROM runs
        WHERE runs.run = ANY((SELECT runs FROM next)::text[]) AND runs.ended IS NULL
            AND (runs.leader IS NULL OR runs.leader NOT IN (SELECT name FROM live)
            OR runs.leader = %(me)s AND runs.run <> ALL(%(held)s::text[]))
        ORDER BY array_position((SELECT runs FROM next), runs.run)
        LIMIT %(most)s FOR NO KEY UPDATE OF runs SKIP LOCKED
    ) AS runs
), led AS (
    UPDATE runs SET leader = %(me)s, epoch = epoch + 1, latest = NULL FROM taken WHERE runs.run = taken.run
    RETURNING taken.place, runs.*
)
SELECT {run}, (SELECT document FROM studies WHERE studies.study = led.study),
    (SELECT state FROM checkpoints WHERE checkpoints.run = led.run)
FROM led ORDER BY place
""".replace("{run}", RUN)
_ALIVE = """
INSERT INTO coordinators (name, address) VALUES (%(me)s, '')
ON CONFLICT (name) DO UPDATE SET seen = clock_timestamp()
"""
_PARTS = "SELECT run, name, data FROM parts WHERE run = ANY(%s) ORDER BY run, part, piece"

_MINE = """
WITH mine AS (
    UPDATE runs SET {change}, latest = %(latest)b, events = events + cardinality(%(kinds)s::text[])
    WHERE run = %(run)s AND epoch = %(epoch)s AND leader = %(me)s AND ended IS NULL
        AND latest IS DISTINCT FROM %(latest)b
    RETURNING run, events - cardinality(%(kinds)s::text[]) AS before
), told AS (
    INSERT INTO events (run, seq, kind, facts, at)
    SELECT run, before + place, kind, facts, coalesce(at, clock_timestamp())
    FROM mine, unnest(%(kinds)s::text[], %(facts)s::jsonb[], %(ats)s::timestamptz[])
        WITH ORDINALITY AS event (kind, facts, at, place)
), applied AS (
    INSERT INTO rounds (run, number, epoch, survivors, facts)
    SELECT run, %(number)s, %(epoch)s, %(survivors)s::text[], %(round_facts)s::jsonb
    FROM mine WHERE %(number)s::integer IS NOT NULL
), contributed AS (
    INSERT INTO contributions (run, round, site)
    SELECT run, %(number)s, site FROM mine, unnest(%(survivors)s::text[]) AS site
), standing AS (
    UPDATE run_sites SET state = news.state,
        round = CASE WHEN news.site = ANY(%(survivors)s::text[]) THEN %(number)s ELSE run_sites.round END,
        at = clock_timestamp()
    FROM mine, unnest(%(told)s::text[], %(states)s::text[]) AS news (site, state)
    WHERE run_sites.run = mine.run AND run_sites.site = news.site
){more}
SELECT count(pg_notify(channel, name)) FROM mine, (VALUES {news}) AS told (channel, name)
"""
_ITS_NEWS = f"('{CHANNEL}', 'run:' || %(run)s)"
_ALL_NEWS = f"('{CHANNEL}', 'runs'), {_ITS_NEWS}"
_SAVE = _MINE.format(
    change="round = %(round)s",
    news=_ITS_NEWS,
    more=""", kept AS (
    INSERT INTO checkpoints (run, round, state) SELECT run, %(round)s, %(state)b FROM mine
    ON CONFLICT (run) DO UPDATE SET round = excluded.round, state = excluded.state, saved = excluded.saved
), gone AS (
    DELETE FROM parts USING mine
    WHERE parts.run = mine.run AND parts.part <> ALL(%(parts)s::bigint[]) AND parts.name <> ALL(%(keep)s::text[])
)""",
)
_END = _MINE.format(
    change="status = %(status)s, reason = %(reason)s, ended = clock_timestamp(), leader = NULL, "
    "started = coalesce(started, clock_timestamp()), round = coalesce(%(number)s, round)",
    news=_ALL_NEWS,
    more=""", left_behind AS (
    INSERT INTO outcomes (run, data) SELECT run, %(outcome)b FROM mine WHERE %(outcome)b::bytea IS NOT NULL
), forgotten AS (
    DELETE FROM checkpoints USING mine WHERE checkpoints.run = mine.run
), gone AS (
    DELETE FROM parts USING mine WHERE parts.run = mine.run
)""",
)
_MARK = _MINE.format(
    change="status = %(status)s, started = coalesce(started, clock_timestamp())", news=_ALL_NEWS, more=""
)
_WRITTEN = "SELECT 1 FROM runs WHERE run = %(run)s AND epoch = %(epoch)s AND latest = %(latest)b"
_RELEASE = f"""
WITH mine AS (
    UPDATE runs SET leader = NULL WHERE run = %(run)s AND epoch = %(epoch)s AND leader = %(me)s RETURNING run
) SELECT pg_notify('{CHANNEL}', 'runs') FROM mine
"""
_PEERS = "SELECT name FROM coordinators WHERE abs(extract(epoch FROM clock_timestamp() - seen)) < %(stale)s"
_WISHES = "SELECT run, wish FROM runs WHERE run = ANY(%s)"
_SITES = f"SELECT {SITE} FROM sites ORDER BY name"


class PostgresRuns:
    """Use one for each coordinator: the first `beat` of another one under the same name ends this one's leads."""

    def __init__(self, database: Database, heart: Database) -> None:
        """Takes the database twice: `heart` is for beats alone, so that no load keeps them waiting."""
        self._database, self._heart = database, heart
        self._entered: set[str] = set()
        self._held: dict[str, int] = {}

    async def beat(self, me: str, address: str) -> None:
        """Says that this coordinator lives."""
        facts = {"me": me, "address": address}

        async def work(connection: Connection) -> None:
            if me in self._entered:
                await connection.execute(_BEAT, facts)
                return
            async with connection.transaction():
                for query in (_ENTER, _LEFT, _OLD):
                    await connection.execute(query, facts)

        await self._heart.do(work)
        self._entered.add(me)

    async def peers(self, stale: float) -> Sequence[str]:
        """Returns the coordinators that gave a sign of life within `stale` seconds, by the database's clock."""

        async def work(connection: Connection) -> list[str]:
            return [row[0] for row in await (await connection.execute(_PEERS, {"stale": stale})).fetchall()]

        return await self._heart.do(work)

    async def claim(self, me: str, stale: float, most: int, share: int = 1_000_000) -> list[Claim]:
        """Takes the lead of runs that want one. Two that claim at once may each count the owners as they were."""
        # what an earlier call took, whose answer was lost, is led by nobody, and is taken again
        facts = {"me": me, "stale": stale, "most": most, "share": share, "held": list(self._held)}

        async def work(connection: Connection) -> list[Claim]:
            async with connection.transaction():
                rows = await (await connection.execute(_CLAIM, facts, binary=True)).fetchall() if most > 0 else []
                if not rows:
                    return []
                await connection.execute(_ALIVE, facts)
                parts = await _read_parts(connection, [row[0] for row in rows])
            return [_claim(run_row(row), row[-2], row[-1], parts.get(row[0], {})) for row in rows]

        claims = await self._database.do(work, _LARGE_SECONDS)
        self._held.update((claim.row.run, claim.row.epoch) for claim in claims)
        return claims

    async def save(
        self,
        claim: Claim,
        checkpoint: Checkpoint,
        applied: Applied | None = None,
        events: Sequence[RunEvent] = (),
    ) -> None:
        """Writes a checkpoint, the round applied with it and events.

        Raises:
            Superseded: the claim's epoch has passed.
            ProtocolError: the round was applied before, with something else.
        """
        parts = {secrets.randbits(62): name for name in checkpoint.parts}
        facts = _guard(claim) | tidings(applied, events)
        facts |= {"round": checkpoint.round, "state": checkpoint.state, "parts": list(parts)}
        facts["keep"] = [name for name in checkpoint.keep if name not in checkpoint.parts]
        sizes = sorted((name, len(data)) for name, data in checkpoint.parts.items())
        what = (checkpoint.round, checkpoint.state, sizes, checkpoint.keep, applied, events)
        facts["latest"] = _digest("save", claim, *what)
        if not parts:
            await self._write(claim, _SAVE, facts)
            return

        async def work(connection: Connection) -> bool:
            stands = False
            async with connection.transaction() as transaction:
                await _copy_parts(connection, claim.row.run, parts, checkpoint.parts)
                stands = await _counted(connection, _SAVE, facts)
                if not stands:
                    raise psycopg.Rollback(transaction)
            return stands

        await self._write(claim, work, facts)

    async def end(
        self,
        claim: Claim,
        status: Status,
        reason: str | None,
        outcome: bytes | None,
        applied: Applied | None = None,
        events: Sequence[RunEvent] = (),
    ) -> None:
        """Ends a run.

        Raises:
            Superseded: the claim's epoch has passed.
            ProtocolError: the round was applied before, with something else.
        """
        facts = _guard(claim) | tidings(applied, events)
        facts |= {"status": status, "reason": text(reason), "outcome": outcome}
        facts["latest"] = _digest("end", claim, status, reason, len(outcome or b""), applied, events)
        await self._write(claim, _END, facts)
        self._let_go(claim)

    async def mark(self, claim: Claim, status: Status, events: Sequence[RunEvent] = ()) -> None:
        """Records that a run is running or paused.

        Raises:
            Superseded: the claim's epoch has passed.
        """
        facts = _guard(claim) | tidings(None, events) | {"status": status}
        facts["latest"] = _digest("mark", claim, status, events)
        await self._write(claim, _MARK, facts)

    async def release(self, claim: Claim) -> None:
        """Gives a run back; nothing happens if another coordinator leads it."""
        self._let_go(claim)

        async def work(connection: Connection) -> None:
            await connection.execute(_RELEASE, _guard(claim))

        await self._database.do(work)

    async def wishes(self, runs: Sequence[str]) -> Mapping[str, Wish]:
        """Returns what people want of these runs."""

        async def work(connection: Connection) -> dict[str, Wish]:
            return dict(await (await connection.execute(_WISHES, (list(runs),))).fetchall())

        return await self._database.do(work)

    async def sites(self) -> Sequence[SiteRow]:
        """Returns the sites of the consortium, revoked ones too."""

        async def work(connection: Connection) -> list[SiteRow]:
            return [site_row(row) for row in await (await connection.execute(_SITES)).fetchall()]

        return await self._database.do(work)

    async def news(self) -> AsyncGenerator[str, None]:
        """Yields channels where something changed, for ever; 'runs' and 'sites' whenever it had to listen anew."""
        pause = 0.05
        while True:
            try:
                async with await self._database.connect() as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    pause = 0.05
                    for channel in ("runs", "sites"):
                        yield channel
                    while True:
                        async for notice in connection.notifies(timeout=_LISTEN_SECONDS):
                            yield notice.payload
                        # a connection that only listens learns of its end by speaking
                        await asyncio.wait_for(connection.execute("SELECT 1"), 10)
            except (Unavailable, psycopg.Error, OSError, TimeoutError):
                await asyncio.sleep(pause)
                pause = min(2 * pause, 1.0)

    def _let_go(self, claim: Claim) -> None:
        if self._held.get(claim.row.run) == claim.row.epoch:
            del self._held[claim.row.run]

    async def _write(self, claim: Claim, how: str | Work[bool], facts: dict[str, Any]) -> None:
        async def one(connection: Connection) -> bool:
            return await _counted(connection, str(how), facts)

        async def again(connection: Connection) -> bool:
            return await (await connection.execute(_WRITTEN, facts)).fetchone() is not None

        try:
            stands = await (self._database.do(one) if isinstance(how, str) else self._database.do(how, _LARGE_SECONDS))
        except errors.UniqueViolation:
            raise ProtocolError(
                f"round {facts['number']} of run '{claim.row.run}' was applied before; nothing was written"
            ) from None
        if not stands and not await self._database.do(again):
            self._let_go(claim)
            raise Superseded(f"another coordinator leads run '{claim.row.run}' by now; nothing was written")


def _guard(claim: Claim) -> dict[str, Any]:
    return {"run": claim.row.run, "epoch": claim.row.epoch, "me": claim.row.leader}


def _digest(*what: object) -> bytes:
    values = (value.row.epoch if isinstance(value, Claim) else value for value in what)
    return hashlib.sha256(msgspec.json.encode(list(values), order="deterministic")).digest()


async def _counted(connection: Connection, query: str, facts: Mapping[str, Any]) -> bool:
    row = await (await connection.execute(query, facts)).fetchone()
    return row is not None and row[0] > 0


async def _copy_parts(connection: Connection, run: str, names: Mapping[int, str], parts: Mapping[str, bytes]) -> None:
    async with connection.cursor().copy("COPY parts (run, part, piece, name, data) FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(["text", "int8", "int4", "text", "bytea"])
        for part, name in names.items():
            data = memoryview(parts[name])
            for piece, start in enumerate(range(0, max(len(data), 1), PIECE)):
                await copy.write_row((run, part, piece, name, data[start : start + PIECE]))


async def _read_parts(connection: Connection, runs: list[str]) -> dict[str, dict[str, bytes]]:
    pieces: dict[str, dict[str, list[bytes]]] = {}
    for run, name, data in await (await connection.execute(_PARTS, (runs,), binary=True)).fetchall():
        pieces.setdefault(run, {}).setdefault(name, []).append(data)
    return {run: {name: _joined(data) for name, data in parts.items()} for run, parts in pieces.items()}


def _joined(pieces: Iterable[bytes]) -> bytes:
    return b"".join(pieces)


def _claim(row: RunRow, document: bytes, state: bytes | None, parts: Mapping[str, bytes]) -> Claim:
    checkpoint = None if state is None else Checkpoint(round=row.round, state=bytes(state), parts=parts)
    return Claim(row, bytes(document), checkpoint)
