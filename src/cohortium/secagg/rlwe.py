"""Encryption under which ciphertexts and keys add up: one secret per site and round, and only the sum is opened.

    c_i = a * s_i + e_i + 1023 m_i    in Z_q[X]/(X^4096 + 1),    q = 1073692673 * 1073668097

The public a is expanded from the round's context. The sum of ciphertexts opens with S, the sum of the secrets, and with
nothing less: sum c_i - a * S = (sum e_i) + 1023 (sum m_i), exact while the summed error stays below 1023 / 2. A
coefficient's m holds 50 bits, as many values as fit: the sum of two 25-bit ones costs 4 bytes a value on the wire.

Secrets and errors are X + 2 Y with centred binomials X of 12 and Y of 20 coin pairs: 64 random bits each, variance 46,
standard deviation 6.78, magnitude at most 52.

Source: the scheme is Regev's in the ring (Lyubashevsky, Peikert, Regev, "On ideal lattices and learning with errors
over rings", EUROCRYPT 2010), its sum that of Bell et al., "ACORN: Input Validation for Secure Aggregation", USENIX
Security 2023. The width follows Kim, Lee, Seo and Song, "Toward Practical Lattice-Based Proof of Knowledge from
Hint-MLWE", CRYPTO 2023, theorem 1. `docs/adr/0012-threshold-encryption-by-rlwe.md` has the figures.

Trust: whoever holds the ciphertexts and S, and the secrets of all but two of the sites summed, learns the sum of those
two sites' vectors. That opening S and the summed error gives away no more rests on the theorem above, which is proved
for discrete Gaussians, not for binomials, and honest sites that use a secret for one context only and let only one sum
of it be opened: S over U and over U without i reveals s_i. Semi-honest: a site that deviates can spoil the sum. Not
constant-time in the strict sense, and not reviewed by a cryptographer. A patent application covers one-shot
aggregation with another way to hand over keys (US20250358106A1): take advice before commercial use.
"""

import hashlib
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.random import Randomness
from cohortium.secagg.group import MOST_ENCRYPTING
from cohortium.secagg.quantise import Residues, residue_kind, signed_kind
from cohortium.secagg.ring import MODULUS, WORDS, Words, add_in_place, compiled, factor, mask, reduced, unmask
from cohortium.secagg.ring import RING as RING

MESSAGE_BITS = 50
"""Signed bits of a coefficient's message, the sum over all sites included."""
DELTA = MODULUS >> MESSAGE_BITS
"""What a message is multiplied by: 1023."""
LARGEST = 52
"""The largest magnitude of an entry of a secret or an error."""
LARGEST_NOISE = 496
"""A summed error beyond this is refused: it shows a wrong key. Fifty honest sites reach it with probability 2^-81."""

_BLOCK = 4
"""Chunks at a time: their streams stay in the processor's second-level cache."""

Ciphertext = Words


def slots(bits: int) -> int:
    """Returns how many sums of `bits` bits one coefficient holds.

    Raises:
        StudyError: a sum does not fit, or has no bits.
    """
    if not 1 <= bits <= MESSAGE_BITS:
        raise StudyError(f"sums of {bits} bits cannot be encrypted: choose aggregation.bits from 1 to {MESSAGE_BITS}")
    return MESSAGE_BITS // bits


