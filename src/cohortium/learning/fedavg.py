"""Federated averaging for any PyTorch module: FedAvg, FedProx and SCAFFOLD at the sites, any server optimiser above.

    site:         delta_i = (parameters after `local.steps` batches) - (parameters received)
    on the wire:  w_i, w_i delta_i, w_i loss_i (and w_i times the control change), with w_i = patients / maximum
    coordinator:  parameters <- server(parameters, sum of w_i delta_i / sum of w_i)

Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1;
Li et al. 2020, "Federated Optimization in Heterogeneous Networks", algorithm 2 (FedProx); Karimireddy et al. 2020,
"SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", algorithm 1 with option II.

Training runs on the processor, and equal inputs give equal bits for the same PyTorch build and thread count.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import CohortError, ConvergenceError, ProtocolError, StudyError
from cohortium.core.features import BinaryTarget, NumberTarget
from cohortium.core.layout import Block, Floats, Layout, Statistics
from cohortium.core.random import Randomness
from cohortium.core.training import Averaging
from cohortium.learning import server
from cohortium.learning.algorithm import Memory
from cohortium.learning.network import Activation, NetworkFit
from cohortium.learning.preprocess import middle_and_half
from cohortium.learning.table import Table

try:
    import torch
except ImportError as error:
    raise StudyError(
        "training a network needs PyTorch, which is not installed here: run pip install 'cohortium[torch]'"
    ) from error

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Mean loss of a batch, from the module's output and the targets `(n_rows,)`."""

_WORK_FOR_THREADS = 1 << 22
"""Parameters times rows of a batch from which several threads pay."""
_LARGEST = 1e4
"""Parameters and control variates beyond this are never sent: training that leads there has diverged."""
LOSS_BOUND = 16.0
"""A site's mean loss is reported up to this value; it only informs, no step depends on it."""


def mlp(
    columns: int, hidden: tuple[int, ...], activation: Activation, outputs: int = 1
) -> Callable[[], torch.nn.Module]:
    """Returns the factory of a feed-forward network; its module maps `(n_rows, columns)` to `(n_rows, outputs)`."""

    def build() -> torch.nn.Module:
        widths = (columns, *hidden, outputs)
        layers: list[torch.nn.Module] = []
        for inner, outer in pairwise(widths):
            layers += [torch.nn.Linear(inner, outer), torch.nn.Tanh() if activation == "tanh" else torch.nn.ReLU()]
        return torch.nn.Sequential(*layers[:-1])

    return build


def loss_for(target: BinaryTarget | NumberTarget) -> Loss:
    """Returns a one-output network's loss: cross-entropy of log-odds, or the squared error on the unit scale."""
    return _cross_entropy if isinstance(target, BinaryTarget) else partial(_squared_error, target.range)


def _cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(output[:, 0], target)


