"""What a study's epsilon costs: utility over a grid of epsilons, and the smallest epsilon that costs little.

Each seed holds out other patients and draws other noise, and is the same for all epsilons. So losses are compared seed
by seed, which removes what the choice of patients does to all epsilons alike.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np
from scipy.special import stdtrit

from cohortium.core.document import document
from cohortium.core.layout import Floats
from cohortium.core.study import Study
from cohortium.learning.evaluation import auc_and_variance

CURVES: Mapping[str, str] = {
    "distributed": "the study itself: each hospital adds a share of the noise, under the secure sum",
    "central": "one trusted party that holds all records and adds the noise once",
    "local": "each hospital adds the whole noise by itself, without a secure sum",
    "alone": "each hospital fits its own records by itself, with the whole noise",
}
"""What is compared, and what each is."""
_FORMAT = "cohortium tradeoff 1"
_DIGITS = 3


@dataclass(frozen=True)
class Utility:
    """What a result is judged by. `useless` is what one scores that knows nothing of the patients' differences."""

    name: str
    higher_is_better: bool
    useless: float


@dataclass(frozen=True)
class Point:
    """One seed's utilities at one epsilon.

    Attributes:
        epsilon: None without noise.
        scores: the utility of each curve.
        failed: for each curve that had some, the fits that found no model and count as one that knows the mean alone.
    """

    epsilon: float | None
    seed: int
    scores: dict[str, float]
    failed: dict[str, int]


@dataclass(frozen=True)
class Level:
    """A curve's height at one epsilon: mean over the seeds, its standard error, and the ends of its 95% interval."""

    curve: str
    epsilon: float | None
    mean: float
    error: float
    low: float
    high: float
    failed: int


@dataclass(frozen=True)
class Price:
    """What one epsilon costs the study.

    Attributes:
        utility: mean over the seeds.
        loss: by how much it is worse than without noise, paired by seed; below zero where it happened to be better.
        bound: the one-sided 95% upper confidence bound of the loss.
        kept: whether the bound is within the loss that is allowed.
    """

    epsilon: float
    utility: float
    loss: float
    bound: float
    kept: bool


@dataclass(frozen=True)
class Basis:
    """What must be equal for two points to belong to one trade-off: version, study, data and how they are used."""

    version: str
    study_id: str
    data: str
    delta: float
    holdout: float


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """Utility against epsilon.

    Attributes:
        basis: what all points have in common.
        epsilons: rising; the reference without noise is not among them.
        patients: how many each site has in its cohort.
        allowed: the loss of utility that is accepted.
        points: those found so far; there may be more of them than epsilons and seeds ask for.
    """

    study: Study
    basis: Basis
    utility: Utility
    curves: tuple[str, ...]
    epsilons: tuple[float, ...]
    seeds: tuple[int, ...]
    patients: Mapping[str, int]
    allowed: float
    points: tuple[Point, ...] = field(default=(), repr=False)

    @property
    def grid(self) -> tuple[float | None, ...]:
        """The epsilons, and None for the reference without noise."""
        return (*self.epsilons, None)

    @property
    def missing(self) -> tuple[tuple[float | None, int], ...]:
        """The epsilons and seeds of the points that are still to be computed, seed by seed."""
        known = {(point.epsilon, point.seed) for point in self.points}
        wanted = ((epsilon, seed) for seed in self.seeds for epsilon in self.grid)
        return tuple(pair for pair in wanted if pair not in known)


def levels(found: Tradeoff) -> tuple[Level, ...]:
    """Returns each curve's heights, in the order of the curves and of the epsilons."""
    return tuple(_level(found, curve, epsilon) for curve in found.curves for epsilon in found.grid)


def prices(found: Tradeoff) -> tuple[Price, ...]:
    """Returns what each epsilon costs, in rising order."""
    return tuple(_price(found, epsilon) for epsilon in found.epsilons)


def recommended(found: Tradeoff) -> Price | None:
    """Returns the price of the smallest epsilon that keeps within the allowed loss; None if there is none."""
    return next((price for price in prices(found) if price.kept), None)


def verdict(found: Tradeoff) -> str:
    """Returns what is recommended, or why nothing is."""
    price, allowed = recommended(found), plain(found.allowed)
    if price is not None:
        smaller = " It is the smallest of the list: a smaller one may do." if price.epsilon == found.epsilons[0] else ""
        return (
            f"Epsilon {price.epsilon:g}: {found.utility.name} {plain(price.utility)}, {_difference(found, price)} the "
            f"study without noise (95% bound {plain(price.bound)}, allowed {allowed}).{smaller}"
        )
    last = prices(found)[-1]
    return (
        f"No epsilon of the list is sure to cost {allowed} at most: the largest, {last.epsilon:g}, has "
        f"{found.utility.name} {plain(last.utility)}, {_difference(found, last)} the study without noise, and its 95% "
        f"bound {plain(last.bound)} misses by {plain(last.bound - found.allowed)}."
    )


