"""What a federated algorithm is, and how two make one.

    init()                                  -> state          coordinator
    broadcast(state)                        -> what sites see
    admit(broadcast, before)                -> or refuses     at each site, before a record is touched
    local(broadcast, table, memory, random) -> statistics     at each site, on its own patients
    update(state, total)                    -> state          coordinator, on the SUM of the sites' statistics

All are pure. An algorithm is a frozen value that holds its hyper-parameters, so both halves of a run build it from
the same study. It never learns how many sites there are or how their statistics were summed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np

from cohortium.core import codec
from cohortium.core.errors import ProtocolError
from cohortium.core.layout import Floats, Layout, Statistics
from cohortium.core.random import Randomness
from cohortium.learning.table import Table

Memory = Mapping[str, Floats]
"""What a site keeps for itself from one round to the next; empty before the first."""

S = TypeVar("S")
B = TypeVar("B")
R = TypeVar("R", covariant=True)


class Algorithm(Protocol[S, B, R]):
    """A federated algorithm with coordinator state `S`, broadcast `B` and result `R`."""

    @property
    def broadcast_type(self) -> type[B]:
        """The frozen dataclass that sites receive; `cohortium.core.codec` turns it into bytes."""

    def init(self) -> S:
        """Returns the state before the first round."""

    def broadcast(self, state: S) -> B:
        """Returns what the sites need of the state for the coming round."""

    def admit(self, broadcast: B, before: B | None) -> None:
        """Checks, at a site, that an honest coordinator could send `broadcast` after `before` (None: at the start).

        What it lets through must be safe to compute on: of the right shapes, finite, within bounds that no record
        decides, and in the algorithm's own order.

        Raises:
            ProtocolError: no honest coordinator would send it.
        """

    def layout(self, broadcast: B) -> Layout:
        """Returns the shape of the coming round's statistics, with a public bound for each."""

    def local(self, broadcast: B, table: Table, memory: Memory, randomness: Randomness) -> tuple[Statistics, Memory]:
        """Returns one site's statistics and its memory for the next round.

        `randomness` belongs to this site and this run and is the same in every round.
        """

    def update(self, state: S, total: Statistics) -> S:
        """Returns the state after a round, given the sum of the sites' statistics.

        Raises:
            CohortError: the sites' data taken together cannot support the study.
            ConvergenceError: the rounds are used up without success.
        """

    def done(self, state: S) -> bool:
        """Returns whether no more rounds are wanted."""

    def finish(self, state: S) -> R:
        """Returns the result of a state that is done."""

    def progress(self, state: S) -> tuple[int, float | None]:
        """Returns the most rounds that may still follow, and the last objective if there is one."""

    def freeze(self, state: S) -> bytes:
        """Returns a state as bytes, from which another coordinator goes on."""

    def thaw(self, data: bytes) -> S:
        """Returns the state that `freeze` wrote, equal to the last bit. Its arrays are read-only.

        Raises:
            ProtocolError: the bytes hold no such state.
        """


class Ageing(Protocol):
    """An algorithm whose statistics may be summed in a later round than they were computed for."""

    def stale(self, statistics: Statistics, late: int) -> Statistics:
        """Returns what is summed of statistics that are so many rounds late."""


@dataclass(frozen=True)
class PhaseState:
    """State of two algorithms in sequence: the first one's result once it is done."""

    first: Any
    fitted: Any = None
    second: Any = None


@dataclass(frozen=True)
class PhaseBroadcast:
    """What sites receive: the first result, so that they build the same second algorithm, and its broadcast."""

    fitted: bytes
    inner: bytes


