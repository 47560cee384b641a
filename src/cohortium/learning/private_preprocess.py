"""Preprocessing with differential privacy: one noisy sum of what the study needs, and no more.

What leaves a site, with noise: one vector, the sum of one bounded vector for each privacy unit. A unit's vector is the
average over its records, so that it is as long as one record's at most, however many there are. It holds

- a 1, which counts the units;
- for a number that is scaled by its deviation: u and sqrt(2) (u^2 - 3/4), with u the value on the unit scale;
- for a number that is imputed: u, and a 1 where it is missing, and then zeros for the rest;
- for a category that is imputed: a 1 for its level.

What the study does not need is not asked for: noise grows with the vector's length. Subtracting 3/4 from the square
costs nothing, since the units are counted anyway, and shortens (u, sqrt(2) (u^2 - 3/4)) to sqrt(9/8) where
(u, sqrt(2) u^2) would reach sqrt(3); a missing value adds nothing to the longest vector. One joint vector is one
release: splitting it into blocks with a share of the budget each gives every entry the same noise.

The coordinator then makes plausible values of whatever the noise left: it may turn a count or a variance negative.
Only sums are released, and refusals that depend on the data are none: a constant feature or an empty level, which
`cohortium.learning.preprocess` refuses, go unnoticed.

Source: Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014, appendix A (Gaussian mechanism) and
proposition 2.1 (what is done to a noisy sum afterwards costs nothing).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cohortium.core import codec
from cohortium.core.errors import ProtocolError
from cohortium.core.features import Category, Feature, Number
from cohortium.core.layout import Block, Floats, Layout, Noise, Statistics
from cohortium.core.random import Randomness
from cohortium.learning.algorithm import Memory
from cohortium.learning.preprocess import FitBroadcast, FitState, Fitted, Scale, middle_and_half, to_unit
from cohortium.learning.table import Owners, Table, Unit
from cohortium.privacy.clip import by_unit, clipped

MOMENTS_LENGTH = 1.125
"""The largest squared length of a number's two moments."""
ROUNDING = 1 + 1e-6
"""Norms are declared a little larger than vectors are long, so that the room which clipping keeps for rounding in
floating point scales none of them down."""
_AT_ONCE = 1 << 21
"""Most numbers of vectors that are held at a time."""
_SPREAD, _CENTRE = 2.0**0.5, 0.75
_LEAST_DEVIATION = 0.01
"""On the unit scale: no feature is taken for narrower than a hundredth of half its range."""
_SURE = 2.0
"""A variance counts as at least this many times its noise's deviation: a feature whose scale is lost in noise would
otherwise be blown up by chance, and its patients clipped."""


def shares(owners: Owners | None, rows: int) -> Floats:
    """Returns what each row counts so that every unit counts once, `(n_rows,)`: one divided by its unit's rows."""
    if owners is None:
        return np.ones(rows)
    share: Floats = 1 / np.bincount(owners)[owners]
    return share


def lengths(rows: Floats) -> Floats:
    """Returns the Euclidean norm of each row of `(n_rows, d)`."""
    length: Floats = np.sqrt((rows * rows).sum(axis=1))
    return length


