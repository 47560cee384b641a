"""A cohort's Table 1 with differential privacy: counts, means, deviations, histograms and quantiles of one noisy sum.

What leaves a site, with noise: one vector, the sum of one bounded vector for each privacy unit. A unit's vector is the
average over its records, so that it is as long as one record's at most: a patient with three records counts a third of
each. It holds a 1, which counts the units, and for each feature a 1 in one cell (a bin of the histogram, a level, or
"missing" where the study lets values be missing) and for a number two moments of its value
(`cohortium.learning.private_preprocess.moments`).

Small cells are not hidden: noise protects the patients in them, and a rule that hides counts by what they are would let
one patient move the sum by more than the norm.

What the coordinator makes of the noisy sum costs nothing: no count is negative, the cells of a feature are the nearest
ones (least squares) that add up to its known values, and deviations are possible ones. A true zero may show as a small
count and a small count as zero.

A quantile is interpolated in the cumulative histogram. Its `within` spans the bins in which it may lie, given the
bins' width and noise of two deviations: for about 19 of 20 quantiles the cohort's own is no further away. Narrowing a
bin round after round would cost each time, so a study with differential privacy asks for no refinements, and for bins
as fine as it needs: noise in a cumulative count grows with the root of the number of bins only.

Sources: Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014, proposition 2.1; cells that add
up: Hay et al. 2010, "Boosting the Accuracy of Differentially Private Histograms Through Consistency"; the nearest such
cells: Duchi et al. 2008, "Efficient Projections onto the l1-Ball for Learning in High Dimensions", figure 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cohortium.core import codec
from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.features import Category, Feature, Number, Target
from cohortium.core.layout import Block, Floats, Layout, Noise, Statistics
from cohortium.core.models import Descriptive
from cohortium.core.random import Randomness
from cohortium.learning.algorithm import Memory
from cohortium.learning.descriptive import (
    CategorySummary,
    Describe,
    FrozenSummary,
    Histogram,
    NumberSummary,
    Summary,
)
from cohortium.learning.preprocess import FitBroadcast, middle_and_half, to_unit
from cohortium.learning.private_preprocess import (
    MOMENTS_LENGTH,
    ROUNDING,
    indicators,
    mean_and_variance,
    moments,
    sum_of_averages,
)
from cohortium.learning.quantile import Quantile, split
from cohortium.learning.table import Owners, Table, Unit

_DEVIATIONS = 2.0
"""How many deviations of noise a quantile's uncertainty covers."""


@dataclass(frozen=True)
class PrivateDescribeState:
    """The summary once the sum is known."""

    summary: Summary | None = None


@dataclass(frozen=True)
class _Frozen:
    summary: FrozenSummary | None


