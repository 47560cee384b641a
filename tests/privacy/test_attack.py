"""Guesses about membership: bounds that hold, and that come near where they can; attacks against closed forms."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, ndtr, ndtri
from sklearn.metrics import roc_auc_score, roc_curve

from cohortium.core.events import Gaussian
from cohortium.core.layout import Floats
from cohortium.privacy.attack import attack_auc, found_at, lira, lower_bound, one_run
from cohortium.privacy.calibrate import Budget, multiplier

Bools = NDArray[np.bool_]


def flipped(epsilon: float, count: int, random: np.random.Generator) -> tuple[Floats, Bools]:
    """Scores from randomised response: each canary's part, told wrongly with probability 1 / (1 + e^epsilon)."""
    included = random.random(count) < 0.5
    told = included ^ (random.random(count) > expit(epsilon))
    # ties are broken by numbers that tell nothing
    return told + random.random(count) / 2, included


def noised(deviation: float, count: int, random: np.random.Generator) -> tuple[Floats, Bools]:
    """Scores from a Gaussian mechanism in which each canary moves an entry of its own by 1."""
    included = random.random(count) < 0.5
    return included + deviation * random.standard_normal(count), included


@pytest.mark.parametrize(
    ("guesses", "right", "canaries", "delta", "printed"),
    # Steinke, Nasr and Jagielski 2023, appendix D and section 7; the second is cut off, not rounded
    [(100, 75, 1000, 1e-4, 0.673), (1510, 1439, 100_000, 1e-5, 2.6755)],
)
def test_bounds_that_were_printed(guesses: int, right: int, canaries: int, delta: float, printed: float) -> None:
    assert lower_bound(guesses, right, canaries, delta) == pytest.approx(printed, abs=6e-4)


def test_without_delta_the_bound_is_clopper_and_pearsons() -> None:
    # all of 10 right: chance^10 = 0.05
    chance = 0.05**0.1
    assert lower_bound(10, 10, 10, 0.0) == pytest.approx(math.log(chance / (1 - chance)), rel=1e-9)
    assert lower_bound(10, 5, 10, 0.0) == 0.0
    assert lower_bound(0, 0, 10, 0.0) == lower_bound(0, 0, 0, 0.0) == 0.0


def test_bounds_rise_with_right_guesses_and_fall_with_what_makes_them_easier() -> None:
    bounds = [lower_bound(250, right, 1000, 1e-5) for right in range(120, 251, 5)]
    assert bounds == sorted(bounds) and bounds[0] == 0 < bounds[-1]
    assert lower_bound(250, 200, 1000, 1e-3) < lower_bound(250, 200, 1000, 0.0)
    assert lower_bound(250, 200, 10_000, 1e-4) < lower_bound(250, 200, 1000, 1e-4)
    assert lower_bound(250, 200, 1000, 1e-5, 0.99) < lower_bound(250, 200, 1000, 1e-5, 0.9)
    assert lower_bound(250, 250, 1000, 1.0) == 0.0


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 2.0])
def test_a_known_epsilon_is_rarely_exceeded(epsilon: float) -> None:
    random = np.random.default_rng(int(epsilon * 10))
    repeats = 200
    above = sum(one_run(*flipped(epsilon, 400, random), 0.0, 0.9).epsilon > epsilon for _ in range(repeats))
    # at most a tenth, and four deviations more
    assert above <= repeats * 0.1 + 4 * math.sqrt(repeats * 0.09)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_with_many_canaries_the_bound_comes_near(epsilon: float) -> None:
    scores, included = flipped(epsilon, 200_000, np.random.default_rng(5))
    assert 0.95 * epsilon < one_run(scores, included, 0.0).epsilon <= epsilon