def as_bytes(found: Tradeoff) -> bytes:
    """Returns a trade-off as JSON: the points, and what follows from them once none is missing.

    The same points give the same bytes, in whatever order they were computed.
    """
    return json.dumps(as_json(found), indent=1, allow_nan=False).encode()


def as_json(found: Tradeoff) -> dict[str, Any]:
    """Returns a trade-off as plain JSON values; an epsilon of null is the study without noise."""
    content: dict[str, Any] = {
        "format": _FORMAT,
        **asdict(found.basis),
        "study": document(found.study),
        "utility": asdict(found.utility),
        "epsilons": list(found.epsilons),
        "seeds": list(found.seeds),
        "patients": dict(found.patients),
        "allowed": found.allowed,
        "points": [asdict(point) for point in sorted(found.points, key=_order)],
    }
    if not found.missing:
        price = recommended(found)
        content["levels"] = [asdict(level) for level in levels(found)]
        content["prices"] = [asdict(price) for price in prices(found)]
        content["recommendation"] = {"epsilon": price.epsilon if price else None, "sentence": verdict(found)}
    return content


def points_of(data: bytes, basis: Basis) -> tuple[Point, ...]:
    """Returns the points that `as_bytes` wrote; none if they rest on something else, or cannot be read."""
    try:
        kept = msgspec.json.decode(data, type=_Kept)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ()
    found = Basis(kept.version, kept.study_id, kept.data, kept.delta, kept.holdout)
    return kept.points if (kept.format, found) == (_FORMAT, basis) else ()


def score(target: Floats, expected: Floats, kind: str) -> float:
    """Returns the utility of expected targets `(n,)` for a target of a kind: AUC, R², or deviance explained.

    Raises:
        ValueError: the targets do not vary.
    """
    if not np.ptp(target) > 0:
        raise ValueError("targets that do not vary judge nothing")
    if kind == "binary":
        return auc_and_variance(target == 1, expected)[0]
    deviance = _squares if kind == "number" else _poisson_deviance
    return 1 - deviance(target, expected) / deviance(target, np.full(len(target), target.mean()))


def total_variation(shares: Iterable[tuple[Floats, Floats]]) -> float:
    """Returns the mean over pairs of counts `(n_cells,)` of half the absolute difference of their shares."""
    return float(np.mean([np.abs(_shares(one) - _shares(other)).sum() / 2 for one, other in shares]))


def odds(epsilon: float, prior: float) -> float:
    """Returns how sure somebody can be at most after the result who believed something with probability `prior`."""
    return 1 / (1 + (1 / prior - 1) * math.exp(-epsilon))


def plain(value: float) -> str:
    """Returns a utility or a loss as people read it."""
    # what rounds to nothing has no sign
    return f"{round(value, _DIGITS) + 0.0:.{_DIGITS}f}"


@dataclass(frozen=True)
class _Kept:
    format: str
    version: str
    study_id: str
    data: str
    delta: float
    holdout: float
    points: tuple[Point, ...]


def _level(found: Tradeoff, curve: str, epsilon: float | None) -> Level:
    points = _of(found, epsilon)
    scores = np.array([point.scores[curve] for point in points])
    error = _standard_error(scores)
    reach = float(stdtrit(len(scores) - 1, 0.975)) * error
    mean = float(scores.mean())
    failed = sum(point.failed.get(curve, 0) for point in points)
    return Level(curve, epsilon, mean, error, mean - reach, mean + reach, failed)


def _price(found: Tradeoff, epsilon: float) -> Price:
    with_noise = np.array([point.scores["distributed"] for point in _of(found, epsilon)])
    without = np.array([point.scores["distributed"] for point in _of(found, None)])
    losses = without - with_noise if found.utility.higher_is_better else with_noise - without
    loss = float(losses.mean())
    bound = loss + float(stdtrit(len(losses) - 1, 0.95)) * _standard_error(losses)
    return Price(epsilon, float(with_noise.mean()), loss, bound, bound <= found.allowed)


def _of(found: Tradeoff, epsilon: float | None) -> list[Point]:
    """Returns the points of an epsilon in the order of the seeds."""
    known = {point.seed: point for point in found.points if point.epsilon == epsilon}
    return [known[seed] for seed in found.seeds]


def _standard_error(values: Floats) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _order(point: Point) -> tuple[float, int]:
    return math.inf if point.epsilon is None else point.epsilon, point.seed


def _difference(found: Tradeoff, price: Price) -> str:
    worse, better = ("below", "above") if found.utility.higher_is_better else ("above", "below")
    return f"{plain(abs(price.loss))} {worse if price.loss >= 0 else better}"


def _squares(target: Floats, expected: Floats) -> float:
    return float(((target - expected) ** 2).sum())


def _poisson_deviance(target: Floats, expected: Floats) -> float:
    mean = np.maximum(expected, np.finfo(np.float64).tiny)
    counted = target > 0
    logarithm = np.zeros(len(target))
    logarithm[counted] = target[counted] * np.log(target[counted] / mean[counted])
    return float(2 * (logarithm - (target - mean)).sum())


def _shares(counts: Floats) -> Floats:
    total = counts.sum()
    return counts / total if total else np.full(len(counts), 1 / len(counts))
