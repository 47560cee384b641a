"""Compression inside the sum: a few bits for each entry of a long vector, and nothing lost of the single numbers.

    clip -> scale down to the norm -> random signs -> Hadamard rotation -> dithered rounding -> secure sum

Each site sends levels, whole numbers of at most L = 2^(levels-1) - 1 in magnitude. Residues are `bits` wide, the
smallest width with n L <= 2^(bits-1) - 1 for n sites, so that no sum can wrap: 15 sites at 8 bits need 12.

A rotation spreads a vector evenly over its entries whichever of them were large, so that one public range serves
all. It is a product of small Hadamard matrices, whose orders need not be powers of two: 12, 20, 44, 60 and many more
will do, and a vector of 10,000 entries or more grows by about 3 %, not by up to twice. Every entry of the whole
matrix has the same magnitude, so each rotated entry of a vector of norm r has the variance r^2 / padded length
over the signs, even if all of r stands in one layer.

Error. With the step s between levels, dithered rounding is unbiased up to the arithmetic's own rounding; its variance
is at most s^2 / 4 for each entry and s^2 / 6 where the entries spread over many levels. With rotation
s = 5 norm / (L sqrt(padded length)): for a vector as long as `norm` the normalised mean squared error is
25 / (6 L^2), or 2.6e-4 at 8 bits. It grows as the square of norm / length for a shorter one.

Bias. Two steps are not unbiased. A vector longer than `norm` is scaled down. A rotated entry beyond 5 sigma is clipped,
sigma being the root of its variance; 5 is a rule of thumb. For entries near to normal, as those of a vector with many
entries that matter, 6 in ten million are clipped and the squared error grows by 4e-8 sigma^2 for each entry, a
six-thousandth of the rounding error at 8 bits; from 15 bits on it is the larger part. For no vector is an entry
clipped with a chance above 2 exp(-25/2), 7.5 in a million (Hoeffding), if the vector does not depend on the signs.

Trust: signs, norm and levels are public, and a site's levels are seen by none but the site. Whoever knows the signs
before training may craft a vector that is clipped, which spoils that one contribution and no other.

Source: Suresh, Yu, Kumar and McMahan (2017), Distributed Mean Estimation with Limited Communication, "stochastic
rotated quantization", with a public range in place of each site's own minimum and maximum, which no secure sum can
carry. Paley (1933), On Orthogonal Matrices: the Hadamard matrices of order q + 1.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.events import DpEvent
from cohortium.core.layout import Block, Floats, Layout, size
from cohortium.core.random import Randomness
from cohortium.secagg.quantise import FixedPoint, Residues, fixed_point, residue_kind, signed_kind

Reals = NDArray[np.floating[Any]]

_SIGMAS = 5.0
_EXACT_BITS = 53
"""Sums of the other blocks have at most as many digits as a float holds."""
_PLAUSIBLE = 1e100
"""Bounds and norms beyond this, or below its inverse, could overflow or vanish when squared."""
_LARGEST = float(np.finfo(np.float64).max)
_MOST_SINGLE = 12
"""Up to this many bits a level in single precision leaves the dither 13 bits or more after the point."""

_PRIMES = (3, 7, 11, 19, 23, 31, 43, 47, 59, 67, 71, 79, 83, 103, 107, 127)
_MOST_ORDER = 128
_ORDERS = sorted({1, 2} | {q + 1 << k for q in _PRIMES for k in range(6) if q + 1 << k <= _MOST_ORDER})
"""Orders of Hadamard matrices that Paley's first construction and doubling reach."""
_USUAL_ORDER = 40
"""Above it a further, smaller factor is faster, and more factors come nearer to a given length."""
_PADDING_PERCENT = 3


