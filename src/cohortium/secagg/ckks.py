"""CKKS under a single key, for consortia that have it already: any hospital can decrypt any update it sees.

All sites hold one secret key, the coordinator holds the public one. It adds the sites' encryptions, and any site
decrypts the sum. Integers below 2^31 in magnitude come back exact, since the scheme's error stays far below a half.

Trust: this protects from a coordinator that holds no key and follows the protocol, and from nobody else. A site that
sees another's update can read it; a coordinator that sends a single update instead of the sum gets it decrypted. What
is decrypted must not be sent to where its encryption is known, because its error would tell of the key (Li and
Micciancio, EUROCRYPT 2021); rounding to integers before sending removes that error. Encryption draws on TenSEAL's own
randomness, so equal seeds give equal sums and other ciphertexts.

Source: Cheon, Kim, Kim and Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers", ASIACRYPT 2017.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohortium.core import codec
from cohortium.core.errors import PolicyRefused, ProtocolError, StudyError
from cohortium.core.random import Randomness
from cohortium.secagg.group import Group
from cohortium.secagg.quantise import Residues, residue_kind, signed_kind
from cohortium.secagg.scheme import NO_SECRET, Payload, check_vector
from cohortium.secagg.shamir import Words

try:
    import tenseal
except ImportError as error:
    raise StudyError(
        "the protocol 'ckks-single-key' needs TenSEAL, which is not installed here: run pip install 'cohortium[ckks]'"
    ) from error

_DEGREE = 8192
_PRIMES = (60, 40, 40, 60)
_SCALE = 2.0**40
_SLOTS = _DEGREE // 2
_MOST_BYTES = 400_000
"""More than any encryption of one chunk takes."""


def make_keys() -> tuple[bytes, bytes]:
    """Returns the consortium's secret key, for every hospital, and the public one, for the coordinator."""
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, _DEGREE, coeff_mod_bit_sizes=list(_PRIMES))
    context.global_scale = _SCALE
    plain = {"save_galois_keys": False, "save_relin_keys": False}
    return context.serialize(save_secret_key=True, **plain), context.serialize(save_secret_key=False, **plain)


@dataclass(frozen=True)
class SingleKey:
    """CKKS for vectors of `length` residues whose sums are `bits` bits wide, at most 32.

    `key` is the consortium's secret key at a site, and the public one at the coordinator.
    """

    group: Group
    length: int
    bits: int
    key: bytes = field(repr=False)

    @property
    def secret_shape(self) -> tuple[int, int]:
        return 0, 0

    @property
    def opens(self) -> bool:
        return True

    @property
    def decrypted_by_sites(self) -> bool:
        return True

    @property
    def payload_bytes(self) -> int:
        return payload_bytes(self.length)

    @property
    def answer_bytes(self) -> int:
        return residue_kind(self.bits).itemsize * self.length

    def protect(
        self, me: str, seeds: Mapping[str, bytes], context: bytes, vector: Residues, randomness: Randomness
    ) -> tuple[Payload, Words]:
        check_vector(vector, self.length, self.bits)
        signed = vector.view(signed_kind(self.bits)).astype(np.float64)
        return self._encrypted(signed), NO_SECRET

    def add(self, total: Payload | None, payload: Payload) -> Payload:
        # a sum begins with zeros, so that the first payload is checked as any other
        begun = self._encrypted(np.zeros(self.length)) if total is None else total
        sums = zip(self._encryptions(begun), self._encryptions(payload), strict=True)
        try:
            return _carried([(one + other).serialize() for one, other in sums])
        except (ValueError, RuntimeError):
            raise ProtocolError("an encrypted vector was refused: it does not add up with the others") from None

    def answer(self, me: str, survivors: tuple[str, ...], shares: Mapping[str, Words], total: Payload) -> NDArray[Any]:
        """Returns the decrypted sum, rounded to integers, shape `(length,)`."""
        plain = [number for one in self._encryptions(total) for number in one.decrypt()]
        return self._rounded(np.array(plain))

    def check_answer(self, site: str, answer: NDArray[Any], survivors: tuple[str, ...]) -> None:
        if answer.shape != (self.length,) or answer.dtype != residue_kind(self.bits):
            raise ProtocolError(f"the sum that site '{site}' decrypted was refused: it has the wrong shape or type")

    def open(
        self, context: bytes, total: Payload, survivors: tuple[str, ...], answers: Mapping[str, NDArray[Any]]
    ) -> Residues:
        first, *others = answers.values()
        if any(not np.array_equal(first, other) for other in others):
            raise ProtocolError("the sites decrypted different sums: at least one gave a false one")
        return first

    def _encrypted(self, plain: NDArray[np.float64]) -> Payload:
        keys = _context(self.key)
        chunks = [plain[start : start + _SLOTS].tolist() for start in range(0, self.length, _SLOTS)]
        return _carried([tenseal.ckks_vector(keys, chunk).serialize() for chunk in chunks])

    def _rounded(self, plain: NDArray[np.float64]) -> Residues:
        half = 2.0 ** (self.bits - 1)
        if plain.shape != (self.length,) or not (np.abs(plain) < half).all():
            raise ProtocolError("an encrypted sum was refused: it has another length or is out of range")
        return np.rint(plain).astype(signed_kind(self.bits)).view(residue_kind(self.bits))

    def _encryptions(self, payload: Payload) -> list[Any]:
        limit = payload_bytes(self.length) + 64
        if payload.dtype != np.uint8 or payload.ndim != 1:
            raise ProtocolError("an array was refused: it holds no encryptions")
        parts = codec.decode(payload.tobytes(), list[bytes], limit)
        if len(parts) != -(-self.length // _SLOTS) or any(len(part) > _MOST_BYTES for part in parts):
            raise ProtocolError("an encrypted vector was refused: it has another length")
        try:
            encryptions = [tenseal.ckks_vector_from(_context(self.key), part) for part in parts]
        except (ValueError, RuntimeError):
            raise ProtocolError("an encrypted vector was refused: it is malformed") from None
        sizes = [min(_SLOTS, self.length - start) for start in range(0, self.length, _SLOTS)]
        if [one.size() for one in encryptions] != sizes:
            raise ProtocolError("an encrypted vector was refused: it has another length")
        return encryptions


def payload_bytes(length: int) -> int:
    """Returns the most bytes that the encryption of a vector takes."""
    return 16 + (_MOST_BYTES + 8) * -(-length // _SLOTS)


def _carried(parts: list[bytes]) -> Payload:
    return np.frombuffer(codec.encode(parts), np.uint8)


@lru_cache(maxsize=4)
def _context(key: bytes) -> Any:
    if not key:
        raise PolicyRefused(
            "the study was refused: it asks for protocol 'ckks-single-key', and no CKKS key is installed here"
        )
    return tenseal.context_from(key)