@dataclass(frozen=True)
class Then(Generic[R]):
    """Runs `first`, builds an algorithm from its result with `second`, and runs that.

    `fitted_type` is the type of the first result, which travels to the sites. `rounds` bounds the second's rounds
    while it is not built yet.
    """

    first: Algorithm[Any, Any, Any]
    fitted_type: type[Any]
    second: Callable[[Any], Algorithm[Any, Any, R]]
    rounds: int

    @property
    def broadcast_type(self) -> type[PhaseBroadcast]:
        return PhaseBroadcast

    def init(self) -> PhaseState:
        return self._advance(PhaseState(self.first.init()))

    def broadcast(self, state: PhaseState) -> PhaseBroadcast:
        algorithm, inner = self._current(state)
        fitted = b"" if state.fitted is None else codec.encode(state.fitted)
        return PhaseBroadcast(fitted, codec.encode(algorithm.broadcast(inner)))

    def admit(self, broadcast: PhaseBroadcast, before: PhaseBroadcast | None) -> None:
        if before is not None and before.fitted and broadcast.fitted != before.fitted:
            raise ProtocolError("a broadcast was refused: what the first phase fitted has changed")
        if before is None and broadcast.fitted:
            raise ProtocolError("a broadcast was refused: it skips the first phase")
        algorithm, inner = self._received(broadcast)
        same_phase = before is not None and before.fitted == broadcast.fitted
        algorithm.admit(inner, self._received(before)[1] if before is not None and same_phase else None)

    def layout(self, broadcast: PhaseBroadcast) -> Layout:
        algorithm, inner = self._received(broadcast)
        return algorithm.layout(inner)

    def local(
        self, broadcast: PhaseBroadcast, table: Table, memory: Memory, randomness: Randomness
    ) -> tuple[Statistics, Memory]:
        algorithm, inner = self._received(broadcast)
        return algorithm.local(inner, table, memory, randomness.child("second" if broadcast.fitted else "first"))

    def stale(self, broadcast: PhaseBroadcast, statistics: Statistics, late: int) -> Statistics:
        """Returns what is summed of the statistics of a broadcast's phase that are so many rounds late."""
        algorithm, _ = self._received(broadcast)
        return cast(Ageing, algorithm).stale(statistics, late)

    def update(self, state: PhaseState, total: Statistics) -> PhaseState:
        algorithm, inner = self._current(state)
        inner = algorithm.update(inner, total)
        if state.fitted is None:
            return self._advance(PhaseState(inner))
        return PhaseState(state.first, state.fitted, inner)

    def done(self, state: PhaseState) -> bool:
        return state.fitted is not None and self.second(state.fitted).done(state.second)

    def finish(self, state: PhaseState) -> tuple[Any, R]:
        """Returns both results."""
        return state.fitted, self.second(state.fitted).finish(state.second)

    def progress(self, state: PhaseState) -> tuple[int, float | None]:
        algorithm, inner = self._current(state)
        left, objective = algorithm.progress(inner)
        return left + (self.rounds if state.fitted is None else 0), objective

    def freeze(self, state: PhaseState) -> bytes:
        algorithm, inner = self._current(state)
        fitted = b"" if state.fitted is None else codec.encode(state.fitted)
        return codec.encode(PhaseBroadcast(fitted, algorithm.freeze(inner)))

    def thaw(self, data: bytes) -> PhaseState:
        frozen = codec.decode(data, PhaseBroadcast)
        if not frozen.fitted:
            return PhaseState(self.first.thaw(frozen.inner))
        fitted = codec.decode(frozen.fitted, self.fitted_type)
        return PhaseState(None, fitted, self.second(fitted).thaw(frozen.inner))

    def _advance(self, state: PhaseState) -> PhaseState:
        if not self.first.done(state.first):
            return state
        fitted = self.first.finish(state.first)
        return PhaseState(None, fitted, self.second(fitted).init())

    def _current(self, state: PhaseState) -> tuple[Algorithm[Any, Any, Any], Any]:
        if state.fitted is None:
            return self.first, state.first
        return self.second(state.fitted), state.second

    def _received(self, broadcast: PhaseBroadcast) -> tuple[Algorithm[Any, Any, Any], Any]:
        algorithm: Algorithm[Any, Any, Any] = self.first
        if broadcast.fitted:
            algorithm = self.second(codec.decode(broadcast.fitted, self.fitted_type))
        return algorithm, codec.decode(broadcast.inner, algorithm.broadcast_type)


def in_the_clear(
    algorithm: Algorithm[S, B, R], tables: Sequence[Table], randomness: Randomness, noise: float = 0.0
) -> R:
    """Runs an algorithm over tables that one process may read, without quantisation or masks.

    The reference for what protection costs, and the way to fit one hospital alone or the pooled rows.

    Args:
        noise: the standard deviation of the normal noise that each sum gets, in units of what its layout asks for: 1
            is central differential privacy (one unit at one site), the root of the number of sites is what local
            noise at each of them comes to. This noise is drawn in floating point: for comparisons, not for releases.
    """
    memories: list[Memory] = [{} for _ in tables]
    state = algorithm.init()
    generator = randomness.child("noise").generator()
    while not algorithm.done(state):
        broadcast = algorithm.broadcast(state)
        total: dict[str, Floats] = {}
        for index, table in enumerate(tables):
            mine = randomness.child("site", index)
            statistics, memories[index] = algorithm.local(broadcast, table, memories[index], mine)
            total = {name: total.get(name, 0.0) + np.asarray(value) for name, value in statistics.items()}
        for block in algorithm.layout(broadcast) if noise else ():
            if block.noise is not None:
                deviation = noise * block.noise.multiplier * block.noise.norm
                total[block.name] = total[block.name] + deviation * generator.standard_normal(block.shape)
        state = algorithm.update(state, total)
    return algorithm.finish(state)
