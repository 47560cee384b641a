"""Which identities of other sites this site believes in. Rules without files or network.

The coordinator introduces the sites to each other, and its word is believed once: the first identity of a name stays,
and a later one is refused until somebody of this hospital has compared its fingerprint by telephone. What an attacker
gains who holds the coordinator's key: it can invent sites that nobody has met yet, and where it lies to a site that
meets all others for the first time, take all their places and read that site's vectors. Under the rule 'confirmed' it
gains nothing, because a site counts only after that telephone call.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec.structs import replace

from cohortium.core.errors import PolicyRefused, ProtocolError, StudyError, nearest
from cohortium.core.fields import names
from cohortium.core.identity import Introduction, check_introduction, fingerprint, same_fingerprint
from cohortium.core.messages import MOST_SITES

Rule = Literal["first-use", "confirmed"]
MOST_PEERS = 4 * MOST_SITES
_Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another site.

    Attributes:
        identity: its pinned Ed25519 public key.
        seen: when it was met first, in Unix seconds.
        confirmed: whether somebody compared the fingerprint.
        other: a different identity that the coordinator told since; refused until it is confirmed.
    """

    identity: _Key
    seen: int
    confirmed: bool = False
    other: _Key | None = None


Peers = Mapping[str, Peer]


@dataclass(eq=False)
class Pinned(Mapping[str, bytes]):
    """The identities that count at a site while it runs, for `Membership.pinned`.

    Attributes:
        now: identities by name. They are replaced whole and never changed, since other threads look meanwhile.
    """

    now: Mapping[str, bytes]

    def __getitem__(self, name: str) -> bytes:
        return self.now[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


@dataclass(frozen=True)
class Met:
    """What became of some introductions: the peers now, names that are new, and names whose identity changed."""

    peers: Peers
    new: tuple[str, ...]
    changed: tuple[str, ...]


def meet(known: Peers, told: Sequence[Introduction], coordinator: bytes, me: tuple[str, bytes], now: int) -> Met:
    """Returns the peers after the coordinator's introductions; pins what is new, and marks what changed.

    Args:
        coordinator: its pinned Ed25519 public key.
        me: this site's name and identity.

    Raises:
        ProtocolError: an introduction is not the coordinator's, or there are too many.
        PolicyRefused: the coordinator tells others of this site with an identity that is not its own.
    """
    if len(told) > MOST_SITES:
        raise ProtocolError(f"{len(told)} introductions were refused: {MOST_SITES} is the most")
    peers, new, changed = dict(known), [], []
    for one in told:
        names("site", [one.site])
        check_introduction(coordinator, one)
        peer = peers.get(one.site)
        if one.site == me[0]:
            if one.identity != me[1]:
                raise PolicyRefused(
                    f"the consortium knows this site '{me[0]}' by another identity, {fingerprint(one.identity)}: "
                    "somebody else enrolled under its name; tell the consortium's operator by telephone"
                )
        elif peer is None:
            peers[one.site] = Peer(one.identity, now)
            new.append(one.site)
        elif peer.identity != one.identity:
            peers[one.site] = replace(peer, other=one.identity)
            changed.append(one.site)
    if len(peers) > MOST_PEERS:
        raise ProtocolError(f"introductions were refused: more than {MOST_PEERS} sites were told of so far")
    return Met(peers, tuple(new), tuple(changed))


def pinned(peers: Peers, rule: Rule, me: tuple[str, bytes]) -> dict[str, bytes]:
    """Returns the identities that count, by name, this site's own among them."""
    return {name: peer.identity for name, peer in peers.items() if peer.confirmed or rule == "first-use"} | dict([me])


def confirm(peers: Peers, name: str, told: str) -> Peers:
    """Returns the peers after somebody compared a fingerprint: it may be that of a changed identity, which is taken.

    Raises:
        StudyError: no such site has been met.
        PolicyRefused: the fingerprint is none of that site's.
    """
    peer = peers.get(name)
    if peer is None:
        raise StudyError(f"no site '{name}' has been met{nearest(name, peers)}: names come once the agent has run")
    for identity in filter(None, (peer.identity, peer.other)):
        if same_fingerprint(told, identity):
            left = peer.other if identity == peer.identity else None
            return {**peers, name: replace(peer, identity=identity, confirmed=True, other=left)}
    raise PolicyRefused(
        f"the fingerprint is not that of site '{name}': compare it by telephone, with a number that you know"
    )
