"""A run as one coordinator leads it over a network that loses things: (lead, event, now) -> (lead, effects), pure.

Around the run's own state machine (`cohortium.coordinator.rounds`) it adds time and repetition. What a site still owes
an answer to is said again, in the same bytes, whenever the site attaches anew, when another coordinator takes over,
and from time to time in between; sites answer the same request with the same bytes. Where a state must outlast this
process before anybody hears of it, a `Save` stands before the messages that follow from it.

A round waits `terms.deadline` seconds for its sites. Then it goes on over those that answered, if they are enough;
if not, it waits on, up to `terms.patience`, because links come back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from cohortium.coordinator.checkpoint import freeze, held, milestone, thaw
from cohortium.coordinator.ports import Applied, Checkpoint, Status, Terms
from cohortium.coordinator.rounds import (
    Broadcast,
    Effect,
    Failed,
    Finished,
    RoundClosed,
    RunState,
    Send,
    enough,
    expel,
    inbound_limit,
    lost,
    open_run,
    outstanding,
    step,
    took,
)
from cohortium.core import codec
from cohortium.core.layout import Layout
from cohortium.core.messages import CONTROL_BYTES, CloseRun, MaskedUpdate, ToSite, decode_from_site
from cohortium.plan import Plan
from cohortium.secagg.stream import PLAIN, Means

FIRST_REPEAT, LONGEST_REPEAT = 3.0, 30.0
"""Seconds until something is said again, and the most that doubling makes of it."""


@dataclass(frozen=True)
class Tell:
    """Send a site these messages, in order, and expect at most `limit` bytes in answer."""

    site: str
    messages: tuple[bytes, ...]
    limit: int


@dataclass(frozen=True)
class Save:
    """Write the checkpoint durably before anything that comes after this effect.

    Where it `may_wait`, what comes next may be done meanwhile, but the next write must wait for this one. Then whoever
    takes over from the checkpoint before comes to the same state again: the survivors are known, and sites keep what
    they answered in this round and the one before.
    """

    checkpoint: Checkpoint
    applied: Applied | None
    may_wait: bool = False


@dataclass(frozen=True)
class End:
    """The run is over; record it durably before anything that comes after this effect."""

    status: Status
    reason: str | None
    outcome: bytes | None
    applied: Applied | None
    facts: Mapping[str, Any]


Order = Tell | Save | End


@dataclass(frozen=True)
class Leader:
    """Who leads: the signing key that sites pinned, their keys, and how this machine removes masks.

    Attributes:
        identity: the coordinator's signing key, whose public half the sites pinned.
        pinned: each site's Ed25519 public key (32 bytes) by name.
    """

    identity: Ed25519PrivateKey
    pinned: Mapping[str, bytes]
    means: Means = PLAIN


class Lead(msgspec.Struct, frozen=True):
    """Where a led run stands. Times are monotonic seconds of this process.

    Attributes:
        opened: when the phase began.
        repeat: when each site that owes an answer is asked again, and after how many seconds the time after that.
        up, down: bytes of the sites' messages and of those to them since the last round closed; `setup` before it.
        round_opened: when the round began.
        stored: names of the checkpoint's parts that the store holds.
        limit: the most bytes that a site's message may have, for rounds of the layout `measured`.
    """

    state: RunState
    terms: Terms
    opened: float
    repeat: Mapping[str, tuple[float, float]] = msgspec.field(default_factory=dict)
    up: int = 0
    down: int = 0
    setup: int = 0
    round_opened: float = 0.0
    stored: frozenset[str] = frozenset()
    limit: int = CONTROL_BYTES
    measured: Layout | None = None

    @property
    def over(self) -> bool:
        return self.state.phase == "over"


def begin(plan: Plan, run: str, leader: Leader, terms: Terms, seed: int | None, now: float) -> tuple[Lead, list[Order]]:
    """Returns a new run's lead, and what to do first."""
    state, effects = open_run(plan, run, leader.identity, leader.pinned, leader.means, seed)
    return _done(Lead(state, terms, now, round_opened=now), state, effects, now)


def resume(plan: Plan, checkpoint: Checkpoint, leader: Leader, terms: Terms, now: float) -> tuple[Lead, list[Order]]:
    """Returns the lead of a run that goes on from a checkpoint, and what to say again."""
    state = thaw(checkpoint, plan, leader.identity, leader.pinned, leader.means)
    lead = Lead(state, terms, now, round_opened=now, stored=held(checkpoint))
    return again(_measured(lead, state), now)


