"""What a site's long-term Ed25519 identity proves when it joins, and what the coordinator says of it to other sites.

What an attacker gains who holds a site's identity key: that site's place in the consortium, until it is revoked. Who
holds only its TLS key gains its link until that certificate expires, because renewing takes the identity, too.
"""

import base64
import hashlib

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cohortium.core.errors import ProtocolError
from cohortium.core.signature import sign, verify

IDENTITY_BYTES = 32
_JOIN, _RENEW, _INTRODUCE = "cohortium enrolment v1", "cohortium renewal v1", "cohortium introduction v1"
_FINGERPRINT_BYTES = 20
_GROUP = 4


def fingerprint(identity: bytes) -> str:
    """Returns an identity's fingerprint for people to compare: 160 bits of SHA-256 as eight groups of letters."""
    text = base64.b32encode(hashlib.sha256(b"cohortium identity v1" + identity).digest()[:_FINGERPRINT_BYTES]).decode()
    return "-".join(text[start : start + _GROUP] for start in range(0, len(text), _GROUP))


def same_fingerprint(told: str, identity: bytes) -> bool:
    """Returns whether somebody's words are the identity's fingerprint, however they are spaced and cased."""
    return told.upper().replace("-", "").replace(" ", "") == fingerprint(identity).replace("-", "")


def prove_joining(key: Ed25519PrivateKey, digest: bytes, site: str, csr: bytes) -> bytes:
    """Returns the signature with which a site joins by the invitation of this digest."""
    return sign(key, _JOIN, digest, site.encode(), csr)


def check_joining(identity: bytes, proof: bytes, digest: bytes, site: str, csr: bytes) -> None:
    """Checks what `prove_joining` made.

    Raises:
        ProtocolError: it is not this identity's signature of these.
    """
    _check(identity, proof, _JOIN, digest, site.encode(), csr)


def prove_renewal(key: Ed25519PrivateKey, site: str, csr: bytes) -> bytes:
    """Returns the signature with which a member asks for a new certificate.

    It may be said again by whoever hears it, and only gets a certificate for the request's own key.
    """
    return sign(key, _RENEW, site.encode(), csr)


def check_renewal(identity: bytes, proof: bytes, site: str, csr: bytes) -> None:
    """Checks what `prove_renewal` made.

    Raises:
        ProtocolError: it is not this identity's signature of these.
    """
    _check(identity, proof, _RENEW, site.encode(), csr)


class Introduction(msgspec.Struct, frozen=True):
    """The coordinator's word that a site has this identity (32 bytes) since it was enrolled (Unix seconds)."""

    site: str
    identity: bytes
    enrolled: int
    signature: bytes = b""


def introduce(key: Ed25519PrivateKey, site: str, identity: bytes, enrolled: int) -> Introduction:
    """Returns the coordinator's signed word on a site."""
    return Introduction(site, identity, enrolled, sign(key, _INTRODUCE, *_parts(site, identity, enrolled)))


def check_introduction(coordinator: bytes, told: Introduction) -> None:
    """Checks what `introduce` made.

    Args:
        coordinator: the pinned Ed25519 public key (32 bytes).

    Raises:
        ProtocolError: the coordinator did not sign this, or the identity is no key.
    """
    if len(told.identity) != IDENTITY_BYTES or not 0 <= told.enrolled < 1 << 63:
        raise ProtocolError(f"the identity of site '{told.site[:80]}' was refused: it is no key of 32 bytes")
    parts = _parts(told.site, told.identity, told.enrolled)
    _check(coordinator, told.signature, _INTRODUCE, *parts)


def _parts(site: str, identity: bytes, enrolled: int) -> tuple[bytes, ...]:
    return site.encode(), identity, enrolled.to_bytes(8, "big")


def _check(identity: bytes, proof: bytes, purpose: str, *parts: bytes) -> None:
    try:
        verify(Ed25519PublicKey.from_public_bytes(identity), proof, purpose, *parts)
    except (InvalidSignature, ValueError):
        raise ProtocolError(f"a signature was refused: it is not the identity's own for {purpose}") from None
