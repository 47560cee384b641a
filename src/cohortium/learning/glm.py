"""Generalised linear models by Newton's method on summed gradients and Hessians.

The federated fit is the pooled fit: each round adds up, over all patients, what Newton's method needs, so nothing
depends on how patients are spread over sites.

Sources: McCullagh and Nelder, "Generalized Linear Models", 2nd ed. 1989, chapter 2 (canonical links, where Newton is
IRLS); the penalty and its sandwich covariance follow le Cessie and van Houwelingen, "Ridge Estimators in Logistic
Regression", Applied Statistics 41 (1992), equations 5 and 8.

Units. Fitting happens on the unit scale (`cohortium.learning.preprocess`), where all bounds are public: a column lies
in -1..1, a logistic residual too. The penalty applies on the scale that the study names. Results are in the features'
own units.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from cohortium.core import codec
from cohortium.core.errors import CohortError, ConvergenceError, ProtocolError
from cohortium.core.features import CountTarget, NumberTarget, Target
from cohortium.core.layout import Block, Floats, Layout, Statistics
from cohortium.core.models import Regression
from cohortium.core.random import Randomness
from cohortium.core.training import Newton
from cohortium.learning.algorithm import Memory
from cohortium.learning.coefficients import (
    LARGEST_COEFFICIENT,
    LARGEST_PREDICTOR,
    Kind,
    names,
    predicted_mean,
    symmetric,
    target_scale,
    to_raw,
)
from cohortium.learning.preprocess import Encoder, Scale, to_unit
from cohortium.learning.table import Table

_LONGEST = 100.0
"""The most that one step changes a coefficient on the unit scale; the first step of a regression may go too far."""
_HEADROOM = 4.0
"""Poisson means count as at most this many times the largest admitted count."""
_NEGLIGIBLE = 1e-4
"""Half a squared Newton decrement (0.014 standard errors) from which a stand-still means that rounding is all."""
_EXACT = 1e-9
"""Mean squared residual on the unit scale that rounding alone may leave."""
_SEPARATED = 1e-6
"""Mean Hessian weight of a patient below which every outcome is predicted with certainty."""
_REMEDY = "add a ridge penalty (model.penalty.l2), remove features"
_SINGULAR = 1e-7
"""Least eigenvalue of a Hessian scaled to a unit diagonal; below it the features repeat one another."""
_OVERSHOOT = 0.5
"""A step is halved while the slope along it turns and stays steeper than this share of the slope at its start."""
_MOST_HALVINGS = 12
"""After so many the slope at the start must have been taken over other patients, equal in number."""


@dataclass(frozen=True)
class Family:
    """One regression on the unit scale.

    Attributes:
        mean: the mean of the target given linear predictors.
        weight: the Hessian's weight of each patient, given predictors and means.
        loss: each patient's negative log-likelihood; for a linear model half the squared residual.
        residual, curvature, worst: public bounds of a patient's |target - mean|, weight and loss.
    """

    mean: Callable[[Floats], Floats]
    weight: Callable[[Floats], Floats]
    loss: Callable[[Floats, Floats], Floats]
    residual: float
    curvature: float
    worst: float


def family(kind: Kind, target: Target) -> Family:
    """Returns the regression's family for a target of the study."""
    if kind == "logistic":
        return Family(
            mean=special.expit,
            weight=lambda mean: mean * (1 - mean),
            loss=lambda eta, y: np.logaddexp(0.0, eta) - y * eta,
            residual=1.0,
            curvature=0.25,
            worst=LARGEST_PREDICTOR + 1,
        )
    if kind == "linear":
        # evaluated at zero only, where a residual is the target itself, in -1..1
        return Family(
            mean=lambda eta: eta,
            weight=np.ones_like,
            loss=lambda eta, y: (y - eta) ** 2 / 2,
            residual=1.0,
            curvature=1.0,
            worst=0.5,
        )
    assert isinstance(target, CountTarget)
    cap = _HEADROOM * target.maximum
    return Family(
        mean=lambda eta: np.minimum(np.exp(eta), cap),
        weight=lambda mean: mean,
        loss=lambda eta, y: np.minimum(np.exp(eta), cap) - y * eta + special.gammaln(y + 1),
        residual=cap,
        curvature=cap,
        worst=cap + LARGEST_PREDICTOR * target.maximum + float(special.gammaln(target.maximum + 1)),
    )


@dataclass(frozen=True)
class GlmBroadcast:
    """Coefficients on the unit scale, `(p,)`, the intercept first."""

    beta: np.ndarray


@dataclass(frozen=True)
class GlmState:
    """Newton's state: the point being tried, and the last accepted one with its derivatives and step."""

    trial: Floats
    accepted: Floats | None = None
    gradient: Floats | None = None
    hessian: Floats | None = None
    direction: Floats | None = None
    length: float = 1.0
    halvings: int = 0
    decrement: float = float("inf")
    loss: float = float("nan")
    rows: float = 0.0
    rounds: int = 0
    converged: bool = False


