"""A session as bytes and back, so that a site's agent goes on where a crash stopped it.

What goes on is the same bit by bit: the plan is compiled anew from the study's canonical bytes, schemes are built anew
from the plan, and seeds of rounds are derived anew from the keys of pairs.

Trust: a snapshot holds the run's secrets: whoever reads one could take the site's place in that run, and has the
site's share in opening its sums. It never leaves the site. An older snapshot than the newest must never be gone on
from: the round after it could be protected twice, with two vectors under one mask.
"""

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cohortium.core import codec
from cohortium.core.document import from_canonical
from cohortium.core.errors import ProtocolError
from cohortium.core.layout import Statistics
from cohortium.core.messages import Announcement
from cohortium.core.random import Randomness
from cohortium.plan import Compiler, Plan, compile_study
from cohortium.secagg.group import Group
from cohortium.secagg.keys import Pairs
from cohortium.secagg.protocol import Member, Pending
from cohortium.secagg.stream import PLAIN, Means
from cohortium.site.ports import Frozen
from cohortium.site.session import Membership, Session, Spare

VERSION = 1
BEFORE, MEMORY, SPARE = "before", "memory", "spare"
"""The large parts: the last broadcast, what the algorithm keeps at the site, and work that may have come too late."""


class _Round(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    number: int
    length: int
    bits: int
    context: bytes
    seeds: dict[str, bytes]
    shares: dict[str, np.ndarray]
    survivors: tuple[str, ...]
    revealed: bool
    sites: tuple[str, ...]
    threshold: int


class _Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    group: tuple[str, ...]
    threshold: int
    peers: tuple[str, ...]
    keys: tuple[bytes, ...]
    session: bytes
    coordinator: bytes
    last_round: int
    rounds: tuple[_Round, ...]


class _Session(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    site: str
    run: str
    study: bytes
    randomness: bytes
    training: bytes
    public: bytes
    private: bytes
    announced: Announcement | None
    member: _Member | None
    history: bytes
    heard: int = 0
    spare: tuple[int, int] | None = None


def freeze(session: Session, since: Session | None = None) -> Frozen:
    """Returns an open session as bytes.

    A round that is asked for and not contributed to is left out: nothing of it was sent, so it may be asked for again.

    Args:
        since: an earlier state of it; parts that are the same there are left out.

    Raises:
        ValueError: the session is not open.
    """
    plan = session.plan
    if plan is None or session.training is None or session.over:
        raise ValueError("only an open session is frozen")
    kept = _Session(
        version=VERSION,
        site=session.membership.site,
        run=session.run,
        study=plan.document,
        randomness=session.randomness.key,
        training=session.training.key,
        public=session.public.key if session.public else b"",
        private=session.private.private_bytes_raw() if session.private else b"",
        announced=session.announced,
        member=_frozen_member(session.member) if session.member else None,
        history=session.history,
        heard=session.heard,
        spare=(session.spare.round, session.spare.sent) if session.spare else None,
    )
    parts = {}
    if since is None or since.said is not session.said:
        parts[BEFORE] = session.said
    if since is None or since.memory is not session.memory:
        parts[MEMORY] = codec.encode(dict(session.memory)) if session.memory else b""
    if _spare(since) is not _spare(session):
        parts[SPARE] = codec.encode(dict(session.spare.statistics)) if session.spare else b""
    return Frozen(codec.encode(kept), parts)


def thaw(
    frozen: Frozen,
    membership: Membership,
    compiler: Compiler = compile_study,
    means: Means = PLAIN,
) -> Session:
    """Returns the session that was frozen, with all of its parts.

    Raises:
        ProtocolError: the bytes hold none, or another site's, or one of another version.
        StudyError: this version cannot compile its study.
    """
    version = codec.decode(frozen.core, _Versioned).version
    if version != VERSION:
        raise ProtocolError(f"a session of version {version} was refused: this program reads version {VERSION}")
    kept = codec.decode(frozen.core, _Session)
    if kept.site != membership.site:
        raise ProtocolError(f"a session was refused: it is site '{kept.site}'s, and this is '{membership.site}'")
    plan = compiler(from_canonical(kept.study))
    before, memory = frozen.parts.get(BEFORE, b""), frozen.parts.get(MEMORY, b"")
    return Session(
        membership,
        _randomness(kept.randomness),
        compiler,
        means,
        training=_randomness(kept.training),
        public=_randomness(kept.public) if kept.public else None,
        plan=plan,
        run=kept.run,
        private=_private(kept.private) if kept.private else None,
        announced=kept.announced,
        member=_thawed_member(kept, kept.member, plan, means) if kept.member else None,
        spare=_thawed_spare(kept, frozen.parts.get(SPARE, b"")),
        heard=max(kept.heard, kept.member.last_round if kept.member else 0),
        before=codec.decode(before, plan.algorithm.broadcast_type) if before else None,
        said=before,
        history=kept.history,
        memory=codec.decode(memory, dict[str, np.ndarray]) if memory else {},
    )


def _spare(session: Session | None) -> Statistics | None:
    return session.spare.statistics if session is not None and session.spare else None


def _thawed_spare(kept: _Session, data: bytes) -> Spare | None:
    if kept.spare is None:
        return None
    statistics = codec.decode(data, dict[str, np.ndarray])
    return Spare(*kept.spare, statistics)


class _Versioned(msgspec.Struct, frozen=True):
    version: int


def _frozen_member(member: Member) -> _Member:
    return _Member(
        group=member.group.sites,
        threshold=member.group.threshold,
        peers=member.pairs.peers,
        keys=member.pairs.keys,
        session=member.session,
        coordinator=member.coordinator,
        last_round=member.last_round,
        rounds=tuple(_frozen_round(number, pending) for number, pending in sorted(member.rounds.items())),
    )


def _frozen_round(number: int, pending: Pending) -> _Round:
    scheme = pending.scheme
    return _Round(
        number,
        scheme.length,
        scheme.bits,
        pending.context,
        dict(pending.seeds),
        dict(pending.shares),
        pending.survivors,
        pending.revealed,
        scheme.group.sites,
        scheme.group.threshold,
    )


def _thawed_member(kept: _Session, member: _Member, plan: Plan, means: Means) -> Member:
    try:
        group = Group(member.group, member.threshold)
        groups = {one.number: Group(one.sites, one.threshold) for one in member.rounds}
    except ValueError as error:
        raise ProtocolError(f"a session was refused: {error}") from None

    def pending(one: _Round) -> Pending:
        scheme = plan.scheme_of(groups[one.number], one.length, one.bits, means)
        return Pending(scheme, one.context, one.seeds, one.shares, one.survivors, one.revealed)

    return Member(
        kept.run,
        kept.site,
        group,
        Pairs(member.peers, member.keys),
        member.session,
        member.coordinator,
        member.last_round,
        {one.number: pending(one) for one in member.rounds},
    )


def _randomness(key: bytes) -> Randomness:
    try:
        return Randomness(key)
    except ValueError as error:
        raise ProtocolError(f"a session was refused: {error}") from None


def _private(key: bytes) -> X25519PrivateKey:
    try:
        return X25519PrivateKey.from_private_bytes(key)
    except ValueError as error:
        raise ProtocolError(f"a session was refused: {error}") from None
