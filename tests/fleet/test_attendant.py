"""An attendant answers other runs while one trains, and a run itself where its rounds are buffers."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import cohortium as co
from cohortium.bootstrap.simulation import coordinator_key, simulated_agents
from cohortium.coordinator.rounds import open_run, outstanding, step
from cohortium.core import codec
from cohortium.core.messages import MaskedUpdate, Noted, decode_from_site
from cohortium.core.models import Network
from cohortium.core.protection import Aggregation
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.core.training import Asynchronous, Averaging, Local
from cohortium.engines.fleet import attendant as module
from cohortium.engines.fleet.attendant import Attendant, Trainers
from cohortium.plan import Plan, compile_study
from cohortium.site.agent import Agent, Taken, Work

from .test_service import Cluster

ROOT = Randomness.of_seed(5)
ME = "zurich"


class Link:
    """Messages in and answers out, in memory."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.said: list[tuple[str, Any]] = []
        self.news = asyncio.Event()

    async def messages(self) -> AsyncIterator[tuple[str, bytes]]:
        while True:
            yield await self.incoming.get()

    async def send(self, run: str, data: bytes) -> None:
        self.said.append((run, decode_from_site(data)))
        self.news.set()

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not true():
                self.news.clear()
                await self.news.wait()

    def of(self, run: str) -> list[Any]:
        return [message for name, message in self.said if name == run]


@dataclass
class Slow:
    """An agent whose work from a round on waits for a gate, where its run has one."""

    agent: Agent
    since: int = 1
    gates: dict[str, threading.Event] = field(default_factory=dict)
    began: list[str] = field(default_factory=list)

    def receive(self, data: bytes) -> list[bytes]:
        return self.agent.receive(data)

    def take(self, data: bytes) -> Taken:
        taken = self.agent.take(data)
        return replace(taken, work=self.gated(taken.work)) if taken.work else taken

    def finish(self, work: Any, result: Any) -> Taken:
        taken = self.agent.finish(work.work, result)
        return replace(taken, work=self.gated(taken.work)) if taken.work else taken

    def gated(self, work: Work) -> Any:
        return Gated(work, self)


@dataclass(frozen=True)
class Gated:
    work: Work
    slow: Slow

    @property
    def apart(self) -> bool:
        return self.work.apart

    def done(self) -> Any:
        late = self.work.train.asked.round >= self.slow.since
        gate = self.slow.gates.get(self.work.run) if late else None
        self.slow.began.append(self.work.run)
        assert gate is None or gate.wait(20)
        return self.work.done()


def study(asynchronous: bool) -> Study:
    pytest.importorskip("torch")
    how = Asynchronous(buffer=3) if asynchronous else None
    training = Averaging(rounds=3, local=Local(steps=2), asynchronous=how)
    return replace(
        co.load_example(), aggregation=Aggregation(dropouts=1), model=Network(hidden=(3,)), training=training
    )


class Run:
    """A coordinator of one run, whose other sites answer at once."""

    def __init__(self, plan: Plan, agents: dict[str, Agent], name: str, link: Link) -> None:
        self.agents, self.name, self.link = agents, name, link
        pinned = agents[ME].membership.pinned
        self.state, _ = open_run(plan, name, coordinator_key(ROOT), pinned, seed=5)
        self.told: set[bytes] = set()
        self.taken = 0

    def turn(self) -> None:
        """Has every other site answer, and takes in what mine has said, until mine is waited for."""
        for message in self.link.of(self.name)[self.taken :]:
            self.taken += 1
            self.state, _ = step(self.state, ME, message)
        others = True
        while others and self.state.phase != "over":
            others = False
            debts = dict(outstanding(self.state))
            for data in map(codec.encode, debts.pop(ME, ())):
                if data not in self.told:
                    self.told.add(data)
                    self.link.incoming.put_nowait((self.name, data))
            for site, owed in debts.items():
                for data in map(codec.encode, owed):
                    for answer in self.agents[site].receive(data):
                        self.state, _ = step(self.state, site, decode_from_site(answer))
                        others = True
                if others:
                    break


async def serving(agent: Any, link: Link, scenario: Callable[[], Any]) -> None:
    async def prepare(data: bytes) -> None:
        return None

    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(2) as trainers:
        attendant = Attendant(agent, link, pool, trainers, time.monotonic, prepare)
        task = asyncio.create_task(attendant.serve())
        try:
            await scenario()
        finally:
            for gate in agent.gates.values():
                gate.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def test_a_run_that_trains_for_long_does_not_keep_another_waiting() -> None:
    async def go() -> None:
        plan = compile_study(study(asynchronous=False))
        agents, link = simulated_agents(plan, co.example_sites(), ROOT, runs=2), Link()
        gate = threading.Event()
        mine = Slow(agents[ME], gates={"long": gate})
        long, short = (Run(plan, agents, name, link) for name in ("long", "short"))

        async def scenario() -> None:
            long.turn()
            await link.until(lambda: bool(link.of("long")))
            long.turn()
            async with asyncio.timeout(20):
                while "long" not in mine.began:
                    await asyncio.sleep(0)
            while short.state.phase != "over":
                before = len(link.of("short"))
                short.turn()
                if short.state.phase != "over":
                    await link.until(lambda before=before: len(link.of("short")) > before)  # type: ignore[misc]
            assert not any(isinstance(message, MaskedUpdate) for message in link.of("long"))
            gate.set()
            while long.state.phase != "over":
                before = long.taken
                await link.until(lambda before=before: len(link.of("long")) > before)  # type: ignore[misc]
                long.turn()

        await serving(mine, link, scenario)
        assert codec.encode(long.state.learned) == codec.encode(short.state.learned)

    asyncio.run(go())