@pytest.mark.parametrize(("epsilon", "median"), [(0.5, 0.79), (1.0, 1.65)])
def test_correct_noise_passes_and_too_little_is_caught(epsilon: float, median: float) -> None:
    deviation = multiplier(Budget(epsilon, 1e-5), lambda z: (Gaussian(z),))
    right, wrong = [], []
    for seed in range(20):
        right.append(one_run(*noised(deviation, 1000, np.random.default_rng(seed)), 1e-5).epsilon)
        # each of 15 hospitals adds a fifteenth of the noise's deviation, not of its variance
        wrong.append(one_run(*noised(deviation / math.sqrt(15), 1000, np.random.default_rng(seed)), 1e-5).epsilon)
    assert max(right) <= epsilon
    assert np.median(wrong) > epsilon
    assert np.median(wrong) == pytest.approx(median, abs=0.15)


def test_an_audit_says_what_it_rests_on() -> None:
    included = np.arange(80) >= 40
    found = one_run(np.arange(80.0), included, 1e-5, 0.9)
    assert (found.canaries, found.guesses, found.right, found.confidence) == (80, 20, 20, 0.9)
    assert found.epsilon == lower_bound(20, 20, 80, 1e-5, 0.9)
    assert one_run(-np.arange(80.0), included, 1e-5).right == 0
    # any scale will do
    assert one_run(np.exp(np.arange(80.0)), included, 1e-5, 0.9) == found


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_few_canaries_show_nothing(count: int) -> None:
    found = one_run(np.arange(float(count)), np.ones(count, dtype=bool), 1e-5)
    assert found.epsilon == 0 and found.guesses <= count


def shadows_of(
    shift: float, models: int, count: int, random: np.random.Generator
) -> tuple[Floats, Bools, Floats, Bools]:
    """A model and shadows of it whose scores are normal about a level of each example, `shift` higher for members."""
    level, width = 5 * random.standard_normal(count), random.uniform(0.5, 2, count)
    members = random.random(count) < 0.5
    half = np.argsort(random.random((models, count)), axis=0) < models // 2
    scores = level + width * (shift * members + random.standard_normal(count))
    shadows = level + width * (shift * half + random.standard_normal((models, count)))
    return scores, members, shadows, half


@pytest.mark.parametrize("models", [16, 128])
def test_scores_that_do_not_depend_on_membership_tell_nothing(models: int) -> None:
    scores, members, shadows, half = shadows_of(0.0, models, 4000, np.random.default_rng(1))
    found = attack_auc(lira(scores, shadows, half), members)
    assert found.low < 0.5 < found.high
    assert found_at(lira(scores, shadows, half), members, 0.01) < 0.03


def test_shifted_scores_are_told_apart_as_well_as_can_be() -> None:
    shift = 1.5
    scores, members, shadows, half = shadows_of(shift, 512, 6000, np.random.default_rng(2))
    ratios = lira(scores, shadows, half)
    # the likelihood ratio of two normal distributions of equal width, `shift` deviations apart
    best = float(ndtr(shift / math.sqrt(2)))
    found = attack_auc(ratios, members)
    assert found.low < best < found.high and found.auc == pytest.approx(best, abs=0.015)
    # what the score itself tells, without knowing each example's level
    assert attack_auc(scores, members).auc < 0.65
    assert found_at(ratios, members, 0.01) == pytest.approx(ndtr(shift + ndtri(0.01)), rel=0.2)
    assert found_at(ratios, members, 0.001) == pytest.approx(ndtr(shift + ndtri(0.001)), rel=0.6)


def test_ratios_are_those_of_normal_distributions() -> None:
    random = np.random.default_rng(3)
    scores, _, shadows, half = shadows_of(1.0, 200, 5, random)
    ratios = lira(scores, shadows, half)
    for example in range(5):
        inside, outside = shadows[half[:, example], example], shadows[~half[:, example], example]
        parts = [
            -math.log(group.std(ddof=1)) - (scores[example] - group.mean()) ** 2 / (2 * group.var(ddof=1))
            for group in (inside, outside)
        ]
        assert ratios[example] == pytest.approx(parts[0] - parts[1], rel=1e-9)


