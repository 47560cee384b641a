"""Rounds that are buffers: what is summed, what is late, and what neither crashes nor lies change about it."""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cohortium.bootstrap import simulated_agents
from cohortium.coordinator.checkpoint import freeze, thaw
from cohortium.coordinator.rounds import (
    Broadcast,
    Failed,
    Finished,
    RoundClosed,
    Send,
    lost,
    open_run,
    outstanding,
    step,
)
from cohortium.core import codec
from cohortium.core.document import document, parse, study_id
from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.messages import (
    KeySet,
    MaskedUpdate,
    Noted,
    OpenRound,
    Refusal,
    Survivors,
    decode_from_site,
    decode_to_site,
)
from cohortium.core.models import Network
from cohortium.core.protection import Aggregation, Compression, Privacy
from cohortium.core.random import Randomness
from cohortium.core.study import Sites
from cohortium.core.training import Asynchronous, Averaging, Local, Server
from cohortium.engines import local
from cohortium.guarantees import protection
from cohortium.learning.evaluation import evaluate
from cohortium.learning.fedavg import FedAvgBroadcast
from cohortium.plan import Plan, compile_study
from cohortium.secagg.stream import PLAIN
from cohortium.site import snapshot
from cohortium.site.cohort import load
from cohortium.site.ports import Frozen
from cohortium.site.session import Asked, Trained
from cohortium.site.session import step as site_step

from . import test_takeover as takeover

pytest.importorskip("torch")
staging, NAMES, KEPT, ROOT = takeover.staging, takeover.NAMES, takeover.KEPT, takeover.ROOT
SEED = 5
EVEN = dict.fromkeys(NAMES, 1.0)
UNEVEN = {"budapest": 1.0, "cleveland": 1.9, "long-beach": 3.1, "zurich": 10.0}
SLOW = EVEN | {"budapest": 1.03, "long-beach": 0.96, "zurich": 10.07}


def study(buffer: int | None = 3, dropouts: int = 1, rounds: int = 6, **other: Any) -> Any:
    asynchronous = None if buffer is None else Asynchronous(buffer=buffer, **other.pop("how", {}))
    training = Averaging(
        rounds=rounds,
        local=other.pop("local", Local(steps=3, batch_size=16, learning_rate=0.1)),
        server=other.pop("server", Server()),
        clip=other.pop("clip", None),
        asynchronous=asynchronous,
    )
    aggregation = other.pop("aggregation", Aggregation(dropouts=dropouts))
    return staging.heart(aggregation, model=Network(hidden=(4,)), training=training, **other)


PLAN = compile_study(study())


