"""One run that this process leads, from its claim to its end: it performs what the pure lead asks for, in that order.

There is one way back from any trouble with the store: the run is given back here and claimed anew, from the checkpoint
that truly is there. The same happens when another process takes it over.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.coordinator import lead
from cohortium.coordinator.exchange import Exchange, Heard, Joined
from cohortium.coordinator.inbox import LARGE, Inbox, Item, Revoked, Stored, Wished
from cohortium.coordinator.lead import End, Lead, Leader, Order, Save, Tell
from cohortium.coordinator.ports import ENDED, Applied, Claim, RunEvent, Runs, SiteRow, Status, Superseded, Unavailable
from cohortium.core.codec import Data
from cohortium.core.errors import CohortiumError, ProtocolError
from cohortium.plan import Plan
from cohortium.secagg.group import Group
from cohortium.secagg.stream import PLAIN, Means

log = logging.getLogger("cohortium.coordinator")
Observer = Callable[[str, RunEvent], None]
"""Is told of what happens to runs: the run's name, and the event."""

_BESIDE = 1 << 20
"""Bytes of a checkpoint's parts from which it is written beside the next round, where it may wait."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the runs of one coordinator share.

    Attributes:
        me: the coordinator's name.
        runs: the store.
        exchange: brings messages.
        identity: the consortium's signing key, whose public half the sites pinned.
        sites: returns the consortium's sites as they were seen last, revoked ones too.
        plan: turns a study's canonical bytes into its plan.
        clock: monotonic seconds.
        pause: seconds between two tries to reach the store.
        means: how this machine removes masks.
        observe: is told of every event of a run.
    """

    me: str
    runs: Runs
    exchange: Exchange
    identity: Ed25519PrivateKey
    sites: Callable[[], Mapping[str, SiteRow]]
    plan: Callable[[bytes], Plan]
    clock: Callable[[], float]
    pause: float
    means: Means = PLAIN
    observe: Observer = lambda run, event: None