def _squared_error(bounds: tuple[float, float], output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    middle, half = middle_and_half(bounds)
    return torch.nn.functional.mse_loss(output[:, 0], (target - middle) / half)


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

    module: Callable[[], torch.nn.Module]
    loss: Loss
    features: Callable[[Table], Floats]
    averaging: Averaging
    maximum: int
    initial: Randomness
    optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.SGD

    def __post_init__(self) -> None:
        if self.averaging.local.scaffold and self.optimiser is not torch.optim.SGD:
            raise StudyError("SCAFFOLD reads gradients off the local steps, so the local optimiser must be SGD")

    @property
    def broadcast_type(self) -> type[FedAvgBroadcast]:
        return FedAvgBroadcast

    def init(self) -> FedAvgState:
        parameters = _vector(_trainable(self._build())).astype(np.float64)
        control = np.zeros(parameters.size if self.averaging.local.scaffold else 0)
        return FedAvgState(0, parameters, control, server.start(self.averaging.server, parameters.size))

    def broadcast(self, state: FedAvgState) -> FedAvgBroadcast:
        return FedAvgBroadcast(state.round, state.parameters.astype(np.float32), state.control.astype(np.float32))

    def admit(self, broadcast: FedAvgBroadcast, before: FedAvgBroadcast | None) -> None:
        if broadcast.round != (0 if before is None else before.round + 1) or broadcast.round >= self.averaging.rounds:
            raise ProtocolError("a broadcast was refused: its round is out of order")
        start = self.broadcast(self.init()) if before is None else before
        for part, own in ((broadcast.parameters, start.parameters), (broadcast.control, start.control)):
            if part.shape != own.shape or part.dtype != np.float32 or not (np.abs(part) <= _LARGEST).all():
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
        delta, loss = self._train(broadcast, table, broadcast.control - own, randomness)
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
        shapes = [tuple(parameter.shape) for parameter in _trainable(self._build())]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
        parts = np.split(state.parameters.astype(np.float32), ends)
        weights = tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        return NetworkFit(weights, state.loss)

    def progress(self, state: FedAvgState) -> tuple[int, float | None]:
        return self.averaging.rounds - state.round, state.loss

    @property
    def _control_bound(self) -> float:
        """The largest mean gradient that an update within its own bound can stand for."""
        return self.averaging.update_bound / (self.averaging.local.steps * self.averaging.local.learning_rate)

    def _build(self) -> torch.nn.Module:
        with _seeded(self.initial):
            module = self.module()
        if any(getattr(part, "track_running_stats", False) for part in module.modules()):
            raise StudyError(
                "the module keeps running statistics of its batches, which are not parameters and would differ from "
                "site to site: use group or layer normalisation"
            )
        return module

    def _train(
        self, broadcast: FedAvgBroadcast, table: Table, correction: Floats, randomness: Randomness
    ) -> tuple[Floats, float]:
        """Returns the parameters' change `(n_parameters,)` over this round's batches, and the mean loss on them."""
        local = self.averaging.local
        module = self._build().train()
        parameters = _trainable(module)
        start = torch.tensor(broadcast.parameters, dtype=torch.float32)
        size = sum(parameter.numel() for parameter in parameters)
        if start.shape != (size,) or broadcast.control.shape != (size if local.scaffold else 0,):
            raise ProtocolError(f"what was received does not fit the study's network of {size} parameters")
        torch.nn.utils.vector_to_parameters(start.clone(), parameters)
        inputs = torch.tensor(self.features(table), dtype=torch.float32)
        targets = torch.tensor(table.target, dtype=torch.float32)
        pull = torch.tensor(correction, dtype=torch.float32)
        optimiser = self.optimiser(parameters, lr=local.learning_rate)
        losses, seen = 0.0, 0
        work = start.numel() * min(local.batch_size, table.rows)
        with _seeded(randomness.child("round", broadcast.round)), _threads_for(work):
            for rows in _batches(table.rows, local.batch_size, broadcast.round * local.steps, local.steps, randomness):
                loss = self.loss(module(inputs[rows]), targets[rows])
                losses, seen = losses + loss.item() * len(rows), seen + len(rows)
                if local.proximal or local.scaffold:
                    # The gradient of these terms is mu (y - x) + c - c_i.
                    vector = torch.nn.utils.parameters_to_vector(parameters)
                    loss = loss + local.proximal / 2 * (vector - start).square().sum()
                    loss = loss + (pull @ vector if local.scaffold else 0.0)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        return (_vector(parameters) - broadcast.parameters).astype(np.float64), losses / seen


def _batches(rows: int, size: int, first: int, count: int, randomness: Randomness) -> Iterator[torch.Tensor]:
    """Yields the row indices of batches `first` to `first + count - 1` of an endless walk through shuffled epochs.

    A batch's place depends on its number alone, so a round goes on where the one before it stopped, without memory.
    An epoch's last batch may be short.
    """
    in_epoch = -(-rows // size)
    order, shuffled = np.empty(0, dtype=np.int64), -1
    for number in range(first, first + count):
        epoch, place = divmod(number, in_epoch)
        if epoch != shuffled:
            order, shuffled = randomness.child("epoch", epoch).generator().permutation(rows), epoch
        yield torch.from_numpy(order[place * size : (place + 1) * size])


def _trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _vector(parameters: list[torch.nn.Parameter]) -> NDArray[np.float32]:
    vector: NDArray[np.float32] = torch.nn.utils.parameters_to_vector(parameters).detach().float().numpy()
    return vector


@contextmanager
def _threads_for(work: int) -> Iterator[None]:
    """Keeps small steps on one thread, where handing out work would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if work < _WORK_FOR_THREADS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _seeded(randomness: Randomness) -> Iterator[None]:
    """Seeds PyTorch's generator, which layers such as dropout draw from, and puts it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(randomness.bytes(8), "big") >> 1)
        yield
