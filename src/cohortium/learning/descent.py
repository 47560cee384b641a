"""Generalised linear models by gradient descent on all patients: the form that clips and takes noise well.

Each round adds up the gradient of the loss, from coefficients zero on. With a clip, a record whose row z = (1, x) of
the design is longer than the clip weighs clip / |z|, as in a weighted regression; the weighted gradients of a privacy
unit's records are added up (averaged, where the unit is a site), and if that is longer than the clip it is scaled down
to it. So one unit moves the sum by the clip at most, however many records it has. Weights depend on the features alone
and do not bias the fit, whereas scaling gradients down does: it takes most from those who are predicted worst, until
predictions drift towards the commoner outcome. A logistic residual is at most 1, so a patient with one record is only
ever weighted. A linear one is, on the unit scale, but for absurd predictions. Of Poisson counts those far from their
mean are scaled down: choose a clip several times as large as usual residuals.

    step  = momentum * last step - learning rate * (gradient / units + penalty)

With differential privacy nothing else leaves a site: the sum, with noise, is divided by the noisy number of units that
preprocessing released; no loss and no count is sent. The result is then the mean over the second half of the rounds,
which costs nothing and averages noise out that the last coefficients alone would keep. With `rate` below 1 each site
draws its units for a round secretly, each one with this probability; the divisor stays rate times the number of units,
since the number drawn is itself a secret.

Sources: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1, with all patients instead of a lot;
weights: Mallows's, as in Hampel et al., "Robust Statistics", 1986, section 6.3; averaging: Polyak and Juditsky 1992,
"Acceleration of Stochastic Approximation by Averaging". The penalty's step is taken at its end (proximal), so that no
penalty is too large for the learning rate.

Units. Coefficients are those of the design as the study scales it; a number target is on the unit scale.
"""

from dataclasses import dataclass

import numpy as np

from cohortium.core import codec
from cohortium.core.errors import ConvergenceError, ProtocolError, StudyError
from cohortium.core.features import NumberTarget, Target
from cohortium.core.layout import Block, Floats, Layout, Noise, Statistics
from cohortium.core.models import Regression
from cohortium.core.random import Randomness
from cohortium.core.training import LEARNING_RATES, Descent
from cohortium.learning.algorithm import Memory
from cohortium.learning.coefficients import (
    LARGEST_COEFFICIENT,
    LARGEST_PREDICTOR,
    CoefficientFit,
    between,
    names,
    raw_coefficients,
    target_scale,
)
from cohortium.learning.glm import family
from cohortium.learning.preprocess import Encoder, Scale, to_unit
from cohortium.learning.private_preprocess import lengths, shares
from cohortium.learning.table import Owners, Table, Unit
from cohortium.privacy.clip import sum_clipped

_LARGEST_MEAN = 4.0
"""A linear model's prediction counts as at most this, where targets lie in -1..1: so residuals have a public bound."""
_RISE = 1e-6
"""A rise of the mean loss, from the first round to the last, that rounding may explain."""


@dataclass(frozen=True)
class DescentBroadcast:
    """The round, from 0, and the coefficients of the scaled design, `(p,)`, the intercept first."""

    round: int
    beta: np.ndarray


@dataclass(frozen=True)
class DescentState:
    """Where descent stands.

    Attributes:
        beta, step: `(p,)` the coefficients and the last change of them.
        tail: `(p,)` the sum of the coefficients over the rounds that are averaged.
        patients: units, or records without a clip, in the last round; an estimate where they are sampled.
        loss, first_loss: the last round's loss and the first's, summed over a unit's records and averaged over units;
            None with differential privacy.
    """

    beta: Floats
    step: Floats
    tail: Floats
    rounds: int = 0
    patients: float = 1.0
    loss: float | None = None
    first_loss: float | None = None


