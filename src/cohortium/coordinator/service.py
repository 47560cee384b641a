"""One coordinator process: it claims runs, has them led, and lets go of them. It holds only what it leads now."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.coordinator.exchange import Exchange
from cohortium.coordinator.inbox import Revoked, Wished
from cohortium.coordinator.leading import Leading, Observer, Shared
from cohortium.coordinator.ports import Claim, Runs, SiteRow, Unavailable
from cohortium.core.document import from_canonical
from cohortium.plan import Compiler, compile_study
from cohortium.secagg.stream import PLAIN, Means

log = logging.getLogger("cohortium.coordinator")


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
        self._pace, self._on_revoked, self._news = pace or Pace(), revoked, news
        self._shared = Shared(
            me=me,
            runs=runs,
            exchange=exchange,
            identity=identity,
            sites=lambda: self._sites,
            plan=lru_cache(maxsize=64)(lambda document: compiler(from_canonical(document))),
            clock=clock,
            pause=self._pace.beat,
            means=means,
            observe=observe,
        )
        self._led: dict[str, Leading] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sites: dict[str, SiteRow] = {}
        self._look, self._changed = asyncio.Event(), asyncio.Event()
        self._alive = False

    @property
    def leading(self) -> Mapping[str, Leading]:
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
        run = claim.row.run
        led = self._led[run] = Leading(self._shared, claim)
        task = asyncio.create_task(self._lead(run, led), name=run)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lead(self, run: str, led: Leading) -> None:
        try:
            await led.through()
        finally:
            if self._led.get(run) is led:
                del self._led[run]
            self._look.set()

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
