"""How well a score tells patients with an outcome from those without, on patients the model has not seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit, ndtri

from cohortium.core.layout import Floats

_BINS = 10
_LEAST_PER_BIN = 10
_DEVIATIONS_95 = float(ndtri(0.975))


@dataclass(frozen=True)
class Roc:
    """The ROC curve from (0, 0) to (1, 1), one point for each distinct score.

    Attributes:
        fpr: share of patients without the outcome at or above the threshold.
        tpr: share of patients with the outcome at or above the threshold.
    """

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """Predicted against observed risk, in bins of nearly equal counts; equal scores share a bin.

    Attributes:
        predicted: mean predicted probability in each bin, rising.
        observed: share of patients with the outcome in each bin.
        count: patients in each bin.
    """

    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    count: tuple[int, ...]


@dataclass(frozen=True)
class Evaluation:
    """A binary score on held-out patients.

    Attributes:
        n: held-out patients.
        positives: those with the outcome.
        auc: area under the ROC curve; None, like `roc`, where only one outcome occurs.
        auc_low: lower end of its 95% interval; None, like `auc_high`, where the data cannot support one: fewer than
            two patients on either side, or a perfect separation, whose estimated variance is zero.
        auc_high: upper end of its 95% interval.
        brier: mean squared difference of probability and outcome; None without patients.
        roc: the curve.
        calibration: predicted against observed risk.
    """

    n: int
    positives: int
    auc: float | None
    auc_low: float | None
    auc_high: float | None
    brier: float | None
    roc: Roc | None
    calibration: Calibration


@dataclass(frozen=True)
class Comparison:
    """What one hospital's held-out patients say about each way of learning.

    Attributes:
        site: the hospital.
        models: evaluations by model name: "federated", "alone" (this hospital's own data), "pooled".
    """

    site: str
    models: Mapping[str, Evaluation]


def evaluate(target: ArrayLike, probability: ArrayLike) -> Evaluation:
    """Returns the evaluation of `(n_rows,)` predicted probabilities against `(n_rows,)` outcomes, 0 or 1.

    Raises:
        ValueError: shapes differ, an outcome is neither 0 nor 1, or a probability lies outside 0..1.
    """
    outcome, score = np.asarray(target, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    if outcome.ndim != 1 or outcome.shape != score.shape:
        raise ValueError(f"outcomes of shape {outcome.shape} and probabilities of shape {score.shape} do not match")
    if not np.isin(outcome, (0, 1)).all():
        raise ValueError("an outcome is neither 0 nor 1")
    if not ((score >= 0) & (score <= 1)).all():
        raise ValueError("a probability is missing or lies outside 0..1")
    positive = outcome == 1
    auc, low, high = _auc_with_interval(positive, score)
    return Evaluation(
        n=len(score),
        positives=int(positive.sum()),
        auc=auc,
        auc_low=low,
        auc_high=high,
        brier=float(np.mean((score - outcome) ** 2)) if len(score) else None,
        roc=None if auc is None else _roc(positive, score),
        calibration=_calibration(outcome, score),
    )


def mean_auc(comparisons: Sequence[Comparison], model: str) -> float | None:
    """Returns the unweighted mean AUC of one model over the sites where it exists; None if it exists nowhere."""
    found = [comparison.models[model].auc for comparison in comparisons if model in comparison.models]
    known = [auc for auc in found if auc is not None]
    return float(np.mean(known)) if known else None


def auc_and_variance(positive: NDArray[np.bool_], score: Floats) -> tuple[float, float]:
    """Returns the AUC and DeLong's estimate of its variance, NaN with fewer than two patients on either side.

    Both classes must occur. Ties count one half. O(n log n), by midranks.

    Source:
        DeLong, DeLong and Clarke-Pearson (1988), Biometrics 44(3), equations 3 to 5 for the structural components and
        their variances; Sun and Xu (2014), IEEE Signal Processing Letters 21(11), for the form with midranks.
    """
    cases, controls = score[positive], score[~positive]
    ranks = _midranks(score)
    of_cases = (ranks[positive] - _midranks(cases)) / len(controls)
    of_controls = 1 - (ranks[~positive] - _midranks(controls)) / len(cases)
    if min(len(cases), len(controls)) < 2:
        return float(of_cases.mean()), float("nan")
    variance = of_cases.var(ddof=1) / len(cases) + of_controls.var(ddof=1) / len(controls)
    return float(of_cases.mean()), float(variance)


def _auc_with_interval(positive: NDArray[np.bool_], score: Floats) -> tuple[float | None, float | None, float | None]:
    """Returns the AUC with a 95% interval that is symmetric on the logit scale, so that it stays within 0..1."""
    if positive.all() or not positive.any():
        return None, None, None
    auc, variance = auc_and_variance(positive, score)
    if not np.isfinite(variance) or auc in (0.0, 1.0):
        return auc, None, None
    # The delta method: the derivative of the logit is 1 / (auc (1 - auc)).
    reach = _DEVIATIONS_95 * np.sqrt(variance) / (auc * (1 - auc))
    return auc, float(expit(logit(auc) - reach)), float(expit(logit(auc) + reach))


def _midranks(values: Floats) -> Floats:
    """Returns ranks from 1, equal values sharing the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    midranks: Floats = np.cumsum(counts) - (counts - 1) / 2
    return midranks[which]


def _roc(positive: NDArray[np.bool_], score: Floats) -> Roc:
    values, which = np.unique(score, return_inverse=True)

    def rising(chosen: NDArray[np.bool_]) -> tuple[float, ...]:
        falling_scores = np.bincount(which[chosen], minlength=len(values))[::-1]
        return (0.0, *(float(share) for share in np.cumsum(falling_scores) / chosen.sum()))

    return Roc(rising(~positive), rising(positive))


def _calibration(outcome: Floats, score: Floats) -> Calibration:
    if not len(score):
        return Calibration((), (), ())
    bins = max(1, min(_BINS, len(score) // _LEAST_PER_BIN))
    edges = np.quantile(score, np.arange(1, bins) / bins)
    member = np.searchsorted(edges, score, side="left")
    counts = np.bincount(member, minlength=bins)
    filled = counts > 0

    def means(values: Floats) -> tuple[float, ...]:
        sums = np.bincount(member, weights=values, minlength=bins)
        return tuple(float(mean) for mean in sums[filled] / counts[filled])

    return Calibration(means(score), means(outcome), tuple(int(count) for count in counts[filled]))
