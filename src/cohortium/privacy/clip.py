"""Clipping by privacy unit: all that a unit's records contribute is added up first, and then bounded once.

Clipping each record instead would let a patient with many records move the sum by many times the bound.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1 (for records); McMahan et al. 2018,
"Learning Differentially Private Recurrent Language Models", section 2 (for all of a person's records).
"""

import numpy as np
from numpy.typing import NDArray

from cohortium.core.layout import Floats

_SAFETY = 1 - 1e-9
"""Scaling down aims a little below the bound, so that rounding in floating point never leads above it."""


def clipped(contributions: Floats, norm: float) -> Floats:
    """Returns the rows of `contributions` `(n_units, d)`, those that are longer than `norm` scaled down to it."""
    lengths = np.sqrt(np.einsum("ij,ij->i", contributions, contributions))
    # a row that overflows, or holds no number, adds nothing
    scale = np.where(np.isfinite(lengths), np.minimum(1.0, norm * _SAFETY / np.maximum(lengths, 1e-300)), 0.0)
    return np.where(scale[:, None] > 0, contributions, 0.0) * scale[:, None]


def by_unit(contributions: Floats, owners: NDArray[np.intp] | None) -> Floats:
    """Returns the contributions `(n_rows, d)` added up for each unit, `(n_units, d)`; `owners` numbers them from 0."""
    if owners is None:
        return contributions
    units = int(owners.max(initial=-1)) + 1
    sums = np.zeros((units, contributions.shape[1]))
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
