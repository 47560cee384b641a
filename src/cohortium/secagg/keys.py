"""Who is who in a run: identities pinned at enrolment sign the run's key agreement.

Trust: a coordinator that swaps, drops or invents a key is caught, because every site checks each peer's signature
with the identity it pinned beforehand, over the run, the study, the peer's name and the peer's key. What an attacker
who holds a site's identity key gains: it can take that site's place in later runs; past runs stay closed, because the
agreement keys are made for one run, and the root that they come from moves on (`cohortium.site.agent`).
"""

from collections.abc import Mapping, Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cohortium.core.errors import ProtocolError
from cohortium.core.messages import Announcement
from cohortium.core.signature import framed, sign, verify

_CONTEXT = "cohortium run key v1"


def announce(
    identity: Ed25519PrivateKey, private: X25519PrivateKey, run: str, study_id: str, site: str
) -> Announcement:
    """Returns the site's agreement key for one run, signed by its identity."""
    public = private.public_key().public_bytes_raw()
    return Announcement(run, site, public, sign(identity, _CONTEXT, *_signed_parts(run, study_id, site, public)))


def check(announcements: Sequence[Announcement], pinned: Mapping[str, bytes], run: str, study_id: str) -> None:
    """Checks that each pinned site, and nobody else, announced one key for this run and study.

    Args:
        pinned: each taking-part site's Ed25519 public key (32 bytes) by name.

    Raises:
        ProtocolError: a site is missing, unknown or listed twice, two share a key, or a signature is wrong.
    """
    names = [announcement.site for announcement in announcements]
    if sorted(names) != sorted(pinned):
        raise ProtocolError("the key set was refused: it must hold one key of each site of the study, and no other")
    if len({announcement.public_key for announcement in announcements}) != len(announcements):
        raise ProtocolError("the key set was refused: two sites show the same key")
    for announcement in announcements:
        parts = _signed_parts(run, study_id, announcement.site, announcement.public_key)
        public = Ed25519PublicKey.from_public_bytes(pinned[announcement.site])
        try:
            verify(public, announcement.signature, _CONTEXT, *parts)
        except InvalidSignature:
            raise ProtocolError(
                f"the key set was refused: the key of site '{announcement.site}' is not signed by its pinned identity"
            ) from None


def pair_key(private: X25519PrivateKey, mine: Announcement, peer: Announcement) -> bytes:
    """Returns the 32-byte key that two sites share for one run: X25519, then HKDF-SHA256 bound to run, names and keys.

    Raises:
        ProtocolError: the peer's key is malformed or of low order.
    """
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(peer.public_key))
    except ValueError:
        raise ProtocolError(f"the key of site '{peer.site}' is not a valid X25519 key") from None
    first, second = sorted([mine, peer], key=lambda announcement: announcement.site)
    ends = (first.site.encode(), first.public_key, second.site.encode(), second.public_key)
    info = framed(b"cohortium pair key v1", mine.run.encode(), *ends)
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(secret)


def _signed_parts(run: str, study_id: str, site: str, public: bytes) -> tuple[bytes, ...]:
    return run.encode(), study_id.encode(), site.encode(), public
