"""Preprocessing: imputation, scaling and one-hot coding, fitted by one secure sum and saved with the model.

Numbers are measured on the unit scale u = (x - middle) / half, where the public range maps to -1..1, so that every
sum has a bound that no record decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cohortium.core import codec
from cohortium.core.errors import CohortError, ProtocolError
from cohortium.core.features import Category, Feature, Number
from cohortium.core.layout import Block, Floats, Layout, Statistics
from cohortium.core.random import Randomness
from cohortium.learning.algorithm import Memory
from cohortium.learning.table import Table

Scale = Literal["standard", "range", "none"]
_MOMENTS = ("patients", "sum", "sum of squares")
_LEAST_VARIANCE = 1e-8
"""On the unit scale: a spread under a ten-thousandth of half the range counts as constant."""


def middle_and_half(bounds: tuple[float, float]) -> tuple[float, float]:
    """Returns the middle of a range and half its length."""
    low, high = bounds
    return (low + high) / 2, (high - low) / 2


def to_unit(values: Floats, bounds: tuple[float, float]) -> Floats:
    """Returns values within the range on the unit scale, -1..1; rounding never leads outside."""
    middle, half = middle_and_half(bounds)
    return np.clip((values - middle) / half, -1.0, 1.0)


@dataclass(frozen=True)
class Fitted:
    """What preprocessing learned: a mean and a standard deviation (in the feature's unit) for each number, and the
    index of the most frequent level for each category. Features in the study's order.

    `patients`: with differential privacy the noisy number, at least 1, of privacy units (patients, unless the study
    says otherwise), by which later sums are divided; None without.
    """

    means: dict[str, float]
    deviations: dict[str, float]
    modes: dict[str, int]
    patients: float | None = None


@dataclass(frozen=True)
class Encoder:
    """Turns a cohort into a design matrix: numbers as one column, categories as one for each level but the first."""

    features: Mapping[str, Feature]
    fitted: Fitted

    def __post_init__(self) -> None:
        fitted, numbers = self.fitted, {n: f for n, f in self.features.items() if isinstance(f, Number)}
        categories = {n: f for n, f in self.features.items() if isinstance(f, Category)}
        if (
            not (fitted.means.keys() == fitted.deviations.keys() == numbers.keys())
            or fitted.modes.keys() != categories.keys()
            or not all(_plausible(f.range, fitted.means[n], fitted.deviations[n]) for n, f in numbers.items())
            or not all(0 <= fitted.modes[n] < len(f.levels) for n, f in categories.items())
            or not (fitted.patients is None or 1 <= fitted.patients < float("inf"))
        ):
            raise ProtocolError("preprocessing was refused: it cannot have been fitted to data within the ranges")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the design's columns: 'age', or 'sex[male]'."""
        names: list[str] = []
        for name, feature in self.features.items():
            names += [name] if isinstance(feature, Number) else [f"{name}[{level}]" for level in feature.levels[1:]]
        return tuple(names)

    def affine(self, scale: Scale) -> tuple[Floats, Floats]:
        """Returns `(shift, width)`, each `(n_columns,)`: the design's column is (raw - shift) / width."""
        pairs: list[tuple[float, float]] = []
        for name, feature in self.features.items():
            if isinstance(feature, Category):
                pairs += [(0.0, 1.0)] * (len(feature.levels) - 1)
            elif scale == "standard":
                pairs.append((self.fitted.means[name], self.fitted.deviations[name]))
            else:
                pairs.append(middle_and_half(feature.range) if scale == "range" else (0.0, 1.0))
        shift, width = np.array(pairs).reshape(-1, 2).T
        return shift, width

    def design(self, table: Table, scale: Scale) -> Floats:
        """Returns the `(n_rows, n_columns)` design matrix, without an intercept, missing values imputed."""
        parts: list[Floats] = []
        for name, feature in self.features.items():
            column = table.columns[name]
            missing = np.isnan(column)
            if isinstance(feature, Number):
                parts.append(np.where(missing, self.fitted.means[name], column)[:, None])
            else:
                level = np.where(missing, self.fitted.modes[name], column)
                parts.append((level[:, None] == np.arange(1, len(feature.levels))).astype(np.float64))
        shift, width = self.affine(scale)
        return (np.concatenate(parts, axis=1) - shift) / width


@dataclass(frozen=True)
class FitState:
    fitted: Fitted | None = None


@dataclass(frozen=True)
class FitBroadcast:
    """Nothing: the first round needs only the study."""


@dataclass(frozen=True)
class Preprocess:
    """Fits means, standard deviations and modes in one round.

    `maximum` is the study's public limit of patients at a site.
    """

    features: Mapping[str, Feature]
    maximum: int

    @property
    def broadcast_type(self) -> type[FitBroadcast]:
        return FitBroadcast

    def init(self) -> FitState:
        return FitState()

    def broadcast(self, state: FitState) -> FitBroadcast:
        return FitBroadcast()

    def admit(self, broadcast: FitBroadcast, before: FitBroadcast | None) -> None:
        if before is not None:
            raise ProtocolError("a broadcast was refused: preprocessing takes one round")

    def layout(self, broadcast: FitBroadcast) -> Layout:
        blocks: list[Block] = []
        for name, feature in self.features.items():
            labels = _MOMENTS if isinstance(feature, Number) else feature.levels
            blocks.append(Block(name, (len(labels),), float(self.maximum), labels=labels))
        return tuple(blocks)

    def local(
        self, broadcast: FitBroadcast, table: Table, memory: Memory, randomness: Randomness
    ) -> tuple[Statistics, Memory]:
        statistics: dict[str, Floats] = {}
        for name, feature in self.features.items():
            known = table.columns[name][~np.isnan(table.columns[name])]
            if isinstance(feature, Number):
                unit = to_unit(known, feature.range)
                statistics[name] = np.array([len(known), unit.sum(), (unit * unit).sum()])
            else:
                statistics[name] = np.bincount(known.astype(np.intp), minlength=len(feature.levels)).astype(float)
        return statistics, memory

    def update(self, state: FitState, total: Statistics) -> FitState:
        means, deviations, modes = {}, {}, {}
        for name, feature in self.features.items():
            counts = total[name]
            if isinstance(feature, Number):
                middle, half = middle_and_half(feature.range)
                mean, variance = _moments(name, counts)
                means[name], deviations[name] = middle + half * mean, half * variance**0.5
            else:
                _refuse_empty_levels(name, feature, counts)
                modes[name] = int(np.argmax(counts))
        return FitState(Fitted(means, deviations, modes))

    def done(self, state: FitState) -> bool:
        return state.fitted is not None

    def finish(self, state: FitState) -> Fitted:
        assert state.fitted is not None
        return state.fitted

    def progress(self, state: FitState) -> tuple[int, float | None]:
        return (0 if self.done(state) else 1), None

    def freeze(self, state: FitState) -> bytes:
        return codec.encode(state)

    def thaw(self, data: bytes) -> FitState:
        return codec.decode(data, FitState)


def _plausible(bounds: tuple[float, float], mean: float, deviation: float) -> bool:
    middle, half = middle_and_half(bounds)
    # a variance within the range is at most half squared; a little room for rounding and quantising
    return abs(mean - middle) <= 1.01 * half and 0.5 * _LEAST_VARIANCE**0.5 * half <= deviation <= 1.01 * half


def _moments(name: str, sums: Floats) -> tuple[float, float]:
    """Returns mean and variance on the unit scale from `(count, sum, sum of squares)`."""
    count, first, second = (float(value) for value in sums)
    if count < 1:
        raise CohortError(f"feature '{name}' is missing for every patient at every site: remove it")
    mean = first / count
    variance = second / count - mean * mean
    if variance <= _LEAST_VARIANCE:
        raise CohortError(f"feature '{name}' is constant over all sites: remove it, or narrow its range")
    return mean, variance


def _refuse_empty_levels(name: str, feature: Category, counts: Floats) -> None:
    seen = int((counts > 0.5).sum())
    if seen < 2:
        raise CohortError(f"feature '{name}' is constant over all sites: remove it")
    for level, count in zip(feature.levels, counts, strict=True):
        if count < 0.5:
            raise CohortError(f"level '{level}' of feature '{name}' occurs at no site: remove the level")
