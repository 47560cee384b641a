"""Randomness as an argument: a tree of keys, each child as good as a fresh key, all of it decided by the root.

Whoever holds a key can derive everything below it and nothing beside or above it (HKDF-SHA256, RFC 5869). The
root comes from the operating system in production and from an explicit seed in a simulation.
"""

import hmac
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from cohortium.core.signature import framed


@dataclass(frozen=True)
class Randomness:
    """A 256-bit key and the streams below it."""

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.key) != 32:
            raise ValueError("a randomness key has 32 bytes")

    @staticmethod
    def of_seed(seed: int) -> "Randomness":
        """Returns the root for a simulation's seed. It holds no entropy beyond the seed's."""
        if seed < 0:
            raise ValueError("a seed is a whole number from 0 up")
        length = (seed.bit_length() + 7) // 8
        kdf = HKDF(hashes.SHA256(), 32, salt=None, info=b"cohortium seed v1")
        return Randomness(kdf.derive(seed.to_bytes(length, "big")))

    def child(self, *labels: str | int) -> "Randomness":
        """Returns the key at the path `labels` below this one; different paths give independent keys."""
        path = framed(b"child", *(_encoded(label) for label in labels))
        # HKDF-Expand of one block, a tenth of the call's cost
        return Randomness(hmac.digest(self.key, path + b"\x01", "sha256"))

    def stream(self, count: int) -> bytes:
        """Returns the first `count` bytes of AES-256's keystream under this key, in counter mode from block zero.

        A key that is used so is used for nothing else.
        """
        return Cipher(algorithms.AES(self.key), modes.CTR(bytes(16))).encryptor().update(bytes(count))

    def bytes(self, count: int) -> bytes:
        """Returns `count` bytes, the same ones each time; at most 8,160."""
        return HKDFExpand(hashes.SHA256(), count, b"bytes").derive(self.key)

    def generator(self) -> np.random.Generator:
        """Returns a numpy generator at its start, for sampling and training, not for keys or noise."""
        return np.random.Generator(np.random.PCG64DXSM(int.from_bytes(self.bytes(32), "big")))


def _encoded(label: str | int) -> bytes:
    return b"s" + label.encode() if isinstance(label, str) else b"i" + str(label).encode()
