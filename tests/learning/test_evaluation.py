"""Evaluation of binary scores, against scikit-learn, a quadratic DeLong variance and simulation."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import brier_score_loss, roc_auc_score, roc_curve

from cohortium.core.random import Randomness
from cohortium.learning.evaluation import Comparison, Evaluation, auc_and_variance, evaluate, mean_auc

Sample = tuple[NDArray[np.float64], NDArray[np.float64]]

# Scores k/64 make ties common, and 1 - p exact.
samples = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 64)), min_size=2, max_size=60).map(
    lambda rows: (np.array([row[0] for row in rows], float), np.array([row[1] / 64 for row in rows]))
)


def draw(seed: int, n: int, separation: float = 1.2, decimals: int = 6) -> Sample:
    random = Randomness.of_seed(seed).generator()
    target = (random.random(n) < 0.4).astype(float)
    score = 1 / (1 + np.exp(-(random.normal(size=n) + separation * target)))
    return target, np.round(score, decimals)


def variance_by_pairs(target: NDArray[np.float64], score: NDArray[np.float64]) -> float:
    """DeLong's variance from all pairs of a case and a control."""
    cases, controls = score[target == 1], score[target == 0]
    kernel = np.array([[1.0 if x > y else 0.5 if x == y else 0.0 for y in controls] for x in cases])
    auc, m, n = kernel.mean(), len(cases), len(controls)
    s10 = sum((row.mean() - auc) ** 2 for row in kernel) / (m - 1)
    s01 = sum((column.mean() - auc) ** 2 for column in kernel.T) / (n - 1)
    return float(s10 / m + s01 / n)


@pytest.mark.parametrize("decimals", [1, 2, 6])
def test_auc_roc_and_brier_equal_scikit_learn_with_and_without_ties(decimals: int) -> None:
    for seed in range(20):
        target, score = draw(seed, 83, decimals=decimals)
        found = evaluate(target, score)
        fpr, tpr, _ = roc_curve(target, score, drop_intermediate=False)
        assert found.roc is not None
        assert found.auc == pytest.approx(roc_auc_score(target, score), abs=1e-12)
        np.testing.assert_allclose(found.roc.fpr, fpr, atol=1e-12)
        np.testing.assert_allclose(found.roc.tpr, tpr, atol=1e-12)
        assert found.brier == pytest.approx(brier_score_loss(target, score), abs=1e-12)


@pytest.mark.parametrize("decimals", [1, 6])
def test_variance_equals_the_computation_over_all_pairs(decimals: int) -> None:
    for seed in range(20):
        target, score = draw(seed, 61, decimals=decimals)
        _, variance = auc_and_variance(target == 1, score)
        assert variance == pytest.approx(variance_by_pairs(target, score), rel=1e-12)


def test_variance_agrees_with_the_bootstrap() -> None:
    target, score = draw(3, 200)
    random = Randomness.of_seed(4).generator()
    rows = random.integers(0, len(target), size=(1000, len(target)))
    resampled = [auc_and_variance(target[row] == 1, score[row])[0] for row in rows]
    _, variance = auc_and_variance(target == 1, score)
    assert np.std(resampled) == pytest.approx(math.sqrt(variance), rel=0.1)


def test_interval_covers_the_true_auc_about_95_times_in_100() -> None:
    true_auc = 0.5 * (1 + math.erf(1.2 / 2))  # two unit normals, 1.2 apart
    covered = 0
    for seed in range(600):
        found = evaluate(*draw(seed, 120, decimals=12))
        assert found.auc_low is not None
        assert found.auc_high is not None
        covered += found.auc_low <= true_auc <= found.auc_high
    assert 0.92 <= covered / 600 <= 0.98


@given(samples)
def test_interval_stays_within_0_and_1_around_the_auc(sample: Sample) -> None:
    found = evaluate(*sample)
    if found.auc_low is not None:
        assert found.auc is not None
        assert found.auc_high is not None
        assert 0 <= found.auc_low <= found.auc + 1e-12
        assert found.auc - 1e-12 <= found.auc_high <= 1


@given(samples)
def test_auc_is_unchanged_by_a_rising_transform(sample: Sample) -> None:
    target, score = sample
    assert evaluate(target, score).auc == evaluate(target, score**3 / 2 + 0.25).auc


