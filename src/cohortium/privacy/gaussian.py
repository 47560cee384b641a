"""Integer noise that sums to a normal distribution's privacy: rounded Gaussians, drawn exactly from integer tables.

A share of deviation s is the sum of `levels` independent draws from one table, each 16 times as coarse as the last:

    X = X_0 + 16 X_1 + 16^2 X_2 + ...,     X_j = round(G_j),  G_j normal of deviation b,  b^2 (1 + 16^2 + ...) = s^2

For whole numbers x, x + round(G) is round(x + G): one draw is the Gaussian mechanism with its outcome rounded. That a
sum of several draws, of one site or of many, costs no more is proved in ADR 0016; `cohortium.privacy.bounds` has
what the proof and the table's 128 bits leave over.

What a key gives is fixed for good, on every machine:

- levels: as many as leave b at 80 or more, and at least one. b is rounded up to a multiple of 2^-32.
- table: T(k) = P(X_j > k) = P(G > k + 1/2), rounded to the nearest multiple of 2^-128, for k = 0, 1, ... until it is 0.
  P(X_j <= k) is 1 - T(k), and T(-k-1) for a negative k.
- draw: X_j is the least k whose P(X_j <= k) exceeds r / 2^128, for a uniform r of 128 bits.
- r: entries come in segments of 16,384. Entry i of segment c has for level j the i-th little-endian word of 64 bits of
  the stream of child (j, c), child ("high") as its upper half, and that of child ("low") as its lower half. The lower
  one matters only where the upper one equals that of an entry in the table, which next to never happens.

Source: inversion with a guide table after Chen and Asau, "On Generating Random Variates from an Empirical
Distribution", AIIE Transactions 6, 1974. Levels as in Micciancio and Walter, "Gaussian Sampling over the Integers:
Efficient, Generic, Constant-Time", CRYPTO 2017, for discrete Gaussians.

Trust: whoever learns the key learns the site's noise, can take it off what the site sent if that is seen too, and so
takes this share out of the sum's protection; all other shares still count. The noise is as random as AES-256 in
counter mode. Tables are looked up and loops end by secret draws: whoever measures cache or time on the site's
machine may learn about them. This is no constant-time code.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, repeat
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import StudyError
from cohortium.core.random import Randomness

try:
    import numba
except ImportError as error:
    raise StudyError(
        "noise for differential privacy needs numba, which is not installed here: run pip install 'cohortium[privacy]'"
    ) from error

SMALLEST = 5.0
"""The least deviation of a share: sums of smaller ones are less and less like a normal distribution."""
LARGEST = 2.0**58
"""The largest deviation of a share; no draw leaves 64 bits."""
RATIO = 16
"""How much coarser each level is than the one before."""
FINEST = 80
"""The least deviation of a level where there are several: five steps of the next level."""
SEGMENT = 1 << 14
"""Entries drawn under one key. They stay in the processor's cache with their random words."""

