"""A run as the coordinator leads it: step(state, event) -> (state, effects), without I/O, clock or randomness.

    keys:     every site announces a key -> all keys go to every site
    collect:  broadcast -> one protected vector of each site, of each that the round selects, or of those that are first
    endorse:  who is in the sum -> each survivor's endorsement        unless the sum opens by itself
    reveal:   the endorsements -> each survivor's answer -> the sum -> the algorithm's next state
    finished: an outcome, or a reason

Whoever carries the messages says when a site is `lost`: it is then not waited for in this phase. A round goes on with
those that are left, as long as the study's threshold of them is; below it, the run fails with the sum closed, and
another run starts with fresh keys. A site that was lost is asked again in the next round, a site that refused is not.

Where rounds are buffers, a round closes with the study's `buffer` of contributions, and whoever is later is not lost:
it contributes to the next one (`cohortium.site.session`).

The state holds only the running sum of protected vectors.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from cohortium.coordinator.selection import Career, choose
from cohortium.coordinator.state import Broadcast as Broadcast
from cohortium.coordinator.state import Effect as Effect
from cohortium.coordinator.state import Failed as Failed
from cohortium.coordinator.state import Finished as Finished
from cohortium.coordinator.state import RoundClosed as RoundClosed
from cohortium.coordinator.state import RunState as RunState
from cohortium.coordinator.state import Send as Send
from cohortium.core import codec
from cohortium.core.errors import CohortiumError, ProtocolError, Repeated, RunFailed
from cohortium.core.layout import size, unpack
from cohortium.core.messages import (
    CONTROL_BYTES,
    MOST_MISSED,
    Announcement,
    CloseRun,
    Endorsement,
    FromSite,
    KeySet,
    MaskedUpdate,
    Noted,
    OpenRound,
    OpenRun,
    Refusal,
    Reveal,
    ToSite,
)
from cohortium.learning.descriptive import Summary
from cohortium.learning.model import GlobalModel
from cohortium.plan import Plan
from cohortium.secagg import keys
from cohortium.secagg.group import Group
from cohortium.secagg.protocol import Tally
from cohortium.secagg.quantise import Residues
from cohortium.secagg.stream import PLAIN, Means


def open_run(
    plan: Plan,
    run: str,
    identity: Ed25519PrivateKey,
    pinned: Mapping[str, bytes],
    means: Means = PLAIN,
    seed: int | None = None,
) -> tuple[RunState, list[Effect]]:
    """Returns the state and effects at the start of a run named `run`; a name is used once.

    Args:
        identity: the coordinator's signing key.
        pinned: each site's Ed25519 public key (32 bytes) by name.
        means: how this machine removes masks.
        seed: a public seed of the sites' training; for studies without noise only.
    """
    state = RunState(plan, run, identity, pinned, means, "keys", frozenset(plan.sites), seed=seed)
    return state, [Broadcast(_invitation(state), plan.sites)]


def inbound_limit(state: RunState) -> int:
    """Returns more bytes than a site's message may have now."""
    return CONTROL_BYTES + (state.plan.traffic(state.layout).total if state.layout else 0)


def step(state: RunState, sender: str, message: FromSite) -> tuple[RunState, list[Effect]]:
    """Returns the state after a message, and what to do.

    Args:
        sender: the site's name as the transport authenticated it.

    Raises:
        ProtocolError: the message is not one that this sender may send now; the state stays as it was, and still
            waits for the sender: if nothing better is to come, call `lost`.
    """
    if message.run != state.run or message.site != sender or sender not in state.plan.sites:
        raise ProtocolError(f"a message of '{sender}' was refused: it is for another run or in another site's name")
    if state.phase == "over":
        raise ProtocolError("a message was refused: the run is over")
    if sender in state.gone:
        raise ProtocolError(f"a message of '{sender}' was refused: it left the run")
    if isinstance(message, Refusal) and not message.round:
        return _left(state, message.site, message.reason)
    if isinstance(message, Noted) and sender not in state.waiting:
        return _late(state, message), []
    if isinstance(message, Noted) and _buffering(state):
        # its contribution is still to come
        return _accepted(state, message), []
    if sender not in state.waiting:
        raise Repeated(f"a message of '{sender}' was refused: nothing more is expected of it now")
    return _heard(_accepted(state, message), sender)


