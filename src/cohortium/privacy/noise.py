"""The stage that adds a site's noise share to its integers, so that the sum, and nothing less, carries enough noise.

    a share's deviation = multiplier * sensitivity / sqrt(honest),
    sensitivity = copies * rounded_norm(factor * norm * scale, dimension, beta)

`honest` shares are certain to be in the sum and unknown to an attacker. Shares beyond those make the sum no less
private. Blocks without noise pass unchanged.

Residues. A share is added modulo the words' width, and nothing is masked: numbers narrower than their words, of 25 or
50 bits say, are two's complement in the whole word before and after, since the quantiser's range proof counts
`margin` in. That is what encryption needs, which refuses what is wider, and what masks take, which send the low bits.

Trust: see `cohortium.privacy.gaussian` for what a site's key gives away. A site that adds no share, or a smaller one,
cannot be told from an honest one: count it as colluding. The guarantee is for units of honest sites, against whoever
sees the sum, and as many shares as were assumed lost or colluding.
"""

import math
from dataclasses import dataclass

import numpy as np

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.events import DpEvent, Events, Gaussian, Sampled, Slack
from cohortium.core.layout import Block, Layout, size
from cohortium.core.random import Randomness
from cohortium.core.stage import Vector
from cohortium.privacy.bounds import aliasing, precision, rounded_norm
from cohortium.privacy.gaussian import LARGEST, SMALLEST, largest, segments

_ROUNDED_UP = 1 + 2.0**-50
"""More than floating point takes off a deviation."""


@dataclass(frozen=True)
class NoiseShares:
    """The stage that adds noise shares. Build it with `noise_shares`.

    Attributes:
        layout: the blocks of the vector.
        bits: how wide its residues are.
        deviations: a share's standard deviation for each block, in steps of its scale; 0 where none is added.
        cost: what releasing one sum costs.
    """

    layout: Layout
    bits: int
    deviations: tuple[float, ...]
    cost: Events

    def encode(self, vector: Vector, randomness: Randomness) -> Vector:
        """Returns the residues with the site's share added, shape `(size(layout),)`.

        Raises:
            ProtocolError: the vector has another length or type.
        """
        kind = np.dtype("<u2" if self.bits <= 16 else "<u4" if self.bits <= 32 else "<u8")
        if vector.shape != (size(self.layout),) or vector.dtype != kind:
            raise ProtocolError(f"a vector of shape {vector.shape} and type {vector.dtype} does not fit its layout")
        noisy = vector.copy()
        start = 0
        for index, (block, deviation) in enumerate(zip(self.layout, self.deviations, strict=True)):
            if deviation:
                place = start
                for share in segments(deviation, block.size, randomness.child("noise", index)):
                    noisy[place : place + len(share)] += share.astype(kind)
                    place += len(share)
            start += block.size
        return noisy

    def decode(self, total: Vector) -> Vector:
        """Returns the total as it is: its noise is there to stay."""
        return total

    def events(self) -> tuple[DpEvent, ...]:
        """Returns the cost of one sum: its noise, and the probability that its bounds fail."""
        return self.cost


def noise_shares(
    layout: Layout, exponents: tuple[int, ...], bits: int, honest: int, factor: int, copies: int, beta: float
) -> NoiseShares:
    """Returns the stage for sums in which each block carries the noise that its layout asks for.

    Args:
        layout: the blocks; at least those with noise are rounded with a dither.
        exponents: the binary logarithm of each block's scale.
        bits: how wide residues are.
        honest: how many shares are certain to be in the sum and unknown to an attacker.
        factor: 2 where neighbours differ by replacing a unit, whose two contributions may be opposite; otherwise 1.
        copies: at how many sites one unit may be at most. Each rounds for itself.
        beta: the probability that the bound on rounding fails, for each block and site.

    Raises:
        StudyError: a share would be too small, against the steps of the scale, to be proved private.
    """
    deviations, slack = [], 0.0
    for block, exponent in zip(layout, exponents, strict=True):
        deviation = _deviation(block, exponent, honest, factor, copies, beta)
        deviations.append(deviation)
        if block.noise is None:
            continue
        if not SMALLEST <= deviation <= LARGEST:
            raise StudyError(_unfit(block, deviation))
        slack += aliasing(deviation, honest, block.size)
        slack += precision(deviation, honest, block.size, block.noise.multiplier)
        norm = factor * block.noise.norm * 2.0**exponent
        if rounded_norm(norm, block.size, beta) < rounded_norm(norm, block.size, 0.0):
            slack += copies * beta
    return NoiseShares(layout, bits, tuple(deviations), _cost(layout, slack))


def margin(block: Block, exponent: int, honest: int, factor: int, copies: int, beta: float) -> int:
    """Returns the most that one site's share adds to an entry in absolute value, 0 without noise.

    The arguments are those of `noise_shares`. Where no such share can be drawn, it is more than 64 bits hold.
    """
    if block.noise is None:
        return 0
    deviation = _deviation(block, exponent, honest, factor, copies, beta)
    return largest(max(deviation, SMALLEST)) if deviation <= LARGEST else 1 << 64


def _deviation(block: Block, exponent: int, honest: int, factor: int, copies: int, beta: float) -> float:
    if honest < 1 or factor not in (1, 2) or copies < 1:
        raise ValueError("noise needs an honest share, a factor of 1 or 2 and at least one copy")
    if block.noise is None:
        return 0.0
    sensitivity = copies * rounded_norm(factor * block.noise.norm * 2.0**exponent, block.size, beta)
    return block.noise.multiplier * sensitivity / math.sqrt(honest) * _ROUNDED_UP


def _unfit(block: Block, deviation: float) -> str:
    if deviation > LARGEST:
        return f"the noise for statistic '{block.name}' is larger than any sum here can carry: lower its multiplier"
    return (
        f"each site's share of the noise for statistic '{block.name}' would have a deviation of {deviation:.2g} steps "
        f"of rounding, and below {SMALLEST:g} its privacy is not proved: set aggregation.bits: 64 or lower "
        "cohort.maximum, for finer steps"
    )


def _cost(layout: Layout, slack: float) -> Events:
    noises = [block.noise for block in layout if block.noise is not None]
    if not noises:
        return ()
    rates = {noise.rate for noise in noises}
    if len(rates) > 1:
        raise ValueError("all blocks of a sum are drawn at one rate")
    multipliers = [noise.multiplier for noise in noises]
    # the norms of the blocks' shifts, each relative to its own noise, add up like the sides of a box
    joint = multipliers[0] if len(multipliers) == 1 else (1 - 2.0**-50) / math.hypot(*(1 / z for z in multipliers))
    rate = rates.pop()
    event = Gaussian(joint)
    return event if rate == 1 else Sampled(rate, event), Slack(min(1.0, slack))
