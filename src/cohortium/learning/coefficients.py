"""Regressions as coefficients: what predicts alike, however it was fitted, and how coefficients change their scale."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from cohortium.core.features import NumberTarget, Target
from cohortium.core.layout import Floats
from cohortium.learning.preprocess import Encoder, Scale, middle_and_half

Kind = Literal["logistic", "linear", "poisson"]

LARGEST_PREDICTOR = 30.0
"""Linear predictors count as at most this large; exp(-30) is nothing beside 1."""
LARGEST_COEFFICIENT = 10_000.0
"""A coefficient on the unit scale beyond this is never tried: at a hundredth of it, outcomes are already certain."""
_LARGEST_EXPONENT = 700.0
"""Beyond it, a Poisson mean would be infinite in floating point; coefficients that carry noise may lead there."""


@dataclass(frozen=True)
class CoefficientFit:
    """A fitted regression in the features' own units, the intercept first, without standard errors.

    The likelihood's curvature at a fit that is clipped, noisy or stopped early does not tell its errors, so none are
    given.

    Attributes:
        names: `(p,)` "(intercept)" and the design's columns.
        coefficients: `(p,)`.
        patients: how many privacy units (patients, unless the study says otherwise) it was fitted to; with
            differential privacy the noisy number.
        rounds: rounds of training.
        loss: the mean of minus the log-likelihood before the last step, for a linear model half the mean squared
            residual; None where it is not known: differential privacy does not release it.
    """

    kind: Kind
    names: tuple[str, ...]
    coefficients: tuple[float, ...]
    patients: int
    rounds: int
    loss: float | None = None

    def predict_mean(self, design: Floats) -> Floats:
        """Returns the predicted mean, `(n,)`, for a raw-scale design `(n, p - 1)`."""
        return predicted_mean(self.kind, self.coefficients, design)


def predicted_mean(kind: str, coefficients: tuple[float, ...], design: Floats) -> Floats:
    """Returns the mean of the target, `(n,)`, for a raw-scale design `(n, p - 1)`; the intercept comes first."""
    beta = np.array(coefficients)
    eta: Floats = beta[0] + design @ beta[1:]
    if kind == "linear":
        return eta
    mean: Floats = special.expit(eta) if kind == "logistic" else np.exp(np.minimum(eta, _LARGEST_EXPONENT))
    return mean


def names(encoder: Encoder) -> tuple[str, ...]:
    """Returns what each coefficient belongs to, `(p,)`."""
    return ("(intercept)", *encoder.columns)


def between(encoder: Encoder, old: Scale, new: Scale) -> Floats:
    """Returns the `(p, p)` matrix A with which a design's row, with the intercept's 1, is on the scale `new` A times
    the row on the scale `old`. Coefficients for `new` become those for `old` by its transpose."""
    (shift, width), (target_shift, target_width) = encoder.affine(old), encoder.affine(new)
    matrix = np.diag(np.concatenate([[1.0], width / target_width]))
    matrix[1:, 0] = (shift - target_shift) / target_width
    return matrix


def target_scale(target: Target) -> tuple[float, float]:
    """Returns the target's zero and unit on the unit scale; only a number has others than 0 and 1."""
    return middle_and_half(target.range) if isinstance(target, NumberTarget) else (0.0, 1.0)


def to_raw(encoder: Encoder, scale: Scale, target: Target) -> tuple[Floats, Floats]:
    """Returns `(matrix, offset)` that turn coefficients of a scaled design and a target on the unit scale into ones in
    the features' and the target's own units: matrix @ beta + offset."""
    middle, half = target_scale(target)
    offset = np.zeros(len(encoder.columns) + 1)
    offset[0] = middle
    return between(encoder, "none", scale).T * half, offset


def raw_coefficients(encoder: Encoder, scale: Scale, target: Target, beta: Floats) -> tuple[float, ...]:
    """Returns a scaled design's coefficients in the features' own units, `(p,)`."""
    matrix, offset = to_raw(encoder, scale, target)
    return tuple((matrix @ beta + offset).tolist())


def symmetric(upper: Floats, size: int) -> Floats:
    """Returns the `(size, size)` symmetric matrix with this upper triangle, row by row."""
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size)] = upper
    return matrix + np.triu(matrix, 1).T
