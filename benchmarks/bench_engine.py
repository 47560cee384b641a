"""Overhead of the local engine: what a protected round costs beyond the algorithm's own arithmetic.

Runs a study whose local step costs nothing (fixed statistics) through the full engine: study, key agreement, canonical
messages as bytes, quantisation, masks, sums. What remains of a round is overhead.
"""

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cohortium import bootstrap
from cohortium.core.features import Number
from cohortium.core.layout import Block
from cohortium.core.models import Descriptive
from cohortium.core.protection import Aggregation, Privacy
from cohortium.core.random import Randomness
from cohortium.core.study import Cohort, Purpose, Sites, Study
from cohortium.engines import local
from cohortium.plan import Phase, compile_study
from machine import processor

SITES, VALUES, ROUNDS, REPEATS = 15, 100, 200, 5
LAYOUT = (Block("values", (VALUES,), 1000.0),)
PHASES = (Phase("nothing", LAYOUT, ROUNDS, 0.0),)
RESULTS = Path(__file__).parent / "results" / "engine.json"


@dataclass(frozen=True)
class Counter:
    round: int = 0


@dataclass(frozen=True)
class Nothing:
    """An algorithm without arithmetic: its statistics are ready-made."""

    values: np.ndarray

    @property
    def broadcast_type(self) -> type[Counter]:
        return Counter

    def init(self) -> Counter:
        return Counter()

    def broadcast(self, state: Counter) -> Counter:
        return state

    def admit(self, broadcast: Counter, before: Counter | None) -> None:
        pass

    def layout(self, broadcast: Counter) -> tuple[Block, ...]:
        return LAYOUT

    def local(self, broadcast: Counter, table: Any, memory: Any, randomness: Any) -> Any:
        return {"values": self.values}, memory

    def update(self, state: Counter, total: Any) -> Counter:
        return Counter(state.round + 1)

    def done(self, state: Counter) -> bool:
        return state.round >= ROUNDS

    def finish(self, state: Counter) -> Any:
        return None, None

    def progress(self, state: Counter) -> tuple[int, None]:
        return ROUNDS - state.round, None


def empty_study(names: tuple[str, ...], **aggregation: Any) -> Study:
    """Returns a study of which only the sites and the protection matter."""
    return Study(
        name="overhead",
        purpose=Purpose(summary="benchmark"),
        sites=Sites(include=names),
        cohort=Cohort(dataset="none", patient="id", features={"x": Number(unit="1", range=(0, 1))}, minimum=1),
        model=Descriptive(),
        privacy=Privacy(unit="patient"),
        aggregation=Aggregation(**aggregation),
    )


def main() -> None:
    names = tuple(f"site-{index:02d}" for index in range(SITES))
    study = empty_study(names)
    frame = pd.DataFrame({"id": np.arange(50), "x": np.linspace(0, 1, 50)})
    plan = replace(compile_study(study), phases=PHASES, algorithm=Nothing(np.linspace(-1, 1, VALUES)))
    medians = []
    for repeat in range(REPEATS):
        root = Randomness.of_seed(repeat)
        agents = bootstrap.simulated_agents(plan, dict.fromkeys(names, frame), root, lambda _: plan)
        result = local.run(plan, agents, f"run-{repeat}", time.perf_counter, bootstrap.coordinator_key(root))
        medians.append(statistics.median(record.seconds for record in result.rounds) * 1000)
    figure = statistics.median(medians)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"round_15x100_ms": figure, "repeats_ms": medians, "machine": processor()}, indent=1) + "\n"
    )
    print(f"engine: round_15x100_ms={figure:.2f} rounds={ROUNDS} repeats={REPEATS}")


if __name__ == "__main__":
    main()