@dataclass
class Clockwork:
    """A run in memory, in which each site's training takes its own time, and all else takes none."""

    plan: Plan
    speeds: dict[str, float]
    deaf: Callable[[str, Any], bool] = lambda site, message: False
    after: Callable[["Clockwork"], None] = lambda play: None
    now: float = 0.0
    trained: list[tuple[str, int]] = field(default_factory=list)
    contributed: dict[tuple[str, int], int] = field(default_factory=dict)
    survivors: dict[int, tuple[str, ...]] = field(default_factory=dict)
    refused: list[Any] = field(default_factory=list)
    heard: list[Any] = field(default_factory=list)
    ending: Any = None

    def __post_init__(self) -> None:
        self.agents = simulated_agents(self.plan, KEPT, ROOT)
        for agent in self.agents.values():
            agent.compiler = lambda _: self.plan
        pinned = self.agents[NAMES[0]].membership.pinned
        self.state, effects = open_run(self.plan, "run-1", staging.COORDINATOR, pinned, seed=SEED)
        self.post: deque[tuple[str, Any]] = deque()
        self.work: list[tuple[float, int, str, Any]] = []
        self.learned: dict[int, Any] = {}
        self.do(effects)

    def session(self, site: str) -> Any:
        return self.agents[site]._sessions["run-1"]

    def go(self, until: Callable[["Clockwork"], bool] = lambda play: False) -> "Clockwork":
        while self.ending is None and not until(self):
            # what ends at one moment ends before anything that follows from it arrives
            if self.post and not (self.work and self.work[0][0] <= self.now):
                self.deliver(*self.post.popleft())
            elif self.work:
                self.now, _, site, work = heapq.heappop(self.work)
                self.answer(site, self.agents[site].finish(work, work.done()))
            else:
                raise AssertionError("nothing happens any more")
            self.after(self)
        return self

    def deliver(self, site: str, message: Any) -> None:
        if self.deaf(site, message):
            if not isinstance(message, KeySet):
                self.take(*lost(self.state, site))
            return
        self.answer(site, self.agents[site].take(codec.encode(message)))

    def answer(self, site: str, taken: Any) -> None:
        for data in taken.answers:
            message = decode_from_site(data)
            self.heard.append(message)
            if isinstance(message, MaskedUpdate) and self.plan.buffers(message.round):
                spare = self.session(site).spare
                if spare is not None:
                    assert spare.sent == message.round
                    assert self.contributed.get((site, message.round)) is None
                    self.contributed[site, message.round] = spare.round
            try:
                self.take(*step(self.state, site, message))
            except ProtocolError as error:
                self.refused.append((message, str(error)))
        if taken.work is not None:
            self.trained.append((site, taken.work.train.asked.round))
            # ties go by name
            place = NAMES.index(site)
            heapq.heappush(self.work, (self.now + self.speeds[site], place, site, taken.work))

    def take(self, state: Any, effects: Any) -> None:
        self.state = state
        self.do(effects)

    def do(self, effects: Any) -> None:
        for effect in effects:
            match effect:
                case Broadcast(message, sites):
                    self.post.extend((site, message) for site in sites)
                case Send(messages):
                    self.post.extend(messages.items())
                case RoundClosed():
                    self.survivors[effect.number] = effect.survivors
                    self.learned[effect.number] = self.state.learned
                case Finished() | Failed():
                    self.ending = effect

    @property
    def summed(self) -> list[tuple[str, int, int]]:
        """Site, the round that its work began in, and the round in whose sum it is."""
        return [
            (site, self.contributed.get((site, number), number), number)
            for number, sites in sorted(self.survivors.items())
            for site in sites
            if self.plan.buffers(number)
        ]


def reference(plan: Plan, play: Clockwork) -> tuple[list[tuple[str, int, int]], Any]:
    """FedBuff in plain numpy, with a clock of its own; what the first phase fitted is taken over."""
    fitted = play.learned[1].fitted
    algorithm = plan.algorithm.second(fitted)  # type: ignore[attr-defined]
    training, buffer = plan.study.training, plan.buffer
    tables = {site: load(plan, KEPT[site]).table for site in NAMES}
    drawn = {site: Randomness.of_seed(SEED).child("training", site).child("second") for site in NAMES}
    x, now = algorithm.init().parameters, 0.0
    sums, done, late, version, clock = [], {}, {}, {}, []  # type: ignore[var-annotated]
    for number in range(training.rounds):
        broadcast = FedAvgBroadcast(number, x.astype(np.float32), np.zeros(0, np.float32))
        inside: list[tuple[str, int]] = []
        for site in NAMES:
            if site in late and number - late[site] <= buffer.latest:
                inside.append((site, late.pop(site)))
            elif site not in {name for _, _, name in clock}:
                late.pop(site, None)
                version[site] = number
                done[site, number] = algorithm.local(broadcast, tables[site], {}, drawn[site])[0]
                heapq.heappush(clock, (now + play.speeds[site], NAMES.index(site), site))
        while len(inside) < buffer.buffer:
            now, _, site = heapq.heappop(clock)
            if number - version[site] <= buffer.latest:
                inside.append((site, version[site]))
                continue
            version[site] = number
            done[site, number] = algorithm.local(broadcast, tables[site], {}, drawn[site])[0]
            heapq.heappush(clock, (now + play.speeds[site], NAMES.index(site), site))
        late |= dict(inside[buffer.buffer :])
        while clock and clock[0][0] == now:
            _, _, site = heapq.heappop(clock)
            late[site] = version[site]
        inside = inside[: buffer.buffer]
        weight = {one: (1.0 + number - one[1]) ** -buffer.staleness for one in inside}
        change = sum(weight[one] * done[one]["update"] for one in inside)
        x = x + change / sum(weight[one] * done[one]["weight"] for one in inside)
        sums += [(site, began + 2, number + 2) for site, began in sorted(inside)]
    return sums, x


