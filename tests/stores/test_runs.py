"""Runs in PostgreSQL: one leader, all or nothing, each round once, and nothing lost that was acknowledged."""

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.adapters import servers
from cohortium.adapters.embedded import Stores
from cohortium.adapters.postgres_runs import PIECE
from cohortium.coordinator.ports import Applied, Checkpoint, Claim, RunEvent, Superseded, Terms, Unavailable
from cohortium.core.errors import ProtocolError, StudyError

from .faulty import FaultyRuns
from .world import World, cleared, until, world

DOCUMENT = b'{"study":1}'
STALE = 30.0


async def submit(stores: World, run: str, owner: str = "ada", priority: int = 0) -> None:
    terms = Terms(priority=priority)
    await stores.desk.submit(run, "sha256:1", DOCUMENT, owner, ["a", "b"], terms, seed=2**64)


async def led(stores: World, run: str, me: str = "one") -> Claim:
    await stores.runs.beat(me, "here:1")
    await submit(stores, run)
    (claim,) = await stores.runs.claim(me, STALE, 1)
    assert claim.row.run == run
    return claim


async def seen(stores: World, run: str) -> tuple[object, ...]:
    """Returns all there is to see of a run."""
    row = await stores.desk.run(run)
    return (
        row,
        await stores.desk.events(run),
        await stores.desk.applied(run),
        await stores.desk.outcome(run),
        await stores.desk.site_states(run),
    )


async def checkpoint_of(stores: World, run: str) -> Checkpoint | None:
    """Returns a run's checkpoint, by taking its lead."""
    with suppress(Unavailable):
        await stores.runs.beat("reader", "x")
    await stores.runs.beat("reader", "x")
    async with asyncio.timeout(10):
        while True:
            claims = await stores.runs.claim("reader", -1.0, 100)
            for claim in claims:
                if claim.row.run == run:
                    return claim.checkpoint


