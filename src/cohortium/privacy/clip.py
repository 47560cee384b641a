"""Clipping by privacy unit: all that a unit's records contribute is added up first, and then bounded once.

Clipping each record instead would let a patient with many records move the sum by many times the bound.

A clipped contribution is rounded to a grid on which sums of up to 2^27 units are exact in floating point. Sums of other
numbers depend on the order in which they are added, and one unit more could change them by more than the bound says
(Casacuberta et al. 2022, "Widespread Underestimation of Sensitivity in Differentially Private Libraries").

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1 (for records); McMahan et al. 2018,
"Learning Differentially Private Recurrent Language Models", section 2 (for all of a person's records).
"""

import math

import numpy as np
from numpy.typing import NDArray

from cohortium.core.layout import Floats

_GRID = 25
"""The grid's step is the norm's power of two, times 2^-25: an entry has 26 bits, and 27 are left for units."""
_ROUNDING = 1e-12
"""Relative excess of a norm that arithmetic in floating point may leave."""


def clipped(contributions: Floats, norm: float) -> Floats:
    """Returns the rows of `contributions` `(n_units, d)`, those that are longer than `norm` scaled down to it.

    A row that is not finite, or so long that its norm is not, becomes zero. No row is longer than `norm` afterwards,
    rounding included.
    """
    step = 2.0 ** (math.floor(math.log2(norm)) - _GRID)
    room = norm * (1 - _ROUNDING) - step * math.sqrt(contributions.shape[1]) / 2
    if room <= 0:
        raise ValueError("a vector of so many numbers cannot be clipped: its rounding would exceed the norm")
    with np.errstate(all="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", contributions, contributions))
        scale = np.minimum(1.0, room / np.maximum(lengths, np.finfo(np.float64).tiny))
        rows: Floats = np.rint(contributions * (scale / step)[:, None]) * step
    rows[~np.isfinite(lengths)] = 0.0
    return rows


def by_unit(contributions: Floats, owners: NDArray[np.intp] | None) -> Floats:
    """Returns the contributions `(n_rows, d)` added up for each unit, `(n_units, d)`; `owners` numbers them from 0."""
    if owners is None:
        return contributions
    sums = np.zeros((int(owners.max(initial=-1)) + 1, contributions.shape[1]))
    np.add.at(sums, owners, contributions)
    return sums


def sum_clipped(contributions: Floats, owners: NDArray[np.intp] | None, norm: float) -> Floats:
    """Returns the sum `(d,)` of what each unit contributes, each scaled down to `norm` where it is longer.

    Args:
        contributions: one row for each record, `(n_rows, d)`.
        owners: which unit each row belongs to, `(n_rows,)` numbers from 0; None: each to another one.
        norm: the largest Euclidean norm of a unit's contribution.
    """
    total: Floats = clipped(by_unit(contributions, owners), norm).sum(axis=0)
    return total
