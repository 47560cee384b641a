"""A coordinator or an agent whose studies do no arithmetic of their own: what bench_fleet measures is the fleet alone.

    python fleet_process.py coordinator run FOLDER ...     as `cohortium coordinator run`
    python fleet_process.py site run HOME

The study's summary says how many values a round has and how many rounds there are: `values=1000 rounds=60`.
"""

import re
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from cohortium import bootstrap
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
    return np.linspace(-1, 1, length)


def ready(study: Study) -> Plan:
    """Returns the plan of a study whose summary says its size."""
    told = dict(re.findall(r"(\w+)=(\d+)", study.purpose.summary))
    algorithm = Ready(int(told["values"]), int(told["rounds"]))
    phases = (Phase("ready", algorithm.layout(algorithm.init()), algorithm.rounds, 0.0),)
    return replace(compile_study(study), phases=phases, algorithm=algorithm)


def main(arguments: list[str]) -> None:
    options = dict(zip(arguments[3::2], arguments[4::2], strict=True))
    if arguments[0] == "coordinator":
        where = {name.removeprefix("--"): value for name, value in options.items()}
        bootstrap.run_coordinator(arguments[2], **where, compiler=ready)
    else:
        bootstrap.run_agent(arguments[2], compiler=ready)


if __name__ == "__main__":
    main(sys.argv[1:])
