"""A cohort's Table 1 from sums: counts, missing rates, means, deviations, histograms, levels and quantiles.

The first round counts and adds up; each later one narrows the quantiles (`cohortium.learning.quantile`).

What leaves a site: with `small_cells` = k, each count is 0 or at least k, and so is each difference between a count and
the sent counts that make it up (patients into known and missing, known values into bins or levels, a bin into its
parts), so no hidden count can be had by one subtraction. A site with fewer than k patients sends zeros. Means and
deviations rest on at least k patients of a site. This is a heuristic of disclosure control, NOT differential privacy;
`cohortium.learning.disclosure` says what it leaves open.

What that costs: a cell of the result is too small by at most (k - 1) times the number of sites, save where a site hid
one larger cell of the feature to cover a smaller one; `hidden` tells how many values a histogram or the levels lack in
all. Known values are too few by at most k - 1 for each site, or by all that a site knows where fewer than k would
remain. Quantiles stop narrowing where cells get small, and each says how far that leaves it from the truth.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cohortium.core import codec
from cohortium.core.errors import CohortError, ProtocolError
from cohortium.core.features import BinaryTarget, Category, Feature, Number, NumberTarget, Target
from cohortium.core.layout import Block, Floats, Layout, Statistics
from cohortium.core.models import Descriptive
from cohortium.core.random import Randomness
from cohortium.learning.algorithm import Memory
from cohortium.learning.disclosure import known_values, suppress
from cohortium.learning.preprocess import middle_and_half, to_unit
from cohortium.learning.quantile import Bracket, Interval, Quantile, part_counts, split
from cohortium.learning.table import Table


@dataclass(frozen=True)
class Histogram:
    """Counts of equal bins over the public range: `len(edges)` is one more than `len(counts)`.

    `hidden` known values are in no bin, because sites hid small cells.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    hidden: int


@dataclass(frozen=True)
class NumberSummary:
    """A number, in its own unit. `sd` is the sample's (n - 1). None and no quantiles: too few known values."""

    name: str
    known: int
    missing: int
    missing_rate: float
    mean: float | None
    sd: float | None
    quantiles: tuple[Quantile, ...]
    histogram: Histogram
    kind: Literal["number"] = "number"


@dataclass(frozen=True)
class CategorySummary:
    """A category: a count for each level; `hidden` known values are in none, because sites hid small cells."""

    name: str
    known: int
    missing: int
    missing_rate: float
    levels: tuple[str, ...]
    counts: tuple[int, ...]
    hidden: int
    kind: Literal["category"] = "category"


@dataclass(frozen=True)
class Summary:
    """A cohort of `n` patients: its features in the study's order, then the target if there is one."""

    n: int
    features: tuple[NumberSummary | CategorySummary, ...]


@dataclass(frozen=True)
class DescribeState:
    """The summary after the first round, still without quantiles, and where each of those lies."""

    left: int
    summary: Summary | None = None
    brackets: tuple[Bracket, ...] = ()


@dataclass(frozen=True)
class FrozenSummary:
    """A summary as bytes can hold it: features of each kind apart, and the order of all of them."""

    n: int
    order: tuple[str, ...]
    numbers: tuple[NumberSummary, ...]
    categories: tuple[CategorySummary, ...]

    @staticmethod
    def of(summary: Summary | None) -> "FrozenSummary | None":
        """Returns what is to be kept of a summary, if there is one."""
        if summary is None:
            return None
        numbers = tuple(feature for feature in summary.features if isinstance(feature, NumberSummary))
        categories = tuple(feature for feature in summary.features if isinstance(feature, CategorySummary))
        return FrozenSummary(summary.n, tuple(feature.name for feature in summary.features), numbers, categories)

    @property
    def summary(self) -> Summary:
        """The summary that it was made of."""
        features: list[NumberSummary | CategorySummary] = [*self.numbers, *self.categories]
        named = {feature.name: feature for feature in features}
        return Summary(self.n, tuple(named[name] for name in self.order))


@dataclass(frozen=True)
class _Frozen:
    left: int
    summary: FrozenSummary | None
    brackets: tuple[Bracket, ...]


@dataclass(frozen=True)
class DescribeBroadcast:
    """The intervals whose parts are to be counted; none in the first round."""

    intervals: tuple[Interval, ...]


