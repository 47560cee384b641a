"""An algorithm that does no arithmetic of its own: what it is run in is measured alone."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from cohortium.core import codec
from cohortium.core.layout import Block
from cohortium.core.study import Study
from cohortium.learning.coefficients import CoefficientFit
from cohortium.plan import Phase, Plan, compile_study


@dataclass(frozen=True)
class Weights:
    values: np.ndarray
    round: int = 0


@dataclass(frozen=True)
class Ready:
    """An algorithm whose statistics are ready-made and whose broadcast is as long as they are."""

    length: int
    rounds: int

    @property
    def values(self) -> np.ndarray:
        return _values(self.length)

    @property
    def broadcast_type(self) -> type[Weights]:
        return Weights

    def init(self) -> Weights:
        return Weights(self.values.astype(np.float32))

    def broadcast(self, state: Weights) -> Weights:
        return state

    def admit(self, broadcast: Weights, before: Weights | None) -> None:
        pass

    def layout(self, broadcast: Weights) -> tuple[Block, ...]:
        return (Block("values", (self.length,), 10.0),)

    def local(self, broadcast: Weights, table: Any, memory: Any, randomness: Any) -> Any:
        return {"values": self.values}, memory

    def update(self, state: Weights, total: Any) -> Weights:
        return Weights(total["values"].astype(np.float32), state.round + 1)

    def done(self, state: Weights) -> bool:
        return state.round >= self.rounds

    def finish(self, state: Weights) -> Any:
        return None, CoefficientFit("linear", ("sum",), (float(state.values.sum()),), 0, 0.0)

    def progress(self, state: Weights) -> tuple[int, None]:
        return self.rounds - state.round, None

    def freeze(self, state: Weights) -> bytes:
        return codec.encode(state)

    def thaw(self, data: bytes) -> Weights:
        return codec.decode(data, Weights)


@lru_cache(maxsize=2)
def _values(length: int) -> np.ndarray:
    # as the weights of a network are: packing hardly makes them shorter
    return np.random.default_rng(1).normal(0.0, 0.05, length)  # noqa: TID251  the same in every process


def ready_plan(study: Study, values: int, rounds: int) -> Plan:
    """Returns the plan of a study in which a round has so many values, and which has so many rounds."""
    algorithm = Ready(values, rounds)
    phases = (Phase("ready", algorithm.layout(algorithm.init()), rounds, 0.0),)
    return replace(compile_study(study), phases=phases, algorithm=algorithm)
