"""Stages: what happens to a vector between a site's statistics and the secure sum, and back.

    local -> [stage -> stage -> ...] -> secure sum -> [... <- stage <- stage] -> update

A stage's two halves run at different places and compile from the same study. Composed, never subclassed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from cohortium.core.events import DpEvent
from cohortium.core.random import Randomness

Vector = NDArray[Any]


class Stage(Protocol):
    """One reversible step. Both halves are pure."""

    def encode(self, vector: Vector, randomness: Randomness) -> Vector:
        """Site half: returns the vector that goes on towards the sum. Draws from a child of `randomness`
        that bears the stage's name; `randomness` is for this vector alone."""

    def decode(self, total: Vector) -> Vector:
        """Coordinator half: returns what the sum of the encoded vectors stands for."""

    def events(self) -> tuple[DpEvent, ...]:
        """Returns the privacy cost of releasing one sum."""


@dataclass(frozen=True)
class Chain:
    """Stages in order: encodes left to right, decodes right to left. Itself a stage."""

    stages: tuple[Stage, ...]

    def encode(self, vector: Vector, randomness: Randomness) -> Vector:
        for stage in self.stages:
            vector = stage.encode(vector, randomness)
        return vector

    def decode(self, total: Vector) -> Vector:
        for stage in reversed(self.stages):
            total = stage.decode(total)
        return total

    def events(self) -> tuple[DpEvent, ...]:
        return tuple(event for stage in self.stages for event in stage.events())


def chain(stages: Sequence[Stage]) -> Chain:
    """Returns the stages as one."""
    return Chain(tuple(stages))