@dataclass(frozen=True)
class PrivateDescribe:
    """Describes each feature and the target in one round.

    Attributes:
        maximum: the study's public limit of records at a site.
        unit: whose data one vector is; counts are of units.
        multiplier: the noise that the sum must carry; None for none.
        spread: the deviation of the noise that it will carry, in units of multiplier times norm; at least 1.

    Raises:
        StudyError: the study asks for refinements.
    """

    features: Mapping[str, Feature]
    target: Target | None
    model: Descriptive
    maximum: int
    unit: Unit
    multiplier: float | None
    spread: float = 1.0

    def __post_init__(self) -> None:
        if self.model.refinements:
            raise StudyError(
                f"model.refinements is {self.model.refinements}: with differential privacy each would cost, so set it "
                "to 0 and ask for more bins"
            )

    @cached_property
    def columns(self) -> dict[str, Feature]:
        """What is described: the features, then the target as if it were one."""
        return Describe(self.features, self.target, self.model, self.maximum).columns

    @property
    def broadcast_type(self) -> type[FitBroadcast]:
        return FitBroadcast

    @property
    def norm(self) -> float:
        """The largest Euclidean norm of a unit's vector."""
        numbers = sum(isinstance(feature, Number) for feature in self.columns.values())
        return float((1 + len(self.columns) + MOMENTS_LENGTH * numbers) ** 0.5) * ROUNDING

    def init(self) -> PrivateDescribeState:
        return PrivateDescribeState()

    def broadcast(self, state: PrivateDescribeState) -> FitBroadcast:
        return FitBroadcast()

    def admit(self, broadcast: FitBroadcast, before: FitBroadcast | None) -> None:
        if before is not None:
            raise ProtocolError("a broadcast was refused: describing with differential privacy takes one round")

    def layout(self, broadcast: FitBroadcast) -> Layout:
        entries = (f"{name}: {entry}" for name, feature in self.columns.items() for entry in self._entries(feature))
        labels = ("patients", *entries)
        noise = None if self.multiplier is None else Noise(self.norm, self.multiplier)
        return (Block("sums", (len(labels),), self.maximum * self.norm, "clip", labels, noise),)

    def local(
        self, broadcast: FitBroadcast, table: Table, memory: Memory, randomness: Randomness
    ) -> tuple[Statistics, Memory]:
        (block,) = self.layout(broadcast)

        def vectors(rows: Owners) -> Floats:
            parts = [np.ones((len(rows), 1))]
            for name, feature in self.columns.items():
                column = table.target if self.target and name == self.target.name else table.columns[name]
                assert column is not None
                parts.append(self._vectors(feature, column[rows]))
            return np.concatenate(parts, axis=1)

        sums = sum_of_averages(vectors, block.size, table.owners(self.unit), table.rows, self.norm)
        return {block.name: sums}, memory

    def update(self, state: PrivateDescribeState, total: Statistics) -> PrivateDescribeState:
        units, start = max(1.0, float(total["sums"][0])), 1
        summaries: list[NumberSummary | CategorySummary] = []
        for name, feature in self.columns.items():
            length = len(self._entries(feature))
            sums, start = total["sums"][start : start + length], start + length
            missing = 0.0
            if feature.missing == "impute":
                sums, missing = sums[:-1], min(units, max(0.0, float(sums[-1])))
            if isinstance(feature, Number):
                summaries.append(self._number(name, feature, units, missing, sums))
            else:
                summaries.append(_category(name, feature, units, missing, sums))
        return PrivateDescribeState(Summary(round(units), tuple(summaries)))

    def done(self, state: PrivateDescribeState) -> bool:
        return state.summary is not None

    def finish(self, state: PrivateDescribeState) -> Summary:
        assert state.summary is not None
        return state.summary

    def progress(self, state: PrivateDescribeState) -> tuple[int, float | None]:
        return (0 if self.done(state) else 1), None

    def freeze(self, state: PrivateDescribeState) -> bytes:
        return codec.encode(_Frozen(FrozenSummary.of(state.summary)))

    def thaw(self, data: bytes) -> PrivateDescribeState:
        frozen = codec.decode(data, _Frozen)
        return PrivateDescribeState(frozen.summary.summary if frozen.summary else None)

    def _entries(self, feature: Feature) -> tuple[str, ...]:
        """Returns the names of a feature's entries in the vector."""
        missing = ("missing",) if feature.missing == "impute" else ()
        if isinstance(feature, Category):
            return (*feature.levels, *missing)
        bins = tuple(f"bin {index}" for index in range(1, self.model.bins + 1))
        return ("sum", "sum of squares", *bins, *missing)

    def _vectors(self, feature: Feature, column: Floats) -> Floats:
        """Returns a feature's part of each record's vector, `(n_rows, n_entries)`."""
        parts = []
        if isinstance(feature, Category):
            parts.append(indicators(column, len(feature.levels)))
        else:
            cell = np.searchsorted(split(feature.range, self.model.bins), column, side="right") - 1
            places = np.where(np.isnan(column), np.nan, np.clip(cell, 0, self.model.bins - 1))
            parts += [moments(to_unit(column, feature.range)), indicators(places, self.model.bins)]
        if feature.missing == "impute":
            parts.append(np.isnan(column)[:, None].astype(np.float64))
        return np.concatenate(parts, axis=1)

    def _number(self, name: str, feature: Number, units: float, missing: float, sums: Floats) -> NumberSummary:
        middle, half = middle_and_half(feature.range)
        edges = split(feature.range, self.model.bins)
        known, (lost, rate) = units - missing, _missing(units, missing)
        mean = sd = None
        quantiles: tuple[Quantile, ...] = ()
        cells = nearest_cells(sums[2:], known)
        count = round(units) - lost
        if count:
            unit_mean, variance = mean_and_variance(max(1.0, known), float(sums[0]), float(sums[1]))
            mean = middle + half * unit_mean
            sd = half * (variance * count / (count - 1)) ** 0.5 if count > 1 else None
            noise = 0.0 if self.multiplier is None else self.spread * self.multiplier * self.norm
            quantiles = tuple(quantile(q, cells, edges, noise) for q in self.model.quantiles)
        histogram = Histogram(tuple(edges.tolist()), whole(cells, count), hidden=0)
        return NumberSummary(name, count, lost, rate, mean, sd, quantiles, histogram)


