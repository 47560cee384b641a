"""A store, a bus and sites in memory, to lead runs without sockets or databases. The store can fail in two ways."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from cohortium.coordinator.exchange import Exchange
from cohortium.coordinator.ports import (
    ENDED,
    Applied,
    Checkpoint,
    Claim,
    RunEvent,
    RunRow,
    SiteRow,
    SiteState,
    Status,
    Superseded,
    Terms,
    Unavailable,
    Wish,
)
from cohortium.core.errors import StudyError
from cohortium.core.messages import decode_to_site
from cohortium.site.agent import Agent

Fault = Literal["before", "after"]
"""Whether a write fails before it is done, or after: the caller cannot tell."""


@dataclass
class MemoryStore:
    """Runs and Desk in memory, shared by any number of coordinators."""

    members: list[SiteRow]
    clock: Any
    rows: dict[str, RunRow] = field(default_factory=dict)
    documents: dict[str, bytes] = field(default_factory=dict)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    log: dict[str, list[RunEvent]] = field(default_factory=lambda: defaultdict(list))
    rounds: dict[str, list[Applied]] = field(default_factory=lambda: defaultdict(list))
    outcomes: dict[str, bytes] = field(default_factory=dict)
    asked: dict[str, Sequence[str]] = field(default_factory=dict)
    beats: dict[str, tuple[str, float]] = field(default_factory=dict)
    faults: list[Fault | None] = field(default_factory=list)
    saves: int = 0
    _listeners: list[asyncio.Queue[str]] = field(default_factory=list)

    def tell(self, channel: str) -> None:
        for queue in self._listeners:
            queue.put_nowait(channel)

    async def news(self) -> AsyncIterator[str]:
        queue: asyncio.Queue[str] = asyncio.Queue()
        self._listeners.append(queue)
        while True:
            yield await queue.get()

    async def beat(self, me: str, address: str) -> None:
        self.beats[me] = address, self.clock()

    async def peers(self, stale: float) -> Sequence[str]:
        return [name for name, (_, seen) in self.beats.items() if self.clock() - seen <= stale]

    async def claim(self, me: str, stale: float, most: int, share: int = 1_000_000) -> list[Claim]:
        living = {me, *await self.peers(stale)}
        free = [
            row
            for row in self.rows.values()
            if row.status not in ENDED and (not row.leader or row.leader not in living)
        ]
        claims = []
        for row in sorted(free, key=lambda row: (-row.terms.priority, row.submitted))[:most]:
            self.rows[row.run] = mine = replace(row, leader=me, epoch=row.epoch + 1)
            claims.append(Claim(mine, self.documents[row.study], self.checkpoints.get(row.run)))
        return claims

    def _guarded(self, claim: Claim) -> RunRow:
        row = self.rows[claim.row.run]
        if row.epoch != claim.row.epoch or row.leader != claim.row.leader:
            raise Superseded("another coordinator leads this run")
        return row

    def _fault(self, when: Fault) -> None:
        if self.faults and self.faults[0] == when:
            self.faults.pop(0)
            raise Unavailable(f"the store failed {when} the write")

    async def save(
        self, claim: Claim, checkpoint: Checkpoint, applied: Applied | None = None, events: Sequence[RunEvent] = ()
    ) -> None:
        self.saves += 1
        await asyncio.sleep(0)
        self._fault("before")
        row = self._guarded(claim)
        older = self.checkpoints.get(row.run)
        kept = {name: older.parts[name] for name in checkpoint.keep} if older else {}
        self.checkpoints[row.run] = replace(checkpoint, parts={**checkpoint.parts, **kept}, keep=())
        self._applied(row.run, applied)
        self.rows[row.run] = replace(row, round=checkpoint.round)
        self._events(row.run, events)
        self._fault("after")
        if self.faults and self.faults[0] is None:
            self.faults.pop(0)

    def _applied(self, run: str, applied: Applied | None) -> None:
        if applied is not None:
            assert applied.number not in [one.number for one in self.rounds[run]], "a round was applied twice"
            self.rounds[run].append(applied)

    def _events(self, run: str, events: Sequence[RunEvent]) -> None:
        for event in events:
            self.log[run].append(replace(event, seq=len(self.log[run]) + 1, at=datetime.now(UTC)))
        self.tell(f"run:{run}")

    async def end(
        self,
        claim: Claim,
        status: Status,
        reason: str | None,
        outcome: bytes | None,
        applied: Applied | None = None,
        events: Sequence[RunEvent] = (),
    ) -> None:
        self._fault("before")
        row = self._guarded(claim)
        self._applied(row.run, applied)
        self.rows[row.run] = replace(row, status=status, reason=reason, leader=None, ended=datetime.now(UTC))
        if outcome is not None:
            self.outcomes[row.run] = outcome
        self.checkpoints.pop(row.run, None)
        self._events(row.run, events)
        self._fault("after")

    async def mark(self, claim: Claim, status: Status, events: Sequence[RunEvent] = ()) -> None:
        row = self._guarded(claim)
        self.rows[row.run] = replace(row, status=status, started=row.started or datetime.now(UTC))
        self._events(row.run, events)

    async def release(self, claim: Claim) -> None:
        self.rows[claim.row.run] = replace(self._guarded(claim), leader=None)
        self.tell("runs")

    async def wishes(self, runs: Sequence[str]) -> Mapping[str, Wish]:
        return {run: self.rows[run].wish for run in runs}

    async def sites(self) -> Sequence[SiteRow]:
        return list(self.members)

    async def submit(
        self, run: str, study: str, document: bytes, owner: str, sites: Sequence[str], terms: Terms, seed: int | None
    ) -> RunRow:
        self.documents[study], self.asked[run] = document, sites
        self.rows[run] = row = RunRow(
            run=run,
            study=study,
            owner=owner,
            terms=terms,
            seed=seed,
            status="queued",
            wish="run",
            leader=None,
            epoch=0,
            round=0,
            reason=None,
            submitted=datetime.now(UTC),
            started=None,
            ended=None,
        )
        self.tell("runs")
        return row

    async def run(self, run: str) -> RunRow | None:
        return self.rows.get(run)

    async def runs(self, most: int = 100, owner: str | None = None, *, under_way: bool = False) -> Sequence[RunRow]:
        rows = [row for row in self.rows.values() if owner in (None, row.owner) and not (under_way and row.ended)]
        return rows[::-1][:most]

    async def wish(self, run: str, wish: Wish, by: str) -> RunRow:
        if run not in self.rows or self.rows[run].status in ENDED:
            raise StudyError(f"there is no run '{run}' under way")
        self.rows[run] = replace(self.rows[run], wish=wish)
        self.tell("runs")
        return self.rows[run]

    async def events(self, run: str, after: int = 0, most: int = 1000) -> Sequence[RunEvent]:
        return [event for event in self.log[run] if event.seq > after][:most]

    async def applied(self, run: str) -> Sequence[Applied]:
        return self.rounds[run]

    async def document(self, study: str) -> bytes | None:
        return self.documents.get(study)

    async def outcome(self, run: str) -> bytes | None:
        return self.outcomes.get(run)

    async def coordinators(self) -> Sequence[tuple[str, str, datetime]]:
        return [(name, address, datetime.now(UTC)) for name, (address, _) in self.beats.items()]

    async def site_states(self, run: str) -> Sequence[SiteState]:
        last = {site: one.number for one in self.rounds[run] for site in one.survivors}
        return [
            SiteState(
                site=site,
                state="contributed" if site in last else "waiting",
                round=last.get(site, 0),
                at=datetime.now(UTC),
            )
            for site in sorted(self.asked[run])
        ]


@dataclass
class MemoryBus:
    """A bus in memory that coordinators share."""

    values: dict[str, bytes] = field(default_factory=dict)
    boxes: dict[str, list[asyncio.Queue[bytes]]] = field(default_factory=lambda: defaultdict(list))
    away: bool = False

    def _here(self) -> None:
        if self.away:
            raise Unavailable("the bus is away")

    async def put(self, box: str, data: bytes) -> None:
        self._here()
        for queue in self.boxes[box]:
            queue.put_nowait(data)

    async def take(self, box: str) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        self.boxes[box].append(queue)
        while True:
            yield await queue.get()

    async def keep(self, key: str, value: bytes, seconds: float) -> None:
        self._here()
        self.values[key] = value

    async def look(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        self._here()
        return {key: self.values[key] for key in keys if key in self.values}

    async def forget(self, key: str) -> None:
        self._here()
        self.values.pop(key, None)

    async def allow(self, key: str, per_second: float, burst: int) -> bool:
        self._here()
        return True


class MemorySite:
    """A site whose agent answers in this process, and gives the same answer to the same request again."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self.name = agent, agent.membership.site
        self.answers: dict[tuple[Any, ...], list[bytes]] = {}
        self.exchange: Exchange | None = None
        self.deaf = False
        self.heard: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def attach(self, exchange: Exchange) -> None:
        self.exchange = exchange
        await exchange.attach(self.name, self)

    def send(self, run: str, data: bytes, answer_limit: int) -> None:
        task = asyncio.get_running_loop().create_task(self._receive(run, data))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _receive(self, run: str, data: bytes) -> None:
        message = decode_to_site(data)
        self.heard.append(type(message).__name__)
        if self.deaf:
            return
        key = (run, type(message).__name__, getattr(message, "round", 0))
        if key not in self.answers:
            self.answers[key] = self.agent.receive(data)
        for answer in self.answers[key]:
            if self.exchange is not None:
                await self.exchange.heard(self.name, run, answer)

    def close(self, reason: str) -> None:
        self.exchange = None