def ciphertext_shape(length: int, bits: int) -> tuple[int, int, int]:
    """Returns the shape of the ciphertext of `length` values: chunks, primes, coefficients."""
    return -(-length // (slots(bits) * RING)), 2, RING


def secret_key(randomness: Randomness) -> NDArray[np.int16]:
    """Returns a site's secret for one round, `(4096,)`. The randomness must be fresh in each round."""
    secret = np.empty(RING, np.int16)
    _draw(_Stream(randomness.child("secret").bytes(32), np.uint64, RING).take(1)[0], secret)
    return secret


def encrypt(
    secret: NDArray[np.int16], context: bytes, vector: Residues, bits: int, randomness: Randomness
) -> Ciphertext:
    """Returns the ciphertext of a vector: residues modulo each prime, in the shape that `ciphertext_shape` gives.

    Args:
        secret: from `secret_key`, used with this context only.
        context: 32 public bytes, the same at all sites and never used before.
        vector: `(length,)`, two's complement numbers of `bits` bits in the type `residue_kind(bits)`. Their sum over
            all sites must fit into `bits` bits too.
        randomness: fresh in each round; may be the one that the secret came from.

    Raises:
        StudyError: `bits` is out of range.
        ProtocolError: an argument has the wrong shape or type, or an entry does not fit into its bits.
    """
    per_coefficient = slots(bits)
    if vector.ndim != 1 or vector.dtype != residue_kind(bits):
        raise ProtocolError(f"a vector of shape {vector.shape} and type {vector.dtype} cannot be encrypted")
    if secret.shape != (RING,) or secret.dtype != np.int16 or not _within(secret, LARGEST):
        raise ProtocolError("encryption was refused: that is no secret key")
    signed, ready = vector.view(signed_kind(bits)), factor(secret.astype(np.int64))
    public, errors = _public(context), _Stream(randomness.child("error").bytes(32), np.uint64, RING)
    ciphertext, message = np.empty(ciphertext_shape(len(vector), bits), np.uint32), np.empty((_BLOCK, RING), np.int64)
    for start in range(0, len(ciphertext), _BLOCK):
        part = ciphertext[start : start + _BLOCK]
        coins = errors.take(len(part))
        if not _pack(signed, coins, start, bits, per_coefficient, message):
            raise ProtocolError(f"encryption was refused: an entry does not fit into {bits} bits")
        mask(public.take(len(part)), ready, message, part)
    return ciphertext


def add(total: Ciphertext, ciphertext: Ciphertext) -> None:
    """Adds a ciphertext to a total of the same shape, in place.

    Raises:
        ProtocolError: the shapes or types differ, or an entry is not a residue; the total is then left as it was.
    """
    if ciphertext.shape != total.shape:
        raise ProtocolError(f"a ciphertext of shape {ciphertext.shape} was refused: the total has {total.shape}")
    _check(total)
    _check(ciphertext)
    add_in_place(total, ciphertext)


def decrypt(
    total: Ciphertext, summed_secret: NDArray[np.signedinteger[Any]], context: bytes, length: int, bits: int
) -> Residues:
    """Returns the sum of the vectors, `(length,)`, as residues of `bits` bits.

    A key that is not that of the total is noticed from the noise it leaves, unless the total has no chunk.

    Args:
        total: the sum of the ciphertexts.
        summed_secret: `(4096,)`, the sum of the same sites' secrets.
        context: the one under which all of them were encrypted.

    Raises:
        StudyError: `bits` is out of range.
        ProtocolError: an argument has the wrong shape, type or range, or the key is not that of the total.
    """
    per_coefficient = slots(bits)
    if total.shape != ciphertext_shape(length, bits):
        raise ProtocolError(f"a total of shape {total.shape} does not hold {length} values of {bits} bits")
    _check(total)
    if summed_secret.shape != (RING,) or summed_secret.dtype.kind != "i":
        raise ProtocolError(f"decryption was refused: a summed secret is {RING} whole numbers")
    if not _within(summed_secret, MOST_ENCRYPTING * LARGEST):
        raise ProtocolError(f"decryption was refused: {MOST_ENCRYPTING} secrets do not add up to that")
    ready, public = factor(summed_secret.astype(np.int64)), _public(context)
    values, message = np.empty(length, signed_kind(bits)), np.empty((_BLOCK, RING), np.int64)
    for start in range(0, len(total), _BLOCK):
        part = total[start : start + _BLOCK]
        unmask(public.take(len(part)), ready, part, message)
        if _unpack(message[: len(part)], start, bits, per_coefficient, values) > LARGEST_NOISE:
            raise ProtocolError("decryption was refused: the summed secret is not that of the summed ciphertexts")
    return values.view(residue_kind(bits))


class _Stream:
    """AES-256 in counter mode from counter zero, as rows of little-endian words."""

    def __init__(self, key: bytes, kind: type[np.unsignedinteger[Any]], width: int) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._row = np.dtype(kind).itemsize * width
        self._zeros = memoryview(bytes(_BLOCK * self._row))
        # the library asks for room for one more block
        self._bytes = bytearray(_BLOCK * self._row + 16)
        words: NDArray[Any] = np.frombuffer(self._bytes, kind, _BLOCK * width)
        self._words = words.reshape(_BLOCK, width)

    def take(self, rows: int) -> NDArray[Any]:
        """Returns the next rows, in the place of those it returned before."""
        self._cipher.update_into(self._zeros[: rows * self._row], self._bytes)
        return self._words[:rows]


def _public(context: bytes) -> _Stream:
    if len(context) != 32:
        raise ProtocolError("encryption was refused: a context has 32 bytes")
    key = hashlib.blake2b(context, digest_size=32, person=b"cohortium rlwe a").digest()
    return _Stream(key, np.uint32, WORDS)


def _within(numbers: NDArray[np.signedinteger[Any]], limit: int) -> bool:
    return bool(numbers.max() <= limit and numbers.min() >= -limit)


def _check(ciphertext: Ciphertext) -> None:
    if ciphertext.shape[1:] != (2, RING) or ciphertext.dtype != np.uint32 or not ciphertext.flags.c_contiguous:
        raise ProtocolError(f"a ciphertext of shape {ciphertext.shape} and type {ciphertext.dtype} was refused")
    if not reduced(ciphertext):
        raise ProtocolError("a ciphertext was refused: an entry is not a residue modulo its prime")


@compiled
def _small(coins: np.uint64) -> np.int64:
    """Returns X + 2 Y: the ones among the low 24 bits, and twice those among the others, less the mean."""
    pairs = coins - ((coins >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    counts = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    # the top byte of the product is the weighted sum of the bytes' counts
    return np.int64((counts * np.uint64(0x0101010202020202)) >> np.uint64(56)) - np.int64(LARGEST)


@compiled
def _draw(coins: NDArray[np.uint64], secret: NDArray[np.int16]) -> None:
    for place in range(len(secret)):
        secret[place] = _small(coins[place])


@compiled
def _pack(
    vector: NDArray[np.signedinteger[Any]],
    coins: NDArray[np.uint64],
    start: int,
    bits: int,
    per_coefficient: int,
    noisy: NDArray[np.int64],
) -> bool:
    """Fills rows of `noisy` with 1023 m + e, from chunk `start` on. Returns false if a value is wider than its bits."""
    half = np.int64(1) << (bits - 1)
    outside = np.int64(0)
    for chunk in range(len(coins)):
        row = noisy[chunk]
        row[:] = 0
        for slot in range(per_coefficient):
            first = ((start + chunk) * per_coefficient + slot) * 4096
            part = vector[first : first + 4096]
            shift = bits * slot
            for place in range(len(part)):
                value = np.int64(part[place])
                outside |= (value + half) >> bits
                row[place] += value << shift
        for place in range(4096):
            row[place] = row[place] * DELTA + _small(coins[chunk, place])
    return bool(outside == 0)


@compiled
def _unpack(
    noisy: NDArray[np.int64], start: int, bits: int, per_coefficient: int, vector: NDArray[np.signedinteger[Any]]
) -> int:
    """Writes the values of `noisy`, which is used up, from chunk `start` on. Returns the noise's largest magnitude."""
    above = 64 - bits
    largest = np.int64(0)
    # signed digits reach further down than up: by half a unit of every slot but the lowest
    centre = np.int64(0)
    for slot in range(1, per_coefficient):
        centre -= np.int64(1) << (bits * slot - 1)
    for chunk in range(len(noisy)):
        row = noisy[chunk]
        for place in range(4096):
            value = row[place] - DELTA * centre
            value = value - MODULUS if value > MODULUS // 2 else value
            # shifted to where division rounds down
            shifted = np.uint64(value + DELTA // 2 + DELTA * 2**MESSAGE_BITS)
            message = np.int64(shifted // np.uint64(DELTA)) - 2**MESSAGE_BITS
            largest = max(largest, abs(value - DELTA * message))
            row[place] = message + centre
        for slot in range(per_coefficient):
            first = ((start + chunk) * per_coefficient + slot) * 4096
            part = vector[first : first + 4096]
            for place in range(len(part)):
                value = (row[place] << above) >> above
                part[place] = value
                # a negative value borrowed one from the slots above
                row[place] = (row[place] - value) >> bits
    return int(largest)
