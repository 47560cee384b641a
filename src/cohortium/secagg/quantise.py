"""Fixed point: real numbers to integers modulo 2^bits and back, with a proof that no sum can overflow.

Range proof. A block with bound B at n sites uses the scale s, a power of two, only if

    n * (B * s + 1/2) <= 2^(bits-1) - 1,

so that the rounded values of all sites add up inside the signed range whatever the records say. A block for which
not even s = 1 does is refused. The error of a sum is at most n / (2 s) for each entry; from 54 bits on, where a total
may have more digits than a float, half a unit in its last place comes on top.

A block whose sum must carry noise (`cohortium.privacy.noise`) is rounded down after a dither, uniform in 0..1 and
independent of the data, is added: for any two data sets the rounded vectors then differ like a rounding at random of
their difference, which is what the noise is measured by. Rounding so adds up to 1 instead of 1/2, and each site's noise
adds up to a margin that is proved to hold, so that such a block needs n * (B * s + 1 + margin(s)) <= 2^(bits-1) - 1.

Residues of `bits` bits are two's complement numbers in the smallest of 16, 32 and 64 bits that holds them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.events import DpEvent
from cohortium.core.layout import Block, Floats, Layout, size
from cohortium.core.random import Randomness

Residues = NDArray[np.unsignedinteger[Any]]

_WIDER = {25: " or set aggregation.bits: 50", 32: " or set aggregation.bits: 64"}
_LARGEST = float(np.finfo(np.float64).max)
_AT_ONCE = 1 << 14
"""Entries taken at a time, so that they stay in the processor's cache."""
_SLACK = 1e-9
"""Relative excess over a bound that rounding in floating point explains; it is clipped, not refused."""
_MOST_EXPONENT = 1000
"""A larger scale, for a bound next to nothing, would be infinite in floating point."""


@dataclass(frozen=True)
class FixedPoint:
    """The stage that turns a packed vector into residues. Build it with `fixed_point`.

    `exponents[i]` is the binary logarithm of block i's scale, `margins[i]` the most, in steps of the scale, that one
    site's noise adds to an entry.
    """

    layout: Layout
    sites: int
    bits: int
    exponents: tuple[int, ...]
    margins: tuple[int, ...]

    @property
    def length(self) -> int:
        """How many residues stand for one vector."""
        return size(self.layout)

    @property
    def precision(self) -> float:
        """The largest error that quantising and floating point leave in an entry, relative to its bound."""
        pairs = zip(self.layout, self.exponents, strict=True)
        return max(_error(block) * 2.0**-exponent / block.bound for block, exponent in pairs) + 2.0**-53

    def encode(self, vector: Floats, randomness: Randomness | None = None) -> Residues:
        """Returns the site's vector as residues, shape `(length,)`. Only blocks that get noise take randomness.

        Raises:
            ProtocolError: an entry is NaN, infinite or beyond its block's bound; nothing is encoded.
        """
        if vector.shape != (size(self.layout),) or vector.dtype != np.float64:
            raise ProtocolError(f"a vector of shape {vector.shape} and type {vector.dtype} does not fit its layout")
        signed = np.empty(vector.shape, signed_kind(self.bits))
        scaled = np.empty(min(_AT_ONCE, len(vector)))
        first, drawn = 0, None
        for index, (block, exponent) in enumerate(zip(self.layout, self.exponents, strict=True)):
            scale, bound, last = 2.0**exponent, block.bound, first + block.size
            if block.noise is not None:
                assert randomness is not None
                drawn = randomness.child("dither", index).generator()
            for start in range(first, last, _AT_ONCE):
                part = vector[start : min(start + _AT_ONCE, last)]
                # a NaN fails both comparisons
                if not (np.minimum.reduce(part) >= -bound and np.maximum.reduce(part) <= bound):
                    part = _clipped(block, part)
                rounded = np.multiply(part, scale, out=scaled[: len(part)])
                if block.noise is None:
                    np.rint(rounded, out=rounded)
                else:
                    assert drawn is not None
                    # the same as rounding down after adding 1 - u, without a sum that floating point would round
                    whole = np.floor(rounded)
                    rounded = whole + (drawn.random(len(part)) < rounded - whole)
                signed[start : start + len(part)] = rounded
            first = last
        return signed.view(residue_kind(self.bits))

    def decode(self, total: Residues) -> Floats:
        """Returns the sum of the sites' vectors that `total`, a sum of residues, stands for.

        Raises:
            ProtocolError: an entry is beyond what the sites can add up to: the sum is noise, of masks that did not
                cancel or of false shares. Few entries may hide it, many will not.
        """
        signed = total.view(signed_kind(self.bits)).astype(np.float64)
        start = 0
        for block, exponent, margin in zip(self.layout, self.exponents, self.margins, strict=True):
            part = signed[start : start + block.size]
            most = self.sites * (block.bound * 2.0**exponent + _error(block) + margin) * (1 + _SLACK)
            if not (np.minimum.reduce(part, initial=0.0) >= -most and np.maximum.reduce(part, initial=0.0) <= most):
                raise ProtocolError(
                    f"the sum was refused: statistic '{block.name}' is beyond what {self.sites} sites can add up to; "
                    "a site heard other broadcasts than the rest, or gave a false answer"
                )
            part *= 2.0**-exponent
            start += block.size
        return signed

    def events(self) -> tuple[DpEvent, ...]:
        """Rounding gives no privacy and costs none."""
        return ()