class Leading:
    """A run that is led here.

    Attributes:
        inbox: takes what its sites, and people, want it to know.
        lead: where it stands, once it was begun or resumed.
        paused: whether somebody asked it to wait.
    """

    def __init__(self, shared: Shared, claim: Claim) -> None:
        self.inbox, self.paused = Inbox(), False
        self.lead: Lead | None = None
        self._shared, self._claim, self._run = shared, claim, claim.row.run
        self._writing: asyncio.Task[None] | None = None
        # once its time is due, how many of the items that had come by then are still to be looked at
        self._grace: int | None = None

    async def through(self) -> None:
        """Leads the run until it ends, or until it is another's to lead."""
        run, exchange = self._run, self._shared.exchange
        try:
            await exchange.lead(run, self.inbox.put_nowait)
            await self._led()
        except Superseded:
            log.info("another coordinator leads the run by now", extra={"run": run})
        except Unavailable as error:
            log.warning("a run is put aside until the store is back", extra={"run": run, "reason": str(error)})
            # a store that answers and cannot write, as with a full disk, would have it claimed again at once
            await asyncio.sleep(self._shared.pause)
            await self._given_back()
        except Exception as error:
            log.error("a run failed in a way that nobody foresaw", extra={"run": run}, exc_info=error)
            await self._broken(error)
        except asyncio.CancelledError:
            with suppress(Exception):
                await asyncio.wait_for(self._shared.runs.release(self._claim), 2.0)
            raise
        finally:
            if self._writing is not None:
                self._writing.cancel()
            exchange.leave(run, self.inbox.put_nowait)

    async def _given_back(self) -> None:
        while True:
            try:
                await self._shared.runs.release(self._claim)
                return
            except Superseded:
                return
            except Unavailable:
                await asyncio.sleep(self._shared.pause)

    async def _broken(self, error: Exception) -> None:
        told = str(error) if isinstance(error, CohortiumError) else type(error).__name__
        reason = f"the coordinator failed ({told}), and its log says where; nothing more was opened. Submit it again"
        closing = lead.cancelled(self.lead, reason)[1:] if self.lead else []
        try:
            await self._perform([_ended("failed", reason), *closing])
        except Superseded:
            pass
        except Exception:  # noqa: BLE001  as above
            await self._given_back()

    async def _led(self) -> None:
        orders = await self._begun()
        while self.lead is not None:
            if self.paused:
                orders = await self._paused()
            await self._perform(orders)
            orders = [] if self.lead.over else await self._next()
            if self.lead.over and not orders:
                return

    async def _begun(self) -> list[Order]:
        shared, claim, row = self._shared, self._claim, self._claim.row
        if row.wish == "cancel":
            await self._end(_ended("cancelled", row.reason or "cancelled before it began"))
            return []
        try:
            # on a thread: a coordinator that stops for seconds looks dead to the others
            plan = await asyncio.to_thread(self._prepared, claim.document)
            leader = Leader(shared.identity, await self._pinned(plan), shared.means)
            if claim.checkpoint is None:
                self.lead, orders = lead.begin(plan, row.run, leader, row.terms, row.seed, shared.clock())
            else:
                self.lead, orders = await asyncio.to_thread(
                    lead.resume, plan, claim.checkpoint, leader, row.terms, shared.clock()
                )
        except Unavailable:
            raise
        except CohortiumError as error:
            await self._end(_ended("failed", str(error)))
            return []
        assert self.lead is not None
        kind = "began" if row.started is None else "taken over"
        self.paused = row.wish == "pause"
        await self._mark(kind, coordinator=shared.me, round=self.lead.state.number)
        return orders

    def _prepared(self, document: bytes) -> Plan:
        """Returns a study's plan, with what its sums are made of loaded: that of encryption takes seconds."""
        plan = self._shared.plan(document)
        plan.scheme(Group(plan.sites, plan.threshold), plan.phases[0].layout, self._shared.means)
        return plan

    async def _pinned(self, plan: Plan) -> dict[str, bytes]:
        rows = self._shared.sites()
        if not set(plan.sites) <= rows.keys():
            # the service keeps its own, or it would not see what is new in these
            rows = {row.name: row for row in await self._shared.runs.sites()}
        for site in plan.sites:
            if site in rows and rows[site].revoked and self._claim.row.started is not None:
                # a run that is under way goes on without it
                self.inbox.put_nowait(Revoked(site))
            elif site not in rows or rows[site].revoked:
                what = "was revoked" if site in rows else "is not enrolled"
                raise ProtocolError(f"site '{site}' {what} in this consortium: invite it, or leave it out of the study")
        return {site: rows[site].identity for site in plan.sites}

    async def _mark(self, kind: str, **facts: Any) -> None:
        event = RunEvent(kind=kind, facts=facts)
        await self._shared.runs.mark(self._claim, "paused" if self.paused else "running", [event])
        self._shared.observe(self._run, event)

    async def _paused(self) -> list[Order]:
        """Waits until the run shall go on or end."""
        assert self.lead is not None
        while True:
            item = await self.inbox.get()
            if isinstance(item, Wished) and item.wish == "run":
                self.paused = False
                await self._mark("resumed")
                self.lead, orders = lead.again(self.lead, self._shared.clock())
                return orders
            if isinstance(item, Wished) and item.wish == "cancel":
                return self._cancelled(self.lead)
            if isinstance(item, Revoked):
                self.lead, orders = lead.revoked(self.lead, item.site, self._shared.clock())
                if orders and self.lead.over:
                    return orders
                # what follows is said when the run goes on; what it rests on is kept now
                await self._perform([order for order in orders if isinstance(order, Save)])

    def _cancelled(self, stood: Lead) -> list[Order]:
        self.paused = False
        self.lead = lead.closed(stood)
        return lead.cancelled(stood, "cancelled on request")

    async def _next(self) -> list[Order]:
        """Returns what follows from the next event, or from the time that has passed."""
        assert self.lead is not None
        wait = lead.due(self.lead) - self._shared.clock()
        if wait > 0:
            self._grace = None
        elif self._grace is None:
            self._grace = self.inbox.qsize()
        elif self._grace:
            self._grace -= 1
        if self._grace == 0:
            # what came by then was looked at; whoever sends without end does not hold up the time
            self._grace = None
            await asyncio.sleep(0)
            return self._ticked(self.lead)
        try:
            item = self.inbox.get_nowait()
        except asyncio.QueueEmpty:
            try:
                async with asyncio.timeout(max(0.0, wait)):
                    item = await self.inbox.get()
            except TimeoutError:
                return self._ticked(self.lead)
        return await self._after(self.lead, item)

    def _ticked(self, stood: Lead) -> list[Order]:
        self.lead, orders = lead.ticked(stood, self._shared.clock())
        return orders

    async def _after(self, stood: Lead, item: Item) -> list[Order]:
        orders: list[Order] = []
        match item:
            case Heard(site, data):
                orders = await self._heard(stood, site, data)
            case Joined(site):
                self.lead, orders = lead.joined(stood, site, self._shared.clock())
            case Revoked(site):
                self.lead, orders = lead.revoked(stood, site, self._shared.clock())
            case Wished("cancel"):
                orders = self._cancelled(stood)
            case Wished("pause"):
                self.paused = True
                await self._mark("paused")
            case Stored():
                await self._written()
            case Wished():
                pass
        return orders

    async def _heard(self, stood: Lead, site: str, data: Data) -> list[Order]:
        try:
            if max(len(data), stood.limit) > LARGE:
                after, orders = await asyncio.to_thread(lead.heard, stood, site, data, self._shared.clock())
            else:
                after, orders = lead.heard(stood, site, data, self._shared.clock())
        except ProtocolError as error:
            facts = {"run": self._run, "site": site, "reason": str(error)}
            log.info("a site's message was refused", extra=facts)
            return []
        self.lead = after
        if site in after.state.gone:
            await self._mark("refused", site=site, reason=after.state.gone[site])
        return orders

    async def _perform(self, orders: list[Order]) -> None:
        for order in orders:
            match order:
                case Tell(site, messages, limit):
                    for message in messages:
                        await self._shared.exchange.tell(site, self._run, message, limit)
                case Save():
                    await self._written()
                    if order.may_wait and sum(map(len, order.checkpoint.parts.values())) > _BESIDE:
                        self._writing = asyncio.create_task(self._save(order))
                        self._writing.add_done_callback(lambda _: self.inbox.put_nowait(Stored()))
                    else:
                        await self._save(order)
                case End():
                    await self._written()
                    await self._end(order)

    async def _save(self, save: Save) -> None:
        events = _closed(save.applied)
        await self._shared.runs.save(self._claim, save.checkpoint, save.applied, events)
        for event in events:
            self._shared.observe(self._run, event)

    async def _written(self) -> None:
        """Waits for the write that goes on beside the run, if there is one; raises what it raised."""
        if self._writing is not None:
            task, self._writing = self._writing, None
            await task

    async def _end(self, end: End) -> None:
        assert end.status in ENDED
        events = [*_closed(end.applied), RunEvent(kind=end.status, facts={"reason": end.reason, **end.facts})]
        await self._shared.runs.end(self._claim, end.status, end.reason, end.outcome, end.applied, events)
        for event in events:
            self._shared.observe(self._run, event)


def _ended(status: Status, reason: str) -> End:
    return End(status, reason, None, None, {})


def _closed(applied: Applied | None) -> list[RunEvent]:
    """Returns the event of a round that was applied."""
    if applied is None:
        return []
    facts = {"number": applied.number, "survivors": list(applied.survivors), **applied.facts}
    return [RunEvent(kind="round", facts=facts)]
