"""Arithmetic in Z_q[X]/(X^4096 + 1), q the product of two primes, compiled for the machine it runs on.

A ring element is held modulo each prime (residue number system). A product a * s needs one transform, because the
public factor is given by its values: for each root r of Y^1024 + 1 modulo the prime, a stands as its remainder modulo
X^4 - r, a polynomial of degree 3. Such remainders multiply on their own, and ten levels of butterflies take them to
coefficients. It is the number theoretic transform of FIPS 203 (ML-KEM), section 4.3, stopped two levels early instead
of one, since four products and one reduction cost less than two more levels.

Two orders differ from the textbook's, so that every loop runs over neighbours in memory:

- leaves: remainder 256 q + k (q < 4) belongs to the root eta^(2 b + 1), b being the ten bits of 4 k + q reversed;
  its coefficient i stands at place 1024 i + 256 q + k.
- coefficients: X^(16 k + i + 4 j) (i, j < 4) stands at place 16 k + 4 i + j.

Source: Harvey, "Faster arithmetic for number-theoretic transforms", Journal of Symbolic Computation 60, 2014 (lazy
butterflies after Shoup); Montgomery, "Modular multiplication without trial division", 1985.

Trust: nothing branches on a secret or looks up a table by one, but no instruction's timing was verified: this is not
constant-time code in the strict sense.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import ProtocolError, StudyError

try:
    import numba
except ImportError as error:
    raise StudyError(
        "the protocol 'rlwe' needs numba, which is not installed here: run pip install 'cohortium[rlwe]'"
    ) from error

RING = 4096
PRIMES = (1073692673, 1073668097)
"""Both are 1 modulo 8192 and just below 2^30, so that four times either fits into 32 bits."""
MODULUS = PRIMES[0] * PRIMES[1]
RESERVE = 64
"""Spare words of a chunk's stream. A chunk needs 0.47 on average, and more than 64 with probability below 2^-350."""
WORDS = 2 * RING + RESERVE
"""32-bit words of the public stream that one chunk takes."""

