"""A site's part in one run: step(session, event) -> (session, effects), without I/O or clock.

    OpenRound -> Charge or LoadCohort -> Table -> Train -> Trained -> MaskedUpdate

Where rounds are buffers, later rounds may open between Train and Trained. They are noted, and what was trained is
contributed to the newest of them, weighted down by how late it is. It is kept until a survivor set shows that it is in
a sum. If another round opens before, the contribution came too late, and the same work is protected anew for that one.

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
from cohortium.core.errors import ProtocolError, Repeated
from cohortium.core.events import Events
from cohortium.core.layout import Layout, Statistics, pack
from cohortium.core.messages import (
    Announcement,
    CloseRun,
    Endorsed,
    FromSite,
    KeySet,
    Noted,
    OpenRound,
    OpenRun,
    Survivors,
    ToSite,
)
from cohortium.core.random import Randomness
from cohortium.learning.algorithm import Memory
from cohortium.learning.table import Table
from cohortium.plan import Compiler, Plan, compile_study
from cohortium.secagg import keys
from cohortium.secagg.group import Group
from cohortium.secagg.protocol import Member
from cohortium.secagg.stream import PLAIN, Means


@dataclass(frozen=True)
class Membership:
    """Who a site is, and whom it trusts.

    Attributes:
        site: its name.
        identity: its long-term signing key.
        pinned: every site's Ed25519 public key (32 bytes) by name, from enrolment.
        coordinator: the coordinator's Ed25519 public key (32 bytes), from enrolment.
    """

    site: str
    identity: Ed25519PrivateKey = field(repr=False)
    pinned: Mapping[str, bytes]
    coordinator: bytes


@dataclass(frozen=True)
class LoadCohort:
    """Effect: read the cohort of the plan, and answer with a `Table`.

    Attributes:
        cost: at the start of a run what all of it may cost in privacy: who cannot pay for that is left out.
    """

    plan: Plan
    cost: Events


@dataclass(frozen=True)
class Charge:
    """Effect: charge each patient of the run's cohort for a round before anything of it leaves, and answer with a
    `Table` of those who could pay. The answer must not come before the charge would survive a crash."""

    plan: Plan
    round: int
    cost: Events


@dataclass(frozen=True)
class Send:
    """Effect: send a message to the coordinator."""

    message: FromSite


@dataclass(frozen=True)
class Asked:
    """A round that this site is about to contribute to; what is asked for was admitted.

    Attributes:
        broadcast, layout: what the algorithm asks for, and the shape of the answer.
        history: what stands for all broadcasts up to this one.
        selected: the sites that contribute; empty where all do.
    """

    round: int
    broadcast: Any
    history: bytes
    layout: Layout
    selected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """What a site's own patients give in a round, and what the algorithm keeps for the next one."""

    asked: Asked
    statistics: Statistics
    memory: Memory


@dataclass(frozen=True)
class Train:
    """Effect: call `done`, which may take long, and answer with what it returns.

    Attributes:
        apart: messages of the run may be dealt with meanwhile.
    """

    asked: Asked
    plan: Plan
    table: Table
    memory: Memory
    randomness: Randomness
    means: Means
    apart: bool

    def done(self) -> Trained:
        """Returns the statistics.

        Raises:
            CohortiumError: the algorithm cannot go on with this site's data.
        """
        # what overflows becomes infinite, and encoding refuses that
        with self.means.training, np.errstate(all="ignore"):
            found = self.plan.algorithm.local(self.asked.broadcast, self.table, self.memory, self.randomness)
        return Trained(self.asked, *found)


Effect = LoadCohort | Charge | Train | Send
Event = ToSite | Table | Trained


@dataclass(frozen=True)
class Spare:
    """Work that was contributed and may have come too late: what was trained in `round`, last sent in `sent`."""

    round: int
    sent: int
    statistics: Statistics


class Session(msgspec.Struct, frozen=True):
    """Where a site stands in a run. `randomness` is used for this run alone.

    A struct and not a dataclass, because it is replaced several times a round.

    Attributes:
        training: what local training draws from.
        public: the root of a public seed; it decides training and rounding, and no key.
        heard: the newest round that was opened to this site.
        before, said, history: its broadcast, its broadcast's bytes, and what stands for all broadcasts up to it.
        asked: the round that it is at work for.
        spare: where rounds are buffers, the last contribution, until it is known to be in a sum.
    """

    membership: Membership
    randomness: Randomness
    compiler: Compiler = compile_study
    means: Means = PLAIN
    training: Randomness | None = None
    public: Randomness | None = None
    plan: Plan | None = None
    run: str = ""
    private: X25519PrivateKey | None = None
    announced: Announcement | None = None
    member: Member | None = None
    asked: Asked | None = None
    spare: Spare | None = None
    heard: int = 0
    before: Any = None
    said: bytes = b""
    history: bytes = b""
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
    if isinstance(event, Table | Trained):
        return _inside(session, event)
    if not isinstance(event, OpenRun) and event.run != session.run:
        raise ProtocolError("a message was refused: it belongs to another run")
    match event:
        case OpenRun() if session.plan is None:
            return _open_run(session, event)
        case KeySet() if session.announced is not None:
            return _agree(session, event)
        case OpenRound() if session.member is not None and _apart(session, session.asked):
            return _open_round(session, event)
        case Survivors() | Endorsed() if session.member is not None:
            return _open_sum(session, session.member, event)
        case CloseRun():
            blank = Randomness(bytes(32))
            ended = replace(
                session, over=True, private=None, member=None, asked=None, spare=None, before=None, said=b"", memory={}
            )
            return replace(ended, randomness=blank, training=blank, public=None), []
    raise ProtocolError("a message was refused: it came twice or out of order")


