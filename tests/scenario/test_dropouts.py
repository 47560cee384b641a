"""Whole studies in which sites are lost: the answer over those that stayed, or a clear end and no answer."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cohortium.bootstrap import coordinator_key, descriptive, example_sites, simulate, simulated_agents
from cohortium.coordinator.rounds import Finished
from cohortium.core.errors import CohortiumError, RunFailed
from cohortium.core.messages import (
    MOST_MISSED,
    Announcement,
    CloseRun,
    Endorsed,
    Endorsement,
    KeySet,
    MaskedUpdate,
    OpenRound,
    OpenRun,
    Refusal,
    Reveal,
    Survivors,
)
from cohortium.core.models import Descriptive, Penalty, Regression
from cohortium.core.protection import Aggregation
from cohortium.core.random import Randomness
from cohortium.engines import local
from cohortium.plan import Plan, compile_study


def load_staging() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scenario_staging", Path(__file__).with_name("staging.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


staging = load_staging()
NAMES, KEPT = staging.NAMES, staging.KEPT
STUDY = staging.heart()
PLAN = compile_study(STUDY)
CONTRIBUTION = (OpenRound, MaskedUpdate)
OPENING = (Survivors, Endorsement, Endorsed, Reveal)


def drop(*losses: tuple[str, type, int]) -> Callable[[str, Any], bool]:
    """Loses the given messages: of a site, of a kind, in a round (0: whatever the round)."""

    def faults(site: str, message: Any) -> bool:
        return any(
            (site, type(message)) == (one, kind) and number in (0, getattr(message, "round", 0))
            for one, kind, number in losses
        )

    return faults


@dataclass
class Watched:
    """Faults that also note each message with its site."""

    faults: Callable[[str, Any], bool]
    seen: list[tuple[str, Any]] = field(default_factory=list)

    def __call__(self, site: str, message: Any) -> bool:
        self.seen.append((site, message))
        return self.faults(site, message)

    def of(self, site: str, kind: type) -> list[Any]:
        return [message for one, message in self.seen if one == site and type(message) is kind]


def without(*sites: str) -> tuple[str, ...]:
    return tuple(site for site in NAMES if site not in sites)


def agrees(result: Any, plan: Plan, survivors: Callable[[int], tuple[str, ...]]) -> None:
    """The outcome is, to the last bit, that of a run in the clear over these survivors."""
    outcome, rounds = staging.unprotected(plan, survivors)
    assert [record.survivors for record in result.rounds] == [survivors(number) for number in range(1, rounds + 1)]
    assert result.outcome == outcome


def test_without_losses_it_is_the_unprotected_answer() -> None:
    result = simulate(STUDY, example_sites(), seed=1)
    agrees(result, PLAN, lambda number: NAMES)
    assert len(result.rounds) == 7


class TestOneSiteLost:
    @pytest.mark.parametrize("site", NAMES)
    @pytest.mark.parametrize("kind", [*CONTRIBUTION, *OPENING], ids=lambda kind: kind.__name__)
    def test_at_any_message_of_any_round(self, kind: type, site: str) -> None:
        for at in range(1, 8):
            result = simulate(STUDY, KEPT, seed=at, faults=drop((site, kind, at)))
            # who has contributed is in the sum, whatever becomes of it afterwards
            out = at if kind in CONTRIBUTION else 0
            agrees(result, PLAN, lambda number, out=out: without(site) if number == out else NAMES)
            assert len(result.rounds) >= at

    def test_of_a_description(self) -> None:
        study = descriptive(STUDY)
        for kind, at in ((MaskedUpdate, 1), (OpenRound, 2), (Reveal, 3), (Survivors, 1)):
            result = simulate(study, KEPT, seed=3, faults=drop(("zurich", kind, at)))
            out = at if kind in CONTRIBUTION else 0
            agrees(result, compile_study(study), lambda number, out=out: without("zurich") if number == out else NAMES)

    def test_another_one_in_each_round_and_at_each_message(self) -> None:
        kinds = [*CONTRIBUTION, *OPENING]
        for shift in range(len(kinds)):
            losses = [(NAMES[at % 4], kinds[(at + shift) % len(kinds)], at) for at in range(1, 12)]
            out = {at: site for site, kind, at in losses if kind in CONTRIBUTION}
            result = simulate(STUDY, KEPT, seed=shift, faults=drop(*losses))
            agrees(result, PLAN, lambda number, out=out: without(out.get(number, "")))

    def test_one_before_and_one_after_the_survivors_are_chosen_are_two_of_one(self) -> None:
        faults = drop(("zurich", MaskedUpdate, 2), ("budapest", Reveal, 2))
        with pytest.raises(RunFailed, match="2 of 4 sites are left and the study needs 3"):
            simulate(STUDY, KEPT, seed=1, faults=faults)


class TestKeyAgreement:
    @pytest.mark.parametrize(
        "kind",
        [
            OpenRun,
            Announcement,
            KeySet,
        ],
        ids=lambda kind: kind.__name__,
    )
    def test_a_site_lost_then_is_out_for_the_run(self, kind: type) -> None:
        faults = Watched(drop(("cleveland", kind, 0)))
        result = simulate(STUDY, KEPT, seed=1, faults=faults)
        agrees(result, PLAN, lambda number: without("cleveland"))
        assert not faults.of("cleveland", MaskedUpdate)

    @pytest.mark.parametrize("kind", [OpenRun, Announcement])
    def test_two_end_the_run(self, kind: type) -> None:
        faults = Watched(drop(("cleveland", kind, 0), ("zurich", kind, 0)))
        with pytest.raises(RunFailed, match="2 of 4 sites are left and the study needs 3: nothing was opened"):
            simulate(STUDY, KEPT, seed=1, faults=faults)
        assert not [message for _, message in faults.seen if isinstance(message, KeySet | OpenRound)]

    def test_after_it_nobody_else_can_be_spared(self) -> None:
        faults = drop(("cleveland", Announcement, 0), ("zurich", MaskedUpdate, 3))
        with pytest.raises(RunFailed, match="2 of 4 sites are left"):
            simulate(STUDY, KEPT, seed=1, faults=faults)


LONG = replace(descriptive(STUDY), model=Descriptive(bins=2, quantiles=(0.5,), refinements=10, small_cells=1))
"""A study of eleven rounds."""


class TestComingBack:
    @pytest.mark.parametrize("kind", CONTRIBUTION)
    def test_after_several_rounds_in_a_row(self, kind: type) -> None:
        faults = Watched(drop(*(("long-beach", kind, at) for at in (2, 3, 4))))
        result = simulate(STUDY, KEPT, seed=1, faults=faults)
        agrees(result, PLAN, lambda number: without("long-beach") if number in (2, 3, 4) else NAMES)
        missed = {message.round: message.missed for message in faults.of("long-beach", OpenRound)}
        sent = {message.round: message.broadcast for message in faults.of("zurich", OpenRound)}
        assert {number: len(broadcasts) for number, broadcasts in missed.items() if broadcasts} == {3: 1, 4: 2, 5: 3}
        assert missed[5] == (sent[2], sent[3], sent[4])

    def test_after_the_first_round(self) -> None:
        result = simulate(STUDY, KEPT, seed=1, faults=drop(("budapest", OpenRound, 1)))
        agrees(result, PLAN, lambda number: without("budapest") if number == 1 else NAMES)

    @pytest.mark.parametrize(
        "out",
        [
            (1, 2, 5, 6),
            (1, 2, 4, 5),
        ],
        ids=str,
    )
    def test_twice(self, out: tuple[int, ...]) -> None:
        faults = drop(*(("budapest", (OpenRound, MaskedUpdate)[at % 2], at) for at in out))
        result = simulate(STUDY, KEPT, seed=1, faults=faults)
        agrees(result, PLAN, lambda number: without("budapest") if number in out else NAMES)

    @pytest.mark.parametrize("kind", CONTRIBUTION)
    @pytest.mark.parametrize("count", [MOST_MISSED, MOST_MISSED + 1])
    def test_only_while_not_too_many_are_missed(self, count: int, kind: type) -> None:
        faults = Watched(drop(*(("zurich", kind, at) for at in range(1, count + 1))))
        result = simulate(LONG, KEPT, seed=1, faults=faults)
        back = MOST_MISSED + 1 if count == MOST_MISSED else 100
        agrees(result, compile_study(LONG), lambda number: NAMES if number >= back else without("zurich"))
        assert len(result.rounds) == 11
        asked = [message.round for message in faults.of("zurich", OpenRound)]
        assert asked == list(range(1, 12 if count == MOST_MISSED else count + 1))
        assert max(len(message.missed) for message in faults.of("zurich", OpenRound)) == MOST_MISSED

    def test_a_lost_site_is_told_of_the_end(self) -> None:
        faults = Watched(drop(("zurich", OpenRound, 0)))
        result = simulate(STUDY, KEPT, seed=1, faults=faults)
        agrees(result, PLAN, lambda number: without("zurich"))
        assert faults.of("zurich", CloseRun) == [CloseRun(result.run, "finished")]


@dataclass
class Changing:
    """A dataset that is another one from some look at it on."""

    kept: Any
    looks: int

    def read(self, *arguments: Any, **named: Any) -> Any:
        return self.kept.read(*arguments, **named)

    def fingerprint(self) -> str:
        self.looks -= 1
        return str(self.looks < 0)


class TestRefusal:
    @pytest.mark.parametrize("after", [1, 2, 5])
    def test_midway_it_is_a_loss_for_good(self, after: int) -> None:
        # it is looked at once when the run is opened and once in each round
        sites = {**KEPT, "cleveland": Changing(KEPT["cleveland"], after)}
        faults = Watched(drop())
        result = simulate(STUDY, sites, seed=1, faults=faults)
        agrees(result, PLAN, lambda number: NAMES if number < after else without("cleveland"))
        (refusal,) = faults.of("cleveland", Refusal)
        assert refusal.reason == "the data changed during the run"
        assert faults.of("cleveland", OpenRound)[-1].round == after

    def test_of_two_sites_it_ends_the_run(self) -> None:
        sites = {**KEPT, "cleveland": Changing(KEPT["cleveland"], 3), "zurich": Changing(KEPT["zurich"], 2)}
        with pytest.raises(CohortiumError, match="the data changed during the run"):
            simulate(STUDY, sites, seed=1)

    def test_and_a_loss_are_two(self) -> None:
        sites = {**KEPT, "cleveland": Changing(KEPT["cleveland"], 2)}
        with pytest.raises(CohortiumError):
            simulate(STUDY, sites, seed=1, faults=drop(("zurich", Survivors, 4)))


class TestTooFew:
    @pytest.mark.parametrize("at", [1, 4])
    @pytest.mark.parametrize("kind", [*CONTRIBUTION, *OPENING], ids=lambda kind: kind.__name__)
    def test_two_lost_sites_end_the_run(self, kind: type, at: int) -> None:
        faults = Watched(drop(("budapest", kind, at), ("cleveland", kind, at)))
        closed: list[Any] = []
        with pytest.raises(RunFailed) as failed:
            simulate(STUDY, KEPT, seed=1, progress=closed.append, faults=faults)
        assert str(failed.value) == (
            "2 of 4 sites are left and the study needs 3: nothing was opened; start another run when they are back, "
            "with fresh keys"
        )
        assert len(closed) == at - 1
        later = {"OpenRound": OPENING, "MaskedUpdate": OPENING, "Survivors": (Endorsed, Reveal)}
        forbidden = later.get(kind.__name__, (Endorsed, Reveal) if kind is Endorsement else ())
        asked = [message for _, message in faults.seen if isinstance(message, forbidden) and message.round == at]
        assert not asked
        assert {message.outcome for site, message in faults.seen if isinstance(message, CloseRun)} == {"failed"}

    def test_another_run_of_the_same_agents_has_fresh_keys(self) -> None:
        agents = simulated_agents(PLAN, KEPT, staging.ROOT, runs=99)
        said: dict[str, list[Any]] = {"one": [], "two": []}

        def go(run: str, faults: Any) -> Any:
            key = coordinator_key(staging.ROOT)
            return local.run(PLAN, agents, run, lambda: 0.0, key, tap=said[run].append, faults=faults)

        with pytest.raises(RunFailed):
            go("one", drop(("budapest", MaskedUpdate, 2), ("zurich", MaskedUpdate, 2)))
        agrees(go("two", None), PLAN, lambda number: NAMES)
        public = [[one.public_key for one in heard if isinstance(one, Announcement)] for heard in said.values()]
        assert len({*public[0], *public[1]}) == 8
        texts = [
            [one.values.tobytes() for one in heard if isinstance(one, MaskedUpdate) and one.round == 1]
            for heard in said.values()
        ]
        assert not set(texts[0]) & set(texts[1])
        for agent in agents.values():
            with pytest.raises(CohortiumError, match="its name was used before"):
                local.run(PLAN, agents, "one", lambda: 0.0, coordinator_key(staging.ROOT))
            assert "its name was used before" in str(agent.failure)
            break

    @pytest.mark.parametrize("kind", [OpenRun, Announcement, KeySet, *CONTRIBUTION], ids=lambda kind: kind.__name__)
    def test_where_nobody_may_be_lost_one_is_too_many(self, kind: type) -> None:
        study = staging.heart(Aggregation())
        for at in (1, 3) if kind in CONTRIBUTION else (0,):
            with pytest.raises(CohortiumError) as failed:
                simulate(study, KEPT, seed=1, faults=drop(("zurich", kind, at)))
            if kind is KeySet:  # without keys, the site refuses the round
                assert "out of order" in str(failed.value)
            else:
                assert "3 of 4 sites are left and the study needs 4: nothing was opened" in str(failed.value)


SITUATIONS = [
    pytest.param((), lambda number: NAMES, id="nobody"),
    pytest.param(
        (("zurich", MaskedUpdate, 2),), lambda number: without("zurich") if number == 2 else NAMES, id="upload"
    ),
    pytest.param((("budapest", Survivors, 1),), lambda number: NAMES, id="survivors"),
    pytest.param((("cleveland", Reveal, 3), ("zurich", Endorsement, 4)), lambda number: NAMES, id="answers"),
    pytest.param((("cleveland", Announcement, 0),), lambda number: without("cleveland"), id="keys"),
]


@pytest.mark.parametrize(("losses", "survivors"), SITUATIONS)
class TestOtherSchemes:
    """Each gives its own plain sums, and what masking gives within the width of its numbers."""

    def check(self, aggregation: Aggregation, losses: Any, survivors: Any) -> None:
        study = staging.heart(aggregation)
        result = simulate(study, KEPT, seed=1, faults=drop(*losses))
        agrees(result, compile_study(study), survivors)
        wide = simulate(staging.heart(Aggregation(dropouts=1, bits=64)), KEPT, seed=1, faults=drop(*losses))
        assert result.model.coef_ == pytest.approx(wide.model.coef_, abs=1e-4)
        assert result.model.intercept_ == pytest.approx(wide.model.intercept_, abs=1e-4)

    def test_rlwe(self, losses: Any, survivors: Any) -> None:
        pytest.importorskip("numba")
        self.check(Aggregation(protocol="rlwe", dropouts=1, bits=50), losses, survivors)

    def test_ckks(self, losses: Any, survivors: Any) -> None:
        pytest.importorskip("tenseal")
        self.check(Aggregation(protocol="ckks-single-key", dropouts=1), losses, survivors)

    def test_narrow_masking(self, losses: Any, survivors: Any) -> None:
        self.check(Aggregation(dropouts=1, bits=32), losses, survivors)


class TestSeveralRuns:
    def studies(self) -> dict[str, Any]:
        return {
            "risk": STUDY,
            "again": STUDY,
            "table": descriptive(STUDY),
            "softer": staging.heart(model=Regression(kind="logistic", penalty=Penalty(l2=5.0))),
        }

    @pytest.mark.parametrize("turn", [1, 2, 5])
    def test_take_turns_at_one_set_of_agents(self, turn: int) -> None:
        """One message of each run in turn, each run with a loss of its own."""
        studies = self.studies()
        plans = {run: compile_study(study) for run, study in studies.items()}
        agents = simulated_agents(PLAN, KEPT, staging.ROOT, runs=99)
        for agent in agents.values():
            agent.approved = {plan.study_id: 9 for plan in plans.values()}
        lanes = {run: staging.Lane(plan, agents, run) for run, plan in plans.items()}
        out = {"risk": ("zurich", 2), "table": ("budapest", 1), "softer": ("cleveland", 3)}

        def unheard(run: str) -> Callable[[str, Any], bool]:
            site, number = out.get(run, ("", 0))
            return drop((site, OpenRound, number))

        while any(lane.queue for lane in lanes.values()):
            for run, lane in lanes.items():
                for _ in range(turn):
                    if lane.queue:
                        lane.advance(unheard(run))
        for run, lane in lanes.items():
            site, at = out.get(run, ("", 0))
            assert isinstance(lane.ending, Finished)
            expected, _ = staging.unprotected(
                plans[run], lambda number, site=site, at=at: without(site) if number == at else NAMES
            )
            assert lane.ending.outcome == expected

    def test_one_ends_while_another_goes_on(self) -> None:
        """A run within a round of another, which fails and leaves the other as it was."""
        agents = simulated_agents(PLAN, KEPT, staging.ROOT, runs=99)
        key = coordinator_key(staging.ROOT)
        inner: list[CohortiumError] = []

        def interrupt(closed: Any) -> None:
            faults = drop(("budapest", Endorsement, 1), ("zurich", Reveal, 1))
            with pytest.raises(RunFailed) as failed:
                local.run(PLAN, agents, f"inner-{closed.number}", lambda: 0.0, key, faults=faults)
            inner.append(failed.value)

        result = local.run(PLAN, agents, "outer", lambda: 0.0, key, progress=interrupt)
        agrees(result, PLAN, lambda number: NAMES)
        assert len(inner) == len(result.rounds) == 7


def test_the_seed_decides_no_result_with_losses_either() -> None:
    faults = drop(("zurich", MaskedUpdate, 2), ("budapest", Survivors, 3))
    one, two = (simulate(STUDY, KEPT, seed=seed, faults=faults) for seed in (1, 2))
    assert one.outcome == two.outcome
    assert (
        coordinator_key(Randomness.of_seed(1)).private_bytes_raw()
        != coordinator_key(Randomness.of_seed(2)).private_bytes_raw()
    )
