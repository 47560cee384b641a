"""Canaries: made-up patients whose data are nothing but a direction of their own, to measure what a sum gives away.

A canary's vector is one long number in the coordinate that bears its name, much longer than any unit's may be, so that
clipping is tried as well. Half of the canaries, drawn at random, take part in a run; whoever sees the sums then guesses
which. A mechanism that promises privacy must make that hard, and the study's own mechanism is what they go through:
each phase of it with as many rounds, the same clip, bound, noise and sampling, on vectors that are longer than the
study's because a small model has too few directions for many canaries. Noise falls on each coordinate alike, so one
canary is as well hidden among a thousand coordinates as a patient is in the model's few. A canary turns round after
each round, so that noise which comes again in the next one cancels.

What leaves a site: for each noisy block of a phase, the sum of its canaries' clipped vectors.

Source: Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", algorithm 1 and section 6 (white
box); directions of their own: Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from cohortium.core import codec
from cohortium.core.errors import ProtocolError
from cohortium.core.features import Feature, Number
from cohortium.core.layout import Block, Floats, Layout, Noise, Statistics
from cohortium.core.random import Randomness
from cohortium.learning.algorithm import Memory
from cohortium.learning.preprocess import Fitted
from cohortium.learning.table import Table, Unit
from cohortium.privacy.clip import sum_clipped

OVERLONG = 10.0
"""A canary's vector before clipping, in units of the largest norm that one unit may have."""


@dataclass(frozen=True)
class CanaryBroadcast:
    """The round, from 0: all that sites are told."""

    round: int


@dataclass(frozen=True)
class CanaryState:
    """The sums of the rounds so far, those of a round by block, `(canaries,)` each."""

    sums: tuple[Mapping[str, Floats], ...] = ()


@dataclass(frozen=True)
class Canaries:
    """Sums canaries through a study's phases.

    Attributes:
        count: how many there are.
        phases: the layout of each phase's vectors, from `widened`, and its rounds.
        unit: what the study protects.
    """

    count: int
    phases: tuple[tuple[Layout, int], ...]
    unit: Unit

    @property
    def broadcast_type(self) -> type[CanaryBroadcast]:
        return CanaryBroadcast

    @property
    def rounds(self) -> int:
        return sum(rounds for _, rounds in self.phases)

    def init(self) -> CanaryState:
        return CanaryState()

    def broadcast(self, state: CanaryState) -> CanaryBroadcast:
        return CanaryBroadcast(len(state.sums))

    def admit(self, broadcast: CanaryBroadcast, before: CanaryBroadcast | None) -> None:
        if broadcast.round != (0 if before is None else before.round + 1) or broadcast.round >= self.rounds:
            raise ProtocolError("a broadcast was refused: its round is out of order")

    def layout(self, broadcast: CanaryBroadcast) -> Layout:
        return [layout for layout, rounds in self.phases for _ in range(rounds)][broadcast.round]

    def local(
        self, broadcast: CanaryBroadcast, table: Table, memory: Memory, randomness: Randomness
    ) -> tuple[Statistics, Memory]:
        statistics = {}
        for block, noise in noisy(self.layout(broadcast)):
            drawn = table.drawn(self.unit, noise.rate, randomness.child("sample", broadcast.round))
            vectors = np.zeros((drawn.rows, self.count))
            vectors[np.arange(drawn.rows), drawn.columns["canary"].astype(np.intp)] = drawn.columns["sign"]
            vectors *= turned(broadcast.round) * OVERLONG * noise.norm
            statistics[block.name] = sum_clipped(vectors, drawn.owners(self.unit), noise.norm)
        return statistics, memory

    def update(self, state: CanaryState, total: Statistics) -> CanaryState:
        return CanaryState((*state.sums, total))

    def done(self, state: CanaryState) -> bool:
        return len(state.sums) >= self.rounds

    def finish(self, state: CanaryState) -> tuple[Fitted, CanaryState]:
        """Returns nothing fitted, and every sum: together they stand where a study has its model."""
        return Fitted({}, {}, {}), state

    def progress(self, state: CanaryState) -> tuple[int, float | None]:
        return self.rounds - len(state.sums), None

    def freeze(self, state: CanaryState) -> bytes:
        return codec.encode([dict(total) for total in state.sums])

    def thaw(self, data: bytes) -> CanaryState:
        return CanaryState(tuple(codec.decode(data, list[dict[str, np.ndarray]])))


def turned(number: int) -> float:
    """Returns the direction of all canaries in a round, counted from 0: 1 or -1."""
    return -1.0 if number % 2 else 1.0


def features(count: int) -> dict[str, Feature]:
    """Returns the columns of a table of canaries: which one a row is of, and the sign of its vector.

    A row whose sign is 0 is a bystander, who adds nothing: a hospital is never empty.
    """
    return {
        "canary": Number(unit="1", range=(0, max(1, count - 1))),
        "sign": Number(unit="1", range=(-1, 1)),
    }


def widened(layout: Layout, count: int) -> Layout:
    """Returns a study's layout with one entry for each canary in every block."""
    return tuple(replace(block, shape=(count,), labels=()) for block in layout)


def noisy(layout: Layout) -> Iterator[tuple[Block, Noise]]:
    """Yields each block with its noise; where differential privacy is promised, every block has some."""
    for block in layout:
        assert block.noise is not None
        yield block, block.noise
