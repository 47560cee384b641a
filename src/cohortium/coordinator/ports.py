"""What the coordinator's service needs of the world outside: a store that is the truth, and a bus that may lose things.

The store is PostgreSQL: what it has acknowledged outlasts every process and the machine. The bus is Redis: it carries
messages between processes quickly, and everything on it can be had again, so losing it loses nothing.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

from cohortium.core.errors import CohortiumError

Status = Literal["queued", "running", "paused", "finished", "failed", "cancelled"]
Wish = Literal["run", "pause", "cancel"]
ENDED: tuple[Status, ...] = ("finished", "failed", "cancelled")


class Superseded(CohortiumError):
    """Another coordinator leads this run by now; nothing was written."""


class Unavailable(CohortiumError):
    """The store or the bus cannot be reached just now; whether the last write stands is not known."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a run is led; chosen by whoever submits it, and no part of what sites approve.

    Attributes:
        deadline: seconds that a round waits for sites once enough of the others have answered.
        patience: seconds that a run waits for enough sites before it fails.
        priority: runs of a higher one start first.
    """

    deadline: float = 60.0
    patience: float = 3600.0
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run as the store holds it, without its checkpoint.

    Attributes:
        run: its name, used once.
        study: the study's id, `sha256:...`.
        owner: who submitted it.
        seed: a public seed of the sites' training, or None: each site draws its own.
        wish: what people want of it; `status` is what it does.
        leader: the coordinator that leads it, if one does.
        epoch: counts its leaders; a write under an older epoch is refused.
        round: the round that is open, 0 before the first.
        reason: why it failed or was cancelled.
    """

    run: str
    study: str
    owner: str
    terms: Terms
    seed: int | None
    status: Status
    wish: Wish
    leader: str | None
    epoch: int
    round: int
    reason: str | None
    submitted: datetime
    started: datetime | None
    ended: datetime | None


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """Something that happened to a run, in the order of `seq`. `facts` hold no patient's value."""

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    seq: int = 0
    at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a run stands, enough to go on from it. Large parts lie apart, so that they are written once.

    Attributes:
        round: the round that is open.
        state: the run's state, a few kilobytes (`cohortium.coordinator.checkpoint`).
        parts: large byte strings by name. Those of an earlier checkpoint that are not named in `keep` are forgotten.
        keep: names of parts that stay as they were written before.
    """

    round: int
    state: bytes
    parts: Mapping[str, bytes] = field(default_factory=dict)
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A round whose sum was opened and applied. The store takes each number of a run once."""

    number: int
    survivors: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A run that this coordinator leads under an epoch, with what it needs to go on.

    `document` holds the study's canonical bytes; `checkpoint` is None if the run has not begun.
    """

    row: RunRow
    document: bytes
    checkpoint: Checkpoint | None


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """A site of the consortium. `identity` is its pinned Ed25519 public key (32 bytes)."""

    name: str
    identity: bytes
    enrolled: datetime
    revoked: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class SiteState:
    """How a site stands in a run: its last word (an event's kind, or 'contributed'), and its last round, 0 if none."""

    site: str
    state: str
    round: int
    at: datetime


class Runs(Protocol):
    """The store's runs, as the service leads them. Every method may raise `Unavailable`."""

    async def beat(self, me: str, address: str) -> None:
        """Says that this coordinator lives; a run whose leader has not for `stale` seconds may be claimed."""

    async def peers(self, stale: float) -> Sequence[str]:
        """Returns the coordinators that gave a sign of life within `stale` seconds."""

    async def claim(self, me: str, stale: float, most: int, share: int = 1_000_000) -> list[Claim]:
        """Takes the lead of at most `most` runs that want one: queued ones, and those of leaders that are gone.

        Its own runs are not taken anew: what it put aside it releases first, and a process that starts has a new name.

        One transaction raises each run's epoch, so no other coordinator leads it from then on. Queued runs come in
        fair order: a higher priority first, then the owner with the fewest runs under way, then the oldest. Nobody
        begins more than `share` runs at a time for each living coordinator, so that one owner's runs, which may wait
        for sites, leave room for others'.
        """

    async def save(
        self,
        claim: Claim,
        checkpoint: Checkpoint,
        applied: Applied | None = None,
        events: Sequence[RunEvent] = (),
    ) -> None:
        """Writes a checkpoint, the round applied with it and events, all or nothing, durably.

        Raises:
            Superseded: the claim's epoch has passed.
        """

    async def end(
        self,
        claim: Claim,
        status: Status,
        reason: str | None,
        outcome: bytes | None,
        applied: Applied | None = None,
        events: Sequence[RunEvent] = (),
    ) -> None:
        """Ends a run with its outcome or a reason; its checkpoint is forgotten.

        Raises:
            Superseded: the claim's epoch has passed.
        """

    async def mark(self, claim: Claim, status: Status, events: Sequence[RunEvent] = ()) -> None:
        """Records that a run is running or paused.

        Raises:
            Superseded: the claim's epoch has passed.
        """

    async def release(self, claim: Claim) -> None:
        """Gives a run back, so that another coordinator may claim it at once."""

    async def wishes(self, runs: Sequence[str]) -> Mapping[str, Wish]:
        """Returns what people want of these runs."""

    async def sites(self) -> Sequence[SiteRow]:
        """Returns the sites of the consortium, revoked ones too."""

    def news(self) -> AsyncIterator[str]:
        """Yields the name of a channel whenever something changed there: 'runs', 'sites', 'run:NAME'.

        A hint, which may be lost: whoever needs to know looks from time to time, too.
        """


class Desk(Protocol):
    """The store's runs, as people see them. Every method may raise `Unavailable`."""

    async def submit(
        self, run: str, study: str, document: bytes, owner: str, sites: Sequence[str], terms: Terms, seed: int | None
    ) -> RunRow:
        """Queues a run. The same call again, after a lost answer, returns the run that is there already.

        Raises:
            StudyError: the name is taken by another run.
        """

    async def run(self, run: str) -> RunRow | None:
        """Returns a run."""

    async def runs(self, most: int = 100, owner: str | None = None, *, under_way: bool = False) -> Sequence[RunRow]:
        """Returns the latest runs, newest first: of one owner or of all, and those alone that have not ended or all."""

    async def wish(self, run: str, wish: Wish, by: str) -> RunRow:
        """Says what somebody wants of a run; an event keeps who.

        Raises:
            StudyError: there is no such run, or it has ended.
        """

    async def events(self, run: str, after: int = 0, most: int = 1000) -> Sequence[RunEvent]:
        """Returns a run's events with a larger `seq` than `after`, in order."""

    async def applied(self, run: str) -> Sequence[Applied]:
        """Returns the rounds that were applied, in order."""

    async def document(self, study: str) -> bytes | None:
        """Returns a study's canonical bytes."""

    async def outcome(self, run: str) -> bytes | None:
        """Returns what a finished run left."""

    async def coordinators(self) -> Sequence[tuple[str, str, datetime]]:
        """Returns each coordinator's name, address and last sign of life."""

    async def site_states(self, run: str) -> Sequence[SiteState]:
        """Returns how a run's sites stand, by name."""


class Enrolments(Protocol):
    """The store's invitations, sites and certificates. Every method may raise `Unavailable`."""

    async def invite(self, name: str, digest: bytes, expires: datetime, by: str) -> None:
        """Keeps the SHA-256 digest of a one-time secret for a site; an older invitation of that name is void.

        Raises:
            StudyError: a site of that name is enrolled, and not revoked.
        """

    async def redeem(self, name: str, digest: bytes, identity: bytes, now: datetime) -> SiteRow:
        """Uses up an invitation and enrols the site under its identity, in one transaction.

        The same call again with the same identity succeeds until the invitation expires: the answer may have been lost.

        Raises:
            PolicyRefused: there is no such invitation, it has expired, or another identity used it.
        """

    async def issued(self, name: str, serial: int, expires: datetime) -> None:
        """Records a certificate."""

    async def site(self, name: str) -> SiteRow | None:
        """Returns a site."""

    async def sites(self) -> Sequence[SiteRow]:
        """Returns all sites, revoked ones too."""

    async def revoke(self, name: str, by: str) -> SiteRow:
        """Revokes a site at once; `news` tells every coordinator.

        Raises:
            StudyError: there is no such site.
        """


class Bus(Protocol):
    """Boxes of short-lived messages, and what is known for some seconds. Every method may raise `Unavailable`."""

    async def put(self, box: str, data: bytes) -> None:
        """Puts a message into a box; a box nobody reads is forgotten after a while."""

    def take(self, box: str) -> AsyncIterator[bytes]:
        """Yields what is put into a box from now on, in order, across losses of the connection; some may be lost."""

    async def keep(self, key: str, value: bytes, seconds: float) -> None:
        """Keeps a value for some seconds."""

    async def look(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """Returns the values that are still kept, by key."""

    async def forget(self, key: str) -> None:
        """Forgets a value."""

    async def allow(self, key: str, per_second: float, burst: int) -> bool:
        """Returns whether one more is within a rate; a token bucket that all processes share."""
