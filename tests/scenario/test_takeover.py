"""A run whose coordinator fails after every single message ends, to the last bit, as one whose coordinator does not."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from cohortium.bootstrap import descriptive, simulated_agents
from cohortium.coordinator import checkpoint as checkpoints
from cohortium.coordinator.checkpoint import freeze, held, milestone, thaw
from cohortium.coordinator.ports import Checkpoint
from cohortium.coordinator.rounds import (
    Failed,
    Finished,
    RoundClosed,
    RunState,
    enough,
    expel,
    lost,
    open_run,
    outstanding,
    step,
)
from cohortium.core import codec
from cohortium.core.errors import CohortiumError, ProtocolError, RunFailed
from cohortium.core.messages import (
    MOST_MISSED,
    Announcement,
    Endorsement,
    MaskedUpdate,
    OpenRound,
    Refusal,
    Reveal,
    decode_from_site,
    decode_to_site,
)
from cohortium.core.models import Network
from cohortium.core.protection import Aggregation
from cohortium.core.training import Averaging, Descent, Local, Server
from cohortium.plan import Plan, compile_study

from . import staging

NAMES, KEPT, ROOT, COORDINATOR = staging.NAMES, staging.KEPT, staging.ROOT, staging.COORDINATOR
Fate = Callable[[str, str, int], bool]
"""Whether a site is lost in a phase of a round."""
KINDS = {"keys": Announcement, "collect": MaskedUpdate, "endorse": Endorsement, "reveal": Reveal}


def nobody(site: str, phase: str, number: int) -> bool:
    return False


def unlucky(*losses: tuple[str, str, int]) -> Fate:
    return lambda site, phase, number: (site, phase, number) in losses


@dataclass
class Remembering:
    """An agent that says the same again when it is asked the same again, in whatever words, as a journal lets it."""

    agent: Any
    asked: list[bytes] = field(default_factory=list)
    said: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)

    def receive(self, data: bytes) -> list[bytes]:
        message = decode_to_site(data)
        key = type(message).__name__, getattr(message, "round", 0)
        if key not in self.said:
            self.asked.append(data)
            self.said[key] = self.agent.receive(data)
        return self.said[key]


@dataclass
class Store:
    """What outlasts a coordinator: the last checkpoint, and each large part once."""

    last: Checkpoint
    writes: list[tuple[str, int]] = field(default_factory=list)

    def save(self, checkpoint: Checkpoint) -> None:
        assert set(checkpoint.keep) <= self.last.parts.keys()
        parts = {name: self.last.parts[name] for name in checkpoint.keep} | dict(checkpoint.parts)
        self.writes += [(name, len(data)) for name, data in checkpoint.parts.items()]
        self.last = Checkpoint(round=checkpoint.round, state=checkpoint.state, parts=parts)


@dataclass
class Play:
    """A run in memory. With `fails`, its coordinator loses all it knows after every message that it hears at first."""

    plan: Plan
    fate: Fate = nobody
    fails: bool = False
    agents: dict[str, Remembering] = field(default_factory=dict)
    store: Store | None = None
    survivors: dict[int, tuple[str, ...]] = field(default_factory=dict)
    heard: dict[tuple[str, str, int], Any] = field(default_factory=dict)
    takeovers: int = 0
    ending: Any = None

    def __post_init__(self) -> None:
        self.agents = {name: Remembering(agent) for name, agent in simulated_agents(self.plan, KEPT, ROOT).items()}
        self.pinned = self.agents[NAMES[0]].agent.membership.pinned
        self.state, _ = open_run(self.plan, "run-1", COORDINATOR, self.pinned)
        self.store = Store(freeze(self.state))

    def go(self) -> "Play":
        while self.state.phase != "over":
            debts = outstanding(self.state)
            assert debts.keys() == self.state.waiting
            self.turn(next(iter(debts)), debts)
        return self

    def turn(self, site: str, debts: Any) -> None:
        """Says one site what it owes an answer to, and hears the answer."""
        phase, number = self.state.phase, self.state.number
        if self.fate(site, phase, number):
            self.take(*lost(self.state, site))
            return
        answers = [said for message in debts[site] for said in self.agents[site].receive(codec.encode(message))]
        assert len(answers) == 1
        message = decode_from_site(answers[0])
        self.take(*step(self.state, site, message))
        new = (site, phase, number) not in self.heard
        self.heard[site, phase, number] = message
        if self.fails and new and self.state.phase != "over":
            self.fail()

    def take(self, after: RunState, effects: list[Any]) -> None:
        before, self.state = self.state, after
        assert self.store is not None
        if milestone(before, after):
            self.store.save(freeze(after, held(self.store.last)))
        for effect in effects:
            if isinstance(effect, RoundClosed):
                assert self.survivors.setdefault(effect.number, effect.survivors) == effect.survivors
            elif isinstance(effect, Finished | Failed):
                self.ending = effect

    def fail(self) -> None:
        """Hands the run over to another coordinator, which also hears what comes twice and late."""
        assert self.store is not None
        self.takeovers += 1
        before, self.state = self.state, thaw(self.store.last, self.plan, COORDINATOR, self.pinned)
        expected = {"reveal": "endorse"}.get(before.phase, before.phase)
        if self.state.chosen:
            # the survivors were kept and their sum was not: they contribute once more
            assert (expected, before.tally.survivors if before.tally else ()) == ("endorse", self.state.chosen)
            expected = "collect"
        assert (self.state.phase, self.state.number) == (expected, before.number)
        # with every part kept, a checkpoint of what was thawed is the one that it was thawed from
        again = freeze(self.state, held(self.store.last))
        assert (again.state, set(again.keep)) == (self.store.last.state, set(self.store.last.parts))
        for (site, phase, number), message in self.heard.items():
            if (phase, number) != (self.state.phase, self.state.number):
                with pytest.raises(ProtocolError):
                    step(self.state, site, message)

    def requests(self, site: str) -> list[bytes]:
        """What the site was asked, each request in its first words."""
        return self.agents[site].asked


def study(protocol: str = "masking", dropouts: int = 1) -> Any:
    return staging.heart(Aggregation(protocol=protocol, dropouts=dropouts))  # type: ignore[arg-type]


def network(optimiser: str = "adam", dropouts: int = 1) -> Any:
    training = Averaging(rounds=4, local=Local(steps=3), server=Server(optimiser=optimiser))  # type: ignore[arg-type]
    return staging.heart(Aggregation(dropouts=dropouts), model=Network(hidden=(4,)), training=training)


FATES: dict[str, Fate] = {
    "nobody": nobody,
    "keys": unlucky(("zurich", "keys", 0)),
    "collect": unlucky(("budapest", "collect", 1), ("zurich", "collect", 2), ("zurich", "collect", 3)),
    "endorse": unlucky(("cleveland", "endorse", 1), ("zurich", "endorse", 3)),
    "reveal": unlucky(("budapest", "reveal", 2), ("long-beach", "reveal", 3)),
    "each": unlucky(("budapest", "collect", 2), ("cleveland", "endorse", 3), ("zurich", "reveal", 4)),
}


KEEPING = {"parts apart": (0, 1 << 20), "parts inside": (1 << 16, 1 << 20), "sums asked for again": (0, 0)}


@pytest.fixture(params=KEEPING)
def small(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, bound in zip(("_SMALL", "_LONG"), KEEPING[request.param], strict=True):
        monkeypatch.setattr(checkpoints, name, bound)


def same_end(made: Any, fate: Fate) -> tuple[Play, Play]:
    plan = compile_study(made)
    quiet, shaken = Play(plan, fate).go(), Play(plan, fate, fails=True).go()
    assert isinstance(quiet.ending, Finished), quiet.ending
    assert codec.encode(shaken.state.learned) == codec.encode(quiet.state.learned)
    # a network's weights are in what was learned
    assert plan.study.model.kind == "network" or shaken.ending == quiet.ending
    assert shaken.survivors == quiet.survivors
    for site in NAMES:
        assert shaken.requests(site) == quiet.requests(site)
    answers = len(quiet.heard)
    # all but the last message, which ends the run
    assert shaken.takeovers == answers - 1 and not quiet.takeovers
    return quiet, shaken


class TestTakeover:
    @pytest.mark.parametrize("fate", FATES)
    def test_after_every_message_of_a_run_that_may_lose_a_site(self, fate: str, small: None) -> None:
        same_end(study(), FATES[fate])

    @pytest.mark.parametrize("fate", ["nobody", "each"])
    def test_after_every_message_of_an_encrypted_run(self, fate: str) -> None:
        pytest.importorskip("numba")
        same_end(study("rlwe"), FATES[fate])

    @pytest.mark.parametrize("protocol", ["masking", "rlwe"])
    def test_after_every_message_of_a_run_that_needs_all(self, protocol: str) -> None:
        if protocol == "rlwe":
            pytest.importorskip("numba")
        same_end(study(protocol, 0), nobody)

    def test_of_a_description(self) -> None:
        same_end(descriptive(study()), FATES["collect"])

    @pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
    def test_of_a_network(self, optimiser: str, small: None) -> None:
        pytest.importorskip("torch")
        same_end(network(optimiser), FATES["collect"])


class TestWhatIsWritten:
    def test_no_part_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checkpoints, "_SMALL", 0)
        quiet, _ = same_end(study(), FATES["collect"])
        assert quiet.store is not None
        names = [name for name, _ in quiet.store.writes]
        assert len(names) == len(set(names))
        assert names.count("broadcast.1") == names.count("broadcast.2") == names.count("learned.3") == 1
        assert [name for name in names if name.startswith("broadcast")] == ["broadcast.1", "broadcast.2", "broadcast.3"]

    def test_a_network_trained_without_moments_writes_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("torch")
        monkeypatch.setattr(checkpoints, "_SMALL", 0)
        sizes = {}
        for optimiser in ("sgd", "momentum", "adam"):
            store = Play(compile_study(network(optimiser))).go().store
            assert store is not None
            sizes[optimiser] = dict(store.writes)["learned.3"]
        parameters = (sizes["adam"] - sizes["momentum"]) // 8
        assert abs(sizes["momentum"] - sizes["sgd"] - 8 * parameters) < 8
        assert sizes["sgd"] < 8 * parameters + 1500

    def test_a_site_that_missed_too_much_takes_nothing_along(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checkpoints, "_SMALL", 0)
        fate = unlucky(*(("zurich", "collect", number) for number in range(1, MOST_MISSED + 6)))
        _, shaken = same_end(staging.heart(Aggregation(dropouts=1), training=Descent(rounds=MOST_MISSED + 4)), fate)
        assert shaken.store is not None
        names = [name for name, _ in shaken.store.writes if name.startswith("broadcast")]
        assert names == [f"broadcast.{number}" for number in range(1, MOST_MISSED + 1)]
        assert not any("OpenRound" in repr(data[:40]) for data in shaken.requests("zurich"))


class TestSumsThatAreAskedForAgain:
    def taken_over(self, monkeypatch: pytest.MonkeyPatch, fate: Fate = nobody) -> Play:
        """Returns a run whose coordinator was replaced after the survivors of its second round were told."""
        monkeypatch.setattr(checkpoints, "_LONG", 0)
        play = Play(compile_study(study()), fate)
        while (play.state.phase, play.state.number) != ("endorse", 2):
            debts = outstanding(play.state)
            play.turn(next(iter(debts)), debts)
        play.fail()
        assert play.state.phase == "collect"
        return play

    def test_only_the_same_sum_is_opened(self, monkeypatch: pytest.MonkeyPatch) -> None:
        play = self.taken_over(monkeypatch)
        for left in (3, 2, 1, 0):
            assert not enough(play.state) or not left
            if left:
                debts = outstanding(play.state)
                play.turn(next(iter(debts)), debts)
        after, effects = lost(play.state, *play.state.waiting)
        assert after.phase == "over" and isinstance(effects[-1], Failed)
        assert "did not contribute the same to it again" in str(effects[-1].error)

    def test_whoever_was_not_in_it_is_not_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        play = self.taken_over(monkeypatch, unlucky(("budapest", "collect", 2)))
        assert "budapest" not in play.state.waiting and len(play.state.waiting) == 3
        play.go()
        assert isinstance(play.ending, Finished)
        assert "budapest" not in play.survivors[2] and "budapest" in play.survivors[3]

    def test_a_survivor_that_left_ends_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        play = self.taken_over(monkeypatch)
        play.take(*expel(play.state, "cleveland", "revoked"))
        play.go()
        assert isinstance(play.ending, Failed) and "and cleveland did not" in str(play.ending.error)


class TestCheckpoints:
    def test_of_another_study_or_without_a_part_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checkpoints, "_SMALL", 0)
        play = Play(compile_study(study()))
        while play.state.phase == "keys":
            debts = outstanding(play.state)
            play.turn(next(iter(debts)), debts)
        good = freeze(play.state)
        with pytest.raises(ProtocolError, match="another study"):
            thaw(good, compile_study(study(dropouts=0)), COORDINATOR, play.pinned)
        bare = Checkpoint(round=1, state=good.state)
        with pytest.raises(ProtocolError, match=r"lacks its part 'learned.1'"):
            thaw(bare, play.plan, COORDINATOR, play.pinned)
        for cut in range(0, len(good.state), 7):
            with pytest.raises(ProtocolError):
                thaw(Checkpoint(round=1, state=good.state[:cut]), play.plan, COORDINATOR, play.pinned)

    def test_that_would_be_broadcast_in_other_bytes_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checkpoints, "_SMALL", 0)
        play = Play(compile_study(study()))
        while play.state.number < 3:
            debts = outstanding(play.state)
            play.turn(next(iter(debts)), debts)
        good, algorithm = freeze(play.state), play.plan.algorithm
        other = Checkpoint(round=3, state=good.state, parts={"learned.3": algorithm.freeze(algorithm.init())})
        with pytest.raises(ProtocolError, match="other bytes than sites have heard"):
            thaw(other, play.plan, COORDINATOR, play.pinned)

    def test_of_a_run_that_is_over_are_not_made(self) -> None:
        play = Play(compile_study(descriptive(study()))).go()
        with pytest.raises(ValueError, match="is over"):
            freeze(play.state)
        assert outstanding(play.state) == {}
        assert not enough(play.state)


class TestEnough:
    @pytest.mark.parametrize("phase", KINDS)
    def test_is_the_threshold_in_every_phase(self, phase: str) -> None:
        play = Play(compile_study(study()))
        while play.state.phase != phase:
            debts = outstanding(play.state)
            play.turn(next(iter(debts)), debts)
        for answered in range(3):
            assert not enough(play.state), answered
            after = play.state
            for site in sorted(play.state.waiting):
                after, effects = lost(after, site)
            assert isinstance(effects[-1], Failed)
            debts = outstanding(play.state)
            play.turn(next(iter(debts)), debts)
        assert enough(play.state)
        (left,) = play.state.waiting
        after, _ = lost(play.state, left)
        assert after.phase != "over"


class TestExpelled:
    @pytest.mark.parametrize("phase", KINDS)
    def test_a_site_leaves_at_once_and_is_not_asked_again(self, phase: str) -> None:
        play = Play(compile_study(study()))
        while play.state.phase != phase:
            debts = outstanding(play.state)
            play.turn(next(iter(debts)), debts)
        play.take(*expel(play.state, "cleveland", "its certificate was revoked"))
        assert "cleveland" not in play.state.waiting
        before = len(play.requests("cleveland"))
        with pytest.raises(ProtocolError, match="left the run"):
            step(play.state, "cleveland", Refusal("run-1", "cleveland", "late"))
        play.go()
        assert isinstance(play.ending, Finished)
        assert len(play.requests("cleveland")) == before
        assert expel(play.state, "zurich", "late") == (play.state, [])

    def test_a_site_that_has_endorsed_is_not_waited_for(self) -> None:
        play = Play(compile_study(study()))
        while play.state.phase != "endorse" or len(play.state.waiting) > 3:
            debts = outstanding(play.state)
            play.turn(next(iter(debts)), debts)
        assert play.state.tally is not None
        (first,) = play.state.tally.tags
        play.take(*expel(play.state, first, "revoked"))
        play.go()
        assert isinstance(play.ending, Finished)

    def test_too_few_are_left(self) -> None:
        play = Play(compile_study(study()))
        play.take(*expel(play.state, "cleveland", "revoked"))
        play.take(*expel(play.state, "zurich", "revoked"))
        assert isinstance(play.ending, Failed)
        assert isinstance(play.ending.error, CohortiumError)
        assert "site 'cleveland' takes no part: revoked" in str(play.ending.error)

    def test_those_that_left_stay_away_after_a_takeover(self) -> None:
        play = Play(compile_study(study()))
        play.take(*expel(play.state, "cleveland", "revoked"))
        state = thaw(freeze(play.state), play.plan, COORDINATOR, play.pinned)
        assert state.gone == {"cleveland": "revoked"}
        assert state.waiting == set(NAMES) - {"cleveland"}


class TestOutstanding:
    def test_a_site_that_never_got_the_key_set_gets_it_with_its_first_round(self) -> None:
        play = Play(compile_study(study()), unlucky(("zurich", "collect", 1), ("zurich", "collect", 2)))
        while play.state.number < 3:
            debts = outstanding(play.state)
            play.turn(next(iter(debts)), debts)
        debts = outstanding(play.state)
        assert [type(message).__name__ for message in debts["zurich"]] == ["KeySet", "OpenRound"]
        assert [type(message).__name__ for message in debts["budapest"]] == ["OpenRound"]
        opening = debts["zurich"][1]
        assert isinstance(opening, OpenRound) and len(opening.missed) == 2
        play.go()
        assert isinstance(play.ending, Finished)
        assert "zurich" in play.survivors[3]

    def test_a_run_that_no_longer_has_enough_ends(self) -> None:
        play = Play(compile_study(study()), unlucky(("zurich", "endorse", 1), ("budapest", "endorse", 1))).go()
        assert isinstance(play.ending, Failed) and isinstance(play.ending.error, RunFailed)