def _error(block: Block) -> float:
    """Returns the most that rounding changes an entry, in steps of the scale."""
    return 0.5 if block.noise is None else 1.0


def _clipped(block: Block, part: Floats) -> Floats:
    edge = block.bound * (1 + _SLACK) if block.excess == "refuse" else _LARGEST
    if not (np.abs(part) <= edge).all():
        raise ProtocolError(f"statistic '{block.name}' is not finite or exceeds its bound {block.bound:g}")
    return np.clip(part, -block.bound, block.bound)


Margin = Callable[[Block, int], int]
"""The most that one site's noise adds to an entry of a block, in steps of a scale of the given exponent."""


def no_margin(block: Block, exponent: int) -> int:
    """The margin of sums without noise."""
    return 0


@lru_cache(maxsize=256)
def fixed_point(layout: Layout, sites: int, bits: int, margin: Margin = no_margin) -> FixedPoint:
    """Returns the stage for vectors of `layout` from `sites` sites.

    Raises:
        StudyError: the range proof fails.
    """
    exponents = tuple(_exponent(block, sites, bits, margin) for block in layout)
    margins = tuple(margin(block, exponent) for block, exponent in zip(layout, exponents, strict=True))
    return FixedPoint(layout, sites, bits, exponents, margins)


def _exponent(block: Block, sites: int, bits: int, margin: Margin) -> int:
    room = Fraction(2 ** (bits - 1) - 1, sites) - Fraction(_error(block))
    fits = math.isfinite(block.bound) and 0 < block.bound <= room
    if fits:
        # exact numbers, since a float rounds 2^63 - 1 up; the largest power of two that goes into their quotient
        exponent = min(math.floor(room / Fraction(block.bound)).bit_length() - 1, _MOST_EXPONENT)
        while exponent >= 0:
            if Fraction(block.bound) * 2**exponent + margin(block, exponent) <= room:
                return exponent
            exponent -= 1
    noisy = "" if block.noise is None else ", its noise included,"
    raise StudyError(
        f"the range proof fails: statistic '{block.name}' may reach {block.bound:.3g} at each of {sites} sites, "
        f"and their sum{noisy} could overflow {bits} bits; lower cohort.maximum{_WIDER.get(bits, '')}"
    )


def residue_kind(bits: int) -> "np.dtype[np.unsignedinteger[Any]]":
    """Returns the type of residues that are `bits` (1 to 64) bits wide: 16, 32 or 64 bits, little-endian."""
    return np.dtype("<u2" if bits <= 16 else "<u4" if bits <= 32 else "<u8")


def signed_kind(bits: int) -> "np.dtype[np.signedinteger[Any]]":
    """Returns the type under which such residues read as positive and negative numbers."""
    return np.dtype("<i2" if bits <= 16 else "<i4" if bits <= 32 else "<i8")