def _accepted(state: RunState, message: FromSite) -> RunState:
    tally = state.tally
    match message:
        case Announcement() if state.phase == "keys":
            _check_key(state, message)
            return replace(state, keys={**state.keys, message.site: message})
        case MaskedUpdate() if state.phase == "collect" and tally is not None:
            return replace(_knows(state, message.site), tally=tally.contribute(message))
        case Noted() if state.phase == "collect" and _passes(state, message):
            return replace(_knows(state, message.site), noted=state.noted | {message.site})
        case Endorsement() if state.phase == "endorse" and tally is not None:
            return replace(state, tally=tally.endorse(message))
        case Reveal() if state.phase == "reveal" and tally is not None:
            return replace(state, tally=tally.reveal(message))
        case Refusal() if message.round == state.number:
            return state
    raise ProtocolError(f"a message of '{message.site}' was refused: it is out of order")


def _knows(state: RunState, site: str) -> RunState:
    """Returns the state when a site shows that it holds the key set."""
    return replace(state, keyed=state.keyed | {site})


def _passes(state: RunState, message: Noted) -> bool:
    if message.round != state.number:
        return False
    return state.plan.buffers(message.round) or (bool(state.selected) and message.site not in state.selected)


def _buffering(state: RunState) -> bool:
    return state.phase == "collect" and state.plan.buffers(state.number)


def _late(state: RunState, message: Noted) -> RunState:
    """Returns the state when a site that is not asked has taken in the broadcast after the round's sum was closed."""
    if not _passes(state, message) or message.site not in state.missed:
        raise Repeated(f"a message of '{message.site}' was refused: nothing more is expected of it now")
    missed = {site: broadcasts for site, broadcasts in state.missed.items() if site != message.site}
    return replace(_knows(state, message.site), missed=missed)


def took(state: RunState, site: str, seconds: float) -> RunState:
    """Returns the state that knows how long a site took to contribute, from being asked to its answer."""
    return replace(state, careers={**state.careers, site: state.careers.get(site, Career()).answered(seconds)})


def lost(state: RunState, site: str) -> tuple[RunState, list[Effect]]:
    """Returns the state when a site's answer is no longer waited for, because its link or its time ran out."""
    if site not in state.waiting:
        return state, []
    return _heard(state, site)


def expel(state: RunState, site: str, reason: str) -> tuple[RunState, list[Effect]]:
    """Returns the state when a site has no right to take part any longer: it leaves at once, as if it refused."""
    if state.phase == "over" or site in state.gone or site not in state.plan.sites:
        return state, []
    return _left(state, site, reason)


def enough(state: RunState) -> bool:
    """Returns whether the phase could be closed now, with every site that is waited for as lost."""
    tally, threshold = state.tally, state.plan.threshold
    if state.phase == "over":
        return False
    if tally is None:
        return len(state.keys) >= threshold
    heard = {"collect": tally.sealed, "endorse": tally.tags, "reveal": tally.answers}
    return len(heard[state.phase]) >= max(tally.scheme.group.threshold, len(state.chosen))


def outstanding(state: RunState) -> Mapping[str, tuple[ToSite, ...]]:
    """Returns, for each site that is waited for, the messages that it owes an answer to, in order.

    They are the same to the last byte whenever they are asked for, also after a takeover
    (`cohortium.coordinator.checkpoint`). A key set is not answered; it comes along until the site has contributed,
    which shows that it holds it.
    """
    tally, sites = state.tally, [site for site in state.plan.sites if site in state.waiting]
    if state.phase == "keys":
        return dict.fromkeys(sites, (_invitation(state),))
    if tally is None:
        return {}
    if state.phase == "collect":
        openings, key_set = _openings(state, sites), _key_set(state)
        return {site: (said,) if site in state.keyed else (key_set, said) for site, said in openings.items()}
    told = tally.told(state.identity) if state.phase == "endorse" else tally.endorsed()
    return {site: (told[site],) for site in sites}


def _invitation(state: RunState) -> OpenRun:
    return OpenRun(state.run, state.plan.document, state.seed)


def _key_set(state: RunState) -> KeySet:
    assert state.group is not None
    return KeySet(state.run, tuple(state.keys[site] for site in state.group.sites))


def _openings(state: RunState, sites: Iterable[str]) -> dict[str, OpenRound]:
    """Returns how the round is opened to each site; one message where nothing was missed."""
    opening = OpenRound(state.run, state.number, state.broadcast, selected=state.selected)
    missed, summed = state.missed, state.summed
    return {
        site: replace(opening, missed=missed.get(site, ()), summed=summed.get(site, 0))
        if site in missed or site in summed
        else opening
        for site in sites
    }


def _left(state: RunState, site: str, reason: str) -> tuple[RunState, list[Effect]]:
    state = replace(state, gone={**state.gone, site: reason})
    remaining = len(state.plan.sites) - len(state.gone)
    if remaining < state.plan.tolerance.threshold:
        return _over(state, Failed(_too_few(state, remaining)))
    return lost(state, site)