@dataclass(frozen=True)
class GradientDescent:
    """Fits a regression by gradient descent.

    Attributes:
        maximum: the study's public limit of records at a site.
        unit: whose data the clip bounds.
        multiplier: the noise that each round's sum must carry; None for none.
        rate: the share of units that a site draws for a round.

    Raises:
        StudyError: noise is asked for without a clip.
    """

    encoder: Encoder
    target: Target
    model: Regression
    training: Descent
    scale: Scale
    maximum: int
    unit: Unit
    multiplier: float | None = None
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.multiplier is not None and self.training.clip is None:
            raise StudyError(
                "training.clip is missing: with differential privacy, the most that one patient adds to a gradient "
                "must be bounded; 1 is a good start"
            )

    @property
    def broadcast_type(self) -> type[DescentBroadcast]:
        return DescentBroadcast

    def init(self) -> DescentState:
        zeros = np.zeros(len(self.encoder.columns) + 1)
        return DescentState(zeros, zeros, zeros)

    def broadcast(self, state: DescentState) -> DescentBroadcast:
        return DescentBroadcast(state.rounds, state.beta)

    def admit(self, broadcast: DescentBroadcast, before: DescentBroadcast | None) -> None:
        if broadcast.round != (0 if before is None else before.round + 1) or broadcast.round >= self.training.rounds:
            raise ProtocolError("a broadcast was refused: its round is out of order")
        beta, shape = broadcast.beta, (len(self.encoder.columns) + 1,)
        if beta.shape != shape or beta.dtype != np.float64 or not (np.abs(beta) <= LARGEST_COEFFICIENT).all():
            raise ProtocolError("a broadcast was refused: its coefficients have the wrong shape or are out of bounds")
        if before is None and beta.any():
            raise ProtocolError("a broadcast was refused: training starts with all coefficients at zero")

    def layout(self, broadcast: DescentBroadcast) -> Layout:
        law, most, clip = family(self.model.kind, self.target), float(self.maximum), self.training.clip
        linear, labels = self.model.kind == "linear", names(self.encoder)
        residual = 1 + _LARGEST_MEAN if linear else law.residual
        bound = most * (residual if clip is None else clip)
        if self.multiplier is not None:
            assert clip is not None
            noise = Noise(clip, self.multiplier, self.rate)
            return (Block("gradient", (len(labels),), bound, "clip", labels, noise),)
        return (
            Block("patients", (), most),
            Block("gradient", (len(labels),), bound, "clip", labels),
            Block("loss", (), most * (residual**2 / 2 if linear else law.worst)),
        )

    def local(
        self, broadcast: DescentBroadcast, table: Table, memory: Memory, randomness: Randomness
    ) -> tuple[Statistics, Memory]:
        table = table.drawn(self.unit, self.rate, randomness.child("sample", broadcast.round))
        law, clip = family(self.model.kind, self.target), self.training.clip
        assert table.target is not None
        y = to_unit(table.target, self.target.range) if isinstance(self.target, NumberTarget) else table.target
        largest = _LARGEST_MEAN if self.model.kind == "linear" else LARGEST_PREDICTOR
        # without a clip, sums are over the unit scale, where their bound follows from the study alone
        scale: Scale = "range" if clip is None else self.scale
        x = np.column_stack([np.ones(table.rows), self.encoder.design(table, scale)])
        beta = between(self.encoder, scale, self.scale).T @ broadcast.beta
        # row by row: a matrix product may round a record's by the records beside it
        eta = np.clip((x * beta).sum(axis=1), -largest, largest)
        residual = law.mean(eta) - y
        owners = None if clip is None else table.owners(self.unit)
        if clip is None:
            share, gradient = np.ones(table.rows), x.T @ residual
        else:
            # a sum over a whole site would only ever show its direction
            share = shares(owners, table.rows) if self.unit == "site" else np.ones(table.rows)
            weight = np.minimum(1.0, clip / lengths(x))
            gradient = sum_clipped(x * (weight * share * residual)[:, None], owners, clip)
        if self.multiplier is not None:
            return {"gradient": gradient}, memory
        units, loss = np.array(float(_units(owners, table.rows))), np.array(share @ law.loss(eta, y))
        return {"patients": units, "gradient": gradient, "loss": loss}, memory

    def update(self, state: DescentState, total: Statistics) -> DescentState:
        training, gradient, loss = self.training, total["gradient"], None
        if self.multiplier is None:
            drawn = max(1.0, float(np.rint(total["patients"])))
            patients, loss = drawn / self.rate, float(total["loss"]) / drawn
        else:
            assert self.encoder.fitted.patients is not None
            patients = self.encoder.fitted.patients
            drawn = self.rate * patients
        if training.clip is None:
            gradient = between(self.encoder, "range", self.scale) @ gradient
        penalty = np.full(len(gradient), self.model.penalty.l2 / patients)
        penalty[0] = 0.0
        rate = training.learning_rate or LEARNING_RATES[self.model.kind]
        moved = state.beta + training.momentum * state.step - rate * gradient / drawn
        beta = np.clip(moved / (1 + rate * penalty), -LARGEST_COEFFICIENT, LARGEST_COEFFICIENT)
        rounds = state.rounds + 1
        tail = state.tail + beta if rounds > training.rounds // 2 else state.tail
        first = loss if state.first_loss is None else state.first_loss
        return DescentState(beta, beta - state.beta, tail, rounds, patients, loss, first)

    def done(self, state: DescentState) -> bool:
        return state.rounds >= self.training.rounds

    def progress(self, state: DescentState) -> tuple[int, float | None]:
        return self.training.rounds - state.rounds, state.loss

    def freeze(self, state: DescentState) -> bytes:
        return codec.encode(state)

    def thaw(self, data: bytes) -> DescentState:
        return codec.decode(data, DescentState)

    def finish(self, state: DescentState) -> CoefficientFit:
        beta, loss = state.beta, state.loss
        if self.multiplier is not None:
            beta = state.tail / (state.rounds - self.training.rounds // 2)
        elif self._rose(state):
            raise ConvergenceError(
                f"the mean loss rose from {state.first_loss:.4g} to {loss:.4g}: lower training.learning_rate"
            )
        return CoefficientFit(
            kind=self.model.kind,
            names=names(self.encoder),
            coefficients=raw_coefficients(self.encoder, self.scale, self.target, beta),
            patients=round(state.patients),
            rounds=state.rounds,
            loss=None if loss is None else loss * target_scale(self.target)[1] ** 2,
        )

    def _rose(self, state: DescentState) -> bool:
        """Returns whether the objective rose, as far as it is known: no sampling and no weights may explain it."""
        if self.training.clip is not None or self.rate < 1 or state.loss is None or state.first_loss is None:
            return False
        return state.loss > state.first_loss + _RISE


def _units(owners: Owners | None, rows: int) -> int:
    return rows if owners is None else int(owners.max(initial=-1)) + 1