def heard(lead: Lead, site: str, data: codec.Data, now: float) -> tuple[Lead, list[Order]]:
    """Returns the lead after a site's message.

    Raises:
        ProtocolError: it is none that this site may send now; nothing has changed.
    """
    message = decode_from_site(data, lead.limit)
    before = lead.state
    if isinstance(message, MaskedUpdate) and before.selected and site in before.waiting:
        # before the round closes, because the next selection is made then
        before = took(before, site, now - lead.opened)
    state, effects = step(before, site, message)
    return _done(replace(lead, up=lead.up + len(data)), state, effects, now)


def joined(lead: Lead, site: str, now: float) -> tuple[Lead, list[Order]]:
    """Returns the lead after a site attached: it is told again what it owes an answer to."""
    # a site that attaches again and again costs nothing, unless it is waited for
    owed = outstanding(lead.state).get(site) if site in lead.state.waiting else None
    if not owed:
        return lead, []
    lead = replace(lead, repeat={**lead.repeat, site: (now + FIRST_REPEAT, FIRST_REPEAT)})
    return _told(lead, site, owed)


def again(lead: Lead, now: float) -> tuple[Lead, list[Order]]:
    """Returns the lead as it asks everybody anew, with the phase's time starting now: after a takeover or a pause."""
    lead = replace(lead, opened=now, round_opened=now, repeat={})
    orders: list[Order] = []
    for site in sorted(lead.state.waiting):
        lead, more = joined(lead, site, now)
        orders += more
    return lead, orders


def revoked(lead: Lead, site: str, now: float) -> tuple[Lead, list[Order]]:
    """Returns the lead without a site whose membership was revoked."""
    if lead.over or site not in lead.state.plan.sites or site in lead.state.gone:
        return lead, []
    state, effects = expel(lead.state, site, "its membership in the consortium was revoked")
    return _done(lead, state, effects, now)


def cancelled(lead: Lead, reason: str) -> list[Order]:
    """Returns how a run ends that somebody cancelled."""
    close = codec.encode(CloseRun(lead.state.run, "cancelled"))
    told = [Tell(site, (close,), 0) for site in lead.state.plan.sites if site not in lead.state.gone]
    return [End("cancelled", reason, None, None, {}), *told]


def closed(lead: Lead) -> Lead:
    """Returns the lead of a run that goes no further."""
    return replace(lead, state=replace(lead.state, phase="over", waiting=frozenset(), tally=None))


def ticked(lead: Lead, now: float) -> tuple[Lead, list[Order]]:
    """Returns the lead after some time: it repeats what is due, ends a wait, or gives up."""
    waited = now - lead.opened
    if lead.over or not lead.state.waiting:
        return lead, []
    if waited >= lead.terms.deadline and enough(lead.state):
        return _without(lead, now)
    if waited >= max(lead.terms.patience, lead.terms.deadline):
        return _given_up(lead)
    due = [site for site in sorted(lead.state.waiting) if lead.repeat.get(site, (0.0, 0.0))[0] <= now]
    owed = outstanding(lead.state) if due else {}
    orders: list[Order] = []
    for site in due:
        after = min(2 * max(lead.repeat.get(site, (0.0, 0.0))[1], FIRST_REPEAT / 2), LONGEST_REPEAT)
        lead = replace(lead, repeat={**lead.repeat, site: (now + after, after)})
        lead, more = _told(lead, site, owed.get(site, ()))
        orders += more
    return lead, orders


def due(lead: Lead) -> float:
    """Returns when `ticked` has something to do next."""
    times = [at for site, (at, _) in lead.repeat.items() if site in lead.state.waiting]
    limit = lead.terms.deadline if enough(lead.state) else max(lead.terms.patience, lead.terms.deadline)
    return min([lead.opened + limit, *times])


def _without(lead: Lead, now: float) -> tuple[Lead, list[Order]]:
    """Closes a phase over those that answered."""
    state, effects = lead.state, list[Effect]()
    phase = state.phase, state.number
    for site in sorted(lead.state.waiting):
        if (state.phase, state.number) == phase:
            state, more = lost(state, site)
            effects += more
    return _done(lead, state, effects, now)