def sum_of_averages(
    vectors: Callable[[Owners], Floats], length: int, owners: Owners | None, rows: int, norm: float
) -> Floats:
    """Returns the sum `(length,)` over units of the average of a unit's vectors, each scaled down to `norm` if longer.

    Args:
        vectors: returns the vectors `(k, length)` of the records with the `k` given indices.
        length: how many numbers a vector holds.
        owners: which unit each record belongs to, `(rows,)` numbers from 0; None: each to another one.
        rows: how many records there are.
        norm: the largest Euclidean norm of a unit's average.
    """
    share = shares(owners, rows)
    order = np.arange(rows) if owners is None else np.argsort(owners, kind="stable")
    total, unfinished, last = np.zeros(length), np.zeros((1, length)), -1
    step = max(1, _AT_ONCE // length)
    for start in range(0, rows, step):
        part = order[start : start + step]
        weighted = vectors(part) * share[part][:, None]
        if owners is None:
            total += clipped(weighted, norm).sum(axis=0)
            continue
        # a unit may have more records than are held at a time: it is clipped when all of it is added up
        ids, numbers = np.unique(owners[part], return_inverse=True)
        sums = by_unit(weighted, numbers)
        if ids[0] == last:
            sums[0] += unfinished[0]
        else:
            total += clipped(unfinished, norm)[0]
        total += clipped(sums[:-1], norm).sum(axis=0)
        unfinished, last = sums[-1:], int(ids[-1])
    total += clipped(unfinished, norm)[0]
    return total


def indicators(places: Floats, cells: int) -> Floats:
    """Returns `(n_rows, cells)` with a 1 at each row's place and zeros elsewhere; a NaN is nowhere."""
    at: Floats = (places[:, None] == np.arange(cells)).astype(np.float64)
    return at


def moments(unit: Floats) -> Floats:
    """Returns `(n_rows, 2)` of what is added up to know mean and variance, from values on the unit scale.

    Zeros for a NaN, which is missing.
    """
    pair = np.column_stack([unit, _SPREAD * (unit * unit - _CENTRE)])
    return np.where(np.isnan(pair), 0.0, pair)


def mean_and_variance(known: float, first: float, second: float) -> tuple[float, float]:
    """Returns mean and variance on the unit scale from sums of `moments` over `known` units, both within the range.

    They are possible values for data in -1..1 whatever noise the sums carry; `known` is at least 1.
    """
    mean = min(1.0, max(-1.0, first / known))
    variance = second / _SPREAD / known + _CENTRE - mean * mean
    return mean, min(1 - mean * mean, max(0.0, variance))


@dataclass(frozen=True)
class PrivatePreprocess:
    """Fits means, deviations and modes in one round, and counts the units.

    Attributes:
        maximum: the study's public limit of records at a site.
        scale: how the study scales numbers; only "standard" needs deviations.
        unit: whose data one vector is.
        multiplier: the noise that the sum must carry; None for none.
        spread: the deviation of the noise that it will carry, in units of multiplier times norm; at least 1.
    """

    features: Mapping[str, Feature]
    maximum: int
    scale: Scale
    unit: Unit
    multiplier: float | None
    spread: float = 1.0

    @property
    def broadcast_type(self) -> type[FitBroadcast]:
        return FitBroadcast

    @property
    def norm(self) -> float:
        """The largest Euclidean norm of a unit's vector."""
        longest = 1.0
        for feature in self.features.values():
            entries = self._entries(feature)
            if entries:
                longest += MOMENTS_LENGTH if "sum of squares" in entries else 1.0
        return float(longest**0.5) * ROUNDING

    def init(self) -> FitState:
        return FitState()

    def broadcast(self, state: FitState) -> FitBroadcast:
        return FitBroadcast()

    def admit(self, broadcast: FitBroadcast, before: FitBroadcast | None) -> None:
        if before is not None:
            raise ProtocolError("a broadcast was refused: preprocessing takes one round")

    def layout(self, broadcast: FitBroadcast) -> Layout:
        entries = (f"{name}: {entry}" for name, feature in self.features.items() for entry in self._entries(feature))
        labels = ("patients", *entries)
        noise = None if self.multiplier is None else Noise(self.norm, self.multiplier)
        # an entry of a unit's vector is at most sqrt(2) * 3/4, less than its norm
        return (Block("sums", (len(labels),), self.maximum * self.norm, "clip", labels, noise),)

    def local(
        self, broadcast: FitBroadcast, table: Table, memory: Memory, randomness: Randomness
    ) -> tuple[Statistics, Memory]:
        (block,) = self.layout(broadcast)

        def vectors(rows: Owners) -> Floats:
            parts = [np.ones((len(rows), 1))]
            for name, feature in self.features.items():
                column, entries = table.columns[name][rows], self._entries(feature)
                if isinstance(feature, Category):
                    parts.append(indicators(column, len(entries)))
                    continue
                pair = moments(to_unit(column, feature.range))
                of = {"missing": np.isnan(column), "sum": pair[:, 0], "sum of squares": pair[:, 1]}
                parts += [of[entry][:, None] for entry in entries]
            return np.concatenate(parts, axis=1)

        sums = sum_of_averages(vectors, block.size, table.owners(self.unit), table.rows, self.norm)
        return {block.name: sums}, memory

    def update(self, state: FitState, total: Statistics) -> FitState:
        patients, *rest = total["sums"].tolist()
        patients = max(1.0, patients)
        means, deviations, modes = {}, {}, {}
        for name, feature in self.features.items():
            entries = self._entries(feature)
            sums, rest = dict(zip(entries, rest, strict=False)), rest[len(entries) :]
            if isinstance(feature, Number):
                middle, half = middle_and_half(feature.range)
                mean, deviation = self._mean_and_deviation(patients, sums)
                means[name], deviations[name] = middle + half * mean, half * deviation
            else:
                modes[name] = int(np.argmax([sums.get(level, 0.0) for level in feature.levels]))
        return FitState(Fitted(means, deviations, modes, patients))

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

    def _entries(self, feature: Feature) -> tuple[str, ...]:
        """Returns what is asked for of a feature, an entry of the vector each."""
        imputed = feature.missing == "impute"
        if isinstance(feature, Category):
            return feature.levels if imputed else ()
        missing = ("missing",) if imputed else ()
        if self.scale == "standard":
            return (*missing, "sum", "sum of squares")
        return (*missing, "sum") if imputed else ()

    def _mean_and_deviation(self, patients: float, sums: Mapping[str, float]) -> tuple[float, float]:
        """Returns a number's mean and deviation on the unit scale, those of its range where nothing was asked for."""
        if "sum" not in sums:
            return 0.0, 1.0
        known = min(patients, max(1.0, patients - sums.get("missing", 0.0)))
        if "sum of squares" not in sums:
            return min(1.0, max(-1.0, sums["sum"] / known)), 1.0
        mean, variance = mean_and_variance(known, sums["sum"], sums["sum of squares"])
        noise = 0.0 if self.multiplier is None else self.spread * self.multiplier * self.norm / known
        least = _SURE * noise * (1 / _SPREAD**2 + 4 * mean * mean) ** 0.5
        return mean, min(1.0, max(_LEAST_DEVIATION, max(variance, least) ** 0.5))
