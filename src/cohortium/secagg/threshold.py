"""Threshold homomorphic encryption as a scheme: each site deals shares of its key, and only the keys' sum is opened.

Encryptions add up, messages and keys alike, so the sum over the survivors opens under the sum of their keys. A site
reveals the sum of the shares that it holds of theirs: 8 KiB, whatever the length of the vector. The arithmetic is in
`cohortium.secagg.rlwe`.

Trust: as `cohortium.secagg.group` says. Two different survivor sets would show a single site's key, which is why a
site reveals for one set a round (`cohortium.secagg.protocol`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import ProtocolError
from cohortium.core.random import Randomness
from cohortium.secagg import rlwe
from cohortium.secagg.group import Group
from cohortium.secagg.quantise import Residues
from cohortium.secagg.scheme import Payload, by_place, check_shares, check_vector
from cohortium.secagg.shamir import PRIME, Words, reconstruct


@dataclass(frozen=True)
class Threshold:
    """Key-homomorphic RLWE for vectors of `length` residues whose sums are `bits` (1 to 50) bits wide."""

    group: Group
    length: int
    bits: int

    @property
    def secret_shape(self) -> tuple[int, int]:
        return 1, rlwe.RING

    @property
    def opens(self) -> bool:
        return True

    @property
    def decrypted_by_sites(self) -> bool:
        return False

    @property
    def payload_bytes(self) -> int:
        chunks, primes, size = rlwe.ciphertext_shape(self.length, self.bits)
        return 4 * chunks * primes * size

    @property
    def answer_bytes(self) -> int:
        return 2 * rlwe.RING

    def protect(
        self, me: str, seeds: Mapping[str, bytes], context: bytes, vector: Residues, randomness: Randomness
    ) -> tuple[Payload, Words]:
        check_vector(vector, self.length, self.bits)
        secret = rlwe.secret_key(randomness)
        payload = rlwe.encrypt(secret, context, vector, self.bits, randomness)
        return payload, (secret.astype(np.int64) % PRIME).astype(np.uint16).reshape(self.secret_shape)

    def add(self, total: Payload | None, payload: Payload) -> Payload:
        shape = rlwe.ciphertext_shape(self.length, self.bits)
        if payload.shape != shape or payload.dtype != np.uint32:
            raise ProtocolError(f"an array of shape {payload.shape} and type {payload.dtype} is no such encryption")
        if total is None:
            total = np.zeros(shape, np.uint32)
        rlwe.add(total, payload)
        return total

    def answer(self, me: str, survivors: tuple[str, ...], shares: Mapping[str, Words], total: Payload) -> Words:
        """Returns this site's share of the sum of the survivors' keys, shape `(1, 4096)`."""
        summed = np.sum([shares[site] for site in survivors], axis=0, dtype=np.int64)
        return np.asarray(summed % PRIME, np.uint16)

    def check_answer(self, site: str, answer: NDArray[Any], survivors: tuple[str, ...]) -> None:
        check_shares(site, answer, self.secret_shape)

    def open(
        self, context: bytes, total: Payload, survivors: tuple[str, ...], answers: Mapping[str, NDArray[np.uint16]]
    ) -> Residues:
        key = reconstruct(by_place(self.group, answers), self.group.threshold).reshape(-1).astype(np.int64)
        key[key > PRIME // 2] -= PRIME
        return rlwe.decrypt(total, key, context, self.length, self.bits)
