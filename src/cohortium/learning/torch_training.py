"""What every algorithm for networks shares: modules, their losses, and a site's local training.

Training runs on the processor, and equal inputs give equal bits for the same PyTorch build and thread count.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import RLock

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.features import BinaryTarget, NumberTarget
from cohortium.core.layout import Floats
from cohortium.core.random import Randomness
from cohortium.core.training import Local
from cohortium.learning.network import Activation
from cohortium.learning.preprocess import middle_and_half
from cohortium.learning.table import Table

try:
    import torch
except ImportError as error:
    raise StudyError(
        "training a network needs PyTorch, which is not installed here: run pip install 'cohortium[torch]'"
    ) from error

Factory = Callable[[], torch.nn.Module]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Mean loss of a batch, from the module's output and the targets `(n_rows,)`."""
Optimiser = Callable[..., torch.optim.Optimizer]
SGD: Optimiser = torch.optim.SGD

LARGEST = 1e4
"""Parameters and control variates beyond this are never sent: training that leads there has diverged."""
_GENERATOR = RLock()
"""Held while PyTorch's generator is seeded, and while initial weights are drawn from it."""
_WORK_FOR_THREADS = 1 << 22
"""Parameters times rows of a batch from which several threads pay."""


def mlp(columns: int, hidden: tuple[int, ...], activation: Activation, outputs: int = 1) -> Factory:
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
class Trainer:
    """A module and how a site trains it.

    Attributes:
        module: builds the module. Its initial weights come from `initial`, whatever PyTorch's own generator holds.
        loss: mean loss of a batch.
        features: a table's design matrix `(n_rows, n_columns)`.
        local: steps, batches and what is added to the loss.
        initial: randomness of the initial weights; derived from public study data, so that all halves share it.
        optimiser: built from parameters and learning rate; its own state lives for one round.
    """

    module: Factory
    loss: Loss
    features: Callable[[Table], Floats]
    local: Local
    initial: Randomness
    optimiser: Optimiser = SGD

    def build(self) -> torch.nn.Module:
        """Returns the module with its initial weights.

        Raises:
            StudyError: it keeps statistics that are no parameters.
        """
        with _GENERATOR, seeded(self.initial):
            module = self.module()
        if any(getattr(part, "track_running_stats", False) for part in module.modules()):
            raise StudyError(
                "the module keeps running statistics of its batches, which are not parameters and would differ from "
                "site to site: use group or layer normalisation"
            )
        return module

    def received(self, vector: np.ndarray) -> torch.nn.Module:
        """Returns the module, ready to train, with the trainable parameters that a site received, `(n_parameters,)`.

        Raises:
            ProtocolError: these are not this module's parameters.
        """
        module = self.build().train()
        parameters = trainable(module)
        size = sum(parameter.numel() for parameter in parameters)
        if vector.shape != (size,):
            raise ProtocolError(f"what was received does not fit the study's network of {size} parameters")
        torch.nn.utils.vector_to_parameters(torch.tensor(vector, dtype=torch.float32), parameters)
        return module

    def start(self) -> Floats:
        """Returns the initial parameters, `(n_parameters,)`."""
        return _vector(trainable(self.build())).astype(np.float64)

    def shaped(self, vector: Floats) -> tuple[np.ndarray, ...]:
        """Returns parameters `(n_parameters,)` as one float32 array for each parameter tensor."""
        shapes = [tuple(parameter.shape) for parameter in trainable(self.build())]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
        parts = np.split(vector.astype(np.float32), ends)
        return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))

    def train(
        self, received: np.ndarray, correction: Floats, number: int, table: Table, randomness: Randomness
    ) -> tuple[Floats, float]:
        """Returns the parameters' change `(n_parameters,)` over a round's batches, and the mean loss on them.

        Args:
            received: the parameters to start from, float32.
            correction: SCAFFOLD's c - c_i, `(n_parameters,)`; empty without it.
            number: the round's, from 0; batches and dropout follow from it and from `randomness`, the site's.
        """
        local = self.local
        module = self.received(received)
        parameters = trainable(module)
        start = torch.tensor(received, dtype=torch.float32)
        if correction.shape != (received.shape if local.scaffold else (0,)):
            raise ProtocolError(f"what was received does not fit the study's network of {start.numel()} parameters")
        inputs = torch.tensor(self.features(table), dtype=torch.float32)
        targets = torch.tensor(table.target, dtype=torch.float32)
        pull = torch.tensor(correction, dtype=torch.float32)
        optimiser = self.optimiser(parameters, lr=local.learning_rate)
        losses, seen = 0.0, 0
        work = start.numel() * min(local.batch_size, table.rows)
        with seeded(randomness.child("round", number)), threads_for(work):
            for rows in _batches(table.rows, local.batch_size, number * local.steps, local.steps, randomness):
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
        return (_vector(parameters) - received).astype(np.float64), losses / seen


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


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Returns the parameters that training changes, in the module's order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _vector(parameters: list[torch.nn.Parameter]) -> NDArray[np.float32]:
    vector: NDArray[np.float32] = torch.nn.utils.parameters_to_vector(parameters).detach().float().numpy()
    return vector


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Keeps small steps on one thread, where handing out work would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if work < _WORK_FOR_THREADS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded(randomness: Randomness) -> Iterator[None]:
    """Seeds PyTorch's generator, which layers such as dropout draw from, and puts it back as it was.

    There is one for all threads: layers that draw do not repeat themselves where others train at the same time.
    """
    with _GENERATOR:
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(int.from_bytes(randomness.bytes(8), "big") >> 1)
    try:
        yield
    finally:
        with _GENERATOR:
            torch.set_rng_state(before)