def _category(name: str, feature: Category, units: float, missing: float, sums: Floats) -> CategorySummary:
    lost, rate = _missing(units, missing)
    known = round(units) - lost
    counts = whole(nearest_cells(sums, units - missing), known)
    return CategorySummary(name, known, lost, rate, feature.levels, counts, hidden=0)


def _missing(units: float, missing: float) -> tuple[int, float]:
    return min(round(missing), round(units)), missing / units


def nearest_cells(cells: Floats, total: float) -> Floats:
    """Returns the cells `(n,)`, none negative, that add up to `total`, at least 0, and are nearest to the given."""
    falling = np.sort(cells)[::-1]
    surplus = (np.cumsum(falling) - total) / np.arange(1, len(cells) + 1)
    # the cells that stay above zero are the largest ones, as many as exceed what all of them must give up
    kept = max(1, int(np.count_nonzero(falling > surplus)))
    nearest: Floats = np.maximum(cells - surplus[kept - 1], 0.0)
    return nearest


def whole(cells: Floats, total: int) -> tuple[int, ...]:
    """Returns whole cells that add up to `total`, each within 1 of the given ones where those nearly do."""
    # counts next to nothing are none: a quotient by their sum could be infinite
    known = float(cells.sum()) > 1e-100
    scaled = cells * (total / float(cells.sum())) if known else np.full(len(cells), total / len(cells))
    # what rounding in floating point took from a whole number is given back
    down = np.floor(scaled + 1e-6)
    left = total - int(down.sum())
    down[np.argsort(down - scaled, kind="stable")[: max(0, left)]] += 1
    return tuple(int(count) for count in down)


def quantile(q: float, cells: Floats, edges: Floats, noise: float) -> Quantile:
    """Returns a quantile of a histogram, interpolated in its bin, and how far it may be from the cohort's own.

    Args:
        q: the quantile.
        cells: `(bins,)` none negative, their sum positive.
        edges: `(bins + 1,)`.
        noise: the deviation of the noise in each cell before the cells were made to add up.
    """
    bins, known = len(cells), float(cells.sum())
    through, rank = np.concatenate([[0.0], np.cumsum(cells)]), q * known
    place = min(int(np.searchsorted(through[1:], rank)), bins - 1)
    share = (rank - through[place]) / max(float(cells[place]), 1e-300)
    value = float(edges[place] + (edges[place + 1] - edges[place]) * min(1.0, max(0.0, share)))
    # noise of a cumulative count less the rank: of its own cells, of the total that cells were fitted to
    part = np.arange(bins + 1) / bins
    doubt = _DEVIATIONS * noise * np.sqrt(bins * part * (1 - part) + 2 * (part - q) ** 2)
    surely_below, surely_above = through + doubt < rank, through - doubt >= rank
    surely_below[0] = surely_above[-1] = True
    low, high = edges[np.flatnonzero(surely_below)[-1]], edges[np.flatnonzero(surely_above)[0]]
    return Quantile(q, value, max(value - float(low), float(high) - value))
