"""Who is who in a run: identities pinned at enrolment sign the run's key agreement.

Trust: a coordinator that swaps, drops or invents a key is caught, because every site checks each peer's signature
with the identity it pinned beforehand, over the run, the study, the peer's name and the peer's key. What an attacker
who holds a site's identity key gains: it can take that site's place in later runs; past runs stay closed, because the
agreement keys are made for one run, and the root that they come from moves on (`cohortium.site.agent`).
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from msgspec.structs import replace

from cohortium.core.errors import ProtocolError
from cohortium.core.messages import Announcement
from cohortium.core.signature import framed, sign, verify

_CONTEXT = "cohortium run key v1"
_ANYBODY = X25519PrivateKey.from_private_bytes(bytes(32))
"""No secret: with it, whoever holds no key of the run tells keys that give no secret to anybody."""
_ROUNDS_PER_BLOCK = 16
"""Seeds derived at a time. Each is its own stretch of HKDF output: knowing one tells nothing of the others."""


def announce(
    identity: Ed25519PrivateKey, private: X25519PrivateKey, run: str, study_id: str, site: str
) -> Announcement:
    """Returns the site's agreement key for one run, signed by its identity."""
    public = private.public_key().public_bytes_raw()
    return Announcement(run, site, public, sign(identity, _CONTEXT, *_signed_parts(run, study_id, site, public)))


def check(
    announcements: Sequence[Announcement], pinned: Mapping[str, bytes], run: str, study_id: str, least: int
) -> None:
    """Checks that at least `least` pinned sites, and nobody else, announced one key each for this run and study.

    Args:
        pinned: each of the study's sites' Ed25519 public key (32 bytes) by name.

    Raises:
        ProtocolError: a site is unknown, listed twice or out of order, too few are there, two share a key, or a
            signature is wrong.
    """
    names = [announcement.site for announcement in announcements]
    if names != sorted(set(names)) or not set(names) <= pinned.keys():
        raise ProtocolError("the key set was refused: it must list sites of the study, once each and in order")
    if len(names) < least:
        raise ProtocolError(f"the key set was refused: it holds {len(names)} sites, and the study needs {least}")
    if len({announcement.public_key for announcement in announcements}) != len(announcements):
        raise ProtocolError("the key set was refused: two sites show the same key")
    for announcement in announcements:
        check_one(announcement, pinned, run, study_id)


def check_one(announcement: Announcement, pinned: Mapping[str, bytes], run: str, study_id: str) -> None:
    """Checks that a pinned site announced a usable key for this run and study.

    Raises:
        ProtocolError: the signature is not that of its identity, or no secret can be agreed on with the key.
    """
    parts = _signed_parts(run, study_id, announcement.site, announcement.public_key)
    try:
        verify(Ed25519PublicKey.from_public_bytes(pinned[announcement.site]), announcement.signature, _CONTEXT, *parts)
    except InvalidSignature:
        raise ProtocolError(
            f"the key set was refused: the key of site '{announcement.site}' is not signed by its pinned identity"
        ) from None
    _exchange(_ANYBODY, announcement)


def pair_key(private: X25519PrivateKey, mine: Announcement, peer: Announcement) -> bytes:
    """Returns the 32-byte key that two sites share for one run: X25519, then HKDF-SHA256 bound to run, names and keys.

    Raises:
        ProtocolError: the peer's key is malformed or of low order.
    """
    secret = _exchange(private, peer)
    first, second = sorted([mine, peer], key=lambda announcement: announcement.site)
    ends = (first.site.encode(), first.public_key, second.site.encode(), second.public_key)
    info = framed(b"cohortium pair key v1", mine.run.encode(), *ends)
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(secret)