@dataclass(frozen=True)
class GlmFit:
    """A fitted regression in the features' own units, the intercept first.

    Attributes:
        names: `(p,)` "(intercept)" and the design's columns.
        coefficients, errors, statistics, p_values, lower, upper: `(p,)` each; statistics are z, or t for a linear
            model; intervals at the study's confidence. With a penalty, errors describe the penalised estimate's
            spread and not its bias.
        covariance: `(p, p)`.
        loss: minus the log-likelihood at the fit; for a linear model half the residual sum of squares.
    """

    kind: str
    names: tuple[str, ...]
    coefficients: tuple[float, ...]
    errors: tuple[float, ...]
    statistics: tuple[float, ...]
    p_values: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    patients: int
    rounds: int
    loss: float

    def predict_mean(self, design: Floats) -> Floats:
        """Returns the predicted mean, `(n,)`, for a raw-scale design `(n, p - 1)`."""
        return predicted_mean(self.kind, self.coefficients, design)


@dataclass(frozen=True)
class Glm:
    """Fits a regression. `maximum` is the study's public limit of patients at a site."""

    encoder: Encoder
    target: Target
    model: Regression
    training: Newton
    scale: Scale
    maximum: int

    @property
    def broadcast_type(self) -> type[GlmBroadcast]:
        return GlmBroadcast

    @property
    def _size(self) -> int:
        return len(self.encoder.columns) + 1

    def init(self) -> GlmState:
        return GlmState(np.zeros(self._size))

    def broadcast(self, state: GlmState) -> GlmBroadcast:
        return GlmBroadcast(state.trial)

    def admit(self, broadcast: GlmBroadcast, before: GlmBroadcast | None) -> None:
        beta = broadcast.beta
        within = (np.abs(beta) <= LARGEST_COEFFICIENT).all()
        if beta.shape != (self._size,) or beta.dtype != np.float64 or not within:
            raise ProtocolError("a broadcast was refused: its coefficients have the wrong shape or are out of bounds")
        if (before is None or self.model.kind == "linear") and beta.any():
            raise ProtocolError("a broadcast was refused: fitting starts with all coefficients at zero")
        if before is not None and (self.model.kind == "linear" or not beta.any()):
            raise ProtocolError("a broadcast was refused: fitting was started before")
        if before is not None and (beta == before.beta).all():
            raise ProtocolError("a broadcast was refused: its coefficients were asked for before")

    def layout(self, broadcast: GlmBroadcast) -> Layout:
        law, size, most = family(self.model.kind, self.target), self._size, float(self.maximum)
        return (
            Block("patients", (), most),
            Block("target", (), most * max(1.0, law.residual)),
            Block("gradient", (size,), most * law.residual, labels=names(self.encoder)),
            Block("hessian", (size * (size + 1) // 2,), most * law.curvature),
            Block("loss", (), most * law.worst),
        )

    def local(
        self, broadcast: GlmBroadcast, table: Table, memory: Memory, randomness: Randomness
    ) -> tuple[Statistics, Memory]:
        law = family(self.model.kind, self.target)
        assert table.target is not None
        y = to_unit(table.target, self.target.range) if isinstance(self.target, NumberTarget) else table.target
        x = np.column_stack([np.ones(table.rows), self.encoder.design(table, "range")])
        eta = np.clip(x @ broadcast.beta, -LARGEST_PREDICTOR, LARGEST_PREDICTOR)
        mean = law.mean(eta)
        hessian = (x * law.weight(mean)[:, None]).T @ x
        return {
            "patients": np.array(float(table.rows)),
            "target": y.sum(),
            "gradient": x.T @ (mean - y),
            "hessian": hessian[np.triu_indices(self._size)],
            "loss": np.array(law.loss(eta, y).sum()),
        }, memory

    def update(self, state: GlmState, total: Statistics) -> GlmState:
        rows = float(np.rint(total["patients"]))
        if state.rounds == 0:
            self._refuse_one_class(rows, float(total["target"]))
        ridge = self._ridge()
        gradient = total["gradient"] + ridge * state.trial
        hessian = symmetric(total["hessian"], self._size)
        loss = float(total["loss"])
        rounds = state.rounds + 1
        # slopes compare only over the same patients: after a site was lost or came back, the trial is a new start
        if state.direction is not None and rows == state.rows and self._overshot(state, gradient):
            length = state.length / 2
            assert state.accepted is not None
            trial = state.accepted + length * state.direction
            halvings = state.halvings + 1
            return self._within_rounds(replace(state, trial=trial, length=length, halvings=halvings, rounds=rounds))
        if hessian[0, 0] < _SEPARATED * rows:
            raise ConvergenceError(f"the features separate the outcomes perfectly: {_REMEDY}")
        direction = newton_step(hessian + np.diag(ridge), gradient)
        decrement = float(-gradient @ direction) / 2
        length = min(1.0, _LONGEST / float(np.abs(direction).max(initial=_LONGEST)))
        accepted = GlmState(
            trial=state.trial + length * direction,
            accepted=state.trial,
            gradient=gradient,
            hessian=hessian,
            direction=direction,
            length=length,
            decrement=decrement,
            loss=loss,
            rows=rows,
            rounds=rounds,
            converged=self._converged(decrement, state.decrement),
        )
        return self._within_rounds(accepted)

    def done(self, state: GlmState) -> bool:
        return state.converged

    def progress(self, state: GlmState) -> tuple[int, float | None]:
        left = 0 if state.converged else self.training.rounds - state.rounds
        return left, state.loss if np.isfinite(state.loss) else None

    def freeze(self, state: GlmState) -> bytes:
        return codec.encode(state)

    def thaw(self, data: bytes) -> GlmState:
        return codec.decode(data, GlmState)

    def finish(self, state: GlmState) -> GlmFit:
        assert state.hessian is not None
        beta, ridge, loss = state.trial, self._ridge(), state.loss
        bread = np.linalg.inv(state.hessian + np.diag(ridge))
        covariance = bread @ state.hessian @ bread
        freedom = np.inf
        if self.model.kind == "linear":
            assert state.gradient is not None
            # half the residual sum of squares at the solution, from the sums taken at zero
            loss += float(state.gradient @ beta) + float(beta @ state.hessian @ beta) / 2
            freedom = state.rows - self._size
            if freedom <= 0:
                raise CohortError(f"{state.rows:.0f} patients cannot support {self._size} coefficients")
            if loss <= _EXACT * state.rows:
                raise CohortError("the features predict the target exactly, so errors cannot be judged: remove some")
            covariance = covariance * (2 * loss / freedom)
            loss *= target_scale(self.target)[1] ** 2
        matrix, offset = to_raw(self.encoder, "range", self.target)
        return _inference(self, state, matrix @ beta + offset, matrix @ covariance @ matrix.T, loss, freedom)

    def _ridge(self) -> Floats:
        """Returns the penalty's diagonal on the unit scale, `(p,)`: none on the intercept."""
        _, half = self.encoder.affine("range")
        _, width = self.encoder.affine(self.scale)
        # a linear model's loss and penalty both shrink by the square of its target's unit, so no factor is needed
        return np.concatenate([[0.0], self.model.penalty.l2 * (width / half) ** 2])

    def _converged(self, decrement: float, before: float) -> bool:
        if self.model.kind == "linear":
            return True  # least squares is solved by its first step
        # where the features separate the outcomes, it falls to 1/e in each round, for ever: that is no stand-still
        at_the_sums_precision = decrement <= _NEGLIGIBLE and decrement >= before / 2
        return decrement <= self.training.tolerance or at_the_sums_precision

    def _overshot(self, state: GlmState, gradient: Floats) -> bool:
        assert state.gradient is not None and state.direction is not None
        if state.halvings == _MOST_HALVINGS:
            return False
        start, here = float(state.gradient @ state.direction), float(gradient @ state.direction)
        return here > -_OVERSHOOT * start

    def _within_rounds(self, state: GlmState) -> GlmState:
        if not state.converged and np.abs(state.trial).max() > LARGEST_COEFFICIENT:
            raise ConvergenceError(f"the coefficients grow without bound: {_REMEDY}")
        if not state.converged and state.rounds >= self.training.rounds:
            raise ConvergenceError(
                f"no convergence in {state.rounds} rounds, perhaps because features separate the outcomes: {_REMEDY}, "
                "or raise training.rounds"
            )
        return state

    def _refuse_one_class(self, rows: float, target: float) -> None:
        if self.model.kind == "linear":
            return
        name = self.target.name
        if target < 0.5:
            raise CohortError(f"target '{name}' is the same for every patient of all sites: nothing can be learned")
        if self.model.kind == "logistic" and target > rows - 0.5:
            raise CohortError(f"target '{name}' is the same for every patient of all sites: nothing can be learned")


def newton_step(hessian: Floats, gradient: Floats) -> Floats:
    scale = np.sqrt(np.diag(hessian))
    if not (scale > 0).all() or np.linalg.eigvalsh(hessian / np.outer(scale, scale))[0] < _SINGULAR:
        raise CohortError("some features repeat others (the Hessian is singular): remove them, or add a ridge penalty")
    return np.asarray(-np.linalg.solve(hessian, gradient), dtype=np.float64)


def _inference(glm: Glm, state: GlmState, beta: Floats, covariance: Floats, loss: float, freedom: float) -> GlmFit:
    errors = np.sqrt(np.diag(covariance))
    statistics = beta / errors
    tail = (1 - glm.model.confidence) / 2
    if np.isinf(freedom):
        p_values, quantile = 2 * special.ndtr(-np.abs(statistics)), -float(special.ndtri(tail))
    else:
        p_values, quantile = 2 * special.stdtr(freedom, -np.abs(statistics)), -float(special.stdtrit(freedom, tail))
    return GlmFit(
        kind=glm.model.kind,
        names=names(glm.encoder),
        coefficients=tuple(beta.tolist()),
        errors=tuple(errors.tolist()),
        statistics=tuple(statistics.tolist()),
        p_values=tuple(p_values.tolist()),
        lower=tuple((beta - quantile * errors).tolist()),
        upper=tuple((beta + quantile * errors).tolist()),
        covariance=tuple(tuple(row) for row in covariance.tolist()),
        patients=int(state.rows),
        rounds=state.rounds,
        loss=loss,
    )
