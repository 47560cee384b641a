"""AdaSSP: a regression from one noisy sum of second moments.

What leaves a site, with noise: one vector, the sum of one bounded vector for each privacy unit. With z = (1, x) a
record's row of the design and t its target, a record's vector is the upper triangle of z z', off-diagonal entries times
sqrt(2) so that its length is the square of z's, and z t times a constant that makes both halves equally long at most.
A z that is longer than the clip is scaled down to it, and t with it: such a record counts less in the least squares,
but is not moved. A unit's vector is the average over its records, so it is as long as one record's at most: each
unit counts once, and a patient with three records counts a third of each. Without noise and clip each record counts.

The coordinator solves the normal equations with a ridge that the noise calls for: lambda = max(0, r - least eigenvalue)
with r the size of the noise's own largest eigenvalue, so that what is solved is positive definite whatever the noise.

A logistic model is one Newton step from the model without features, which needs the same moments: weights are all alike
there, p(1 - p) with p the share of outcomes. Its coefficients rank patients much as the full fit does, and are too
small where effects are large. Poisson counts have no such bound and are refused.

Where this differs from the paper: the least eigenvalue is read off the noisy matrix, which costs nothing, instead of
released by itself, for it is not a sum over sites; both moments are one release; the ridge follows from the expected
operator norm of the noise instead of a bound that holds with high probability; it shrinks towards the model without
features instead of towards zero.

Sources: Wang 2018, "Revisiting differentially private linear regression: optimal and adaptive prediction & estimation
in unbounded domain", algorithm 2; the noise's operator norm, sigma sqrt(2p): Anderson, Guionnet and Zeitouni, "An
Introduction to Random Matrices", 2010, section 2.1.6.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import special

from cohortium.core import codec
from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.features import NumberTarget, Target
from cohortium.core.layout import Block, Floats, Layout, Noise, Statistics
from cohortium.core.models import Regression
from cohortium.core.random import Randomness
from cohortium.core.training import OneShot
from cohortium.learning.algorithm import Memory
from cohortium.learning.coefficients import CoefficientFit, names, raw_coefficients, symmetric
from cohortium.learning.glm import newton_step
from cohortium.learning.preprocess import Encoder, FitBroadcast, Scale, to_unit
from cohortium.learning.private_preprocess import ROUNDING, lengths, sum_of_averages
from cohortium.learning.table import Owners, Table, Unit

_RAREST = 0.005
"""The share of outcomes counts as at least this far from 0 and from 1, whatever the noise says."""


@dataclass(frozen=True)
class OneShotState:
    """The fit once the sum is known."""

    fit: CoefficientFit | None = None


@dataclass(frozen=True)
class OneShotRegression:
    """Fits a linear or logistic regression in one round.

    Without a clip rows are measured on the unit scale, where their length is bounded by the study alone.

    Attributes:
        maximum: the study's public limit of records at a site.
        unit: whose data one vector is.
        multiplier: the noise that the sum must carry; None for none.
        spread: the deviation of the noise that it will carry, in units of multiplier times norm; at least 1.

    Raises:
        StudyError: it is a Poisson regression.
    """

    encoder: Encoder
    target: Target
    model: Regression
    training: OneShot
    scale: Scale
    maximum: int
    unit: Unit
    multiplier: float | None = None
    spread: float = 1.0

    def __post_init__(self) -> None:
        if self.model.kind == "poisson":
            raise StudyError("training.algorithm 'adassp' fits linear and logistic models only: use 'descent'")

    @property
    def broadcast_type(self) -> type[FitBroadcast]:
        return FitBroadcast

    @cached_property
    def _length(self) -> float:
        """The largest length of a row with the intercept's 1."""
        # of a category's columns one at most is 1
        return self.training.clip or float((1 + len(self.encoder.features)) ** 0.5)

    @property
    def _largest_target(self) -> float:
        return 1.0 if self.model.kind == "linear" else 0.5

    @property
    def _factor(self) -> float:
        """What products with the target are multiplied by, so that they weigh as much as those of features."""
        return self._length / self._largest_target

    @property
    def _working_scale(self) -> Scale:
        return "range" if self.training.clip is None else self.scale

    @property
    def norm(self) -> float:
        """The largest Euclidean norm of a unit's vector."""
        return float(2**0.5 * self._length**2) * ROUNDING

    def init(self) -> OneShotState:
        return OneShotState()

    def broadcast(self, state: OneShotState) -> FitBroadcast:
        return FitBroadcast()

    def admit(self, broadcast: FitBroadcast, before: FitBroadcast | None) -> None:
        if before is not None:
            raise ProtocolError("a broadcast was refused: this regression takes one round")

    def layout(self, broadcast: FitBroadcast) -> Layout:
        columns = names(self.encoder)
        pairs = [f"{a} * {b}" for index, a in enumerate(columns) for b in columns[index:]]
        labels = (*pairs, *(f"{column} * target" for column in columns))
        noise = None if self.multiplier is None else Noise(self.norm, self.multiplier)
        moments = Block("moments", (len(labels),), self.maximum * self.norm, "clip", labels, noise)
        return (Block("patients", (), float(self.maximum)), moments) if noise is None else (moments,)

    def local(
        self, broadcast: FitBroadcast, table: Table, memory: Memory, randomness: Randomness
    ) -> tuple[Statistics, Memory]:
        assert table.target is not None
        if isinstance(self.target, NumberTarget):
            target = to_unit(table.target, self.target.range)
        else:
            target = table.target - 0.5
        z = np.column_stack([np.ones(table.rows), self.encoder.design(table, self._working_scale)])
        z *= np.minimum(1.0, self._length / lengths(z))[:, None]
        # the intercept's 1 is scaled with its row, and so tells by how much
        target = z[:, 0] * target * self._factor
        first, second = np.triu_indices(z.shape[1])
        weight = np.where(first == second, 1.0, 2**0.5)

        def vectors(rows: Owners) -> Floats:
            part = z[rows]
            return np.concatenate([part[:, first] * part[:, second] * weight, part * target[rows][:, None]], axis=1)

        clips = self.multiplier is not None or self.training.clip is not None
        owners = table.owners(self.unit) if clips else None
        length = len(weight) + z.shape[1]
        moments = {"moments": sum_of_averages(vectors, length, owners, table.rows, self.norm)}
        if self.multiplier is not None:
            return moments, memory
        units = table.rows if owners is None else len(np.unique(owners))
        return {"patients": np.array(float(units)), **moments}, memory

    def update(self, state: OneShotState, total: Statistics) -> OneShotState:
        size = len(self.encoder.columns) + 1
        upper, products = np.split(total["moments"], [size * (size + 1) // 2])
        gram = symmetric(upper, size)
        gram = np.where(np.eye(size, dtype=bool), gram, gram / 2**0.5)
        products = products / self._factor
        weight, mean = self._weight_and_mean(gram, products)
        base, gradient = self._base(mean), mean * gram[:, 0] - products
        if self.multiplier is None:
            patients = float(total["patients"])
            beta = base + newton_step(weight * gram + self._penalty(), gradient)
        else:
            assert self.encoder.fitted.patients is not None
            patients = self.encoder.fitted.patients
            noise = self.spread * self.multiplier * self.norm * (2 * size) ** 0.5
            ridge = max(0.0, noise - float(np.linalg.eigvalsh(gram)[0]))
            beta = base - np.linalg.solve(weight * (gram + ridge * np.eye(size)) + self._penalty(), gradient)
        return OneShotState(
            CoefficientFit(
                kind=self.model.kind,
                names=names(self.encoder),
                coefficients=raw_coefficients(self.encoder, self._working_scale, self.target, beta),
                patients=round(patients),
                rounds=1,
            )
        )

    def done(self, state: OneShotState) -> bool:
        return state.fit is not None

    def finish(self, state: OneShotState) -> CoefficientFit:
        assert state.fit is not None
        return state.fit

    def progress(self, state: OneShotState) -> tuple[int, float | None]:
        return (0 if self.done(state) else 1), None

    def freeze(self, state: OneShotState) -> bytes:
        return codec.encode(state)

    def thaw(self, data: bytes) -> OneShotState:
        return codec.decode(data, OneShotState)

    def _weight_and_mean(self, gram: Floats, products: Floats) -> tuple[float, float]:
        """Returns the loss's curvature at the model without features, and its mean of the target as it is summed."""
        mean = float(products[0]) / max(1.0, float(gram[0, 0]))
        most = self._largest_target - (0.0 if self.model.kind == "linear" else _RAREST)
        mean = min(most, max(-most, mean))
        return (1.0 if self.model.kind == "linear" else 0.25 - mean * mean), mean

    def _base(self, mean: float) -> Floats:
        """Returns the coefficients of the model without features, `(p,)`."""
        base = np.zeros(len(self.encoder.columns) + 1)
        base[0] = mean if self.model.kind == "linear" else special.logit(mean + 0.5)
        return base

    def _penalty(self) -> Floats:
        """Returns the study's penalty as a `(p, p)` matrix on the working scale."""
        (_, width), (_, unit) = self.encoder.affine(self.scale), self.encoder.affine(self._working_scale)
        return np.diag(np.concatenate([[0.0], self.model.penalty.l2 * (width / unit) ** 2]))
