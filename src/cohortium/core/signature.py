"""Ed25519 signatures over a purpose and a list of byte strings, so that one signature never serves two purposes."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def framed(*parts: bytes) -> bytes:
    """Returns the parts as one string from which they can be told apart: each behind its length (4 bytes)."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def sign(key: Ed25519PrivateKey, purpose: str, *parts: bytes) -> bytes:
    """Returns the 64-byte signature of `parts` for `purpose`."""
    return key.sign(framed(purpose.encode(), *parts))


def verify(key: Ed25519PublicKey, signature: bytes, purpose: str, *parts: bytes) -> None:
    """Checks a signature that `sign` made.

    Raises:
        cryptography.exceptions.InvalidSignature: it is not this key's signature of these parts for this purpose.
    """
    key.verify(signature, framed(purpose.encode(), *parts))