@dataclass(frozen=True)
class Describe:
    """Describes each feature and the target. `maximum` is the study's public limit of patients at a site."""

    features: Mapping[str, Feature]
    target: Target | None
    model: Descriptive
    maximum: int

    @property
    def columns(self) -> dict[str, Feature]:
        """What is described: the features, and the target as if it were one."""
        return dict(self.features) | ({self.target.name: _as_feature(self.target)} if self.target else {})

    @property
    def broadcast_type(self) -> type[DescribeBroadcast]:
        return DescribeBroadcast

    def init(self) -> DescribeState:
        return DescribeState(left=1 + self.model.refinements)

    def broadcast(self, state: DescribeState) -> DescribeBroadcast:
        # Quantiles in one bin ask the same, once.
        return DescribeBroadcast(tuple(dict.fromkeys(bracket.interval for bracket in state.brackets if bracket.open)))

    def admit(self, broadcast: DescribeBroadcast, before: DescribeBroadcast | None) -> None:
        self._refuse_foreign(broadcast.intervals)
        if before is None:
            honest = not broadcast.intervals
        elif not before.intervals:
            honest = bool(broadcast.intervals) and all(len(interval.cells) == 1 for interval in broadcast.intervals)
        else:
            parents = {Interval(interval.column, interval.cells[:-1]) for interval in broadcast.intervals}
            honest = bool(parents) and parents <= set(before.intervals)
        if not honest:
            raise ProtocolError("a broadcast was refused: its intervals do not narrow those of the round before")

    def layout(self, broadcast: DescribeBroadcast) -> Layout:
        bound = float(self.maximum)
        if broadcast.intervals:
            return (Block("parts", (len(broadcast.intervals), self.model.bins), bound),)
        # No column's name holds a colon, so none of its blocks is ever called "patients".
        blocks = [Block("patients", (), bound)]
        for name, feature in self.columns.items():
            cells = self.model.bins if isinstance(feature, Number) else len(feature.levels)
            blocks += [Block(f"{name}:known", (), bound), Block(f"{name}:cells", (cells,), bound)]
            if isinstance(feature, Number):
                blocks.append(Block(f"{name}:moments", (2,), bound))
        return tuple(blocks)

    def local(
        self, broadcast: DescribeBroadcast, table: Table, memory: Memory, randomness: Randomness
    ) -> tuple[Statistics, Memory]:
        least = self.model.small_cells
        if broadcast.intervals:
            self._refuse_foreign(broadcast.intervals)
            return {"parts": np.stack([self._parts(interval, table) for interval in broadcast.intervals])}, memory
        statistics: dict[str, Floats] = {"patients": np.array(float(table.rows if table.rows >= least else 0))}
        for name, feature in self.columns.items():
            known = self._known(name, table)
            statistics[f"{name}:known"] = np.array(float(len(known)))
            if isinstance(feature, Number):
                # Rounding may put the range's ends a little beyond 1, and the sum beyond its bound.
                unit = np.clip(to_unit(known, feature.range), -1.0, 1.0)
                statistics[f"{name}:moments"] = np.array([unit.sum(), (unit * unit).sum()])
                statistics[f"{name}:cells"] = part_counts(known, feature.range, (), self.model.bins, least)
            else:
                counts = np.bincount(known.astype(np.intp), minlength=len(feature.levels))
                statistics[f"{name}:cells"] = suppress(counts.astype(np.float64), least)
        return statistics, memory

    def update(self, state: DescribeState, total: Statistics) -> DescribeState:
        if state.summary is not None:
            # Counts are whole; what quantising added to them is not.
            parts = dict(zip(self.broadcast(state).intervals, np.rint(total["parts"]), strict=True))
            brackets = (b.narrowed(parts[b.interval]) if b.open else b for b in state.brackets)
            return DescribeState(state.left - 1, state.summary, tuple(brackets))
        patients = round(float(total["patients"]))
        if patients == 0:
            raise CohortError(
                f"no site has the {self.model.small_cells} patients below which it sends nothing: "
                "widen the cohort, or lower model.small_cells"
            )
        summaries: list[NumberSummary | CategorySummary] = []
        first: list[Bracket] = []
        for name, feature in self.columns.items():
            known, cells = round(float(total[f"{name}:known"])), np.rint(total[f"{name}:cells"])
            if isinstance(feature, Category):
                summaries.append(_category(name, feature, patients, known, cells))
                continue
            summaries.append(_number(name, feature, patients, known, cells, total[f"{name}:moments"]))
            if known:
                wholes = (Bracket.whole(q, name, feature.range, known) for q in self.model.quantiles)
                first += [whole.narrowed(cells) for whole in wholes]
        return DescribeState(state.left - 1, Summary(patients, tuple(summaries)), tuple(first))

    def done(self, state: DescribeState) -> bool:
        return self.progress(state)[0] == 0

    def finish(self, state: DescribeState) -> Summary:
        assert state.summary is not None
        features: list[NumberSummary | CategorySummary] = []
        for feature in state.summary.features:
            if isinstance(feature, NumberSummary):
                mine = tuple(b.quantile() for b in state.brackets if b.interval.column == feature.name)
                feature = replace(feature, quantiles=mine)
            features.append(feature)
        return Summary(state.summary.n, tuple(features))

    def progress(self, state: DescribeState) -> tuple[int, float | None]:
        narrowing = state.summary is None or any(bracket.open for bracket in state.brackets)
        return (state.left if narrowing else 0), None

    def freeze(self, state: DescribeState) -> bytes:
        return codec.encode(_Frozen(state.left, FrozenSummary.of(state.summary), state.brackets))

    def thaw(self, data: bytes) -> DescribeState:
        frozen = codec.decode(data, _Frozen)
        return DescribeState(frozen.left, frozen.summary.summary if frozen.summary else None, frozen.brackets)

    def _known(self, name: str, table: Table) -> Floats:
        """Returns the values of a column that the site may describe, `(n_known,)`."""
        column = table.target if self.target and name == self.target.name else table.columns[name]
        assert column is not None
        return known_values(column, self.model.small_cells)

    def _parts(self, interval: Interval, table: Table) -> Floats:
        """Returns the counts of an interval's parts, `(bins,)`."""
        feature = self.columns[interval.column]
        assert isinstance(feature, Number)
        known = self._known(interval.column, table)
        return part_counts(known, feature.range, interval.cells, self.model.bins, self.model.small_cells)

    def _refuse_foreign(self, intervals: tuple[Interval, ...]) -> None:
        """Raises a `ProtocolError` unless the study's quantiles could ask for these intervals."""
        numbers = [name for name, feature in self.columns.items() if isinstance(feature, Number)]
        fits = len(intervals) <= len(numbers) * len(self.model.quantiles) and all(
            interval.column in numbers
            and 1 <= len(interval.cells) <= self.model.refinements
            and all(0 <= cell < self.model.bins for cell in interval.cells)
            for interval in intervals
        )
        if not fits:
            raise ProtocolError(
                "the coordinator asks for counts that the study's quantiles do not need; none were sent"
            )