def _inside(session: Session, event: Table | Trained) -> tuple[Session, list[Effect]]:
    """Returns the session after something that was asked for at the site itself."""
    plan, asked = session.plan, session.asked
    match event:
        case Table() if plan is not None and session.announced is None:
            return _announce(session)
        case Table() if plan is not None and asked is not None and session.training is not None:
            apart = _apart(session, asked)
            return session, [Train(asked, plan, event, session.memory, session.training, session.means, apart)]
        case Trained() if asked is not None and asked is event.asked:
            return _trained(session, event)
    raise ProtocolError("nobody asked for this cohort or training")


def _open_run(session: Session, message: OpenRun) -> tuple[Session, list[Effect]]:
    plan = session.compiler(from_canonical(message.study))
    if session.membership.site not in plan.sites:
        raise ProtocolError("the study was refused: it does not include this site")
    opened = replace(session, plan=plan, run=message.run, **_choices(session, plan, message.seed))
    return opened, [LoadCohort(plan, plan.releases)]


def _choices(session: Session, plan: Plan, seed: int | None) -> dict[str, Randomness | None]:
    """Returns what decides a run's result at this site: its own secret randomness, or what a public seed says."""
    if seed is None:
        return {"training": session.randomness.child("training"), "public": None}
    if plan.noise is not None:
        raise ProtocolError("the study was refused: it has differential privacy, and takes no public seed")
    root = Randomness.of_seed(seed)
    return {"training": root.child("training", session.membership.site), "public": root}


def _announce(session: Session) -> tuple[Session, list[Effect]]:
    # the cohort was read only to be sure that it keeps the contract; each round asks for it again
    assert session.plan is not None
    member = session.membership
    private = X25519PrivateKey.from_private_bytes(session.randomness.child("agreement", session.run).bytes(32))
    announced = keys.announce(member.identity, private, session.run, session.plan.study_id, member.site)
    return replace(session, private=private, announced=announced), [Send(announced)]


def _agree(session: Session, message: KeySet) -> tuple[Session, list[Effect]]:
    if session.member is not None:
        raise Repeated("a second key set was refused")
    assert session.plan is not None and session.private is not None and session.announced is not None
    plan, pinned, entries = session.plan, dict(session.membership.pinned), message.announcements
    unknown = set(plan.sites) - pinned.keys()
    if unknown:
        raise ProtocolError(f"the study was refused: this site knows no identity of {', '.join(sorted(unknown))}")
    threshold = plan.threshold
    keys.check(entries, {site: pinned[site] for site in plan.sites}, session.run, plan.study_id, threshold)
    member = Member(
        session.run,
        session.membership.site,
        Group(tuple(entry.site for entry in entries), threshold),
        keys.agree(session.private, session.announced, entries),
        keys.session_digest(session.run, plan.study_id, threshold, entries),
        session.membership.coordinator,
    )
    return replace(session, private=None, member=member), []


def again(session: Session) -> tuple[Session, list[Effect]]:
    """Returns the session that takes up the work that a crash ended: for the newest round that it noted, if any."""
    plan, member, number = session.plan, session.member, session.heard
    if session.over or plan is None or member is None or session.asked is not None or not plan.buffers(number):
        return session, []
    return (session, []) if member.last_round >= number else _asked(session)


def _apart(session: Session, asked: Asked | None) -> bool:
    """Returns whether rounds may open although the site is at work."""
    return asked is None or (session.plan is not None and session.plan.buffers(asked.round))


