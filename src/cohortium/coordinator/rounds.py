"""A run as the coordinator leads it: step(state, event) -> (state, effects), without I/O, clock or randomness.

    keys:     every site announces a key -> all keys go to every site
    round:    broadcast -> one masked update of each site -> their sum -> the algorithm's next state
    finished: an outcome, or a reason

The state holds only the running sum of masked updates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from cohortium.core import codec
from cohortium.core.document import canonical_bytes
from cohortium.core.errors import CohortiumError, ProtocolError
from cohortium.core.layout import Layout, size, unpack
from cohortium.core.messages import (
    CONTROL_BYTES,
    Announcement,
    CloseRun,
    FromSite,
    KeySet,
    MaskedUpdate,
    OpenRound,
    OpenRun,
    Refusal,
    ToSite,
)
from cohortium.learning.descriptive import Summary
from cohortium.learning.model import GlobalModel
from cohortium.plan import Plan
from cohortium.secagg.quantise import Residues


@dataclass(frozen=True)
class Broadcast:
    """Send one message to every site of the run."""

    message: ToSite


@dataclass(frozen=True)
class RoundClosed:
    """A round is summed and applied.

    Attributes:
        survivors: the sites in the sum.
        values: how many numbers each of them sent.
        left: the most rounds that may still follow.
        objective: the algorithm's objective before this round's step, if it has one.
    """

    number: int
    survivors: tuple[str, ...]
    values: int
    left: int
    objective: float | None


@dataclass(frozen=True)
class Finished:
    """The run has its outcome."""

    outcome: GlobalModel | Summary


@dataclass(frozen=True)
class Failed:
    """The run ended without an outcome."""

    error: CohortiumError


Effect = Broadcast | RoundClosed | Finished | Failed


class RunState(msgspec.Struct, frozen=True):
    """Where a run stands. Start one with `open_run`.

    A struct and not a dataclass, because it is replaced with every message.
    """

    plan: Plan
    run: str
    phase: Literal["keys", "round", "over"]
    keys: Mapping[str, Announcement] = msgspec.field(default_factory=dict)
    learned: Any = None
    """The algorithm's state."""
    number: int = 0
    layout: Layout = ()
    total: Residues | None = None
    received: frozenset[str] = frozenset()


def open_run(plan: Plan, run: str) -> tuple[RunState, list[Effect]]:
    """Returns the state and effects at the start of a run named `run`; a name is used once."""
    return RunState(plan, run, "keys"), [Broadcast(OpenRun(run, canonical_bytes(plan.study)))]


def inbound_limit(state: RunState) -> int:
    """Returns more bytes than a site's message may have now."""
    return CONTROL_BYTES + 8 * size(state.layout)


def step(state: RunState, sender: str, message: FromSite) -> tuple[RunState, list[Effect]]:
    """Returns the state after a message, and what to do.

    Args:
        sender: the site's name as the transport authenticated it.

    Raises:
        ProtocolError: the message is not one that this sender may send now; the state stays as it was.
    """
    if message.run != state.run or message.site != sender or sender not in state.plan.sites:
        raise ProtocolError(f"a message of '{sender}' was refused: it is for another run or in another site's name")
    if state.phase == "over":
        raise ProtocolError("a message was refused: the run is over")
    match message:
        case Announcement() if state.phase == "keys" and sender not in state.keys:
            return _announced(state, message)
        case MaskedUpdate() if state.phase == "round" and sender not in state.received:
            return _contributed(state, message)
        case Refusal():
            return _over(state, Failed(CohortiumError(f"site '{sender}' takes no part: {message.reason}")))
    raise ProtocolError(f"a message of '{sender}' was refused: it came twice or out of order")


def _announced(state: RunState, message: Announcement) -> tuple[RunState, list[Effect]]:
    state = replace(state, keys={**state.keys, message.site: message})
    if len(state.keys) < len(state.plan.sites):
        return state, []
    keys = Broadcast(KeySet(state.run, tuple(state.keys[site] for site in state.plan.sites)))
    state, effects = _open_round(replace(state, phase="round", learned=state.plan.algorithm.init()))
    return state, [keys, *effects]


def _open_round(state: RunState) -> tuple[RunState, list[Effect]]:
    algorithm = state.plan.algorithm
    broadcast = algorithm.broadcast(state.learned)
    layout, number = algorithm.layout(broadcast), state.number + 1
    state = replace(state, number=number, layout=layout, total=None, received=frozenset())
    return state, [Broadcast(OpenRound(state.run, number, codec.encode(broadcast)))]


def _contributed(state: RunState, message: MaskedUpdate) -> tuple[RunState, list[Effect]]:
    kind = np.uint32 if state.plan.study.aggregation.bits == 32 else np.uint64
    if message.round != state.number or message.values.shape != (size(state.layout),) or message.values.dtype != kind:
        raise ProtocolError(f"an update of '{message.site}' was refused: wrong round, length or type")
    total = message.values if state.total is None else state.total + message.values
    state = replace(state, total=total, received=state.received | {message.site})
    if len(state.received) < len(state.plan.sites):
        return state, []
    return _close_round(state, total)


def _close_round(state: RunState, total: Residues) -> tuple[RunState, list[Effect]]:
    algorithm = state.plan.algorithm
    statistics = unpack(state.layout, state.plan.stages(state.layout).decode(total))
    try:
        learned = algorithm.update(state.learned, statistics)
        outcome = state.plan.outcome(learned) if algorithm.done(learned) else None
    except CohortiumError as error:
        return _over(state, Failed(error))
    left, objective = algorithm.progress(learned)
    closed = RoundClosed(state.number, tuple(sorted(state.received)), len(total), left, objective)
    state = replace(state, learned=learned, total=None)
    state, effects = _open_round(state) if outcome is None else _over(state, Finished(outcome))
    return state, [closed, *effects]


def _over(state: RunState, ending: Finished | Failed) -> tuple[RunState, list[Effect]]:
    word = "finished" if isinstance(ending, Finished) else "failed"
    return replace(state, phase="over", total=None), [Broadcast(CloseRun(state.run, word)), ending]
