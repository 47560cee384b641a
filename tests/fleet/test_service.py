"""Coordinators over a store, a bus and sites in memory: takeover, failures of the store, pauses, lost sites."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

import cohortium as co
from cohortium.bootstrap.simulation import coordinator_key, simulated_agents
from cohortium.coordinator import leading
from cohortium.coordinator.exchange import Exchange
from cohortium.coordinator.keepsake import Keepsake, pack, unpack
from cohortium.coordinator.ports import RunRow, SiteRow, Terms
from cohortium.coordinator.result import Result
from cohortium.coordinator.service import Pace, Service
from cohortium.core.document import canonical_bytes
from cohortium.core.protection import Aggregation
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.plan import compile_study

from .memory import Fault, MemoryBus, MemorySite, MemoryStore

ROOT = Randomness.of_seed(5)
PACE = Pace(beat=0.01, stale=0.1)
LONG = Terms(deadline=20, patience=40)


class Killed(asyncio.CancelledError):
    """A process that is gone asks nothing more of anybody."""


class Lifeline:
    """A coordinator's connection to the store, which ends with the coordinator."""

    def __init__(self, store: MemoryStore) -> None:
        self._store, self.dead = store, False

    def __getattr__(self, name: str) -> Any:
        if self.dead:
            raise Killed
        return getattr(self._store, name)


