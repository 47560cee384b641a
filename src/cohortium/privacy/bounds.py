"""What quantising and drawing integers cost: the sensitivity after rounding, and the delta that noise shares leave.

Rounding. A site rounds a sum x, in steps of its scale, by a dither u that no datum influences: floor(x + u), entry by
entry. Were the sum x + v instead, the integers would differ by floor(w + v), where w = x + u modulo 1 is uniform if u
is. So over u the difference is v rounded at random, each entry independently, up with probability its fractional part.

Shares. The sum of shares of deviation s at n sites is as private as a normal distribution of variance n s^2, except
for what `aliasing` and `precision` return. Both are deltas: they add up over releases, composed adaptively, and hold
for every epsilon. ADR 0016 has the proofs.

Source: Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation", ICML 2021, the proposition on randomised rounding, for a step of 1.

Trust: all of this follows from public numbers.
"""

import math

from cohortium.privacy.gaussian import FINEST, RATIO, law

_CELL = 1.01 * 2.0**-128
"""The most that a table's probability of a value is off: two roundings by half of 2^-128."""
_REACH = 13.4
"""The most that one table's draw comes to, in deviations of its share."""
_GRID = 2.0**-53
"""Dithers are multiples of it."""
_SAFETY = 1 + 1e-12
"""More than floating point takes off any result here."""


def rounded_norm(norm: float, dimension: int, beta: float) -> float:
    """Returns a length that a vector of at most length `norm` exceeds after rounding with probability `beta` at most.

    With N = norm + sqrt(d) 2^-53, because a dither of 53 bits rounds v plus less than 2^-53 in each entry, it is

        min(N + sqrt(d), sqrt(N^2 + d / 4 + sqrt(2 log(1 / beta)) (N + sqrt(d) / 2)))

    The first is certain: no entry moves by 1. For the second, entry j takes the values a and a + 1, a = floor(v_j), so
    its square has an interval of |2 a + 1| <= 2 |v_j| + 1 and a mean of at most v_j^2 + 1 / 4. The intervals' squares
    add up to at most (2 N + sqrt(d))^2 by Minkowski's inequality, and Hoeffding's gives the deviation.

    Args:
        norm: Euclidean, in steps.
        dimension: d, how many entries the vector has.
        beta: from 0, for a length that is never exceeded, to below 1.
    """
    if not (norm >= 0 and dimension >= 1 and 0 <= beta < 1):
        raise ValueError("a norm is not negative, a dimension positive, and a probability from 0 to below 1")
    root = math.sqrt(dimension)
    norm = norm + root * _GRID
    certain = norm + root
    if beta == 0 or not math.isfinite(certain):
        return certain * _SAFETY
    width = math.sqrt(-2 * math.log(beta)) * (norm + root / 2)
    # hypot, because the square of a large norm may be infinite
    return min(certain, math.hypot(norm, root / 2, math.sqrt(width))) * _SAFETY


def aliasing(deviation: float, shares: int, dimension: int) -> float:
    """Returns the delta that it costs to add up lattices: an upper bound, for shares of exact probabilities.

    The sum's probabilities are those of a rounded normal variable plus independent bounded noise, up to a factor from
    (1 - a)^d to (1 + a)^d with a = n (levels - 1) 2 exp(-2 pi^2 b^2 / 257) + (n - 1) 2 exp(-pi^2 s^2).
    """
    chosen = law(deviation)
    levels = shares * (chosen.levels - 1) * _gap(2 * (chosen.deviation**2 / (1 + RATIO**2)))
    sites = (shares - 1) * _gap(deviation**2)
    # for a small product x of both, e^x - (1 - x) < 3 x
    return min(1.0, 3 * dimension * (levels + sites))


def precision(deviation: float, shares: int, dimension: int, multiplier: float) -> float:
    """Returns the delta that it costs to draw from tables of 128 bits: an upper bound.

    Args:
        deviation: of one share.
        shares: n, how many are in the sum.
        dimension: d, how many entries the vector has.
        multiplier: the least deviation of the sum, relative to its sensitivity.
    """
    chosen = law(deviation)
    draws = shares * chosen.levels
    # what all tables together are off, in one entry
    missed = draws * _CELL * (chosen.reach + 2)
    offset = math.sqrt(shares) * chosen.scale / 2 / deviation
    steepness = _REACH / math.sqrt(shares) + 2 * offset + 1 / (2 * multiplier)
    if steepness > 600 * multiplier:
        return 1.0
    # the sum over entries of exp(steepness a), where the squares of all a add up to 1 / multiplier^2 at most
    most = steepness / multiplier
    unequal = dimension + math.sqrt(dimension) * most + most**2 / 2 * math.exp(most)
    rare = 2.1 * draws * _CELL * (2 * chosen.reach + 10) * unequal
    # twice for a secret sample, whose mixture is compared with either of its parts
    return min(1.0, 2 * (2 * dimension * missed + rare))


def _gap(square: float) -> float:
    """Returns more than the sum of 2 exp(-pi^2 square j^2) over j = 1, 2, ... for a square of 3 or more."""
    # held above the smallest float, so that a bound is never 0
    return 2.01 * math.exp(-min(math.pi**2 * square * (1 - 1e-12), 700.0))


assert FINEST**2 / (1 + RATIO**2) > 24  # what `_gap` and ADR 0016 count on