_UNIT = 1 << 32
_FRACTION = 240
"""Binary digits of the numbers that a table is computed with; all errors stay below its last digit by 2^-60 of it."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Law:
    """How a share's draws are made up.

    Attributes:
        levels: how many table draws add up to one.
        base: b, the deviation before rounding of each, in units of 2^-32.
    """

    levels: int
    base: int

    @property
    def deviation(self) -> float:
        """b as a float, exact in all but its last digits."""
        return self.base / _UNIT

    @property
    def scale(self) -> int:
        """The sum of the levels' steps: 1 + 16 + ..."""
        return sum(RATIO**level for level in range(self.levels))

    @property
    def reach(self) -> int:
        """No table draw is larger: 13.2 b, rounded up; beyond that less than 2^-129 is left on either side."""
        return -(-66 * self.base // (5 * _UNIT))


@lru_cache(maxsize=256)
def law(deviation: float) -> Law:
    """Returns how shares of at least this standard deviation are drawn, from exact arithmetic.

    Raises:
        ValueError: the deviation is not from `SMALLEST` to `LARGEST`.
    """
    if not SMALLEST <= deviation <= LARGEST:
        raise ValueError(f"noise of deviation {deviation:g} is not offered: choose from {SMALLEST:g} to {LARGEST:g}")
    numerator, denominator = deviation.as_integer_ratio()
    levels, squares = 1, 1
    while numerator**2 >= (FINEST * denominator) ** 2 * (squares + RATIO ** (2 * levels)):
        squares += RATIO ** (2 * levels)
        levels += 1
    square = -(-((numerator * _UNIT) ** 2) // (denominator**2 * squares))
    return Law(levels, math.isqrt(square - 1) + 1)


def largest(deviation: float) -> int:
    """Returns a magnitude that no draw of such a share exceeds."""
    chosen = law(deviation)
    return chosen.reach * chosen.scale


def sample(deviation: float, count: int, randomness: Randomness) -> NDArray[np.int64]:
    """Returns `count` independent draws of a share, `(count,)`: for one key always the same.

    Memory beyond the draws: half a MiB, and less than one for the table.

    Raises:
        ValueError: the deviation is not offered.
    """
    drawn = np.empty(count, np.int64)
    start = 0
    for part in segments(deviation, count, randomness):
        drawn[start : start + len(part)] = part
        start += len(part)
    return drawn


def segments(deviation: float, count: int, randomness: Randomness) -> Iterator[NDArray[np.int64]]:
    """Yields the draws of `sample` in order, a segment at a time; each is overwritten by the next."""
    chosen = law(deviation)
    table = _table(chosen.base)
    drawn = np.empty(min(SEGMENT, count), np.int64)
    for index, start in enumerate(range(0, count, SEGMENT)):
        part = drawn[: min(SEGMENT, count - start)]
        part[:] = 0
        for level in range(chosen.levels):
            _add_level(table, RATIO**level, randomness.child(level, index), part)
        yield part


@dataclass(frozen=True)
class _Table:
    """A table as the sampler reads it; entry i is P(X <= i - centre), times 2^128.

    Attributes:
        high: upper halves, `(n + 1,)`; the last, all ones, ends every search.
        low: lower halves, `(n,)`.
        guide: for each value of a word's leading bits the first entry that may exceed it, `(a power of two,)`.
        shift: how many bits of a word come after the leading ones.
        centre: how many values are negative.
    """

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    guide: NDArray[np.uint16]
    shift: np.uint64
    centre: int


@lru_cache(maxsize=16)
def _table(base: int) -> _Table:
    tails = _tails(base)
    return _arranged([*reversed(tails), *((1 << 128) - tail for tail in tails)], len(tails))


def _arranged(entries: list[int], centre: int) -> _Table:
    words = (1 << 64) - 1
    high = np.array([*(entry >> 64 for entry in entries), words], np.uint64)
    low = np.array([entry & words for entry in entries], np.uint64)
    # about two leading values for each entry where entries are dense, so that most searches end where they begin
    bits = len(high).bit_length()
    shift = np.uint64(64 - bits)
    starts = np.arange(1 << bits, dtype=np.uint64) << shift
    return _Table(high, low, np.searchsorted(high, starts).astype(np.uint16), shift, centre)


def _add_level(table: _Table, step: int, randomness: Randomness, drawn: NDArray[np.int64]) -> None:
    """Adds `step` times a draw from the table to each entry."""
    words = _words(randomness.child("high"), len(drawn))
    place = _add_draws(words, 0, table.high, table.guide, table.shift, table.centre, step, drawn)
    while place < len(words):
        # the upper half ties
        low = int(_words(randomness.child("low"), len(drawn))[place])
        drawn[place] += step * _drawn(table, int(words[place]), low)
        place = _add_draws(words, place + 1, table.high, table.guide, table.shift, table.centre, step, drawn)


def _drawn(table: _Table, high: int, low: int) -> int:
    """Returns the draw that 128 bits stand for, by their definition."""
    value, first = high << 64 | low, int(np.searchsorted(table.high[:-1], np.uint64(high)))
    while first < len(table.low) and (int(table.high[first]) << 64 | int(table.low[first])) <= value:
        first += 1
    return first - table.centre


def _words(randomness: Randomness, count: int) -> NDArray[np.uint64]:
    return np.frombuffer(randomness.stream(8 * count), "<u8")


def _compiled(function: _Function) -> _Function:
    # kept on disk and renewed when this module changes
    return cast(_Function, numba.njit(function, cache=True, nogil=True, error_model="numpy"))


@_compiled
def _add_draws(
    words: NDArray[np.uint64],
    start: int,
    high: NDArray[np.uint64],
    guide: NDArray[np.uint16],
    shift: np.uint64,
    centre: int,
    step: int,
    drawn: NDArray[np.int64],
) -> int:
    """Adds draws from `start` on; returns the first place at which the word ties with the table, or their number."""
    for place in range(start, len(words)):
        word = words[place]
        entry = np.int64(guide[word >> shift])
        # without a branch the first step costs nothing when it is mispredicted
        entry += np.int64(high[entry] < word)
        while high[entry] < word:
            entry += 1
        if high[entry] == word:
            return place
        drawn[place] += step * (entry - centre)
    return len(words)


def _tails(base: int) -> list[int]:
    """Returns P(G > k + 1/2) for k = 0, 1, ... as whole multiples of 2^-128, as long as they are not 0.

    A cell's probability is the density at its middle times the integral of cosh(k t / b^2) exp(-t^2 / 2 b^2) over
    t from 0 to 1/2, doubled: a power series in (k / 2 b^2)^2. Densities come from each other by two multiplications.
    They add up, over all whole numbers, to b sqrt(2 pi) up to a factor of 1 + 2^-700, by Poisson's summation.
    """
    one = 1 << _FRACTION
    inverse = (one << 64) // base**2
    step, ratio = _exponential(inverse), _exponential(inverse // 2)
    ratios = accumulate(repeat(step), lambda ratio, step: ratio * step >> _FRACTION, initial=ratio)
    densities = [one]
    while densities[-1]:
        densities.append(densities[-1] * next(ratios) >> _FRACTION)
    total = 2 * sum(densities) - one
    series = _series(inverse)
    square = inverse**2 >> (_FRACTION + 2)
    tails: list[int] = []
    above = total
    for k, density in enumerate(densities):
        power, integral = k * k * square, 0
        for coefficient in series:
            integral = (integral * power >> _FRACTION) + coefficient
        mass = density * integral >> _FRACTION
        above -= 2 * mass if k else mass
        # above / total is both tails together
        tail = ((above << 128) + total) // (2 * total)
        if not tail:
            break
        tails.append(tail)
    return tails


def _exponential(number: int) -> int:
    """Returns exp(-number), both with `_FRACTION` binary digits, for a number below 1."""
    total, term, index = 0, 1 << _FRACTION, 0
    while term:
        total += -term if index % 2 else term
        index += 1
        term = (term * number >> _FRACTION) // index
    return total


def _series(inverse: int) -> list[int]:
    """Returns the coefficients of the integral's power series, the highest first; `inverse` is 1 / b^2."""
    coefficients: list[int] = []
    # no k beyond 14 b comes into the table: the power is at most 49 / b^2
    scale, most, index = 1 << _FRACTION, 1 << _FRACTION, 0
    while most:
        moment, term, order = 0, scale, 0
        while term:
            part = term // (2 * (index + order) + 1)
            moment += -part if order % 2 else part
            order += 1
            term = (term * inverse >> (_FRACTION + 3)) // order
        coefficients.append(moment)
        index += 1
        scale //= (2 * index) * (2 * index - 1)
        most = (most * 49 * inverse >> _FRACTION) // ((2 * index) * (2 * index - 1))
    return coefficients[::-1]