@given(samples)
def test_the_opposite_score_has_the_opposite_auc_and_mirrored_interval(sample: Sample) -> None:
    target, score = sample
    there, back = evaluate(target, score), evaluate(target, 1 - score)
    if there.auc is not None:
        assert back.auc == pytest.approx(1 - there.auc, abs=1e-12)
    if there.auc_high is not None:
        assert back.auc_low == pytest.approx(1 - there.auc_high, abs=1e-9)


@given(samples, st.integers(0, 999))
def test_the_order_of_patients_does_not_matter(sample: Sample, seed: int) -> None:
    target, score = sample
    order = Randomness.of_seed(seed).generator().permutation(len(target))
    there, back = evaluate(target, score), evaluate(target[order], score[order])
    assert there.auc == (None if back.auc is None else pytest.approx(back.auc, abs=1e-12))
    assert (there.roc, there.calibration.count) == (back.roc, back.calibration.count)
    np.testing.assert_allclose(there.calibration.observed, back.calibration.observed)


@given(samples)
def test_the_roc_curve_encloses_the_auc(sample: Sample) -> None:
    found = evaluate(*sample)
    if found.auc is not None:
        assert found.roc is not None
        assert np.trapezoid(found.roc.tpr, found.roc.fpr) == pytest.approx(found.auc, abs=1e-12)


@given(samples)
def test_calibration_keeps_every_patient_and_the_overall_means(sample: Sample) -> None:
    target, score = sample
    bins = evaluate(target, score).calibration
    assert sum(bins.count) == len(target)
    assert list(bins.predicted) == sorted(bins.predicted)
    assert np.average(bins.predicted, weights=bins.count) == pytest.approx(score.mean())
    assert np.average(bins.observed, weights=bins.count) == pytest.approx(target.mean())


def test_calibration_bins_have_equal_counts_without_ties() -> None:
    target, score = draw(5, 200, decimals=12)
    assert evaluate(target, score).calibration.count == (20,) * 10


def test_a_constant_score_is_worth_exactly_nothing() -> None:
    found = evaluate([0, 1, 0, 1], [0.3] * 4)
    assert (found.auc, found.auc_low, found.auc_high) == (0.5, 0.5, 0.5)
    assert found.calibration.count == (4,)


@pytest.mark.parametrize("target", [[0, 0, 0], [1, 1, 1]])
def test_one_outcome_alone_has_no_auc(target: list[int]) -> None:
    found = evaluate(target, [0.2, 0.4, 0.9])
    assert (found.auc, found.auc_low, found.auc_high, found.roc) == (None, None, None, None)
    assert found.brier is not None


def test_no_patients_give_no_numbers() -> None:
    found = evaluate([], [])
    assert (found.n, found.positives, found.auc, found.brier) == (0, 0, None, None)


@pytest.mark.parametrize(
    ("target", "score"),
    [([0, 0, 1], [0.1, 0.6, 0.4]), ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])],
    ids=["one case", "perfect"],
)
def test_an_interval_that_the_data_cannot_support_is_left_out(target: list[int], score: list[float]) -> None:
    found = evaluate(target, score)
    assert found.auc is not None
    assert (found.auc_low, found.auc_high) == (None, None)


@pytest.mark.parametrize(
    ("target", "score", "reason"),
    [
        ([0, 1], [0.5], "do not match"),
        ([0, 2], [0.5, 0.5], "neither 0 nor 1"),
        ([0, math.nan], [0.5, 0.5], "neither 0 nor 1"),
        ([0, 1], [0.5, math.nan], "outside 0..1"),
        ([0, 1], [0.5, 1.5], "outside 0..1"),
    ],
)
def test_impossible_values_are_refused(target: list[float], score: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        evaluate(target, score)


def test_mean_auc_leaves_out_sites_without_one() -> None:
    good, poor = evaluate([0, 1], [0.2, 0.8]), evaluate([0, 1], [0.8, 0.2])
    absent: Evaluation = evaluate([1, 1], [0.2, 0.8])
    comparisons = [
        Comparison("a", {"federated": good}),
        Comparison("b", {"federated": poor, "alone": absent}),
        Comparison("c", {"federated": absent}),
    ]
    assert mean_auc(comparisons, "federated") == 0.5
    assert mean_auc(comparisons, "alone") is None
    assert mean_auc(comparisons, "pooled") is None


def test_an_evaluation_is_plain_json() -> None:
    found = Comparison("a", {"federated": evaluate(*draw(1, 50))})
    assert json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))["models"]["federated"]["n"] == 50