def test_a_run_from_queue_to_outcome(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            claim = await led(here, "run")
            assert claim.document == DOCUMENT
            assert claim.checkpoint is None
            assert (claim.row.seed, claim.row.leader, claim.row.epoch, claim.row.status) == (2**64, "one", 1, "queued")
            await here.runs.mark(claim, "running")
            parts = {"model": os.urandom(2 * PIECE + 17), "empty": b""}
            await here.runs.save(claim, Checkpoint(round=1, state=b"s1", parts=parts), None, [RunEvent(kind="opened")])
            applied = Applied(number=1, survivors=("a", "b"), facts={"loss": 0.5})
            lost = RunEvent(kind="lost", facts={"site": "b", "why": "nul \0 here"})
            state = Checkpoint(round=2, state=b"s2", parts={"sum": b"7"}, keep=("model",))
            await here.runs.save(claim, state, applied, [lost])
            assert await here.desk.applied("run") == [applied]
            states = {state.site: (state.state, state.round) for state in await here.desk.site_states("run")}
            assert states == {"a": ("contributed", 1), "b": ("lost", 1)}
            await here.runs.release(claim)
            (again,) = await here.runs.claim("two", STALE, 5)
            assert again.checkpoint == Checkpoint(round=2, state=b"s2", parts={"model": parts["model"], "sum": b"7"})
            await here.runs.end(again, "finished", None, b"outcome")
            assert await here.runs.claim("two", STALE, 5) == []
            row = await here.desk.run("run")
            assert row is not None
            assert (row.status, row.leader, row.epoch, row.round) == ("finished", None, 2, 2)
            assert row.started and row.ended and row.submitted <= row.started <= row.ended
            assert await here.desk.outcome("run") == b"outcome"
            events = await here.desk.events("run")
            assert [event.seq for event in events] == [1, 2, 3]
            assert [event.kind for event in events] == ["submitted", "opened", "lost"]
            assert await here.desk.events("run", after=2, most=1) == events[2:]

    asyncio.run(scenario())


def test_eight_claimers_share_runs_without_a_double(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            for number in range(40):
                await submit(here, f"run-{number}")

            async def claimer(me: str) -> list[str]:
                async with world(stores) as mine:
                    await mine.runs.beat(me, me)
                    found = []
                    while claims := await mine.runs.claim(me, STALE, 2):
                        found += [claim.row.run for claim in claims]
                    return found

            found = await asyncio.gather(*(claimer(f"c{number}") for number in range(8)))
            late = [claim.row.run for claim in await here.runs.claim("late", STALE, 100)]
            counts = Counter(chain(*found, late))
            assert counts == Counter(f"run-{number}" for number in range(40))

    asyncio.run(scenario())


def test_nobody_begins_more_than_a_share(stores: Stores) -> None:
    async def go() -> None:
        async with cleared(stores) as here:
            await here.runs.beat("one", "a:1")
            for number in range(5):
                await submit(here, f"hers-{number}", "her")
            await submit(here, "his", "him")
            taken = [claim.row.run for claim in await here.runs.claim("one", STALE, 10, 2)]
            assert sorted(taken) == ["hers-0", "hers-1", "his"]
            assert await here.runs.claim("one", STALE, 10, 2) == []
            assert len(await here.runs.claim("one", STALE, 10, 3)) == 1

    asyncio.run(go())


def test_queued_runs_come_in_fair_order(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            await here.runs.beat("one", "x")
            for name, owner, priority in (
                ("a1", "ada", 0),
                ("a2", "ada", 0),
                ("a3", "ada", 0),
                ("b1", "bob", 0),
                ("b2", "bob", 0),
                ("c1", "cleo", 0),
                ("urgent", "ada", 5),
            ):
                await submit(here, name, owner, priority)
            # ada's urgent run counts: everybody else has fewer
            order = [claim.row.run for claim in await here.runs.claim("one", STALE, 4)]
            assert order == ["urgent", "b1", "c1", "a1"]
            order = [claim.row.run for _ in range(3) for claim in await here.runs.claim("one", STALE, 1)]
            assert order == ["b2", "a2", "a3"]

    asyncio.run(scenario())


def test_a_leader_that_died_before_the_clock_was_set_back_is_followed(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            await led(here, "run")
            with psycopg.connect(stores.owner_url) as owner:
                owner.execute("UPDATE cohortium.coordinators SET seen = seen + interval '1 day'")

            async def taken() -> list[Claim]:
                return await here.runs.claim("two", 0.5, 5)

            (after,) = await until(taken)
            assert (after.row.epoch, after.row.leader) == (2, "two")
            assert "one" not in await here.runs.peers(STALE)

    asyncio.run(scenario())


def test_only_a_dead_leader_is_followed_and_by_the_databases_clock(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here, world(stores) as restarted:
            claim = await led(here, "run")
            assert await here.runs.claim("two", STALE, 5) == []
            with psycopg.connect(stores.owner_url) as owner:
                owner.execute("UPDATE cohortium.coordinators SET seen = seen - interval '1 hour'")

            async def taken() -> list[Claim]:
                # a database that has just come back gives leaders time to speak
                return await here.runs.claim("two", 0.5, 5)

            (after,) = await until(taken)
            assert (after.row.epoch, after.row.leader) == (2, "two")
            before = await seen(here, "run")
            late = Checkpoint(round=9, state=b"late", parts={"p": b"x"})
            applied, events = Applied(number=9, survivors=("a",)), [RunEvent(kind="late")]
            for write in (
                lambda: here.runs.save(claim, late, applied),
                lambda: here.runs.save(claim, Checkpoint(round=9, state=b"late"), None, events),
                lambda: here.runs.mark(claim, "paused", events),
                lambda: here.runs.end(claim, "failed", "late", b"late"),
            ):
                with pytest.raises(Superseded):
                    await write()
            await here.runs.release(claim)
            assert await seen(here, "run") == before
            assert await checkpoint_of(here, "run") is None
            # a coordinator that starts again under its name has forgotten its runs
            await here.runs.claim("two", -1.0, 5)
            await restarted.runs.beat("two", "new:1")
            assert [claim.row.run for claim in await restarted.runs.claim("three", STALE, 5)] == ["run"]

    asyncio.run(scenario())


def test_a_claim_whose_answer_was_lost_is_made_again(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            await here.runs.beat("one", "x")
            await submit(here, "run")
            runs = FaultyRuns(here.runs, iter(["fails but persists"]))
            with pytest.raises(Unavailable):
                await runs.claim("one", STALE, 1)
            assert await here.runs.claim("two", STALE, 1) == []
            here.runs._held.clear()
            (claim,) = await runs.claim("one", STALE, 1)
            assert claim.row.epoch == 2
            assert await runs.claim("one", STALE, 1) == []

    asyncio.run(scenario())


def test_a_round_is_applied_once(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            claim = await led(here, "run")
            first = Checkpoint(round=2, state=b"s", parts={"p": b"1"}), Applied(number=1, survivors=("a",))
            events = [RunEvent(kind="applied", facts={"round": 1})]
            await here.runs.save(claim, *first, events)
            before = await seen(here, "run")
            await here.runs.save(claim, *first, events)
            assert await seen(here, "run") == before
            other = Applied(number=1, survivors=("b",))
            with pytest.raises(ProtocolError, match="applied before"):
                await here.runs.save(
                    claim, Checkpoint(round=3, state=b"t"), Applied(number=1, survivors=("b",)), events
                )
            with pytest.raises(ProtocolError, match="applied before"):
                await here.runs.end(claim, "finished", None, b"x", other)
            assert await seen(here, "run") == before
            assert await checkpoint_of(here, "run") == Checkpoint(round=2, state=b"s", parts={"p": b"1"})

    asyncio.run(scenario())


@settings(max_examples=12, deadline=None)
@given(faults=st.lists(st.sampled_from(["none", "fails", "fails but persists"]), max_size=12))
def test_whoever_says_it_again_until_it_stands_has_it_once(stores: Stores, faults: list[str]) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            claim = await led(here, "run")
            runs = FaultyRuns(here.runs, iter(faults))  # type: ignore[arg-type]

            async def insist(name: str, *args: object) -> None:
                for _ in repeat(None, 20):
                    with suppress(Unavailable):
                        await getattr(runs, name)(claim, *args)
                        return

            await insist("mark", "running", [RunEvent(kind="began")])
            for number in (1, 2, 3):
                event = RunEvent(kind="round", facts={"number": number})
                parts = {f"part-{number}": b"p"} if number == 2 else {}
                state = Checkpoint(round=number, state=b"s%d" % number, parts=parts)
                await insist("save", state, Applied(number=number, survivors=("a",)), [event])
            await insist("end", "finished", None, b"done", None, [RunEvent(kind="ended")])
            kinds = [event.kind for event in await here.desk.events("run")]
            assert kinds == ["submitted", "began", "round", "round", "round", "ended"]
            assert [applied.number for applied in await here.desk.applied("run")] == [1, 2, 3]

    asyncio.run(scenario())


def test_the_desk_queues_once_and_says_what_people_want(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            await submit(here, "run")
            await submit(here, "run")
            assert len(await here.desk.events("run")) == 1
            with pytest.raises(StudyError, match="taken"):
                await submit(here, "run", owner="eve")
            with pytest.raises(StudyError, match="no run"):
                await here.desk.wish("none", "cancel", "ada")
            await here.desk.wish("run", "pause", "ada")
            assert await here.runs.wishes(["run", "none"]) == {"run": "pause"}
            (claim,) = await here.runs.claim("one", STALE, 1)
            assert claim.row.wish == "pause"
            await here.runs.end(claim, "cancelled", "ada \0 wished so", None)
            with pytest.raises(StudyError, match="ended"):
                await here.desk.wish("run", "run", "ada")
            assert [row.run for row in await here.desk.runs()] == ["run"]
            assert await here.desk.document("sha256:1") == DOCUMENT
            assert await here.desk.document("sha256:2") is None
            assert [name for name, _, _ in await here.desk.coordinators()] == ["one"]

    asyncio.run(scenario())


def test_older_runs_are_found_behind_those_of_others(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            await here.runs.end(await led(here, "ended"), "cancelled", "", None)
            await submit(here, "mine")
            for number in range(3):
                await submit(here, f"hers-{number}", owner="eve")

            async def found(*asked: object, under_way: bool = False) -> list[str]:
                return [row.run for row in await here.desk.runs(*asked, under_way=under_way)]  # type: ignore[arg-type]

            assert await found(2) == ["hers-2", "hers-1"]
            assert await found(2, "ada") == ["mine", "ended"]
            assert await found(2, "ada", under_way=True) == ["mine"]
            assert await found(10, under_way=True) == ["hers-2", "hers-1", "hers-0", "mine"]
            assert await found(10, "nobody") == []

    asyncio.run(scenario())


def test_news_of_what_changed(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            news = here.runs.news()
            assert [await anext(news), await anext(news)] == ["runs", "sites"]
            claim = await led(here, "run")
            assert await anext(news) == "runs"
            await here.runs.save(claim, Checkpoint(round=1, state=b""), None, [RunEvent(kind="x")])
            assert await anext(news) == "run:run"
            # the connection is cut: it listens again, and says that something may have been missed
            with psycopg.connect(stores.owner_url, autocommit=True) as owner:
                owner.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'cohortium_coordinator'"
                )
            async with asyncio.timeout(10):
                assert [await anext(news), await anext(news)] == ["runs", "sites"]
            await news.aclose()
            # what was idle is broken; one failure at most tells of it
            with suppress(Unavailable):
                await here.desk.runs()
            assert len(await here.desk.runs()) == 1

    asyncio.run(scenario())


def test_kills_of_the_database_in_the_middle_of_saves(stores: Stores, short_folder: Path) -> None:
    """Each save is wholly there or wholly not, and what was acknowledged is there."""
    base = short_folder / "shared" / "stores"
    places = servers.Places(base / "postgres", base / "sockets", base, servers.account())

    async def scenario() -> None:
        async with cleared(stores) as here:
            claim = await led(here, "run")
            acknowledged = 0
            done = asyncio.Event()

            async def save() -> None:
                nonlocal acknowledged
                number = 1
                while not done.is_set():
                    part = {f"p{number}": bytes([number % 256]) * 300_000}
                    state = Checkpoint(round=number, state=b"%d" % number, parts=part)
                    event = RunEvent(kind="round", facts={"number": number})
                    try:
                        await here.runs.save(claim, state, Applied(number=number, survivors=("a",)), [event])
                    except Unavailable:
                        await asyncio.sleep(0.01)
                        continue
                    acknowledged = number
                    number += 1

            async def one_more(than: int) -> bool:
                return acknowledged > than

            saving = asyncio.ensure_future(save())
            for _ in range(3):
                before = acknowledged
                await until(lambda before=before: one_more(before + 5))
                process = servers.postmaster(places)
                assert process is not None
                os.kill(process, signal.SIGKILL)
                await until(lambda before=before: one_more(before + 10))
            done.set()
            await saving

            async def back() -> bool:
                with suppress(Unavailable):
                    return bool(await here.desk.applied("run"))
                return False

            await until(back)
            numbers = [applied.number for applied in await here.desk.applied("run")]
            assert numbers == list(range(1, acknowledged + 1))
            rounds = [event.facts["number"] for event in await here.desk.events("run") if event.kind == "round"]
            assert rounds == numbers
            found = await checkpoint_of(here, "run")
            assert found is not None
            assert found.state == b"%d" % acknowledged
            assert found.parts == {f"p{acknowledged}": bytes([acknowledged % 256]) * 300_000}

    asyncio.run(scenario())


def test_a_killed_writer_leaves_nothing_half_done(stores: Stores) -> None:
    """A process dies in the middle of copying parts in; its run goes to another one with the checkpoint before."""
    script = """
import asyncio, os, sys
from cohortium.adapters import postgres
from cohortium.adapters.postgres_runs import PostgresRuns
from cohortium.coordinator.ports import Checkpoint
async def main():
    async with postgres.connected(sys.argv[1]) as database, postgres.connected(sys.argv[1], most=1) as heart:
        runs = PostgresRuns(database, heart)
        await runs.beat("child", "x")
        (claim,) = await runs.claim("child", 30, 1)
        await runs.save(claim, Checkpoint(round=1, state=b"whole", parts={"p": b"whole"}))
        print("saved", flush=True)
        for number in range(2, 10**6):
            state = b"n%d" % number
            await runs.save(claim, Checkpoint(round=number, state=state, parts={"p": state * 10**6}))
asyncio.run(main())
"""

    async def scenario() -> None:
        async with cleared(stores) as here:
            await submit(here, "run")
            child = subprocess.Popen([sys.executable, "-c", script, stores.database_url], stdout=subprocess.PIPE)
            assert child.stdout is not None
            assert await asyncio.to_thread(child.stdout.readline) == b"saved\n"
            child.kill()
            child.wait()
            child.stdout.close()
            found = await checkpoint_of(here, "run")
            assert found is not None
            part = found.parts["p"]
            assert part == (b"whole" if found.state == b"whole" else found.state * 10**6)

    asyncio.run(scenario())


def test_a_database_that_is_away_is_unavailable(fresh: Callable[[str], str]) -> None:
    async def scenario() -> None:
        nowhere = Stores("postgresql:///x?host=/nonexistent", "", "unix:///nonexistent/valkey.sock")
        async with world(nowhere) as here:
            for call in (
                here.desk.runs,
                lambda: here.runs.beat("a", "b"),
                lambda: here.runs.claim("a", 1, 1),
                here.enrolments.sites,
                lambda: here.bus.put("x", b""),
                lambda: here.bus.look(["x"]),
                lambda: here.bus.allow("x", 1, 1),
            ):
                with pytest.raises(Unavailable):
                    await call()

    asyncio.run(scenario())