def test_a_run_whose_rounds_are_buffers_notes_them_while_the_site_trains() -> None:
    async def go() -> None:
        plan = compile_study(study(asynchronous=True))
        agents, link = simulated_agents(plan, co.example_sites(), ROOT), Link()
        gate = threading.Event()
        mine = Slow(agents[ME], 2, {"run": gate})
        run = Run(plan, agents, "run", link)

        async def scenario() -> None:
            while run.state.phase != "over":
                before = len(link.of("run"))
                run.turn()
                if run.state.phase != "over":
                    await link.until(lambda before=before: len(link.of("run")) > before)  # type: ignore[misc]
            # the others did not need it any more
            await link.until(lambda: Noted("run", ME, 3) in [m for m in link.of("run") if isinstance(m, Noted)])
            assert not any(isinstance(m, MaskedUpdate) and m.round > 1 for m in link.of("run"))
            gate.set()
            await link.until(lambda: any(isinstance(m, MaskedUpdate) and m.round > 2 for m in link.of("run")))

        await serving(mine, link, scenario)

    asyncio.run(go())


@dataclass
class Bare:
    """An agent whose thread waits at a gate, and that trains behind another for messages that begin with "train"."""

    gates: dict[str, threading.Event] = field(default_factory=lambda: {"agent": threading.Event()})
    dealt: list[bytes] = field(default_factory=list)

    def receive(self, data: bytes) -> list[bytes]:
        return self.take(data).answers

    def take(self, data: bytes) -> Any:
        if data.startswith(b"train"):
            return Taken([], self)  # type: ignore[arg-type]
        assert self.gates["agent"].wait(20)
        self.dealt.append(data)
        return Taken([])

    apart = False

    def done(self) -> None:
        assert self.gates["training"].wait(20)

    def finish(self, work: Any, result: Any) -> Taken:
        return Taken([])


class Stream(Link):
    """Notes how many messages were read."""

    read = 0

    async def messages(self) -> AsyncIterator[tuple[str, bytes]]:
        while True:
            message = await self.incoming.get()
            self.read += 1
            yield message


async def rested(link: Stream) -> int:
    """Returns how many messages are read until no more are."""
    before = -1
    while before != link.read:
        before = link.read
        for _ in range(50):
            await asyncio.sleep(0)
    return before


async def dealt(agent: Bare, count: int) -> None:
    async with asyncio.timeout(20):
        while len(agent.dealt) < count:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("runs", "size", "most"),
    [(300, 10, module._MOST_RUNS), (60, 1000, 20), (1, 1000, 20)],
    ids=["many runs", "many bytes", "one run"],
)
def test_what_waits_for_the_agent_stays_on_the_network(runs: int, size: int, most: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 20_000)
    agent, link = Bare(), Stream()

    async def scenario() -> None:
        for number in range(300):
            link.incoming.put_nowait((f"r{number % runs}", b"%05d" % number + bytes(size - 5)))
        assert await rested(link) == most
        agent.gates["agent"].set()
        await dealt(agent, 300)
        # messages of one run keep their order
        order = [int(data[:5]) for data in agent.dealt]
        assert all([one for one in order if one % runs == run] == list(range(run, 300, runs)) for run in range(runs))

    asyncio.run(serving(agent, link, scenario))


def test_what_waits_for_its_own_training_keeps_nobody_from_being_read(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 1 << 20)
    monkeypatch.setattr(module, "_SHARE", 1 << 20)
    agent, link = Bare(), Stream()
    agent.gates["agent"].set()
    agent.gates["training"] = threading.Event()

    async def scenario() -> None:
        link.incoming.put_nowait(("long", b"train"))
        await rested(link)
        for number in range(10):
            link.incoming.put_nowait(("long", b"%d" % number + bytes(700 << 10)))
        link.incoming.put_nowait(("long", b"small"))
        for number in range(10):
            link.incoming.put_nowait((f"r{number}", b"other"))
        await dealt(agent, 10)
        assert set(agent.dealt) == {b"other"}
        agent.gates["training"].set()
        await dealt(agent, 13)
        # of what is long a share was kept, and the one with which it was reached
        assert [data[:5].rstrip(b"\0") for data in agent.dealt[10:]] == [b"0", b"1", b"small"]

    asyncio.run(serving(agent, link, scenario))


def test_a_long_message_waits_behind_a_short_one() -> None:
    queue = module._Queue(held=5000)
    assert queue.takes(bytes(2 * module._SHARE))


def test_trainers_give_results_and_failures_and_pass_over_what_was_cancelled() -> None:
    trainers, gate, began = Trainers(1), threading.Event(), threading.Event()

    def first() -> bool:
        began.set()
        return gate.wait(20)

    one, two, three, four = trainers.submit(first), *(trainers.submit(divmod, 7, by) for by in (2, 2, 0))
    assert began.wait(20) and two.cancel()
    gate.set()
    assert one.result(20) and three.result(20) == (3, 1)
    assert isinstance(four.exception(20), ZeroDivisionError)
    assert trainers.submit(sum, [1, 2], start=3).result(20) == 6


def test_coordinators_lead_runs_whose_rounds_are_buffers() -> None:
    async def go() -> None:
        cluster = Cluster.of(study(asynchronous=True))
        await cluster.attach(cluster.start("one"))
        await cluster.submit("buffered")
        row = await cluster.ended("buffered")
        assert (row.status, row.reason) == ("finished", None)
        sizes = [len(one.survivors) for one in cluster.store.rounds["buffered"]]
        assert sizes == [4, 3, 3, 3]
        await cluster.close()

    asyncio.run(go())
