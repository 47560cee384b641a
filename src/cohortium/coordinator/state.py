"""Where a led run stands, and what its steps want done: values without behaviour (`cohortium.coordinator.rounds`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.coordinator.selection import Career
from cohortium.core.errors import CohortiumError
from cohortium.core.layout import Layout
from cohortium.core.messages import Announcement, ToSite
from cohortium.learning.descriptive import Summary
from cohortium.learning.model import GlobalModel
from cohortium.plan import Plan
from cohortium.secagg.group import Group
from cohortium.secagg.protocol import Tally
from cohortium.secagg.stream import Means

Phase = Literal["keys", "collect", "endorse", "reveal", "over"]


@dataclass(frozen=True)
class Broadcast:
    """Send one message to some of the sites."""

    message: ToSite
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Send:
    """Send each site a message of its own."""

    messages: Mapping[str, ToSite]


@dataclass(frozen=True)
class RoundClosed:
    """A round is summed and applied.

    Attributes:
        survivors: the sites in the sum.
        values: how many numbers each of them sent.
        left: the most rounds that may still follow.
        objective: the algorithm's objective before this round's step, if it has one.
        selected: the sites that were asked; empty where all were. In a buffer: those that were first.
    """

    number: int
    survivors: tuple[str, ...]
    values: int
    left: int
    objective: float | None
    selected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The run has its outcome."""

    outcome: GlobalModel | Summary


@dataclass(frozen=True)
class Failed:
    """The run ended without an outcome."""

    error: CohortiumError


Effect = Broadcast | Send | RoundClosed | Finished | Failed


class RunState(msgspec.Struct, frozen=True):
    """Where a run stands. Start one with `open_run`.

    A struct and not a dataclass, because it is replaced with every message.

    Attributes:
        identity: the coordinator's signing key, whose public half the sites pinned.
        pinned: each site's Ed25519 public key (32 bytes) by name, from enrolment.
        waiting: the sites whose answer the phase still needs.
        gone: the sites that refused or were expelled, with their reasons.
        keys: what each site announced.
        keyed: the sites that have answered a round, and so hold the key set.
        learned: the algorithm's state.
        before, history: what stands for all broadcasts before this round, and with it (`keys.history`).
        missed: for each site that was lost, the broadcasts of the rounds since, oldest first.
        selected: the sites that the round asks to contribute; empty where it asks all.
        noted: the others that have taken in its broadcast.
        chosen: the survivors of the round, if they were told to sites and then their sum was lost with a coordinator:
            no other set is ever opened.
        summed: for a site that may not have heard of it, the last buffer that it is in.
        careers: what is known of each site's part so far, to select by.
    """

    plan: Plan
    run: str
    identity: Ed25519PrivateKey
    pinned: Mapping[str, bytes]
    means: Means
    phase: Phase
    waiting: frozenset[str]
    gone: Mapping[str, str] = msgspec.field(default_factory=dict)
    keys: Mapping[str, Announcement] = msgspec.field(default_factory=dict)
    keyed: frozenset[str] = frozenset()
    group: Group | None = None
    session: bytes = b""
    learned: Any = None
    number: int = 0
    layout: Layout = ()
    broadcast: bytes = b""
    before: bytes = b""
    history: bytes = b""
    missed: Mapping[str, tuple[bytes, ...]] = msgspec.field(default_factory=dict)
    selected: tuple[str, ...] = ()
    noted: frozenset[str] = frozenset()
    chosen: tuple[str, ...] = ()
    summed: Mapping[str, int] = msgspec.field(default_factory=dict)
    careers: Mapping[str, Career] = msgspec.field(default_factory=dict)
    tally: Tally | None = None
    seed: int | None = None

    def __repr__(self) -> str:
        return f"RunState(run={self.run!r}, phase={self.phase!r}, number={self.number})"
