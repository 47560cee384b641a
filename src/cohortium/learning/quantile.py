"""Quantiles by counting: the bin that holds one is split into equal parts, and those are counted, round after round.

A site hides small counts (`cohortium.learning.disclosure`), so ranks are known up to the number of hidden values. A
bracket is narrowed only as far as its quantile is sure to lie inside, whatever the hidden values are.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cohortium.core.layout import Floats
from cohortium.learning.disclosure import suppress


class Quantile(NamedTuple):
    """A quantile in its feature's unit: that of the values described lies no further than `within` from `value`."""

    q: float
    value: float
    within: float


@dataclass(frozen=True)
class Interval:
    """A part of a part ... of a column's public range: one index for each split, outermost first."""

    column: str
    cells: tuple[int, ...] = ()


def split(bounds: tuple[float, float], bins: int) -> Floats:
    """Returns the `(bins + 1,)` edges of equal bins; the outer two are exactly the bounds."""
    # Where the bins are as narrow as floating point allows, an inner edge may be rounded beyond the last one.
    return np.clip(np.linspace(*bounds, bins + 1), *bounds)


def part_counts(values: Floats, bounds: tuple[float, float], cells: tuple[int, ...], bins: int, least: int) -> Floats:
    """Returns how many of a site's values lie in each part of an interval, `(bins,)`, small cells hidden.

    A part that is hidden stays hidden when it is split itself: its parts would add up to what was hidden.

    Args:
        values: `(n_known,)`, none or at least `least`, within `bounds`.
        bounds: the interval's outermost bounds; a bin holds its lower edge, the last one also its upper edge.
        cells: the way down from `bounds` to the interval.
        bins: parts at each split.
        least: the smallest count that may be sent.
    """
    edges = split(bounds, bins)
    parts = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, bins - 1)
    counts = suppress(np.bincount(parts, minlength=bins).astype(np.float64), least)
    if not cells:
        return counts
    cell, *deeper = cells
    inside = values[parts == cell] if counts[cell] else values[:0]
    return part_counts(inside, (edges[cell], edges[cell + 1]), tuple(deeper), bins, least)


@dataclass(frozen=True)
class Bracket:
    """Where one quantile is known to lie: the `rank`-th smallest value (from 1) is in `low`..`high`.

    Attributes:
        q: the quantile, between 0 and 1.
        interval: while the bracket is open, the interval that it is.
        low, high: its ends, in the feature's unit.
        rank: the quantile's rank among all known values.
        below: counted values under `low`.
        inside: counted values from `low` to `high`.
        hidden: values that sites hid; any number of them may lie under `low`.
        open: whether splitting it may narrow it further.
    """

    q: float
    interval: Interval
    low: float
    high: float
    rank: int
    below: int
    inside: int
    hidden: int = 0
    open: bool = True

    @staticmethod
    def whole(q: float, column: str, bounds: tuple[float, float], known: int) -> "Bracket":
        """Returns the bracket before any count: the public range. `known` is the number of values, at least 1."""
        rank = max(1, math.ceil(q * known - 1e-9))  # 0.07 * 100 is a little more than 7
        return Bracket(q, Interval(column), *bounds, rank, below=0, inside=known)

    def narrowed(self, parts: Floats) -> "Bracket":
        """Returns the bracket after its `(bins,)` parts were counted: the parts that may hold the quantile.

        One part stays open. Several, because hidden values leave the rank uncertain, close the bracket.
        """
        edges, last = split((self.low, self.high), len(parts)), len(parts) - 1
        hidden = self.hidden + max(0, self.inside - int(parts.sum()))
        through = self.below + np.cumsum(parts)
        first = min(int(np.searchsorted(through + hidden, self.rank)), last)
        final = min(int(np.searchsorted(through, self.rank)), last)
        if (first, final) == (0, last):
            return replace(self, open=False)
        return Bracket(
            q=self.q,
            interval=Interval(self.interval.column, (*self.interval.cells, first)),
            low=float(edges[first]),
            high=float(edges[final + 1]),
            rank=self.rank,
            below=self.below + int(parts[:first].sum()),
            inside=int(parts[first : final + 1].sum()),
            hidden=hidden,
            open=first == final,
        )

    def quantile(self) -> Quantile:
        """Returns the quantile, interpolated linearly between the ends' ranks.

        Hidden values make an end's rank a range; the middle of those that agree with the bracket is taken.
        """
        through = self.below + self.inside
        low_rank = (self.below + min(self.below + self.hidden, self.rank - 1)) / 2
        high_rank = (max(through, self.rank) + max(through + self.hidden, self.rank)) / 2
        value = self.low + (self.high - self.low) * (self.rank - 0.5 - low_rank) / (high_rank - low_rank)
        return Quantile(self.q, value, max(value - self.low, self.high - value))


def decimals(spread: float | None) -> int:
    """Returns how many decimals show a value to less than a hundredth of its spread."""
    return max(0, 2 - math.floor(math.log10(spread))) if spread else 3
