"""Shamir's secret sharing of many small numbers at once: any `threshold` shares give them back, fewer tell nothing.

Numbers live in GF(65521), the largest prime field whose elements fit in 16 bits; a secret of 32 bytes is 18 numbers of
15 bits. Sharing and opening are products of small matrices, exact in float64: entries are below 2^16 and rows shorter
than 2^20, so no sum of products reaches 2^53.

Source: Shamir, "How to Share a Secret", Communications of the ACM 22 (11), 1979.

Trust: whoever holds `threshold` shares holds the secret; whoever holds fewer knows its length and no more, whatever
their computing power. Shares are not signed: a false share gives a false secret, which `reconstruct` notices if there
are more shares than needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import ProtocolError
from cohortium.core.random import Randomness
from cohortium.secagg.stream import keystream

PRIME = 65521
Words = NDArray[np.uint16]
"""Numbers below `PRIME`: a secret, or one site's share of it, in any shape."""

SECRET_BYTES = 32
SECRET_WORDS = 18
"""Numbers that hold a secret of 32 bytes."""
_DIGIT = 15


def share(secret: Words, holders: int, threshold: int, randomness: Randomness, prime: int = PRIME) -> Words:
    """Returns the shares of a secret, shape `(holders, *secret.shape)`; holder i has the one at place i.

    Source: Shamir 1979, section 2: the values at 1, 2, ... of a random polynomial of degree `threshold` - 1 whose
    constant term is the secret.
    """
    if not 1 <= threshold <= holders < prime:
        raise ValueError(f"{threshold} of {holders} shares do not make a scheme modulo {prime}")
    flat = secret.reshape(1, -1)
    rest = _uniform((threshold - 1) * flat.shape[1], randomness, prime).reshape(threshold - 1, flat.shape[1])
    places = _powers(np.arange(1, holders + 1), threshold, prime)
    return _product(places, np.concatenate([flat, rest]), prime).reshape(holders, *secret.shape)


def reconstruct(shares: Mapping[int, Words], threshold: int, prime: int = PRIME) -> Words:
    """Returns the secret from the shares of at least `threshold` holders, numbered from 0.

    Raises:
        ProtocolError: there are too few, or more than needed that do not belong to one secret.
    """
    if len(shares) < threshold:
        raise ProtocolError(f"{len(shares)} shares were given, and it takes {threshold}")
    holders = sorted(shares)
    known, checked = holders[:threshold], holders[threshold:]
    values = np.stack([shares[holder] for holder in known])
    rows = _product(_lagrange(known, [-1, *checked], prime), values.reshape(threshold, -1), prime)
    for row, holder in zip(rows[1:], checked, strict=True):
        if not np.array_equal(row, shares[holder].ravel()):
            raise ProtocolError("the shares do not belong together: at least one site gave a false one")
    secret: Words = rows[0].reshape(values.shape[1:])
    return secret


def to_words(secrets: Sequence[bytes]) -> Words:
    """Returns secrets of 32 bytes as numbers of 15 bits, shape `(len(secrets), 18)`."""
    bits = np.unpackbits(np.frombuffer(b"".join(secrets), np.uint8).reshape(-1, SECRET_BYTES), axis=1)
    digits = np.pad(bits, ((0, 0), (0, SECRET_WORDS * _DIGIT - bits.shape[1]))).reshape(-1, SECRET_WORDS, _DIGIT)
    return (digits @ (1 << np.arange(_DIGIT - 1, -1, -1))).astype(np.uint16)


def from_words(words: Words) -> list[bytes]:
    """Returns what `to_words` was given."""
    bits = (words.reshape(-1, SECRET_WORDS, 1) >> np.arange(_DIGIT - 1, -1, -1)) & 1
    rows = bits.reshape(-1, SECRET_WORDS * _DIGIT)[:, : 8 * SECRET_BYTES]
    return [row.tobytes() for row in np.packbits(rows, axis=1)]


def _uniform(count: int, randomness: Randomness, prime: int) -> Words:
    """Returns numbers below `prime`, exactly uniform: what is beyond is drawn again."""
    kept = np.empty(0, np.uint16)
    key, drawn = randomness.bytes(32), 0
    limit = (1 << 16) // prime * prime
    while len(kept) < count:
        more = (count - len(kept)) * (1 << 16) // limit + 64
        stream = np.frombuffer(keystream(key, 2 * (drawn + more)), "<u2")[drawn:]
        drawn += more
        kept = np.concatenate([kept, stream[stream < limit] % np.uint16(prime)])
    return kept[:count]


def _powers(points: NDArray[np.int64], count: int, prime: int) -> NDArray[np.int64]:
    columns = [np.ones_like(points)]
    for _ in range(count - 1):
        columns.append(columns[-1] * points % prime)
    return np.stack(columns, axis=1)


def _lagrange(known: Sequence[int], wanted: Sequence[int], prime: int) -> NDArray[np.int64]:
    """Returns the weights with which values at the known holders give those at the wanted ones; -1 is the secret."""
    weights = np.empty((len(wanted), len(known)), np.int64)
    for column, place in enumerate(known):
        others = [other for other in known if other != place]
        below = 1
        for other in others:
            below = below * (place - other) % prime
        inverse = pow(below, -1, prime)
        for row, point in enumerate(wanted):
            above = inverse
            for other in others:
                above = above * (point - other) % prime
            weights[row, column] = above
    return weights


def _product(left: NDArray[Any], right: NDArray[Any], prime: int) -> Words:
    return (left.astype(np.float64) @ right.astype(np.float64) % prime).astype(np.uint16)
