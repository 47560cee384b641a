"""One coordinator process: it claims runs, leads them, and lets go of them. Stateless but for what it leads just now.

There is one way back from any trouble with the store: the run is forgotten here and claimed anew, from the checkpoint
that truly is there. The same happens when another process takes it over.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.coordinator import lead as leading
from cohortium.coordinator.exchange import Exchange, Heard, Joined
from cohortium.coordinator.inbox import LARGE, Inbox, Item, Revoked, Stored, Wished
from cohortium.coordinator.lead import End, Lead, Leader, Order, Save, Tell
from cohortium.coordinator.ports import ENDED, Applied, Claim, RunEvent, Runs, SiteRow, Superseded, Unavailable
from cohortium.core.codec import Data
from cohortium.core.document import from_canonical
from cohortium.core.errors import CohortiumError, ProtocolError
from cohortium.plan import Compiler, Plan, compile_study
from cohortium.secagg.group import Group
from cohortium.secagg.stream import PLAIN, Means

log = logging.getLogger("cohortium.coordinator")

_BESIDE = 1 << 20
"""Bytes of a checkpoint's parts from which it is written beside the next round, where it may wait."""

Observer = Callable[[str, RunEvent], None]
"""Is told of what happens to runs: the run's name, and the event."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often a coordinator looks, in seconds, and how much it takes on.

    Attributes:
        beat: between signs of life, and between looks at what there is to do.
        stale: without a sign of life, after which a coordinator's runs are taken over.
        capacity: runs that one coordinator leads at a time.
    """

    beat: float = 0.5
    stale: float = 2.5
    capacity: int = 8


@dataclass
class Led:
    """A run that is led here.

    Attributes:
        grace: once its time is due, how many of the items that had come by then are still to be looked at.
    """

    claim: Claim
    inbox: Inbox = field(default_factory=Inbox)
    lead: Lead | None = None
    paused: bool = False
    grace: int | None = None
    writing: "asyncio.Task[None] | None" = None