def exactly_once(play: Clockwork) -> None:
    """Each result that was trained is in one sum, or too old for any, or still on its way at the end."""
    summed = [(site, began) for site, began, _ in play.summed]
    assert len(summed) == len(set(summed))
    latest = play.plan.buffer.latest  # type: ignore[union-attr]
    for site, began in play.trained:
        if not play.plan.buffers(began) or (site, began) in summed:
            continue
        later = [other for name, other in play.trained if name == site and other > began]
        assert not later or min(later) - began > latest, (site, began)


class TestSums:
    @pytest.mark.parametrize("dropouts", [0, 1])
    def test_of_all_sites_without_delays_are_those_of_synchronous_averaging(self, dropouts: int) -> None:
        waiting = compile_study(study(None, dropouts))
        buffers = replace(compile_study(study(4, dropouts)), algorithm=waiting.algorithm)
        one, other = Clockwork(waiting, UNEVEN).go(), Clockwork(buffers, UNEVEN).go()
        assert codec.encode(one.state.learned) == codec.encode(other.state.learned)
        assert isinstance(other.ending, Finished) and not other.refused

    @pytest.mark.parametrize("speeds", [EVEN, UNEVEN, SLOW], ids=["even", "uneven", "one slow"])
    @pytest.mark.parametrize(("buffer", "dropouts", "latest"), [(3, 1, 8), (3, 1, 1), (4, 1, 8)])
    def test_are_those_of_fedbuff(self, speeds: Any, buffer: int, dropouts: int, latest: int) -> None:
        plan = compile_study(study(buffer, dropouts, rounds=12, how={"latest": latest, "staleness": 0.7}))
        play = Clockwork(plan, speeds).go()
        assert isinstance(play.ending, Finished), play.ending
        sums, parameters = reference(plan, play)
        assert play.summed == sums
        np.testing.assert_allclose(play.state.learned.second.parameters, parameters, atol=2e-6)
        exactly_once(play)

    def test_weigh_late_work_less(self) -> None:
        how = Asynchronous(buffer=3, staleness=0.5)
        assert [how.weight(late) for late in (0, 3, 8)] == [1.0, 0.5, 1 / 3]
        assert Asynchronous(buffer=3, staleness=0).weight(5) == 1.0

    def test_drop_what_is_too_old(self) -> None:
        plan = compile_study(study(rounds=14, how={"latest": 2}))
        play = Clockwork(plan, SLOW | {"zurich": 4.5}).go()
        assert "zurich" not in {site for site, began, at in play.summed}
        assert len([site for site, _ in play.trained if site == "zurich"]) > 3
        exactly_once(play)

    def test_of_compressed_updates(self) -> None:
        aggregation = Aggregation(dropouts=1, compression=Compression(levels=8, norm=2.0))
        play = Clockwork(compile_study(study(aggregation=aggregation)), UNEVEN).go()
        assert isinstance(play.ending, Finished)
        exactly_once(play)

    @settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.lists(st.floats(1, 10), min_size=4, max_size=4),
        st.integers(0, 4),
        st.sampled_from([3, 4]),
        st.sets(st.tuples(st.sampled_from(NAMES), st.sampled_from(["OpenRound", "Survivors"]), st.integers(2, 7))),
    )
    def test_hold_each_result_once_whatever_is_slow_or_lost(
        self, speeds: Any, latest: int, buffer: int, gone: Any
    ) -> None:
        rounds = {number for _, _, number in gone}
        # one site a round may be lost
        gone = {min(one for one in gone if one[2] == number) for number in rounds}

        def deaf(site: str, message: Any) -> bool:
            return (site, type(message).__name__, getattr(message, "round", 0)) in gone

        plan = compile_study(study(buffer, rounds=6, how={"latest": latest}))
        play = Clockwork(plan, dict(zip(NAMES, speeds, strict=True)), deaf).go()
        assert isinstance(play.ending, Finished | Failed)
        exactly_once(play)