def test_with_few_models_variances_are_common() -> None:
    random = np.random.default_rng(4)
    scores, members, shadows, half = shadows_of(1.5, 8, 4000, random)
    common = attack_auc(lira(scores, shadows, half), members).auc
    # with variances of its own from four models each, an example's ratio is mostly chance
    inside, outside = (np.where(which, shadows, np.nan) for which in (half, ~half))
    alone = sum(
        sign
        * (
            -np.log(np.nanstd(group, axis=0))
            - ((scores - np.nanmean(group, axis=0)) / np.nanstd(group, axis=0)) ** 2 / 2
        )
        for sign, group in ((1, inside), (-1, outside))
    )
    assert common > attack_auc(alone, members).auc + 0.02


def test_scores_that_never_vary_are_no_accident() -> None:
    half = np.array([[True, False], [False, True]])
    assert lira(np.ones(2), np.ones((2, 2)), half).tolist() == [0.0, 0.0]
    assert np.isfinite(lira(np.array([0.0, 5.0]), half * 1.0, half)).all()


@pytest.mark.parametrize("seed", range(5))
def test_areas_and_rates_are_those_of_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    members = random.random(300) < 0.4
    scores = np.round(random.standard_normal(300) + members, seed % 2 + 1)
    found = attack_auc(scores, members)
    assert found.auc == pytest.approx(roc_auc_score(members, scores), abs=1e-12)
    assert 0 < found.low < found.auc < found.high < 1
    fpr, tpr, _ = roc_curve(members, scores, drop_intermediate=False)
    for rate in (0.0, 0.01, 0.05, 0.5, 1.0):
        assert found_at(scores, members, rate) <= tpr[fpr <= rate + 1e-12].max()
        assert found_at(scores, members, rate) >= tpr[fpr <= max(rate - 0.01, 0.0)].max() or rate == 1.0


def test_the_interval_covers() -> None:
    random = np.random.default_rng(7)
    true, repeats = float(ndtr(1 / math.sqrt(2))), 400
    covered = 0
    for _ in range(repeats):
        members = np.arange(120) < 50
        found = attack_auc(random.standard_normal(120) + members, members)
        covered += found.low <= true <= found.high
    assert covered >= repeats * 0.95 - 4 * math.sqrt(repeats * 0.0475)


def test_perfect_and_useless_scores_have_intervals_too() -> None:
    members = np.arange(100) < 50
    perfect, useless = attack_auc(members * 1.0, members), attack_auc(np.zeros(100), members)
    assert perfect.auc == 1.0 == perfect.high and 0.5 < perfect.low < 1
    assert useless.auc == 0.5 and useless.low < 0.5 < useless.high
    assert attack_auc(np.array([0.0, 1.0]), np.array([False, True])).low == 0.0
    assert found_at(members * 1.0, members, 0.001) == 1.0 and found_at(np.zeros(100), members, 0.01) == 0.0


def test_what_is_no_attack_is_refused() -> None:
    yes = np.array([True, False])
    with pytest.raises(ValueError, match="shape"):
        one_run(np.zeros(3), yes, 1e-5)
    with pytest.raises(ValueError, match="shape"):
        one_run(np.zeros(2), np.array([1, 0]), 1e-5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="missing"):
        one_run(np.array([0.0, np.nan]), yes, 1e-5)
    with pytest.raises(ValueError, match="3 right guesses of 2"):
        lower_bound(2, 3, 10, 1e-5)
    with pytest.raises(ValueError, match="confidence 1"):
        lower_bound(2, 2, 10, 1e-5, 1.0)
    with pytest.raises(ValueError, match="members and others"):
        attack_auc(np.zeros(2), np.array([True, True]))
    with pytest.raises(ValueError, match="of all shadow models or of none"):
        lira(np.zeros(2), np.zeros((2, 2)), np.array([[True, True], [True, False]]))
    with pytest.raises(ValueError, match="do not match"):
        lira(np.zeros(3), np.zeros((2, 2)), np.array([[True, False], [False, True]]))
