"""A site's part in one run: step(session, event) -> (session, effects), without I/O or clock.

Every refusal is final for the run: after one, the session answers nothing more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec.structs import replace

from cohortium.core import codec
from cohortium.core.document import from_canonical
from cohortium.core.errors import ProtocolError
from cohortium.core.layout import pack
from cohortium.core.messages import Announcement, CloseRun, FromSite, KeySet, MaskedUpdate, OpenRound, OpenRun, ToSite
from cohortium.core.random import Randomness
from cohortium.learning.algorithm import Memory
from cohortium.learning.table import Table
from cohortium.plan import Compiler, Plan, compile_study
from cohortium.secagg import keys
from cohortium.secagg.masking import Masker, masker


@dataclass(frozen=True)
class Membership:
    """Who a site is, and whom it trusts.

    Attributes:
        site: its name.
        identity: its long-term signing key.
        pinned: every site's Ed25519 public key (32 bytes) by name, from enrolment.
    """

    site: str
    identity: Ed25519PrivateKey = field(repr=False)
    pinned: Mapping[str, bytes]


@dataclass(frozen=True)
class LoadCohort:
    """Effect: read the cohort of the plan, and answer with a `Table`."""

    plan: Plan


@dataclass(frozen=True)
class Send:
    """Effect: send a message to the coordinator."""

    message: FromSite


Effect = LoadCohort | Send
Event = ToSite | Table


class Session(msgspec.Struct, frozen=True):
    """Where a site stands in a run. `randomness` is used for this run alone.

    A struct and not a dataclass, because it is replaced several times a round.
    """

    membership: Membership
    randomness: Randomness
    compiler: Compiler = compile_study
    training: Randomness | None = None
    plan: Plan | None = None
    run: str = ""
    private: X25519PrivateKey | None = None
    announced: Announcement | None = None
    masker: Masker | None = None
    waiting: OpenRound | None = None
    before: Any = None
    memory: Memory = msgspec.field(default_factory=dict)
    over: bool = False

    def __repr__(self) -> str:
        # the rest is secret
        return f"Session(site={self.membership.site!r}, run={self.run!r}, over={self.over})"


def step(session: Session, event: Event) -> tuple[Session, list[Effect]]:
    """Returns the session after an event, and what to do.

    Raises:
        StudyError, ProtocolError: the coordinator asks for what this site refuses.
        CohortiumError: the algorithm cannot go on with this site's data.
    """
    if session.over:
        raise ProtocolError("a message was refused: this site's part in the run is over")
    if not isinstance(event, Table | OpenRun) and event.run != session.run:
        raise ProtocolError("a message was refused: it belongs to another run")
    match event:
        case OpenRun() if session.plan is None:
            return _open_run(session, event)
        case Table() if session.plan is not None and session.announced is None:
            return _announce(session)
        case KeySet() if session.announced is not None and session.masker is None:
            return _agree(session, event)
        case OpenRound() if session.masker is not None and session.waiting is None:
            assert session.plan is not None
            if event.round != session.masker.last_round + 1 or event.round > session.plan.rounds:
                raise ProtocolError(f"round {event.round} was refused: it is out of order or beyond the study's rounds")
            return replace(session, waiting=event), [LoadCohort(session.plan)]
        case Table() if session.waiting is not None:
            return _contribute(session, session.waiting, event)
        case CloseRun():
            blank = Randomness(bytes(32))
            ended = replace(session, over=True, private=None, masker=None, before=None, memory={})
            return replace(ended, randomness=blank, training=blank), []
    raise ProtocolError("a message was refused: it came twice or out of order")


def _open_run(session: Session, message: OpenRun) -> tuple[Session, list[Effect]]:
    plan = session.compiler(from_canonical(message.study))
    if session.membership.site not in plan.sites:
        raise ProtocolError("the study was refused: it does not include this site")
    return replace(session, plan=plan, run=message.run, training=session.randomness.child("training")), [
        LoadCohort(plan)
    ]


def _announce(session: Session) -> tuple[Session, list[Effect]]:
    # the cohort was read only to be sure that it keeps the contract; each round asks for it again
    assert session.plan is not None
    member = session.membership
    private = X25519PrivateKey.from_private_bytes(session.randomness.child("agreement", session.run).bytes(32))
    announced = keys.announce(member.identity, private, session.run, session.plan.study_id, member.site)
    return replace(session, private=private, announced=announced), [Send(announced)]


def _agree(session: Session, message: KeySet) -> tuple[Session, list[Effect]]:
    assert session.plan is not None and session.private is not None and session.announced is not None
    plan, pinned = session.plan, session.membership.pinned
    unknown = set(plan.sites) - pinned.keys()
    if unknown:
        raise ProtocolError(f"the study was refused: this site knows no identity of {', '.join(sorted(unknown))}")
    expected = {site: pinned[site] for site in plan.sites}
    keys.check(message.announcements, expected, session.run, plan.study_id)
    agreed = masker(session.private, session.announced, message.announcements, plan.study.aggregation.bits)
    return replace(session, private=None, masker=agreed), []


def _contribute(session: Session, opened: OpenRound, table: Table) -> tuple[Session, list[Effect]]:
    assert session.plan is not None and session.masker is not None and session.training is not None
    algorithm = session.plan.algorithm
    broadcast = codec.decode(opened.broadcast, algorithm.broadcast_type)
    algorithm.admit(broadcast, session.before)
    layout = algorithm.layout(broadcast)
    with np.errstate(all="ignore"):  # what overflows becomes infinite, and encoding refuses that
        statistics, memory = algorithm.local(broadcast, table, session.memory, session.training)
    encoded = session.plan.stages(layout).encode(pack(layout, statistics))
    masked, later = session.masker.mask(opened.round, opened.broadcast, encoded)
    update = MaskedUpdate(session.run, session.membership.site, opened.round, masked)
    return replace(session, masker=later, waiting=None, before=broadcast, memory=memory), [Send(update)]
