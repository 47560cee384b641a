"""Federated averaging for any PyTorch module: FedAvg, FedProx and SCAFFOLD at the sites, any server optimiser above.

    site:         delta_i = (parameters after `local.steps` batches) - (parameters received)
    on the wire:  w_i, w_i delta_i, w_i loss_i (and w_i times the control change), with w_i = patients / maximum
    coordinator:  parameters <- server(parameters, sum of w_i delta_i / sum of w_i)

Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1;
Li et al. 2020, "Federated Optimization in Heterogeneous Networks", algorithm 2 (FedProx); Karimireddy et al. 2020,
"SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", algorithm 1 with option II; Nguyen et al. 2022,
"Federated Learning with Buffered Asynchronous Aggregation", algorithm 1 (there the sum is divided by the buffer's size,
here by the sum of weights, as in every other round).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cohortium.core import codec
from cohortium.core.errors import CohortError, ConvergenceError, ProtocolError, StudyError
from cohortium.core.layout import Block, Floats, Layout, Statistics
from cohortium.core.random import Randomness
from cohortium.core.training import Averaging
from cohortium.learning import server
from cohortium.learning.algorithm import Memory
from cohortium.learning.network import NetworkFit
from cohortium.learning.table import Table
from cohortium.learning.torch_training import LARGEST, SGD, Factory, Loss, Optimiser, Trainer
from cohortium.learning.torch_training import loss_for as loss_for  # what a caller needs besides FedAvg
from cohortium.learning.torch_training import mlp as mlp

LOSS_BOUND = 16.0
"""A site's mean loss is reported up to this value; it only informs, no step depends on it."""


@dataclass(frozen=True)
class FedAvgState:
    """The coordinator's state. Parameters and control are `(n_parameters,)`; the loss is that of the last round."""

    round: int
    parameters: Floats
    control: Floats
    moments: server.Moments
    loss: float | None = None


@dataclass(frozen=True)
class FedAvgBroadcast:
    """What sites receive, in float32: parameters and, for SCAFFOLD, the server's control variate c (else empty)."""

    round: int
    parameters: np.ndarray
    control: np.ndarray