def _as_feature(target: Target) -> Feature:
    if isinstance(target, BinaryTarget):
        return Category(levels=target.levels)
    if isinstance(target, NumberTarget):
        return Number(unit=target.unit, range=target.range)
    return Number(unit="1", range=(0.0, float(target.maximum)))


def _whole(cells: Floats) -> tuple[int, ...]:
    return tuple(int(count) for count in cells)


def _number(name: str, feature: Number, patients: int, known: int, cells: Floats, moments: Floats) -> NumberSummary:
    """Returns a number's summary without quantiles. `moments`: sum and sum of squares on the unit scale."""
    (middle, half), (first, second) = middle_and_half(feature.range), (float(moment) for moment in moments)
    mean = middle + half * first / known if known else None
    # Quantising can leave a constant's variance a little below zero.
    sd = half * (max(0.0, second - first * first / known) / (known - 1)) ** 0.5 if known > 1 else None
    edges = tuple(float(edge) for edge in split(feature.range, len(cells)))
    histogram = Histogram(edges, _whole(cells), known - int(cells.sum()))
    missing = patients - known
    return NumberSummary(name, known, missing, missing / patients, mean, sd, (), histogram)


def _category(name: str, feature: Category, patients: int, known: int, cells: Floats) -> CategorySummary:
    missing, hidden = patients - known, known - int(cells.sum())
    return CategorySummary(name, known, missing, missing / patients, feature.levels, _whole(cells), hidden)