def _check_key(state: RunState, message: Announcement) -> None:
    """Refuses a key here that every other site would refuse, and with it the whole key set."""
    others = [entry for site, entry in state.keys.items() if site != message.site]
    if message.public_key in [entry.public_key for entry in others]:
        raise ProtocolError(f"the key of site '{message.site}' was refused: another site shows it")
    keys.check_one(message, state.pinned, state.run, state.plan.study_id)


def _too_few(state: RunState, count: int) -> CohortiumError:
    if state.gone:
        return CohortiumError("; ".join(f"site '{site}' takes no part: {why}" for site, why in state.gone.items()))
    sites, needed = len(state.plan.sites), state.plan.threshold
    if state.selected and state.tally is not None:
        sites, needed = len(state.selected), state.tally.scheme.group.threshold
    return RunFailed(
        f"{count} of {sites} sites are left and the study needs {needed}: "
        "nothing was opened; start another run when they are back, with fresh keys"
    )


def _sum_lost(state: RunState, present: frozenset[str]) -> CohortiumError:
    missing = ", ".join(site for site in state.chosen if site not in present)
    return RunFailed(
        f"the coordinator was replaced while round {state.number} was being opened, and {missing} did not contribute "
        "the same to it again: no other sum of it may be opened; start another run, with fresh keys"
    )


def _heard(state: RunState, site: str) -> tuple[RunState, list[Effect]]:
    state = replace(state, waiting=state.waiting - {site})
    if _awaited(state):
        return state, []
    close = {"keys": _agreed, "collect": _collected, "endorse": _endorsed, "reveal": _revealed}[state.phase]
    return close(state)


def _awaited(state: RunState) -> bool:
    """Returns whether the phase waits for somebody."""
    buffer, tally = state.plan.buffer, state.tally
    if state.phase == "collect" and state.selected:
        # a round does not wait for those that only listen
        return bool(state.waiting.intersection(state.selected))
    if _buffering(state) and buffer is not None and tally is not None and len(tally.sealed) >= buffer.buffer:
        return False
    return bool(state.waiting)


def _agreed(state: RunState) -> tuple[RunState, list[Effect]]:
    plan, names = state.plan, tuple(site for site in state.plan.sites if site in state.keys)
    threshold = plan.threshold
    if len(names) < threshold:
        return _over(state, Failed(_too_few(state, len(names))))
    entries = tuple(state.keys[site] for site in names)
    session = keys.session_digest(state.run, plan.study_id, threshold, entries)
    state = replace(state, group=Group(names, threshold), session=session, learned=plan.algorithm.init())
    state, effects = _open_round(state)
    return state, [Broadcast(_key_set(state), names), *effects]


def _open_round(state: RunState) -> tuple[RunState, list[Effect]]:
    assert state.group is not None
    number, present = state.number + 1, _present(state)
    selects = state.plan.selects(number)
    if len(present) < (state.plan.study.sites.fewest if selects else state.group.threshold):
        return _over(state, Failed(_too_few(replace(state, selected=()), len(present))))
    state = replace(state, selected=_selected(state, number, present) if selects else ())
    asked = {site: replace(state.careers.get(site, Career()), asked=number) for site in state.selected}
    state = opened(replace(state, careers={**state.careers, **asked}), number, state.history)
    openings = _openings(state, [site for site in state.plan.sites if site in state.waiting])
    if state.plan.buffers(number):
        return state, [Send(openings)]
    back = {site: message for site, message in openings.items() if message.missed}
    told = tuple(site for site in openings if site not in back)
    effects: list[Effect] = [Broadcast(openings[told[0]], told)] if told else []
    return state, [*effects, Send(back)] if back else effects


def _present(state: RunState) -> tuple[str, ...]:
    """Returns the sites that a round is opened to."""
    assert state.group is not None
    return tuple(
        site for site in state.group.sites if site not in state.gone and len(state.missed.get(site, ())) <= MOST_MISSED
    )