@dataclass(frozen=True)
class FedAvg:
    """Federated averaging of a module's trainable parameters.

    Attributes:
        module: builds the module. Its initial weights come from `initial`, whatever PyTorch's own generator holds.
        loss: mean loss of a batch.
        features: a table's design matrix `(n_rows, n_columns)`.
        averaging: the study's rounds, local training, server optimiser and update bound.
        maximum: most patients that a site may bring; public.
        initial: randomness of the initial weights; derived from public study data, so that all halves share it.
        optimiser: builds the sites' optimiser from parameters and learning rate; its own state lives for one round.
    """

    module: Factory
    loss: Loss
    features: Callable[[Table], Floats]
    averaging: Averaging
    maximum: int
    initial: Randomness
    optimiser: Optimiser = SGD

    def __post_init__(self) -> None:
        if self.averaging.local.scaffold and self.optimiser is not SGD:
            raise StudyError("SCAFFOLD reads gradients off the local steps, so the local optimiser must be SGD")

    @property
    def broadcast_type(self) -> type[FedAvgBroadcast]:
        return FedAvgBroadcast

    def init(self) -> FedAvgState:
        parameters = self._trainer.start()
        control = np.zeros(parameters.size if self.averaging.local.scaffold else 0)
        return FedAvgState(0, parameters, control, server.start(self.averaging.server, parameters.size))

    def broadcast(self, state: FedAvgState) -> FedAvgBroadcast:
        return FedAvgBroadcast(state.round, state.parameters.astype(np.float32), state.control.astype(np.float32))

    def admit(self, broadcast: FedAvgBroadcast, before: FedAvgBroadcast | None) -> None:
        if broadcast.round != (0 if before is None else before.round + 1) or broadcast.round >= self.averaging.rounds:
            raise ProtocolError("a broadcast was refused: its round is out of order")
        start = self.broadcast(self.init()) if before is None else before
        for part, own in ((broadcast.parameters, start.parameters), (broadcast.control, start.control)):
            if part.shape != own.shape or part.dtype != np.float32 or not (np.abs(part) <= LARGEST).all():
                raise ProtocolError("a broadcast was refused: its parameters have another shape or are out of bounds")
            if before is None and (part != own).any():
                raise ProtocolError("a broadcast was refused: training starts with the study's own initial weights")

    def layout(self, broadcast: FedAvgBroadcast) -> Layout:
        blocks = [
            Block("weight", (), 1.0),
            Block("update", broadcast.parameters.shape, self.averaging.update_bound, "clip"),
            Block("loss", (), LOSS_BOUND, "clip"),
        ]
        if self.averaging.local.scaffold:
            blocks.append(Block("control", broadcast.parameters.shape, self._control_bound, "clip"))
        return tuple(blocks)

    def local(
        self, broadcast: FedAvgBroadcast, table: Table, memory: Memory, randomness: Randomness
    ) -> tuple[Statistics, Memory]:
        local, bound = self.averaging.local, self.averaging.update_bound
        own = memory.get("control", np.zeros(broadcast.control.shape))
        pull = broadcast.control - own
        delta, loss = self._trainer.train(broadcast.parameters, pull, broadcast.round, table, randomness)
        if not (np.isfinite(delta).all() and np.isfinite(loss)):
            raise ConvergenceError("local training diverged: lower training.local.learning_rate; nothing was sent")
        weight = np.float64(table.rows / self.maximum)
        statistics: dict[str, Floats] = {
            "weight": np.asarray(weight),
            "update": weight * np.clip(delta, -bound, bound),
            "loss": np.asarray(weight * min(loss, LOSS_BOUND)),
        }
        if not local.scaffold:
            return statistics, memory
        # Option II: c_i <- c_i - c + (x - y) / (K eta). What is clipped is not kept either, so that c stays the mean.
        change = -broadcast.control - delta / (local.steps * local.learning_rate)
        change = np.clip(change, -self._control_bound, self._control_bound)
        return statistics | {"control": weight * change}, {"control": own + change}

    def stale(self, statistics: Statistics, late: int) -> Statistics:
        """Returns the statistics of work that is so many rounds late: its weight, and all in proportion to it, less."""
        assert self.averaging.asynchronous is not None
        factor = self.averaging.asynchronous.weight(late)
        return {name: np.asarray(value * factor) for name, value in statistics.items()}

    def update(self, state: FedAvgState, total: Statistics) -> FedAvgState:
        weight = float(total["weight"])
        if weight <= 0:
            raise CohortError("the sites of this round bring no patients: there is nothing to average")
        mean = total["update"] / weight
        parameters, moments = server.apply(self.averaging.server, state.parameters, state.moments, mean)
        control = state.control
        if self.averaging.local.scaffold:
            control = control + total["control"] / weight
        return FedAvgState(state.round + 1, parameters, control, moments, float(total["loss"]) / weight)

    def done(self, state: FedAvgState) -> bool:
        return state.round >= self.averaging.rounds

    def finish(self, state: FedAvgState) -> NetworkFit:
        assert state.loss is not None
        return NetworkFit(self._trainer.shaped(state.parameters), state.loss)

    def progress(self, state: FedAvgState) -> tuple[int, float | None]:
        return self.averaging.rounds - state.round, state.loss

    def freeze(self, state: FedAvgState) -> bytes:
        return codec.encode(state)

    def thaw(self, data: bytes) -> FedAvgState:
        return codec.decode(data, FedAvgState)

    @property
    def _trainer(self) -> Trainer:
        return Trainer(self.module, self.loss, self.features, self.averaging.local, self.initial, self.optimiser)

    @property
    def _control_bound(self) -> float:
        """The largest mean gradient that an update within its own bound can stand for."""
        return self.averaging.update_bound / (self.averaging.local.steps * self.averaging.local.learning_rate)