def test_a_site_that_missed_the_survivors_is_told_in_the_next_round() -> None:
    plan = compile_study(study(4, 1, rounds=5))

    def deaf(site: str, message: Any) -> bool:
        return isinstance(message, Survivors) and (site, message.round) == ("budapest", 3)

    play = Clockwork(plan, UNEVEN, deaf).go(lambda play: play.state.number == 4)
    told = outstanding(play.state)
    assert told["budapest"][-1].summed == 3 and told["zurich"][-1].summed == 0
    again = thaw(freeze(play.state), plan, staging.COORDINATOR, play.agents[NAMES[0]].membership.pinned)
    assert outstanding(again) == told
    assert play.session("budapest").spare.sent == 3
    play.go(lambda play: ("budapest", 4) in play.trained)
    assert ("budapest", 4) in play.trained
    play.go()
    assert isinstance(play.ending, Finished)
    assert {site for site, began, at in play.summed if at == 3} == set(NAMES)
    exactly_once(play)


class TestAgents:
    def test_note_what_opens_while_they_train_and_contribute_to_the_newest(self) -> None:
        play = Clockwork(PLAN, SLOW).go(lambda play: play.state.number == 6)
        zurich = [message for message in play.heard if message.site == "zurich" and getattr(message, "round", 0) > 1]
        assert zurich[:4] == [Noted("run-1", "zurich", number) for number in (2, 3, 4, 5)]
        assert not play.state.missed

    def test_that_are_frozen_after_every_message_go_on_as_if_they_had_not_been(self) -> None:
        def frozen(play: Clockwork) -> None:
            for agent in play.agents.values():
                for run, session in agent._sessions.items():
                    if session.plan is None or session.asked is not None:
                        continue
                    parts = snapshot.freeze(session)
                    agent._sessions[run] = snapshot.thaw(parts, agent.membership, lambda _: play.plan)

        plan = compile_study(study(rounds=10))
        quiet, shaken = Clockwork(plan, UNEVEN).go(), Clockwork(plan, UNEVEN, after=frozen).go()
        assert any(began < at for _, began, at in quiet.summed)
        assert list(map(codec.encode, shaken.heard)) == list(map(codec.encode, quiet.heard))
        assert codec.encode(shaken.state.learned) == codec.encode(quiet.state.learned)

    def test_keep_late_work_as_a_part_that_is_written_once(self) -> None:
        play = Clockwork(PLAN, EVEN).go(lambda play: play.state.number == 3 and not play.post)
        late = next(site for site in NAMES if site not in play.survivors[2])
        before = play.session(late)
        assert before.spare is not None and before.spare.round == 2
        assert snapshot.SPARE in snapshot.freeze(before).parts
        assert snapshot.SPARE not in snapshot.freeze(before, before).parts
        none = msgspec.structs.replace(before, spare=None)
        assert snapshot.freeze(none, before).parts == {snapshot.SPARE: b""}
        again = snapshot.thaw(
            Frozen(snapshot.freeze(before).core, snapshot.freeze(before).parts), before.membership, lambda _: PLAN
        )
        assert (again.spare.round, again.spare.sent) == (before.spare.round, before.spare.sent)

    def test_that_train_at_once_say_only_what_they_contribute(self) -> None:
        play = Clockwork(PLAN, EVEN).go(lambda play: play.state.number == 2)
        site, message = next((site, message) for site, message in play.post if isinstance(message, OpenRound))
        (answer,) = play.agents[site].receive(codec.encode(message))
        assert isinstance(decode_from_site(answer), MaskedUpdate)