def _given_up(lead: Lead) -> tuple[Lead, list[Order]]:
    missing = ", ".join(sorted(lead.state.waiting))
    reason = (
        f"the run waited {max(lead.terms.patience, lead.terms.deadline):.0f} s for {missing} in round "
        f"{lead.state.number}, and without them too few sites are left; nothing was opened. Submit it again when they "
        "are back"
    )
    orders = [End("failed", reason, None, None, {}), *cancelled(lead, reason)[1:]]
    return closed(lead), orders


def _done(lead: Lead, state: RunState, effects: list[Effect], now: float) -> tuple[Lead, list[Order]]:
    """Returns the lead in its new state, and the effects as orders, in an order that survives a crash at any point."""
    before, applied = lead.state, None
    lead = _measured(lead, state)
    moved = (state.phase, state.number) != (before.phase, before.number)
    if moved:
        lead = replace(lead, opened=now)
    if before.phase == "keys" and state.phase != "keys":
        lead = replace(lead, setup=lead.up + lead.down, up=0, down=0, round_opened=now)
    ending: Finished | Failed | None = None
    messages: list[tuple[str, ToSite]] = []
    for effect in effects:
        match effect:
            case Broadcast(message, sites):
                messages += [(site, message) for site in sites]
            case Send(told):
                messages += list(told.items())
            case RoundClosed():
                lead, applied = _closed(lead, effect, now)
            case Finished() | Failed():
                ending = effect
    orders: list[Order] = []
    if ending is not None:
        orders.append(_ended(lead, ending, applied))
    elif milestone(before, state):
        checkpoint = freeze(state, lead.stored)
        lead = replace(lead, stored=held(checkpoint))
        orders.append(Save(checkpoint, applied, applied is not None and state.plan.plain))
    lead, told_orders = _delivered(lead, messages, now)
    return lead, orders + told_orders


def _measured(lead: Lead, state: RunState) -> Lead:
    """Returns the lead in a state, with the limit that goes with it; a layout is measured once."""
    if state.layout is lead.measured:
        return replace(lead, state=state)
    return replace(lead, state=state, measured=state.layout, limit=inbound_limit(state))


def _closed(lead: Lead, closed: RoundClosed, now: float) -> tuple[Lead, Applied]:
    facts = {
        "values": closed.values,
        "bytes_up": lead.up,
        "bytes_down": lead.down,
        "seconds": now - lead.round_opened,
        "left": closed.left,
        "objective": closed.objective,
        **({"selected": list(closed.selected)} if closed.selected else {}),
    }
    applied = Applied(number=closed.number, survivors=closed.survivors, facts=facts)
    return replace(lead, up=0, down=0, round_opened=now), applied


def _ended(lead: Lead, ending: Finished | Failed, applied: Applied | None) -> End:
    facts = {"bytes_setup": lead.setup + lead.up + lead.down}
    if isinstance(ending, Failed):
        return End("failed", str(ending.error), None, applied, facts)
    return End("finished", None, lead.state.plan.algorithm.freeze(lead.state.learned), applied, facts)


def _delivered(lead: Lead, messages: list[tuple[str, ToSite]], now: float) -> tuple[Lead, list[Order]]:
    """Returns orders that tell each site its messages together, each message encoded once."""
    encoded: dict[int, bytes] = {}
    by_site: dict[str, list[bytes]] = {}
    for site, message in messages:
        if id(message) not in encoded:
            encoded[id(message)] = codec.encode(message)
        by_site.setdefault(site, []).append(encoded[id(message)])
    # who is told that a run is over has nothing long to say of it any more
    limit = 0 if lead.over else lead.limit
    orders: list[Order] = [Tell(site, tuple(parts), limit) for site, parts in by_site.items()]
    down = sum(len(part) for parts in by_site.values() for part in parts)
    repeat = {site: (now + FIRST_REPEAT, FIRST_REPEAT) for site in lead.state.waiting if site in by_site}
    kept = {site: when for site, when in lead.repeat.items() if site in lead.state.waiting}
    return replace(lead, down=lead.down + down, repeat=kept | repeat), orders


def _told(lead: Lead, site: str, owed: tuple[ToSite, ...]) -> tuple[Lead, list[Order]]:
    parts = tuple(codec.encode(message) for message in owed)
    if not parts:
        return lead, []
    return replace(lead, down=lead.down + sum(map(len, parts))), [Tell(site, parts, lead.limit)]