class Service:
    """Leads runs under leases in the store.

    Args:
        me: this coordinator's name, different from every other process's.
        address: where sites reach it, to be shown.
        runs: the store.
        identity: the consortium's signing key, whose public half the sites pinned.
        clock: monotonic seconds.
        compiler: turns a study into a plan.
        observe: is told of every event of a run.
        news: is told of every channel of the store's news.
        revoked: called after sites were revoked.
    """

    def __init__(
        self,
        me: str,
        address: str,
        runs: Runs,
        exchange: Exchange,
        identity: Ed25519PrivateKey,
        clock: Callable[[], float],
        pace: Pace | None = None,
        means: Means = PLAIN,
        compiler: Compiler = compile_study,
        observe: Observer = lambda run, event: None,
        revoked: Callable[[], None] = lambda: None,
        news: Callable[[str], None] = lambda channel: None,
    ) -> None:
        self.me, self._address, self._runs, self._exchange = me, address, runs, exchange
        self._identity, self._clock, self._means = identity, clock, means
        self._pace, self._observe, self._on_revoked = pace or Pace(), observe, revoked
        self._news = news
        self._compiled = lru_cache(maxsize=64)(lambda document: compiler(from_canonical(document)))
        self._led: dict[str, Led] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sites: dict[str, SiteRow] = {}
        self._look, self._changed = asyncio.Event(), asyncio.Event()
        self._alive = False

    @property
    def leading(self) -> Mapping[str, Led]:
        """The runs that are led here."""
        return self._led

    @property
    def alive(self) -> bool:
        """Whether the store answered lately."""
        return self._alive

    @property
    def sites(self) -> Mapping[str, SiteRow]:
        """The consortium's sites as they were seen last, revoked ones too."""
        return self._sites

    async def serve(self, stop: asyncio.Event) -> None:
        """Works until `stop` is set; then gives its runs back, for others to claim at once."""
        loops = [
            asyncio.create_task(self._for_ever(work), name=name)
            for name, work in (
                ("beats", self._beat),
                ("presence", self._presence),
                ("claims", self._claim),
                ("members", self._members),
            )
        ]
        loops += [asyncio.create_task(self._listen()), asyncio.create_task(self._exchange.relay())]
        try:
            await stop.wait()
        finally:
            for task in [*loops, *self._tasks]:
                task.cancel()
            await asyncio.gather(*loops, *self._tasks, return_exceptions=True)

    async def _for_ever(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except Unavailable as error:
                self._alive = False
                log.warning("the store or the bus is away; runs wait", extra={"reason": str(error)})
                await asyncio.sleep(self._pace.beat)
            except Exception as error:
                self._alive = False
                log.error("a coordinator's loop failed; it goes on", exc_info=error)
                await asyncio.sleep(self._pace.beat)

    async def _beat(self) -> None:
        await self._runs.beat(self.me, self._address)
        self._alive = True
        self._exchange.peers = frozenset(await self._runs.peers(self._pace.stale)) - {self.me}
        await asyncio.sleep(self._pace.beat)

    async def _presence(self) -> None:
        # apart from the beats: a bus that hangs must not make a coordinator look dead
        with suppress(Unavailable):
            await self._exchange.refresh()
        await asyncio.sleep(self._pace.beat)

    async def _claim(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._pace.beat):
                await self._look.wait()
        self._look.clear()
        if not self._alive:
            return
        for run, wish in (await self._runs.wishes(list(self._led))).items() if self._led else ():
            if run in self._led:
                self._led[run].inbox.put_nowait(Wished(wish))
        busy = sum(not led.paused for led in self._led.values())
        if busy < self._pace.capacity:
            free, share = self._pace.capacity - busy, max(1, self._pace.capacity * 3 // 4)
            for claim in await self._runs.claim(self.me, self._pace.stale, free, share):
                self._take(claim)

    def _take(self, claim: Claim) -> None:
        led = self._led[claim.row.run] = Led(claim)
        task = asyncio.create_task(self._lead(led), name=claim.row.run)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _members(self) -> None:
        before = self._sites
        self._sites = {row.name: row for row in await self._runs.sites()}
        gone = [
            name
            for name, row in self._sites.items()
            if row.revoked and not (name in before and before[name].revoked) and before
        ]
        for name in gone:
            self._exchange.close(name, "the site was revoked")
            for led in self._led.values():
                led.inbox.put_nowait(Revoked(name))
        if gone:
            self._on_revoked()
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await self._changed.wait()

    async def _listen(self) -> None:
        async for channel in self._runs.news():
            self._news(channel)
            if channel == "sites":
                self._changed.set()
            elif channel == "runs":
                self._look.set()

    async def _lead(self, led: Led) -> None:
        claim, run = led.claim, led.claim.row.run
        try:
            await self._exchange.lead(run, led.inbox.put_nowait)
            await self._led_through(led)
        except Superseded:
            log.info("another coordinator leads the run by now", extra={"run": run})
        except Unavailable as error:
            log.warning("a run is put aside until the store is back", extra={"run": run, "reason": str(error)})
            await self._given_back(claim)
        except Exception as error:
            log.error("a run failed in a way that nobody foresaw", extra={"run": run}, exc_info=error)
            await self._broken(led, error)
        except asyncio.CancelledError:
            with suppress(Exception):
                await asyncio.wait_for(self._runs.release(claim), 2.0)
            raise
        finally:
            if led.writing is not None:
                led.writing.cancel()
            self._exchange.leave(run, led.inbox.put_nowait)
            if self._led.get(run) is led:
                del self._led[run]
            self._look.set()

    async def _given_back(self, claim: Claim) -> None:
        while True:
            try:
                await self._runs.release(claim)
                return
            except Superseded:
                return
            except Unavailable:
                await asyncio.sleep(self._pace.beat)

    async def _broken(self, led: Led, error: Exception) -> None:
        told = str(error) if isinstance(error, CohortiumError) else type(error).__name__
        reason = f"the coordinator failed ({told}), and its log says where; nothing more was opened. Submit it again"
        orders = [End("failed", reason, None, None, {})]
        try:
            await self._perform(led, orders + (leading.cancelled(led.lead, reason)[1:] if led.lead else []))
        except Superseded:
            pass
        except Exception:  # noqa: BLE001  as above
            await self._given_back(led.claim)

    async def _led_through(self, led: Led) -> None:
        orders = await self._begun(led)
        while led.lead is not None:
            if led.paused:
                orders = await self._paused(led)
            await self._perform(led, orders)
            orders = [] if led.lead.over else await self._next(led)
            if led.lead.over and not orders:
                return

    async def _begun(self, led: Led) -> list[Order]:
        row, claim = led.claim.row, led.claim
        if row.wish == "cancel":
            await self._end(led, End("cancelled", row.reason or "cancelled before it began", None, None, {}))
            return []
        try:
            # on a thread: a coordinator that stops for seconds looks dead to the others
            plan = await asyncio.to_thread(self._prepared, claim.document)
            leader = Leader(self._identity, await self._pinned(plan, led), self._means)
            if claim.checkpoint is None:
                led.lead, orders = leading.begin(plan, row.run, leader, row.terms, row.seed, self._clock())
            else:
                led.lead, orders = await asyncio.to_thread(
                    leading.resume, plan, claim.checkpoint, leader, row.terms, self._clock()
                )
        except Unavailable:
            raise
        except CohortiumError as error:
            await self._end(led, End("failed", str(error), None, None, {}))
            return []
        assert led.lead is not None
        kind = "began" if row.started is None else "taken over"
        led.paused = row.wish == "pause"
        await self._mark(led, kind, coordinator=self.me, round=led.lead.state.number)
        return orders

    def _prepared(self, document: bytes) -> Plan:
        """Returns a study's plan, with what its sums are made of loaded: that of encryption takes seconds."""
        plan = self._compiled(document)
        plan.scheme(Group(plan.sites, plan.threshold), plan.phases[0].layout, self._means)
        return plan

    async def _pinned(self, plan: Plan, led: Led) -> dict[str, bytes]:
        rows = self._sites
        if not set(plan.sites) <= rows.keys():
            # `_members` keeps its own, or it would not see what is new in these
            rows = {row.name: row for row in await self._runs.sites()}
        for site in plan.sites:
            if site in rows and rows[site].revoked and led.claim.row.started is not None:
                # a run that is under way goes on without it
                led.inbox.put_nowait(Revoked(site))
            elif site not in rows or rows[site].revoked:
                what = "was revoked" if site in rows else "is not enrolled"
                raise ProtocolError(f"site '{site}' {what} in this consortium: invite it, or leave it out of the study")
        return {site: rows[site].identity for site in plan.sites}

    async def _mark(self, led: Led, kind: str, **facts: object) -> None:
        await self._note(led, RunEvent(kind=kind, facts=facts))

    async def _note(self, led: Led, event: RunEvent) -> None:
        await self._runs.mark(led.claim, "paused" if led.paused else "running", [event])
        self._observe(led.claim.row.run, event)

    async def _paused(self, led: Led) -> list[Order]:
        """Waits until the run shall go on or end."""
        assert led.lead is not None
        while True:
            item = await led.inbox.get()
            if isinstance(item, Wished) and item.wish == "run":
                led.paused = False
                await self._mark(led, "resumed")
                led.lead, orders = leading.again(led.lead, self._clock())
                return orders
            if isinstance(item, Wished) and item.wish == "cancel":
                return self._cancelled(led)
            if isinstance(item, Revoked):
                led.lead, orders = leading.revoked(led.lead, item.site, self._clock())
                if orders and led.lead.over:
                    return orders
                # what follows is said when the run goes on; what it rests on is kept now
                await self._perform(led, [order for order in orders if isinstance(order, Save)])

    def _cancelled(self, led: Led) -> list[Order]:
        assert led.lead is not None
        led.paused = False
        orders = leading.cancelled(led.lead, "cancelled on request")
        led.lead = leading.closed(led.lead)
        return orders

    async def _next(self, led: Led) -> list[Order]:
        """Returns what follows from the next event, or from the time that has passed."""
        assert led.lead is not None
        wait = leading.due(led.lead) - self._clock()
        if wait > 0:
            led.grace = None
        elif led.grace is None:
            led.grace = led.inbox.qsize()
        elif led.grace:
            led.grace -= 1
        if led.grace == 0:
            # what came by then was looked at; whoever sends without end does not hold up the time
            led.grace = None
            await asyncio.sleep(0)
            led.lead, orders = leading.ticked(led.lead, self._clock())
            return orders
        try:
            item = led.inbox.get_nowait()
        except asyncio.QueueEmpty:
            try:
                async with asyncio.timeout(max(0.0, wait)):
                    item = await led.inbox.get()
            except TimeoutError:
                led.lead, orders = leading.ticked(led.lead, self._clock())
                return orders
        return await self._after(led, item)

    async def _after(self, led: Led, item: Item) -> list[Order]:
        assert led.lead is not None
        orders: list[Order] = []
        match item:
            case Heard(site, data):
                orders = await self._heard(led, site, data)
            case Joined(site):
                led.lead, orders = leading.joined(led.lead, site, self._clock())
            case Revoked(site):
                led.lead, orders = leading.revoked(led.lead, site, self._clock())
            case Wished("cancel"):
                orders = self._cancelled(led)
            case Wished("pause"):
                led.paused = True
                await self._mark(led, "paused")
            case Stored():
                await self._written(led)
            case Wished():
                pass
        return orders

    async def _heard(self, led: Led, site: str, data: Data) -> list[Order]:
        assert led.lead is not None
        run, before = led.claim.row.run, led.lead
        try:
            if max(len(data), before.limit) > LARGE:
                after, orders = await asyncio.to_thread(leading.heard, before, site, data, self._clock())
            else:
                after, orders = leading.heard(before, site, data, self._clock())
        except ProtocolError as error:
            log.info("a site's message was refused", extra={"run": run, "site": site, "reason": str(error)})
            return []
        led.lead = after
        if site in after.state.gone:
            await self._note(led, RunEvent(kind="refused", facts={"site": site, "reason": after.state.gone[site]}))
        return orders

    async def _perform(self, led: Led, orders: list[Order]) -> None:
        run = led.claim.row.run
        for order in orders:
            match order:
                case Tell(site, messages, limit):
                    for message in messages:
                        await self._exchange.tell(site, run, message, limit)
                case Save():
                    await self._written(led)
                    if order.may_wait and sum(map(len, order.checkpoint.parts.values())) > _BESIDE:
                        led.writing = asyncio.create_task(self._save(led, order))
                        led.writing.add_done_callback(lambda _: led.inbox.put_nowait(Stored()))
                    else:
                        await self._save(led, order)
                case End():
                    await self._written(led)
                    await self._end(led, order)

    async def _save(self, led: Led, save: Save) -> None:
        events = [] if save.applied is None else [RunEvent(kind="round", facts=_round_facts(save.applied))]
        await self._runs.save(led.claim, save.checkpoint, save.applied, events)
        for event in events:
            self._observe(led.claim.row.run, event)

    async def _written(self, led: Led) -> None:
        """Waits for the write that goes on beside the run, if there is one; raises what it raised."""
        if led.writing is not None:
            task, led.writing = led.writing, None
            await task

    async def _end(self, led: Led, end: End) -> None:
        assert end.status in ENDED
        events = [] if end.applied is None else [RunEvent(kind="round", facts=_round_facts(end.applied))]
        events.append(RunEvent(kind=end.status, facts={"reason": end.reason, **end.facts}))
        await self._runs.end(led.claim, end.status, end.reason, end.outcome, end.applied, events)
        for event in events:
            self._observe(led.claim.row.run, event)


def _round_facts(applied: Applied) -> dict[str, object]:
    return {"number": applied.number, "survivors": list(applied.survivors), **applied.facts}