class TestTakeover:
    @pytest.mark.parametrize("fate", ["nobody", "collect", "keys"])
    @pytest.mark.parametrize("buffer", [3, 4])
    def test_after_every_message(self, fate: str, buffer: int) -> None:
        takeover.same_end(study(buffer, 1, rounds=4), takeover.FATES[fate])

    def test_asks_those_who_noted_again(self) -> None:
        play = Clockwork(PLAN, SLOW).go(
            lambda play: play.state.number == 3 and play.state.phase == "collect" and "zurich" in play.state.noted
        )
        before = outstanding(play.state)
        assert "zurich" in before
        again = thaw(freeze(play.state), PLAN, staging.COORDINATOR, play.agents[NAMES[0]].membership.pinned)
        assert again.waiting == set(NAMES)
        assert outstanding(again)["zurich"][-1] == before["zurich"][-1]


class TestLies:
    def ready(self) -> tuple[Clockwork, OpenRound]:
        """A run in its third round, in which one site works for the second; what that site was told last."""
        play = Clockwork(PLAN, SLOW).go(
            lambda play: play.state.number == 3 and "zurich" in play.state.noted and not play.post
        )
        return play, outstanding(play.state)["zurich"][-1]  # type: ignore[return-value]

    def say(self, play: Clockwork, message: Any) -> Any:
        return play.agents["zurich"].take(codec.encode(message))

    def test_no_round_is_opened_twice_or_backwards_so_nothing_is_early(self) -> None:
        play, told = self.ready()
        for number in (1, 2, 3):
            taken = self.say(play, msgspec.structs.replace(told, round=number))
            assert taken.answers == [] and taken.work is None
        assert play.session("zurich").heard == 3 and play.session("zurich").asked.round == 2

    @pytest.mark.parametrize("number", [5, 8, 1_000_000])
    def test_no_round_is_left_out(self, number: int) -> None:
        play, told = self.ready()
        (answer,) = self.say(play, msgspec.structs.replace(told, round=number)).answers
        said = decode_from_site(answer)
        assert isinstance(said, Refusal) and "out of order" in said.reason

    def test_what_no_honest_coordinator_broadcasts_ends_the_run_and_its_work(self) -> None:
        play, told = self.ready()
        _, _, _, work = next(one for one in play.work if one[2] == "zurich")
        (answer,) = self.say(play, msgspec.structs.replace(told, round=4)).answers
        assert isinstance(decode_from_site(answer), Refusal)
        assert play.agents["zurich"].finish(work, work.done()).answers == []

    def test_work_is_finished_once_and_contributed_once_to_a_round(self) -> None:
        play, _ = self.ready()
        _, _, _, work = next(one for one in play.work if one[2] == "zurich")
        done = work.done()
        agent = play.agents["zurich"]
        (answer,) = agent.finish(work, done).answers
        said = decode_from_site(answer)
        assert isinstance(said, MaskedUpdate) and said.round == 3
        for _ in range(2):
            assert agent.finish(work, done).answers == []
        session = play.session("zurich")
        with pytest.raises(ProtocolError, match="nobody asked"):
            site_step(session, Trained(Asked(9, None, b"", ()), done.statistics, {}))

    def test_a_survivor_set_of_a_round_that_it_did_not_contribute_to_is_refused(self) -> None:
        play, _ = self.ready()
        forged = Survivors("run-1", 3, NAMES, bytes(64), ())
        (answer,) = self.say(play, forged).answers
        assert isinstance(decode_from_site(answer), Refusal)

    def test_a_late_contribution_is_refused_and_its_site_is_not(self) -> None:
        play = Clockwork(compile_study(study(rounds=8)), EVEN).go()
        assert play.refused and not play.state.gone
        assert all(isinstance(message, MaskedUpdate) for message, _ in play.refused)
        assert all(play.survivors[number] for number in play.survivors)
        exactly_once(play)

    def test_a_site_cannot_contribute_twice_to_a_buffer(self) -> None:
        play = Clockwork(PLAN, UNEVEN).go(
            lambda play: play.state.number == 2 and bool(play.state.tally and play.state.tally.sealed)
        )
        said = next(one for one in play.heard if isinstance(one, MaskedUpdate) and one.round == 2)
        with pytest.raises(ProtocolError, match="nothing more is expected"):
            step(play.state, said.site, said)