def _open_round(session: Session, opened: OpenRound) -> tuple[Session, list[Effect]]:
    assert session.plan is not None and session.member is not None
    plan, member, last = session.plan, session.member, session.heard
    earliest = opened.round - len(opened.missed)
    if opened.round <= last:
        raise Repeated(f"round {opened.round} was refused: round {last} is already protected, or being worked for")
    if not earliest <= last + 1 or opened.round > plan.rounds:
        raise ProtocolError(f"round {opened.round} was refused: it is out of order or beyond the study's rounds")
    if opened.missed and not plan.may_miss:
        raise ProtocolError(f"round {opened.round} was refused: the study lets no site miss a round")
    _check_selected(plan, member.group, opened)
    algorithm, before, history = plan.algorithm, session.before, session.history
    # it may have contributed to a round in which its contribution was lost
    unseen = opened.missed[last + 1 - earliest :]
    with session.means.training, np.errstate(all="ignore"):
        for data in (*unseen, opened.broadcast):
            broadcast = codec.decode(data, algorithm.broadcast_type)
            algorithm.admit(broadcast, before)
            before, history = broadcast, keys.history(history, data)
    session = replace(session, heard=opened.round, before=before, said=opened.broadcast, history=history)
    site = session.membership.site
    if opened.selected and site not in opened.selected:
        later = replace(session, member=member.passed(opened.round))
        return later, [Send(Noted(session.run, site, opened.round))]
    return _buffered(session, opened) if plan.buffers(opened.round) else _asked(session, opened.selected)


def _buffered(session: Session, opened: OpenRound) -> tuple[Session, list[Effect]]:
    """Returns the session after a round that is a buffer was opened: to work that is done, going on, or to be begun."""
    spare, plan = session.spare, session.plan
    assert plan is not None and plan.buffer is not None
    if spare is not None and spare.sent != opened.summed and opened.round - spare.round <= plan.buffer.latest:
        with session.means.training:
            layout = plan.algorithm.layout(session.before)
        return _contribute(session, spare.round, spare.statistics, layout)
    noted = Send(Noted(session.run, session.membership.site, opened.round))
    if session.asked is not None:
        return session, [noted]
    session, effects = _asked(session)
    return session, [noted, *effects]


def _asked(session: Session, selected: tuple[str, ...] = ()) -> tuple[Session, list[Effect]]:
    """Returns the session that works for the newest round."""
    plan = session.plan
    assert plan is not None
    with session.means.training:
        layout = plan.algorithm.layout(session.before)
    cost = plan.stages(layout).events()
    asked = Asked(session.heard, session.before, session.history, layout, selected)
    session = replace(session, asked=asked, spare=None)
    return session, [Charge(plan, asked.round, cost) if cost else LoadCohort(plan, ())]


def _check_selected(plan: Plan, agreed: Group, opened: OpenRound) -> None:
    """Refuses a selection that the study does not allow."""
    chosen = opened.selected
    if not plan.selects(opened.round):
        if chosen:
            raise ProtocolError(f"round {opened.round} was refused: the study asks all sites in it, not some")
        return
    if chosen != tuple(sorted(set(chosen) & set(agreed.sites))) or len(chosen) < plan.study.sites.fewest:
        raise ProtocolError(
            f"round {opened.round} was refused: it must select at least {plan.study.sites.fewest} sites of the run, "
            "once each and in order"
        )


def _trained(session: Session, trained: Trained) -> tuple[Session, list[Effect]]:
    asked, plan = trained.asked, session.plan
    assert plan is not None
    later = replace(session, asked=None, memory=trained.memory)
    if plan.buffer is not None and session.heard - asked.round > plan.buffer.latest:
        return _asked(later)
    return _contribute(later, asked.round, trained.statistics, asked.layout, asked.selected)


def _contribute(
    session: Session, number: int, statistics: Statistics, layout: Layout, selected: tuple[str, ...] = ()
) -> tuple[Session, list[Effect]]:
    """Returns the session that contributes what was trained in a round to the newest one."""
    plan, member, heard = session.plan, session.member, session.heard
    assert plan is not None and member is not None
    spare = Spare(number, heard, statistics) if plan.buffers(number) else None
    if heard > number:
        statistics = plan.stale(session.before, statistics, heard - number)
    own, public = session.randomness.child("round", heard), session.public
    drawn = own if public is None else public.child("encoding", session.membership.site, heard)
    encoded = plan.stages(layout).encode(pack(layout, statistics), drawn)
    scheme = plan.scheme(plan.summing(member.group, selected), layout, session.means)
    update, member = member.protect(heard, keys.among(session.history, selected), scheme, encoded, own)
    # where sums open by themselves, no survivor set is told: then all are in it
    return replace(session, member=member, spare=spare if scheme.opens else None), [Send(update)]


def _open_sum(session: Session, member: Member, event: Survivors | Endorsed) -> tuple[Session, list[Effect]]:
    answer: FromSite
    if isinstance(event, Survivors):
        answer, member = member.endorse(event)
        if session.spare is not None and session.spare.sent == event.round:
            session = replace(session, spare=None)
    else:
        answer, member = member.reveal(event)
    return replace(session, member=member), [Send(answer)]