_INVERSE = np.uint32(pow(PRIMES[0], -1, PRIMES[1]))
_COMPANION = np.uint32((int(_INVERSE) << 32) // PRIMES[1])
_LEAVES = 1024
_DEGREE = 4

Words = NDArray[np.uint32]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Returns the function in machine code, which other threads can run beside.

    The code is kept on disk and renewed when its own module changes, so it should call nothing from another module.
    """
    return cast(_Function, numba.njit(function, cache=True, nogil=True, error_model="numpy"))


def _inlined(function: _Function) -> _Function:
    # a stride that is known when it is compiled is what lets a loop run on vectors
    return cast(_Function, numba.njit(function, inline="always", error_model="numpy"))


@dataclass(frozen=True)
class Tables:
    """What the transform needs for both primes; axis 0 is the prime throughout.

    A twiddle factor w is followed by Shoup's companion floor(w 2^32 / p).

    Attributes:
        primes: `(2, 4)`: the prime p, -1/p, 2^32 and 2^64; the second modulo 2^32, the others modulo p.
        scale: `(2, 2)`: 2^32 / 1024 modulo p: Montgomery's reduction divides by 2^32 once, ten levels multiply by 2.
        down: `(2, 1023, 2)`: a square root of each node's root, the way from coefficients to leaves, from the top.
        first: `(2, 7, 1024)`: three factors for each place of the first merging of four, and the prime.
        later: `(2, 85, 7)`: the same for each block of the four later ones. With the prime at hand as a factor is, the
            compiler takes it for a 32-bit number as well and chooses the faster multiplication.
    """

    primes: Words
    scale: Words
    down: Words
    first: Words
    later: Words


@lru_cache(maxsize=1)
def tables() -> Tables:
    """Returns the constants of the transform, worked out once."""
    each = [_tables(prime) for prime in PRIMES]
    return Tables(*(np.stack(parts).astype(np.uint32) for parts in zip(*each, strict=True)))


def _tables(prime: int) -> "list[NDArray[np.int64]]":
    candidates = (pow(base, (prime - 1) // 2048, prime) for base in range(2, 100))
    eta = next(root for root in candidates if pow(root, 1024, prime) == prime - 1)

    def root(level: int, node: int) -> int:
        reversed_bits = int(f"{node:0{level}b}"[::-1], 2) if level else 0
        return pow(eta, (_LEAVES >> level) * (2 * reversed_bits + 1), prime)

    def merging(level: int, node: int) -> list[int]:
        # what four nodes of a level need to become one node two levels up
        roots = root(level, 4 * node), root(level, 4 * node + 2), root(level - 1, 2 * node)
        return [part for value in roots for part in twiddle(pow(value, -1, prime))] + [prime]

    def twiddle(value: int) -> list[int]:
        return [value, (value << 32) // prime]

    constants = [prime, -pow(prime, -1, 2**32) % 2**32, 2**32 % prime, 2**64 % prime]
    scale = twiddle(2**32 * pow(_LEAVES, -1, prime) % prime)
    down = [twiddle(root(level + 1, 2 * node)) for level in range(10) for node in range(2**level)]
    first = np.array([merging(10, node) for node in range(256)]).T.repeat(_DEGREE, axis=1)
    later = [merging(level, node) for level in (8, 6, 4, 2) for node in range(2 ** (level - 2))]
    return [np.array(constants), np.array(scale), np.array(down), first, np.array(later)]


@compiled
def _uniform(stream: Words, constants: Words) -> bool:
    """Turns a chunk's stream, `(WORDS,)`, into residues uniform modulo each prime, in place.

    A word's low 30 bits count if they are below the prime; otherwise the next spare word of which this holds replaces
    it. Returns false if the spare words ran out.
    """
    spare = 8192
    for index in range(2):
        prime = constants[index, 0]
        part = stream[4096 * index : 4096 * (index + 1)]
        refused = np.uint32(0)
        for place in range(4096):
            word = np.uint32(part[place] & np.uint32(0x3FFFFFFF))
            part[place] = word
            refused += np.uint32(word >= prime)
        if refused == 0:
            continue
        for place in range(4096):
            while part[place] >= prime:
                if spare == len(stream):
                    return False
                part[place] = np.uint32(stream[spare] & np.uint32(0x3FFFFFFF))
                spare += 1
    return True


@_inlined
def _montgomery(value: np.uint64, constants: Words) -> np.uint64:
    """Returns value / 2^32 modulo the prime, below 2 p, for a value below 2^32 p."""
    low = np.uint64(np.uint32(value)) * np.uint64(constants[1])
    return (value + np.uint64(np.uint32(low)) * np.uint64(constants[0])) >> np.uint64(32)


@_inlined
def _times(value: np.uint32, twiddle: np.uint32, companion: np.uint32, prime: np.uint32) -> np.uint32:
    """Returns value * twiddle modulo the prime, below 2 p, for any 32-bit value (Shoup)."""
    quotient = (np.uint64(value) * np.uint64(companion)) >> np.uint64(32)
    return np.uint32(np.uint64(value) * np.uint64(twiddle) - quotient * np.uint64(prime))


@_inlined
def _below(value: np.uint32, limit: np.uint32) -> np.uint32:
    """Returns value modulo the limit, for a value below twice the limit: a difference that wraps round is larger."""
    return min(value, np.uint32(value - limit))


@_inlined
def _merged(x: Any, factors: Any, prime: np.uint32) -> Any:
    """Merges the remainders of four nodes, all below 2 p, to the four quarters of one, likewise below 2 p."""
    twice = np.uint32(prime + prime)
    one, two = _below(np.uint32(x[0] + x[1]), twice), _below(np.uint32(x[2] + x[3]), twice)
    left = _times(np.uint32(x[0] + twice - x[1]), factors[0], factors[1], prime)
    right = _times(np.uint32(x[2] + twice - x[3]), factors[2], factors[3], prime)
    return (
        _below(np.uint32(one + two), twice),
        _below(np.uint32(left + right), twice),
        _times(np.uint32(one + twice - two), factors[4], factors[5], prime),
        _times(np.uint32(left + twice - right), factors[4], factors[5], prime),
    )


@_inlined
def _level(values: Words, later: Words, row: int, stride: int) -> None:
    for block in range(1024 // stride):
        w = later[row + block]
        factors = (w[0], w[1], w[2], w[3], w[4], w[5])
        start = 4 * stride * block
        for i in range(start, start + stride):
            quarters = (values[i], values[i + stride], values[i + 2 * stride], values[i + 3 * stride])
            merged = _merged(quarters, factors, w[6])
            values[i] = merged[0]
            values[i + stride] = merged[1]
            values[i + 2 * stride] = merged[2]
            values[i + 3 * stride] = merged[3]


def factor(element: NDArray[np.int64]) -> Words:
    """Returns a small ring element, ready to be multiplied: shape `(2, 7, 1024)`, with the final division by 1024.

    Args:
        element: `(4096,)`, coefficients in the order of powers, each below 2^29 in magnitude.
    """
    ready = np.empty((2, 7, _LEAVES), np.uint32)
    constants = tables()
    for index in range(2):
        prime = constants.primes[index, 0]
        _factor(element, constants.down[index], constants.scale[index], prime, ready[index])
    return ready


@compiled
def _factor(element: NDArray[np.int64], down: Words, scale: Words, prime: np.uint32, ready: Words) -> None:
    values = np.empty(4096, np.uint32)
    for place in range(4096):
        # no division: its time depends on what is divided
        values[place] = np.uint32(element[place] + (np.int64(prime) & (element[place] >> 63)))
    node = 0
    half = 2048
    while half >= 4:
        for start in range(0, 4096, 2 * half):
            root, companion = down[node, 0], down[node, 1]
            node += 1
            for place in range(start, start + half):
                product = _below(_times(values[place + half], root, companion, prime), prime)
                value = values[place]
                values[place + half] = _below(np.uint32(value + prime - product), prime)
                values[place] = _below(np.uint32(value + product), prime)
        half //= 2
    for leaf in range(1024):
        place = 256 * (leaf & 3) + leaf // 4
        root, companion = down[511 + leaf // 2, 0], down[511 + leaf // 2, 1]
        for power in range(4):
            value = _below(_times(values[4 * leaf + power], scale[0], scale[1], prime), prime)
            ready[power, place] = value
            if power:
                product = _below(_times(value, root, companion, prime), prime)
                # the root of an even leaf is listed; that of its odd neighbour is the negative
                ready[3 + power, place] = np.uint32(prime - product) if leaf & 1 else product


@compiled
def _multiply(values: Words, ready: Words, constants: Words, first: Words, later: Words, work: Words) -> None:
    """Multiplies modulo one prime, in place.

    Args:
        values: `(4096,)`, the public factor, residues below p in the order of leaves; becomes the product, in the
            order of places, below 2 p.
        ready: `(7, 1024)`, the other factor, as `factor` returns it.
        constants, first, later: the rows of `Tables` for this prime.
        work: `(4096,)`, overwritten.
    """
    for k in range(1024):
        a0, a1 = np.uint64(values[k]), np.uint64(values[1024 + k])
        a2, a3 = np.uint64(values[2048 + k]), np.uint64(values[3072 + k])
        s0, s1, s2, s3 = np.uint64(ready[0, k]), np.uint64(ready[1, k]), np.uint64(ready[2, k]), np.uint64(ready[3, k])
        r1, r2, r3 = np.uint64(ready[4, k]), np.uint64(ready[5, k]), np.uint64(ready[6, k])
        # four products stay below 4 p^2 < 2^32 p
        work[4 * k] = np.uint32(_montgomery(a0 * s0 + a1 * r3 + a2 * r2 + a3 * r1, constants))
        work[4 * k + 1] = np.uint32(_montgomery(a0 * s1 + a1 * s0 + a2 * r3 + a3 * r2, constants))
        work[4 * k + 2] = np.uint32(_montgomery(a0 * s2 + a1 * s1 + a2 * s0 + a3 * r3, constants))
        work[4 * k + 3] = np.uint32(_montgomery(a0 * s3 + a1 * s2 + a2 * s1 + a3 * s0, constants))
    for k in range(1024):
        quarters = (work[k], work[1024 + k], work[2048 + k], work[3072 + k])
        factors = (first[0, k], first[1, k], first[2, k], first[3, k], first[4, k], first[5, k])
        merged = _merged(quarters, factors, first[6, k])
        values[4 * k] = merged[0]
        values[4 * k + 1] = merged[1]
        values[4 * k + 2] = merged[2]
        values[4 * k + 3] = merged[3]
    _level(values, later, 0, 16)
    _level(values, later, 64, 64)
    _level(values, later, 80, 256)
    _level(values, later, 84, 1024)


def mask(public: Words, ready: Words, message: NDArray[np.int64], ciphertext: Words) -> None:
    """Writes a * s + message, chunk by chunk.

    Args:
        public: `(chunks, WORDS)`, a's stream; destroyed.
        ready: s, as `factor` returns it.
        message: `(chunks or more, 4096)`, in the order of places, from -q to q / 2.
        ciphertext: `(chunks, 2, 4096)`, residues below the primes.

    Raises:
        ProtocolError: a stream has too few words in range.
    """
    constants = tables()
    if not _mask(public, ready, constants.primes, constants.first, constants.later, message, ciphertext):
        raise ProtocolError("the public stream has too few words in range")


@compiled
def _mask(
    public: Words,
    ready: Words,
    primes: Words,
    first: Words,
    later: Words,
    message: NDArray[np.int64],
    ciphertext: Words,
) -> bool:
    work = np.empty(4096, np.uint32)
    for chunk in range(len(ciphertext)):
        if not _uniform(public[chunk], primes):
            return False
        for index in range(2):
            constants = primes[index]
            product = public[chunk, 4096 * index : 4096 * (index + 1)]
            _multiply(product, ready[index], constants, first[index], later[index], work)
            prime = constants[0]
            twice = np.uint32(prime + prime)
            for place in range(4096):
                # q, which is no change, makes it positive
                value = np.uint64(message[chunk, place] + MODULUS)
                high, low = value >> np.uint64(32), np.uint64(np.uint32(value))
                folded = low * np.uint64(constants[2]) + high * np.uint64(constants[3])
                residue = _below(np.uint32(_montgomery(folded, constants)), prime)
                ciphertext[chunk, index, place] = _below(_below(np.uint32(product[place] + residue), twice), prime)
    return True


def unmask(public: Words, ready: Words, ciphertext: Words, message: NDArray[np.int64]) -> None:
    """Writes ciphertext - a * s to `message`, from -q / 2 to q / 2; arguments and errors are those of `mask`."""
    constants = tables()
    if not _unmask(public, ready, constants.primes, constants.first, constants.later, ciphertext, message):
        raise ProtocolError("the public stream has too few words in range")


@compiled
def _unmask(
    public: Words,
    ready: Words,
    primes: Words,
    first: Words,
    later: Words,
    ciphertext: Words,
    message: NDArray[np.int64],
) -> bool:
    work = np.empty(4096, np.uint32)
    rest = np.empty((2, 4096), np.uint32)
    other = primes[1, 0]
    for chunk in range(len(ciphertext)):
        if not _uniform(public[chunk], primes):
            return False
        for index in range(2):
            prime = primes[index, 0]
            twice = np.uint32(prime + prime)
            product = public[chunk, 4096 * index : 4096 * (index + 1)]
            _multiply(product, ready[index], primes[index], first[index], later[index], work)
            for place in range(4096):
                difference = np.uint32(ciphertext[chunk, index, place] + twice - product[place])
                rest[index, place] = _below(_below(difference, twice), prime)
        for place in range(4096):
            # Chinese remainders; three times a prime fits into 32 bits
            gap = np.uint32(rest[1, place] + other + other - rest[0, place])
            high = _below(_times(gap, _INVERSE, _COMPANION, other), other)
            value = np.int64(rest[0, place]) + np.int64(high) * PRIMES[0]
            message[chunk, place] = value - MODULUS if value > MODULUS // 2 else value
    return True


def reduced(ciphertext: Words) -> bool:
    """Returns whether all entries of a `(chunks, 2, 4096)` array are residues below their primes."""
    return bool(_reduced(ciphertext, tables().primes))


@compiled
def _reduced(ciphertext: Words, primes: Words) -> bool:
    above = np.uint32(0)
    for chunk in range(len(ciphertext)):
        for index in range(2):
            prime = primes[index, 0]
            for place in range(4096):
                above |= np.uint32(ciphertext[chunk, index, place] >= prime)
    return bool(above == 0)


def add_in_place(total: Words, ciphertext: Words) -> None:
    """Adds residues to residues, both `(chunks, 2, 4096)`, modulo their primes."""
    _add(total, ciphertext, tables().primes)


@compiled
def _add(total: Words, ciphertext: Words, primes: Words) -> None:
    for chunk in range(len(total)):
        for index in range(2):
            prime = primes[index, 0]
            for place in range(4096):
                value = np.uint32(total[chunk, index, place] + ciphertext[chunk, index, place])
                total[chunk, index, place] = _below(value, prime)