class TestSimulated:
    def played(self, plan: Plan, seed: int = SEED) -> Any:
        agents = simulated_agents(plan, KEPT, ROOT)
        return local.run(plan, agents, "run", lambda: 0.0, staging.COORDINATOR, PLAIN, seed=seed)

    def test_each_site_is_late_now_and_then_and_in_the_next_buffer(self) -> None:
        plan = compile_study(study(rounds=12))
        one, again, other = self.played(plan), self.played(plan), self.played(plan, 6)
        sets = [record.survivors for record in one.rounds]
        assert sets == [record.survivors for record in again.rounds] != [record.survivors for record in other.rounds]
        assert one.outcome.to_bytes() == again.outcome.to_bytes()
        assert sets[0] == NAMES and all(len(chosen) == 3 for chosen in sets[1:])
        for number in range(1, len(sets) - 1):
            (late,) = set(NAMES) - set(sets[number])
            assert late in sets[number + 1]

    def test_is_nearly_as_good_with_a_slow_site(self) -> None:
        scores = []
        for buffer, speeds in ((None, SLOW), (3, SLOW)):
            made = study(buffer, rounds=60, local=Local(steps=10, batch_size=32, learning_rate=0.1))
            play = Clockwork(compile_study(made), speeds).go()
            assert isinstance(play.ending, Finished)
            model, found, true = play.ending.outcome, [], []
            for site in NAMES:
                table = load(play.plan, KEPT[site]).table
                found.append(model.expect(table))
                true.append(np.asarray(table.target))
            scores.append((evaluate(np.concatenate(true), np.concatenate(found)).auc, play.now))
        (waiting, long), (buffered, short) = scores
        assert abs(waiting - buffered) < 0.01
        assert short < long / 5


class TestOffered:
    @pytest.mark.parametrize(
        ("made", "reason"),
        [
            ({"buffer": 3, "dropouts": 0}, "a sum over fewer than 4 of 4 sites stays closed"),
            ({"buffer": 5}, "set a buffer from 3 to 4"),
            (
                {"privacy": Privacy(unit="patient", epsilon=8.0, delta=1e-5), "clip": 1.0},
                "neither the ledger nor the fixed divisor",
            ),
            ({"clip": 1.0}, "neither the ledger nor the fixed divisor"),
            ({"sites": Sites(include=NAMES, per_round=4)}, "remove one of them"),
            ({"buffer": 4, "dropouts": 0, "local": Local(scaffold=True)}, "mix control variates"),
            ({"aggregation": Aggregation(protocol="rlwe", dropouts=1)}, "is offered with masks"),
        ],
    )
    def test_what_is_not(self, made: Any, reason: str) -> None:
        with pytest.raises(StudyError, match=reason):
            compile_study(study(**made))

    def test_left_out_it_changes_no_study(self) -> None:
        plain = study(None)
        assert "asynchronous" not in document(plain)["training"]
        assert study_id(parse(document(study()))) == study_id(study()) != study_id(plain)

    def test_is_told_the_steward(self) -> None:
        assert "the first 3 of 4 hospitals" in dict(protection(PLAN))["Asynchronous"]
        assert "Asynchronous" not in dict(protection(compile_study(study(None))))


def test_messages_without_the_new_key_are_those_of_before() -> None:
    opened = decode_to_site(codec.encode({"type": "OpenRound", "run": "r", "round": 1, "broadcast": b"x"}))
    assert isinstance(opened, OpenRound) and opened.summed == 0
