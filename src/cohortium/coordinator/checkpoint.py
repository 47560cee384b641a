"""What another coordinator needs to go on with a run: freeze(state) -> bytes, thaw(bytes) -> state. Pure.

What is worth keeping, and when: the keys agreed and a round opened, before anybody hears of that round; the survivors
chosen, before anybody hears of them, since from then on sites refuse any other set. Whatever was answered since is
asked for again, and sites give the very same answers, so a run that changes hands ends as if it had not, to the last
bit:

    keys             as nobody had announced anything      sites say the same keys again
    collect          the round as it was opened            sites send the same contributions again
    endorse, reveal  the sum and its survivors             sites endorse and reveal the same again
       a long sum    its survivors alone                   these send the same contributions again first

Broadcasts follow from what was learned and are not kept, but for those that a site has missed. Large parts have names
that say what is in them (`learned.7`: what round 7 started with), so that none is written twice.

Trust: a checkpoint holds no secret of a site. What it shows is what a coordinator sees: protected vectors' sum, shares
that only their receivers can open, and what was learned so far. The signing key is not in it.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Literal

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from cohortium.coordinator.ports import Checkpoint
from cohortium.coordinator.rounds import RunState, open_run, opened
from cohortium.coordinator.selection import Career
from cohortium.core import codec
from cohortium.core.errors import ProtocolError
from cohortium.core.messages import MOST_MISSED, Announcement
from cohortium.plan import Plan
from cohortium.secagg import keys
from cohortium.secagg.group import Group
from cohortium.secagg.stream import PLAIN, Means

FORMAT = 1
_SMALL = 1 << 16
"""Parts shorter than this many bytes stay within the state."""
_LONG = 4 << 20
"""A sum of more bytes than this is not kept where each site contributes to a round once: the survivors are asked for
theirs again, since writing it would hold up the round."""


class _Frozen(msgspec.Struct, frozen=True):
    """A run's state, but for its large parts.

    Attributes:
        survivors: the sites in the sum, once they are chosen.
        missed: how many of the latest broadcasts each lost site has missed.
        before, history: what stands for all broadcasts before the open round's, which is made anew, and with it.
        small: parts that are short.
    """

    format: int
    run: str
    study: str
    phase: Literal["keys", "collect", "endorse"]
    gone: dict[str, str]
    seed: int | None = None
    keys: tuple[Announcement, ...] = ()
    keyed: tuple[str, ...] = ()
    number: int = 0
    before: bytes = b""
    history: bytes = b""
    missed: dict[str, int] = msgspec.field(default_factory=dict)
    selected: tuple[str, ...] = ()
    summed: dict[str, int] = msgspec.field(default_factory=dict)
    careers: dict[str, Career] = msgspec.field(default_factory=dict)
    survivors: tuple[str, ...] = ()
    small: dict[str, bytes] = msgspec.field(default_factory=dict)


class _Total(msgspec.Struct, frozen=True):
    values: np.ndarray


class _Shares(msgspec.Struct, frozen=True):
    sealed: dict[str, tuple[bytes, ...]]


def milestone(before: RunState, after: RunState) -> bool:
    """Returns whether the later of two states is to be saved before anything that follows from it is said."""
    return after.phase in ("collect", "endorse") and (before.phase, before.number) != (after.phase, after.number)


def held(checkpoint: Checkpoint) -> frozenset[str]:
    """Returns the names of the parts that a store holds once it has taken a checkpoint."""
    return frozenset((*checkpoint.parts, *checkpoint.keep))


def freeze(state: RunState, saved: Collection[str] = ()) -> Checkpoint:
    """Returns a checkpoint of a run.

    Args:
        saved: names of the parts that the store holds (`held` of the last checkpoint that it took).

    Raises:
        ValueError: the run is over.
    """
    if state.phase == "over":
        raise ValueError("a run that is over has no checkpoint: end it in the store")
    head = _Frozen(FORMAT, state.run, state.plan.study_id, "keys", dict(state.gone), state.seed)
    if state.phase == "keys":
        return Checkpoint(round=0, state=codec.encode(head))
    makers = _makers(state)
    kept = tuple(name for name in makers if name in saved)
    made = {name: make() for name, make in makers.items() if name not in saved}
    assert state.group is not None and state.tally is not None
    head = replace(
        head,
        phase="endorse" if _survivors(state) else "collect",
        keys=tuple(state.keys[site] for site in state.group.sites),
        keyed=tuple(sorted(state.keyed)),
        number=state.number,
        before=state.before,
        history=state.history,
        missed={site: len(broadcasts) for site, broadcasts in state.missed.items()},
        selected=state.selected,
        summed=dict(state.summed),
        careers=dict(state.careers),
        survivors=_survivors(state),
        small={name: data for name, data in made.items() if len(data) < _SMALL},
    )
    large = {name: data for name, data in made.items() if len(data) >= _SMALL}
    return Checkpoint(round=state.number, state=codec.encode(head), parts=large, keep=kept)


def thaw(
    checkpoint: Checkpoint,
    plan: Plan,
    identity: Ed25519PrivateKey,
    pinned: Mapping[str, bytes],
    means: Means = PLAIN,
) -> RunState:
    """Returns the state to go on from; `outstanding` tells what is to be said again.

    Args:
        checkpoint: with all its parts, whenever they were written.
        plan: of the study that the run is of.
        identity, pinned, means: as for `open_run`.

    Raises:
        ProtocolError: the checkpoint is of another study or another version, lacks a part, or what it holds would be
            broadcast in other bytes than sites have heard.
    """
    head = codec.decode(checkpoint.state, _Frozen)
    if head.format != FORMAT or head.study != plan.study_id:
        raise ProtocolError(
            f"a checkpoint of run '{head.run}' was refused: it is of another study or of another version; start "
            "another run"
        )
    if head.phase == "keys":
        state, _ = open_run(plan, head.run, identity, pinned, means, head.seed)
        return replace(state, gone=head.gone, waiting=state.waiting - head.gone.keys())
    parts = {**checkpoint.parts, **head.small}
    threshold = plan.threshold
    state = RunState(
        plan,
        head.run,
        identity,
        pinned,
        means,
        "collect",
        frozenset(),
        seed=head.seed,
        gone=head.gone,
        keys={entry.site: entry for entry in head.keys},
        keyed=frozenset(head.keyed),
        group=Group(tuple(entry.site for entry in head.keys), threshold),
        session=keys.session_digest(head.run, plan.study_id, threshold, head.keys),
        learned=plan.algorithm.thaw(_part(parts, f"learned.{head.number}")),
        selected=head.selected,
        summed=head.summed,
        careers=head.careers,
        missed={} if head.survivors else _missed(head, head.number - 1, parts, b""),
    )
    state = opened(state, head.number, head.before)
    if state.history != head.history:
        raise ProtocolError(
            f"a checkpoint of run '{head.run}' was refused: this version would broadcast round {head.number} in other "
            "bytes than sites have heard; start another run"
        )
    if not head.survivors:
        return state
    return _closed(state, head, parts) if f"total.{head.number}" in parts else _asked_again(state, head, parts)


def _asked_again(state: RunState, head: _Frozen, parts: Mapping[str, bytes]) -> RunState:
    """Returns a state that waits for the contributions of the survivors, of all of them, and of nobody else."""
    return replace(
        state,
        chosen=head.survivors,
        waiting=frozenset(head.survivors) - head.gone.keys(),
        missed=_missed(head, head.number, parts, state.broadcast),
    )


def _closed(state: RunState, head: _Frozen, parts: Mapping[str, bytes]) -> RunState:
    """Returns a state whose survivors are chosen, and nobody has endorsed them."""
    assert state.tally is not None
    total = codec.decode(_part(parts, f"total.{head.number}"), _Total).values
    sealed = codec.decode(_part(parts, f"shares.{head.number}"), _Shares).sealed
    return replace(
        state,
        phase="endorse",
        waiting=frozenset(head.survivors) - head.gone.keys(),
        missed=_missed(head, head.number, parts, state.broadcast),
        tally=replace(state.tally, total=total, sealed=sealed, survivors=head.survivors),
    )


def _makers(state: RunState) -> dict[str, Callable[[], bytes]]:
    """Returns the parts of a state by name, each of them made when it is wanted."""
    tally, number = state.tally, state.number
    assert tally is not None
    makers = {f"learned.{number}": lambda: state.plan.algorithm.freeze(state.learned)}
    if tally.survivors and not (state.plan.plain and getattr(tally.total, "nbytes", 0) > _LONG):
        makers[f"total.{number}"] = lambda: codec.encode(_Total(tally.total))  # type: ignore[arg-type]
        makers[f"shares.{number}"] = lambda: codec.encode(_Shares(dict(tally.sealed)))
    last = number if _survivors(state) else number - 1
    for broadcasts in state.missed.values():
        for at, data in enumerate(broadcasts, last - len(broadcasts) + 1):
            if at < number and len(broadcasts) <= MOST_MISSED:
                makers[f"broadcast.{at}"] = lambda data=data: data  # type: ignore[misc]
    return makers


def _survivors(state: RunState) -> tuple[str, ...]:
    assert state.tally is not None
    return state.chosen or state.tally.survivors


def _missed(head: _Frozen, last: int, parts: Mapping[str, bytes], current: bytes) -> dict[str, tuple[bytes, ...]]:
    """Returns the broadcasts that each lost site has missed, those up to round `last`."""
    missed = {}
    for site, count in head.missed.items():
        if count > MOST_MISSED:
            # it does not come back, whatever they were
            missed[site] = (b"",) * count
            continue
        rounds = range(last - count + 1, last + 1)
        missed[site] = tuple(current if at == head.number else _part(parts, f"broadcast.{at}") for at in rounds)
    return missed


def _part(parts: Mapping[str, bytes], name: str) -> bytes:
    if name not in parts:
        raise ProtocolError(f"a checkpoint was refused: it lacks its part '{name}'; start another run")
    return parts[name]
