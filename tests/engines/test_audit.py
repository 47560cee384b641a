"""The audit: correct code passes, planted faults are caught, and what it cannot see is said.

Chance. An audit of correct code fails by its bound with a probability of 1e-4 at epsilon 0.5 (169 of 250 guesses would
have to be right, and an optimal guesser's are with probability 0.56 each) and of 1e-8 at epsilon 1 (195, and 0.61); by
the noise, whose interval misses once in a million audits, it hardly ever does. With a fifteenth of the noise's variance
an audit fails by its bound with probability 0.93 at epsilon 0.5, and all but surely at 1. Tolerances of the noise are
nearly four standard errors. Seeds were chosen before the first run, and equal seeds give equal bits.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import pytest

from cohortium import bootstrap
from cohortium.bootstrap import auditing
from cohortium.coordinator.audit import CanaryTest
from cohortium.core.features import BinaryTarget, Number
from cohortium.core.layout import Layout
from cohortium.core.models import Regression
from cohortium.core.protection import Aggregation, Privacy
from cohortium.core.random import Randomness
from cohortium.core.study import Cohort, Purpose, Sites, Study
from cohortium.core.training import Descent
from cohortium.engines import audit
from cohortium.learning import canaries as sums
from cohortium.plan import Plan, compile_study
from cohortium.privacy.accountant import releases
from cohortium.privacy.noise import NoiseShares
from cohortium.promise import NoiseRule
from cohortium.secagg.quantise import FixedPoint
from cohortium.site.agent import Agent

SEEDS = (1, 2, 3)
SITES = tuple(f"s{number}" for number in range(8))
AGE = Number(unit="a", range=(0, 100))


def study(epsilon: float | None = 1.0, *, dropouts: int = 0, protocol: str = "masking", **changes: Any) -> Study:
    settings: dict[str, Any] = {"unit": "patient", "epsilon": epsilon, "delta": 1e-5 if epsilon else None}
    cohort: dict[str, Any] = {"records": changes.pop("records", "one"), "maximum": 1000}
    return Study(
        name="falls",
        purpose=Purpose(summary="falls on wards"),
        sites=Sites(include=SITES),
        cohort=Cohort(dataset="w", patient="id", features={"age": AGE}, target=BinaryTarget(name="fell"), **cohort),
        model=Regression(kind="logistic"),
        training=Descent(rounds=6, learning_rate=1.0, clip=1.0),
        aggregation=Aggregation(dropouts=dropouts, protocol=protocol),  # type: ignore[arg-type]
        privacy=Privacy(**(settings | changes)),
    )


def tried(plan: Plan, seed: int = 1, canaries: int = 1000) -> CanaryTest:
    return bootstrap.audit_canaries(plan, canaries, 0.95, Randomness.of_seed(seed))


def separation(found: CanaryTest) -> float:
    """Returns how many deviations lie between the scores of both kinds of canaries."""
    inside, outside = np.array(found.included), np.array(found.left_out)
    return float((inside.mean() - outside.mean()) / np.sqrt((inside.var() + outside.var()) / 2))


def reason(found: CanaryTest) -> set[str]:
    """Returns by which of its two figures an audit fails."""
    failed = {"bound": found.lower > found.epsilon, "noise": found.noise_high < 1}
    return {name for name, fails in failed.items() if fails}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_a_correct_study_passes(epsilon: float, seed: int) -> None:
    plan = compile_study(study(epsilon))
    found = tried(plan, seed)
    assert found.verdict == "consistent" and found.lower <= epsilon
    assert found.noise_low < 1 < found.noise_high and found.noise == pytest.approx(1, abs=0.045)


CHANGES: list[dict[str, Any]] = [
    {},
    {"dropouts": 1, "colluding": 2},
    {"dropouts": 2, "colluding": 0},
    {"neighbouring": "replace"},
    {"sites_per_patient": 3},
    {"sampling": 0.3},
    {"records": "several"},
    {"unit": "record", "records": "one", "neighbouring": "replace"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_kind_of_promise_is_tried_at_its_worst(changes: dict[str, Any]) -> None:
    plan = compile_study(study(8.0, **changes))
    found = tried(plan)
    assert found.verdict == "consistent"
    # without what colluding hospitals tell, or with one hospital too many, it would be off by 0.07 and more
    assert found.noise == pytest.approx(1, abs=0.045)
    privacy = plan.study.privacy
    assert len(found.lost) == plan.study.aggregation.dropouts and len(found.colluding) == privacy.colluding
    assert found.carriers == len(SITES) - len(found.lost) - len(found.colluding)
    # an optimal guesser sees what the accountant counts: the audit is as sharp as it can be, but for chance
    ideal = 1 / releases(plan.releases).multiplier
    if privacy.sampling == 1:
        assert separation(found) == pytest.approx(ideal, abs=4.5 * (4 / 1000 * (1 + ideal**2 / 8)) ** 0.5)
    assert found.lower > 1


@pytest.mark.parametrize("protocol", ["rlwe"])
def test_any_protected_sum_is_tried(protocol: str) -> None:
    pytest.importorskip("numba")
    assert tried(compile_study(study(protocol=protocol)), canaries=200).verdict == "consistent"


@dataclass(frozen=True)
class Short(NoiseRule):
    """A noise rule whose shares are `times` as large as they should be, at the price of full ones."""

    times: float = 1.0

    def shares(self, layout: Layout, exponents: tuple[int, ...], bits: int) -> NoiseShares:
        right = super().shares(layout, exponents, bits)
        return replace(right, deviations=tuple(self.times * deviation for deviation in right.deviations))


def short(plan: Plan, times: float) -> Plan:
    rule = plan.noise
    assert rule is not None
    return replace(plan, noise=Short(rule.honest, rule.factor, rule.copies, rule.beta, times))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_noise_divided_by_the_root_of_the_sites_twice_is_caught(epsilon: float, seed: int) -> None:
    found = tried(short(compile_study(study(epsilon)), 15**-0.5), seed)
    assert reason(found) == {"bound", "noise"}
    assert found.noise == pytest.approx(15**-0.5, rel=0.03)


def test_at_a_large_epsilon_the_noise_shows_what_the_bound_cannot() -> None:
    found = tried(short(compile_study(study(8.0)), 15**-0.5))
    assert reason(found) == {"noise"}


def test_clipping_that_is_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclipped(contributions: np.ndarray, owners: Any, norm: float) -> np.ndarray:
        total: np.ndarray = contributions.sum(axis=0)
        return total

    monkeypatch.setattr(sums, "sum_clipped", unclipped)
    # the noise is what it should be, and hides too little
    assert reason(tried(compile_study(study()))) == {"bound"}


def test_clipping_of_records_instead_of_patients_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sums.sum_clipped
    monkeypatch.setattr(sums, "sum_clipped", lambda rows, owners, norm: right(rows, None, norm))
    assert reason(tried(compile_study(study(records="several")))) == {"bound"}
    assert not reason(tried(compile_study(study())))


def test_sites_that_forget_their_noise_are_caught_by_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    agents_of = bootstrap.simulated_agents

    def with_silent_sites(*arguments: Any, **named: Any) -> dict[str, Agent]:
        agents = agents_of(*arguments, **named)
        for name in SITES[:3]:
            compiled = agents[name].compiler
            agents[name].compiler = lambda study, compiled=compiled: short(compiled(study), 1e-3)
        return agents

    monkeypatch.setattr(auditing, "simulated_agents", with_silent_sites)
    found = tried(compile_study(study()))
    # four of seven honest shares are left: epsilon is about 1.4, which 1,000 canaries do not show
    assert reason(found) == {"noise"}
    assert found.noise == pytest.approx((4 / 7) ** 0.5, abs=0.045)


def plant_keys(monkeypatch: pytest.MonkeyPatch, rounds: int, key: Callable[[int, int], int]) -> None:
    """Gives noise a key that follows from its site and round, in the run and where colluding sites tell of it."""
    right, calls = NoiseShares.encode, count()

    def encode(stage: NoiseShares, vector: np.ndarray, randomness: Randomness) -> np.ndarray:
        number, site = divmod(next(calls), len(SITES))
        if number >= rounds:
            number, site = (number - rounds) * len(SITES) + site, len(SITES) - 1
        return right(stage, vector, Randomness.of_seed(key(site, number)))

    monkeypatch.setattr(NoiseShares, "encode", encode)


def test_noise_alike_at_all_sites_is_caught_through_the_colluding_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compile_study(study())
    plant_keys(monkeypatch, plan.rounds, lambda site, number: number)
    # its own noise is everybody's: nothing hides the canaries
    found = tried(plan)
    assert reason(found) == {"bound", "noise"} and found.noise < 0.01


def test_noise_alike_at_all_sites_is_not_caught_where_none_colludes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compile_study(study(colluding=0))
    plant_keys(monkeypatch, plan.rounds, lambda site, number: number)
    # the sum then has more noise than it needs, and who knows no site's noise cannot take it off
    found = tried(plan)
    assert not reason(found) and found.noise > 2


def test_noise_that_comes_again_in_every_round_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compile_study(study(preprocessing=0.01))
    plant_keys(monkeypatch, plan.rounds, lambda site, number: site)
    # canaries turn round from one round to the next, so that it cancels; in each round it is as large as it should be
    assert reason(tried(plan)) == {"bound"}


def test_planting_right_keys_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compile_study(study())
    plant_keys(monkeypatch, plan.rounds, lambda site, number: 1000 * site + number)
    assert not reason(tried(plan))


def test_an_audit_goes_through_the_stages_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float]] = []

    def spied(kind: type, name: str) -> None:
        right = getattr(kind, name)

        def spy(stage: Any, vector: np.ndarray, *rest: Any) -> Any:
            calls.append((f"{kind.__name__}.{name}", float(np.max(getattr(stage, "deviations", (0.0,))))))
            return right(stage, vector, *rest)

        monkeypatch.setattr(kind, name, spy)

    for kind in (FixedPoint, NoiseShares):
        spied(kind, "encode")
        spied(kind, "decode")
    plan = compile_study(study())
    tried(plan, canaries=20)
    times = Counter(name for name, _ in calls)
    # every site in every round, and once more each round for the site that tells its noise
    encoded, decoded = (len(SITES) + 1) * plan.rounds, 2 * plan.rounds
    for kind in (FixedPoint, NoiseShares):
        assert times[f"{kind.__name__}.encode"] == encoded and times[f"{kind.__name__}.decode"] == decoded
    # and the noise is that of the study's own stages, but for what rounding in more coordinates adds
    largest = max(deviation for _, deviation in calls)
    own = max(max(plan.stages(phase.layout).stages[1].deviations) for phase in plan.phases)
    assert 1 <= largest / own < 1.01


def test_equal_seeds_give_equal_audits_and_other_seeds_others() -> None:
    plan = compile_study(study())
    first, again, other = (tried(plan, seed, 50) for seed in (4, 4, 5))
    assert first == again != other


def test_a_study_that_loses_sites_is_audited_without_them() -> None:
    plan = compile_study(study(dropouts=2))
    trial = audit.trial(plan, 30, Randomness.of_seed(1))
    assert trial.honest == SITES[:5] and trial.lost == SITES[5:7] and trial.colluding == SITES[7:]
    carried = {
        site: [name for name in data.columns["id"] if name != "bystander"] for site, data in trial.sources.items()
    }
    assert not any(carried[site] for site in SITES[5:])
    assert sorted(name for names in carried.values() for name in names) == sorted(
        f"canary {number}" for number in np.flatnonzero(trial.included)
    )


def test_where_hospitals_are_protected_each_is_a_canary() -> None:
    found = tried(compile_study(study(unit="site")))
    assert found.canaries == len(SITES) - 1 and found.verdict == "consistent" and found.lower == 0