class Pairs(msgspec.Struct, frozen=True):
    """A site's keys with its peers for one run.

    Attributes:
        peers: their names, in order.
        keys: one key for each peer.
        block, seeds: a stretch of rounds whose seeds are at hand, and those seeds, in one string for each peer.
    """

    peers: tuple[str, ...]
    keys: tuple[bytes, ...]
    block: int = -1
    seeds: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        # the rest is secret
        return f"Pairs(peers={self.peers!r})"

    def at(self, number: int) -> "Pairs":
        """Returns the pairs with the seeds of a round at hand: HKDF-Expand of each key, sixteen rounds at a time."""
        block = number // _ROUNDS_PER_BLOCK
        if block == self.block:
            return self
        info = b"cohortium round seeds v1" + block.to_bytes(8, "big")
        length = 32 * _ROUNDS_PER_BLOCK
        return replace(
            self, block=block, seeds=tuple(HKDFExpand(hashes.SHA256(), length, info).derive(key) for key in self.keys)
        )

    def round_seeds(self, number: int) -> dict[str, bytes]:
        """Returns the 32-byte seed that is shared with each peer for one round, of which `at` was called."""
        assert number // _ROUNDS_PER_BLOCK == self.block
        start = 32 * (number % _ROUNDS_PER_BLOCK)
        return {peer: seeds[start : start + 32] for peer, seeds in zip(self.peers, self.seeds, strict=True)}


def agree(private: X25519PrivateKey, mine: Announcement, announcements: Sequence[Announcement]) -> Pairs:
    """Returns a site's keys with its peers, from its own secret and all announcements, already checked.

    Raises:
        ProtocolError: a malformed key, or one's own announcement is not among them.
    """
    if mine not in announcements:
        raise ProtocolError("the key set was refused: it lacks the key that this site announced")
    peers = sorted((peer for peer in announcements if peer.site != mine.site), key=lambda peer: peer.site)
    return Pairs(tuple(peer.site for peer in peers), tuple(pair_key(private, mine, peer) for peer in peers))


def session_digest(run: str, study_id: str, threshold: int, announcements: Sequence[Announcement]) -> bytes:
    """Returns 32 bytes that stand for a run, its study, its threshold and its whole key set.

    Everything that sites derive or sign later holds it, so sites that were shown different key sets have nothing in
    common that adds up.
    """
    entries = [part for entry in announcements for part in (entry.site.encode(), entry.public_key)]
    text = framed(run.encode(), study_id.encode(), threshold.to_bytes(4, "big"), *entries)
    return blake2b(text, digest_size=32, person=b"cohort session").digest()


def history(before: bytes, broadcast: bytes) -> bytes:
    """Returns 32 bytes that stand for a broadcast and all before it, given those for all before it (b"" at first)."""
    return blake2b(broadcast, key=before, digest_size=32, person=b"cohort history").digest()


def among(history: bytes, selected: Sequence[str]) -> bytes:
    """Returns 32 bytes that stand for all broadcasts and for the sites that one round selects; as given for all sites.

    Sites that were told different selections have nothing in common that adds up.
    """
    if not selected:
        return history
    text = framed(*(site.encode() for site in selected))
    return blake2b(text, key=history, digest_size=32, person=b"cohort selected").digest()


def round_context(session: bytes, number: int, broadcast: bytes) -> bytes:
    """Returns 32 bytes that stand for one round: its session, its number and what was broadcast."""
    digest = blake2b(session + number.to_bytes(8, "big"), digest_size=32, person=b"cohort round")
    digest.update(broadcast)
    return digest.digest()


def purpose_key(seed: bytes, purpose: bytes, context: bytes, *parts: bytes) -> bytes:
    """Returns a 32-byte key for one purpose (at most 16 bytes), from a round's seed: keyed BLAKE2b (RFC 7693)."""
    return blake2b(context + b"".join(parts), key=seed, digest_size=32, person=purpose).digest()


def _exchange(private: X25519PrivateKey, peer: Announcement) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(peer.public_key))
    except ValueError:
        raise ProtocolError(f"the key of site '{peer.site}' is not a valid X25519 key") from None


def _signed_parts(run: str, study_id: str, site: str, public: bytes) -> tuple[bytes, ...]:
    return run.encode(), study_id.encode(), site.encode(), public