@dataclass
class Process:
    """One coordinator."""

    service: Service
    exchange: Exchange
    lifeline: Lifeline
    task: asyncio.Task[None]
    stop: asyncio.Event

    async def kill(self) -> None:
        self.lifeline.dead = True
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@dataclass
class Cluster:
    """Some coordinators and four hospitals."""

    study: Study
    store: MemoryStore
    bus: MemoryBus
    sites: dict[str, MemorySite]
    processes: list[Process] = field(default_factory=list)

    @staticmethod
    def of(study: Study, runs: int = 1) -> "Cluster":
        agents = simulated_agents(compile_study(study), co.example_sites(), ROOT, runs=runs)
        pinned = next(iter(agents.values())).membership.pinned
        members = [SiteRow(name=name, identity=key, enrolled=datetime.now(UTC)) for name, key in pinned.items()]
        store = MemoryStore(members, time.monotonic)
        return Cluster(study, store, MemoryBus(), {name: MemorySite(agent) for name, agent in agents.items()})

    def start(self, name: str) -> Process:
        lifeline, stop = Lifeline(self.store), asyncio.Event()
        exchange = Exchange(name, self.bus, time.time)
        service = Service(name, f"{name}:1", lifeline, exchange, coordinator_key(ROOT), time.monotonic, PACE)  # type: ignore[arg-type]
        process = Process(service, exchange, lifeline, asyncio.create_task(service.serve(stop)), stop)
        self.processes.append(process)
        return process

    async def attach(self, process: Process, *names: str) -> None:
        for name in names or self.sites:
            await self.sites[name].attach(process.exchange)

    async def submit(self, run: str, terms: Terms = LONG, seed: int | None = 5) -> None:
        plan = compile_study(self.study)
        await self.store.submit(run, plan.study_id, canonical_bytes(plan.study), "operator:me", plan.sites, terms, seed)

    async def until(self, true: Callable[[], bool], seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not true():
                await asyncio.sleep(0.002)

    async def ended(self, run: str) -> RunRow:
        await self.until(lambda: self.store.rows[run].ended is not None)
        return self.store.rows[run]

    def result(self, run: str) -> Result:
        rounds = tuple((one.number, one.survivors, dict(one.facts)) for one in self.store.rounds[run])
        return unpack(pack(Keepsake(run, canonical_bytes(self.study), self.store.outcomes[run], rounds, 0)))

    async def close(self) -> None:
        for process in self.processes:
            process.stop.set()
        await asyncio.gather(*(process.task for process in self.processes), return_exceptions=True)


def tolerant() -> Study:
    return replace(co.load_example(), aggregation=Aggregation(dropouts=1))


def expected(study: Study) -> Any:
    return co.simulate(study, co.example_sites(), seed=5).model.coef_


@pytest.mark.parametrize("study", [co.load_example(), tolerant()], ids=["all sites", "one may be lost"])
def test_a_run_gives_what_a_simulation_gives(study: Study) -> None:
    async def go() -> None:
        cluster = Cluster.of(study)
        await cluster.attach(cluster.start("one"))
        await cluster.submit("first")
        row = await cluster.ended("first")
        assert (row.status, row.reason) == ("finished", None)
        np.testing.assert_array_equal(cluster.result("first").model.coef_, expected(study))
        kinds = [event.kind for event in await cluster.store.events("first")]
        assert kinds[0] == "began" and kinds[-1] == "finished" and set(kinds[1:-1]) == {"round"}
        await cluster.close()

    asyncio.run(go())


@pytest.mark.parametrize("beside", [False, True], ids=["saved first", "saved beside"])
@pytest.mark.parametrize("save", range(1, 9))
@pytest.mark.parametrize("study", [co.load_example(), tolerant()], ids=["all sites", "one may be lost"])
def test_another_coordinator_takes_over_at_any_point_and_nothing_is_lost(
    study: Study, save: int, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if beside:
        monkeypatch.setattr(leading, "_BESIDE", -1)

    async def go() -> None:
        cluster = Cluster.of(study)
        first, second = cluster.start("one"), cluster.start("two")
        await cluster.attach(first)
        await cluster.until(lambda: first.service.alive and second.service.alive)
        await cluster.submit("moved")
        await cluster.until(lambda: cluster.store.saves >= save or cluster.store.rows["moved"].ended is not None)
        leader = next((one for one in (first, second) if "moved" in one.service.leading), None)
        if leader is not None:
            await leader.kill()
            other = second if leader is first else first
            await cluster.attach(other)
        row = await cluster.ended("moved")
        assert row.status == "finished", row.reason
        np.testing.assert_array_equal(cluster.result("moved").model.coef_, expected(study))
        await cluster.close()

    asyncio.run(go())


@pytest.mark.parametrize("fault", ["before", "after"])
@pytest.mark.parametrize("beside", [False, True], ids=["saved first", "saved beside"])
@pytest.mark.parametrize("save", range(6))
def test_a_store_that_fails_in_the_middle_of_a_write_loses_and_repeats_nothing(
    fault: Fault, save: int, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if beside:
        monkeypatch.setattr(leading, "_BESIDE", -1)

    async def go() -> None:
        study = tolerant()
        cluster = Cluster.of(study)
        cluster.store.faults = [*[None] * save, fault]
        await cluster.attach(cluster.start("one"))
        await cluster.submit("shaken")
        row = await cluster.ended("shaken")
        assert row.status == "finished" and row.epoch > 1, row.reason
        np.testing.assert_array_equal(cluster.result("shaken").model.coef_, expected(study))
        await cluster.close()

    asyncio.run(go())


def test_a_study_that_takes_long_to_prepare_does_not_make_its_coordinator_look_dead() -> None:
    async def go() -> None:
        cluster = Cluster.of(tolerant())
        first, second = cluster.start("one"), cluster.start("two")
        for process in (first, second):
            process.service._pace = Pace(beat=0.05, stale=0.6)

            def prepared(document: bytes, compiled: Any = process.service._shared.plan) -> Any:
                time.sleep(1.5)
                return compiled(document)

            process.service._shared = replace(process.service._shared, plan=prepared)
        await cluster.attach(first)
        await cluster.submit("slow")
        row = await cluster.ended("slow")
        assert (row.status, row.epoch) == ("finished", 1), row.reason
        await cluster.close()

    asyncio.run(go())


def test_sites_and_leader_find_each_other_across_processes() -> None:
    async def go() -> None:
        study = tolerant()
        cluster = Cluster.of(study)
        first, second = cluster.start("one"), cluster.start("two")
        await cluster.until(lambda: bool(first.exchange.peers and second.exchange.peers))
        await cluster.attach(first, "budapest", "zurich")
        await cluster.attach(second, "cleveland", "long-beach")
        await cluster.submit("spread")
        assert (await cluster.ended("spread")).status == "finished"
        np.testing.assert_array_equal(cluster.result("spread").model.coef_, expected(study))
        await cluster.close()

    asyncio.run(go())


def test_a_silent_site_is_left_out_at_the_deadline_and_is_back_in_the_next_round() -> None:
    async def go() -> None:
        study = tolerant()
        cluster = Cluster.of(study)
        await cluster.attach(cluster.start("one"))
        zurich = cluster.sites["zurich"]
        await cluster.submit("patient", Terms(deadline=1, patience=40))
        await cluster.until(lambda: "KeySet" in zurich.heard)
        zurich.deaf = True
        await cluster.until(lambda: any("zurich" not in one.survivors for one in cluster.store.rounds["patient"]))
        zurich.deaf = False
        assert (await cluster.ended("patient")).status == "finished"
        with_it = ["zurich" in one.survivors for one in cluster.store.rounds["patient"]]
        assert with_it[-1] and not all(with_it)
        await cluster.close()

    asyncio.run(go())


def test_a_run_waits_for_sites_that_it_needs_and_then_says_whom_it_missed() -> None:
    async def go() -> None:
        cluster = Cluster.of(co.load_example())
        await cluster.attach(cluster.start("one"), "budapest", "cleveland", "long-beach")
        await cluster.submit("short", Terms(deadline=0.05, patience=0.3))
        row = await cluster.ended("short")
        assert row.status == "failed" and row.reason is not None and "zurich" in row.reason
        await cluster.close()

    asyncio.run(go())


def test_runs_pause_go_on_and_are_cancelled() -> None:
    async def go() -> None:
        study = tolerant()
        cluster = Cluster.of(study, runs=2)
        await cluster.attach(cluster.start("one"))
        await cluster.submit("steered")
        await cluster.until(lambda: cluster.store.saves >= 2)
        await cluster.store.wish("steered", "pause", "me")
        await cluster.until(lambda: cluster.store.rows["steered"].status == "paused")
        before = cluster.store.saves
        await asyncio.sleep(0.1)
        assert cluster.store.saves <= before + 1
        await cluster.store.wish("steered", "run", "me")
        assert (await cluster.ended("steered")).status == "finished"
        np.testing.assert_array_equal(cluster.result("steered").model.coef_, expected(study))
        for site in cluster.sites.values():
            site.deaf = True
        await cluster.submit("unwanted")
        await cluster.until(lambda: cluster.store.rows["unwanted"].status == "running")
        await cluster.store.wish("unwanted", "cancel", "me")
        assert (await cluster.ended("unwanted")).status == "cancelled"
        assert "CloseRun" in cluster.sites["zurich"].heard
        await cluster.close()

    asyncio.run(go())


def test_a_revoked_site_leaves_the_run_at_once() -> None:
    async def go() -> None:
        cluster = Cluster.of(tolerant())
        process = cluster.start("one")
        await cluster.attach(process)
        await cluster.until(lambda: bool(process.service.sites))
        zurich = cluster.sites["zurich"]
        zurich.deaf = True
        await cluster.submit("smaller", Terms(deadline=30, patience=30))
        await cluster.until(lambda: "OpenRun" in zurich.heard)
        cluster.store.members = [
            replace(row, revoked=datetime.now(UTC)) if row.name == "zurich" else row for row in cluster.store.members
        ]
        cluster.store.tell("sites")
        assert (await cluster.ended("smaller")).status == "finished"
        assert zurich.exchange is None
        await cluster.close()

    asyncio.run(go())


def test_without_its_bus_a_coordinator_goes_on_with_its_own_sites() -> None:
    async def go() -> None:
        cluster = Cluster.of(tolerant())
        cluster.bus.away = True
        await cluster.attach(cluster.start("one"))
        await cluster.submit("alone")
        assert (await cluster.ended("alone")).status == "finished"
        await cluster.close()

    asyncio.run(go())


def test_many_runs_share_a_coordinator() -> None:
    async def go() -> None:
        cluster = Cluster.of(tolerant(), runs=12)
        await cluster.attach(cluster.start("one"))
        for number in range(12):
            await cluster.submit(f"run {number}", Terms(deadline=20, patience=20))
        for number in range(12):
            assert (await cluster.ended(f"run {number}")).status == "finished"
        await cluster.close()

    asyncio.run(go())