@dataclass(frozen=True)
class Part:
    """One compressed block of a vector.

    Attributes:
        block: the block.
        start: where it begins in the vector.
        norm: its greatest Euclidean norm, in the block's unit; None where only its bound counts.
        orders: the Hadamard matrices whose Kronecker product rotates it; empty without rotation.
        gain: levels for each unit, before the matrices of plus and minus ones.
    """

    block: Block
    start: int
    norm: float | None
    orders: tuple[int, ...]
    gain: float

    @property
    def stop(self) -> int:
        """Where the block ends in the vector."""
        return self.start + self.block.size

    @property
    def length(self) -> int:
        """How many levels stand for the block."""
        return math.prod(self.orders) if self.orders else self.block.size

    @property
    def unit(self) -> float:
        """What a level is worth after the inverse rotation, whose matrices of ones are `length` times too large."""
        return 1 / (self.gain * math.prod(self.orders))


@dataclass(frozen=True)
class Compressed:
    """The stage that turns a packed vector into narrow residues. Build it with `compressed`.

    Levels of the compressed blocks come first, in the layout's order, then the digits of all other numbers.

    Attributes:
        layout: the blocks of a vector.
        bits: the width of a residue of the sum.
        levels: the width of one site's entry, 2 to 16 bits.
        signs: the public key from which the rotation's signs come.
        parts: the compressed blocks.
        spans: where the other numbers stand in the vector, as pairs of start and stop.
        exact: the stage for those.
        digits: how many digits of `levels` - 1 bits and a sign one of them has.
    """

    layout: Layout
    bits: int
    levels: int
    signs: Randomness
    parts: tuple[Part, ...]
    spans: tuple[tuple[int, int], ...]
    exact: FixedPoint
    digits: int

    @property
    def length(self) -> int:
        """How many residues stand for one vector."""
        return sum(part.length for part in self.parts) + self.digits * self.exact.length

    def encode(self, vector: Floats, randomness: Randomness) -> Residues:
        """Returns the site's vector as residues, shape `(length,)`, in two's complement.

        The same arguments give the same residues on the same machine; on another one, floating point may take a
        rotated entry to a neighbouring level.

        Raises:
            ProtocolError: an entry is NaN or infinite, or beyond the bound of a block that is not clipped; nothing
                is encoded.
        """
        if vector.shape != (size(self.layout),) or vector.dtype != np.float64:
            raise ProtocolError(f"a vector of shape {vector.shape} and type {vector.dtype} does not fit its layout")
        signed = np.empty(self.length, dtype=signed_kind(self.bits))
        generator = randomness.child("dither").generator()
        start = 0
        for part in self.parts:
            stop = start + part.length
            scaled = _rotated(part, self._scaled(part, vector[part.start : part.stop]))
            signed[start:stop] = _rounded(scaled, self.levels, generator)
            start = stop
        others = self.exact.encode(np.concatenate([np.empty(0), *(vector[slice(*span)] for span in self.spans)]))
        numbers = others.view(np.int64)
        width, rows = self.levels - 1, signed[start:].reshape(self.digits, self.exact.length)
        for place in range(self.digits):
            rows[place] = np.sign(numbers) * (np.abs(numbers) >> width * place & 2**width - 1)
        return signed.view(residue_kind(self.bits))

    def decode(self, total: Residues) -> Floats:
        """Returns the sum of the sites' vectors that `total`, a sum of residues, stands for.

        The inverse rotation adds whole numbers below 2^53, which is exact in every order, so that all machines agree.

        Raises:
            ProtocolError: `total` has another shape or type than `encode` returns.
        """
        if total.shape != (self.length,) or total.dtype != residue_kind(self.bits):
            raise ProtocolError(f"a sum of shape {total.shape} and type {total.dtype} does not fit its layout")
        signed, vector = total.view(signed_kind(self.bits)), np.empty(size(self.layout))
        start = 0
        for part in self.parts:
            stop = start + part.length
            levels: Reals = signed[start:stop].astype(np.float64)
            levels = _rotated(part, levels, back=True)[: part.block.size]
            vector[part.start : part.stop] = self._signed(part, levels) * part.unit
            start = stop
        rows = signed[start:].reshape(self.digits, self.exact.length).astype(np.int64)
        # a partial sum may wrap at 64 bits, but the whole one fits and so comes out right
        numbers = np.add.reduce(rows << (self.levels - 1) * np.arange(self.digits)[:, None], axis=0)
        others, start = self.exact.decode(numbers.view(residue_kind(_EXACT_BITS))), 0
        for first, last in self.spans:
            vector[first:last] = others[start : start + last - first]
            start += last - first
        return vector

    def events(self) -> tuple[DpEvent, ...]:
        """Rounding gives no privacy that we would vouch for, and costs none."""
        return ()

    def _scaled(self, part: Part, values: Floats) -> Reals:
        """Returns the block clipped, scaled down to its norm, in levels, with its signs and padded by zeros."""
        # a NaN fails both comparisons
        least, most = np.minimum.reduce(values), np.maximum.reduce(values)
        if not (least >= -_LARGEST and most <= _LARGEST):
            raise ProtocolError(f"statistic '{part.block.name}' is not finite")
        bound, gain = part.block.bound, part.gain
        if least < -bound or most > bound:
            values = np.clip(values, -bound, bound)
        if part.norm is not None:
            gain *= part.norm / max(part.norm, math.sqrt(float(values @ values)))
        scaled: Reals = np.zeros(part.length, dtype=np.float32 if self.levels <= _MOST_SINGLE else np.float64)
        inside = scaled[: part.block.size]
        np.multiply(values, gain, out=inside, casting="same_kind")
        self._signed(part, inside)
        return scaled

    def _signed(self, part: Part, values: Reals) -> Reals:
        """Multiplies in place by the rotation's signs; returns the same array."""
        if part.orders:
            # raw words, since numpy keeps them the same from version to version, unlike what it makes of them
            source = self.signs.child("signs", part.block.name).generator().bit_generator
            words = source.random_raw(-(-values.size // 64)).astype("<u8")
            ones = np.unpackbits(words.view(np.uint8), count=values.size).view(np.int8)
            np.multiply(values, 1 - 2 * ones, out=values)
        return values


def _rounded(scaled: Reals, levels: int, generator: np.random.Generator) -> Reals:
    """Rounds in place to the level below or above, the nearer the likelier, never beyond the last; returns it."""
    kind: Any = scaled.dtype
    scaled += generator.random(scaled.size, dtype=kind)
    np.floor(scaled, out=scaled)
    # last of all, so that no rounding before it can lead out of the range; a NaN cannot come this far
    most = 2 ** (levels - 1) - 1
    return np.clip(scaled, -most, most, out=scaled)


def _rotated(part: Part, values: Reals, back: bool = False) -> Reals:
    """Returns the product of the Kronecker product of the part's matrices, or its transpose, and `values`.

    Each matrix takes the first axis and leaves it last, so that one multiplication of two matrices does for it and
    all axes are in their place again in the end.
    """
    for order in part.orders:
        matrix = _hadamard(order).astype(values.dtype)
        values = (values.reshape(order, -1).T @ (matrix if back else matrix.T)).reshape(-1)
    return values


@lru_cache(maxsize=len(_ORDERS))
def _hadamard(order: int) -> NDArray[np.int8]:
    """Returns a matrix of plus and minus ones, shape `(order, order)`, whose rows are orthogonal."""
    if order == 1:
        return np.ones((1, 1), dtype=np.int8)
    prime = order - 1
    if prime not in _PRIMES:
        return np.kron(np.array([[1, 1], [1, -1]], dtype=np.int8), _hadamard(order // 2))
    character = np.full(prime, -1, dtype=np.int8)
    character[[number * number % prime for number in range(prime)]] = 1
    character[0] = 0
    matrix = np.ones((order, order), dtype=np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    matrix[1:, 1:] += np.eye(prime, dtype=np.int8)
    return matrix


@lru_cache(maxsize=64)
def _orders(length: int) -> tuple[int, ...]:
    """Returns orders whose product is at least `length`: of those with little padding the fastest, else the least."""
    count = 1
    while _USUAL_ORDER**count < length:
        count += 1
    # work grows as the sum of the orders
    ranked = ((_rank(orders, length), orders) for orders in _products(length, count, 0))
    return min(ranked)[1]


def _rank(orders: tuple[int, ...], length: int) -> tuple[bool, int, int]:
    padded = math.prod(orders)
    wasteful = 100 * padded > (100 + _PADDING_PERCENT) * length
    return wasteful, padded if wasteful else sum(orders), padded


def _products(length: int, count: int, first: int) -> list[tuple[int, ...]]:
    """Returns ascending orders from the `first` on, `count` of them, with a product from `length` to twice that."""
    found: list[tuple[int, ...]] = []
    for index in range(first, len(_ORDERS)):
        order = _ORDERS[index]
        if order**count > 2 * length:
            break
        rest = -(-length // order)
        if count > 1:
            found += [(order, *others) for others in _products(rest, count - 1, index)]
        elif order >= length:
            found.append((order,))
    return found


@lru_cache(maxsize=64)
def compressed(layout: Layout, sites: int, levels: int, rotation: bool, norm: float | None, signs: bytes) -> Compressed:
    """Returns the stage for vectors of `layout` from `sites` sites.

    Blocks that are clipped and no single numbers are compressed, all others exact. Where `norm` is given, each
    compressed block is scaled down to that Euclidean norm, with rotation or without.

    Raises:
        ValueError: `signs`, the public key of the rotation's signs, has not 32 bytes.
        StudyError: `levels` is not from 2 to 16, `norm` is missing where there is a rotation, or a range proof fails.
    """
    if not 2 <= levels <= 16:
        raise StudyError(f"entries of {levels} bits are not offered: choose from 2 to 16 bits for compression")
    if rotation and norm is None:
        raise StudyError(
            "compression with rotation needs a public range: set aggregation.compression.norm to the largest "
            "Euclidean norm that an update of one site should keep"
        )
    if norm is not None and not 1 / _PLAUSIBLE <= norm <= _PLAUSIBLE:
        raise StudyError(f"aggregation.compression.norm: {norm:g} is no plausible norm; it must be a positive number")
    parts: list[Part] = []
    spans: list[tuple[int, int]] = []
    others: list[Block] = []
    start = 0
    for block in layout:
        if block.excess == "clip" and block.shape != () and block.size:
            parts.append(_part(block, start, levels, rotation, norm))
        else:
            others.append(block)
            spans.append((start, start + block.size))
        start += block.size
    try:
        exact = fixed_point(tuple(others), sites, _EXACT_BITS)
    except StudyError as error:
        # its advice is for residues without compression
        reason = str(error).partition(";")[0]
        raise StudyError(f"{reason}; lower cohort.maximum or leave aggregation.compression out") from error
    # what the exact stage proves of one site's numbers
    largest = (2 ** (_EXACT_BITS - 1) - 1) // sites
    digits = -(-largest.bit_length() // (levels - 1))
    bits = (sites * (2 ** (levels - 1) - 1)).bit_length() + 1
    return Compressed(layout, bits, levels, Randomness(signs), tuple(parts), tuple(spans), exact, digits)


def _part(block: Block, start: int, levels: int, rotation: bool, norm: float | None) -> Part:
    if not 1 / _PLAUSIBLE <= block.bound <= _PLAUSIBLE:
        raise StudyError(f"the range proof fails: statistic '{block.name}' may reach {block.bound:.3g} at a site")
    most = 2 ** (levels - 1) - 1
    if not rotation or norm is None:
        return Part(block, start, norm, (), most / (block.bound if norm is None else min(block.bound, norm)))
    orders = _orders(block.size)
    # no rotated entry is larger than the whole vector, which is sqrt(length) sigmas
    return Part(block, start, norm, orders, most / (min(_SIGMAS, math.sqrt(math.prod(orders))) * norm))