def _selected(state: RunState, number: int, present: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the sites that a round asks: of those that were there in the last one, if they are enough."""
    sites = state.plan.study.sites
    assert sites.selection is not None
    steady = tuple(site for site in present if site not in state.missed)
    among = steady if len(steady) >= sites.fewest else present
    return choose(sites.selection, among, state.careers, sites.fewest, state.plan.study_id, number)


def opened(state: RunState, number: int, before: bytes) -> RunState:
    """Returns the state with a round open, to those selected in it, in which nobody has contributed yet.

    Args:
        before: what stands for all broadcasts of earlier rounds.
    """
    assert state.group is not None
    plan = state.plan
    broadcast = plan.algorithm.broadcast(state.learned)
    layout, data = plan.algorithm.layout(broadcast), codec.encode(broadcast)
    history = keys.history(before, data)
    scheme = plan.scheme(plan.summing(state.group, state.selected), layout, state.means)
    context = keys.round_context(state.session, number, keys.among(history, state.selected))
    return replace(
        state,
        phase="collect",
        number=number,
        layout=layout,
        broadcast=data,
        before=before,
        history=history,
        tally=Tally(state.run, number, scheme, context),
        waiting=frozenset(_present(state)),
        noted=frozenset(),
    )


def _collected(state: RunState) -> tuple[RunState, list[Effect]]:
    tally = state.tally
    assert tally is not None
    present = frozenset(tally.sealed)
    if not present.issuperset(state.chosen):
        return _over(state, Failed(_sum_lost(state, present)))
    if len(present) < tally.scheme.group.threshold:
        return _over(state, Failed(_too_few(state, len(present))))
    state = replace(state, chosen=()) if state.chosen else _marked(state, present)
    if not tally.scheme.opens:
        return _sum(state, tuple(sorted(present)))
    tally, told = tally.close(state.identity)
    return _asked(replace(state, phase="endorse", tally=tally), told)


def _marked(state: RunState, present: frozenset[str]) -> RunState:
    """Returns the state that knows who was there in this round and who missed it."""
    assert state.group is not None
    known = present | state.noted | state.gone.keys()
    absent = [site for site in state.group.sites if site not in known]
    # one more than may be missed marks a site that does not come back
    missed = {site: (*state.missed.get(site, ()), state.broadcast)[: MOST_MISSED + 1] for site in absent}
    proven = {site: replace(c, times=c.times + 1) for site, c in state.careers.items() if site in present}
    summed = {site: number for site, number in state.summed.items() if site not in known}
    return replace(state, missed=missed, summed=summed, careers={**state.careers, **proven})


def _endorsed(state: RunState) -> tuple[RunState, list[Effect]]:
    assert state.tally is not None and state.group is not None
    if len(state.tally.tags) < state.tally.scheme.group.threshold:
        return _over(state, Failed(_too_few(state, len(state.tally.tags))))
    return _asked(replace(state, phase="reveal"), state.tally.endorsed())


def _asked(state: RunState, told: Mapping[str, ToSite]) -> tuple[RunState, list[Effect]]:
    """Returns the state that waits for those of the sites told that have not left, if enough of them are there."""
    assert state.tally is not None
    messages = {site: message for site, message in told.items() if site not in state.gone}
    if len(messages) < state.tally.scheme.group.threshold:
        return _over(state, Failed(_too_few(state, len(messages))))
    return replace(state, waiting=frozenset(messages)), [Send(messages)]


def _revealed(state: RunState) -> tuple[RunState, list[Effect]]:
    assert state.tally is not None and state.group is not None
    if len(state.tally.answers) < state.tally.scheme.group.threshold:
        return _over(state, Failed(_too_few(state, len(state.tally.answers))))
    return _sum(state, state.tally.survivors)


def _sum(state: RunState, survivors: tuple[str, ...]) -> tuple[RunState, list[Effect]]:
    assert state.tally is not None
    try:
        total = state.tally.opened()
        learned, closed, outcome = _apply(state, survivors, total)
    except CohortiumError as error:
        return _over(state, Failed(error))
    if state.plan.buffers(state.number) and state.tally.scheme.opens:
        # whoever did not endorse may not know that its contribution counts
        unheard = [site for site in survivors if site not in state.tally.tags]
        state = replace(state, summed={**state.summed, **dict.fromkeys(unheard, state.number)})
    state = replace(state, learned=learned, tally=None)
    state, effects = _open_round(state) if outcome is None else _over(state, Finished(outcome))
    return state, [closed, *effects]


def _apply(
    state: RunState, survivors: tuple[str, ...], total: Residues
) -> tuple[Any, RoundClosed, GlobalModel | Summary | None]:
    algorithm = state.plan.algorithm
    statistics = unpack(state.layout, state.plan.stages(state.layout).decode(total))
    learned = algorithm.update(state.learned, statistics)
    outcome = state.plan.outcome(learned) if algorithm.done(learned) else None
    left, objective = algorithm.progress(learned)
    # nobody is lost in a buffer
    asked = survivors if state.plan.buffers(state.number) else state.selected
    closed = RoundClosed(state.number, survivors, size(state.layout), left, objective, asked)
    return learned, closed, outcome


def _over(state: RunState, ending: Finished | Failed) -> tuple[RunState, list[Effect]]:
    word = "finished" if isinstance(ending, Finished) else "failed"
    told = tuple(site for site in state.plan.sites if site not in state.gone)
    state = replace(state, phase="over", waiting=frozenset(), tally=None, missed={})
    return state, [Broadcast(CloseRun(state.run, word), told), ending]
