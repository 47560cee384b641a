"""The shape of what leaves a site: named blocks of numbers, each with a public bound.

Both halves of a run derive the same layout from the signed study, so a vector needs no header and its range can
be proved before any patient's record is read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import ProtocolError

Floats = NDArray[np.float64]
Statistics = Mapping[str, Floats]
"""What `local` returns and `update` receives summed: one array for each block of the layout."""


@dataclass(frozen=True)
class Noise:
    """The noise that a block's sum must carry.

    Attributes:
        norm: the most, in Euclidean norm, that one privacy unit's data at one site add to the block.
        multiplier: the noise's least standard deviation, relative to the sum's sensitivity.
        rate: the share of units that a site draws secretly for this sum.
    """

    norm: float
    multiplier: float
    rate: float = 1.0


@dataclass(frozen=True)
class Block:
    """One named array of a layout.

    Attributes:
        name: the statistic's name.
        shape: its shape; `()` is a single number.
        bound: at any site no entry's magnitude exceeds it.
        excess: what to do with a larger one: "refuse" sends nothing, "clip" sends the bound.
        labels: what the entries of a vector are, for people; empty where numbers in order say enough.
        noise: the noise that the sum must carry; None for a sum that is exact but for rounding.
    """

    name: str
    shape: tuple[int, ...]
    bound: float
    excess: Literal["refuse", "clip"] = "refuse"
    labels: tuple[str, ...] = ()
    noise: Noise | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Layout = tuple[Block, ...]


def size(layout: Layout) -> int:
    """Returns how many numbers a vector of this layout holds."""
    return sum(block.size for block in layout)


def entry_names(layout: Layout) -> tuple[str, ...]:
    """Returns a name for each number of a vector, such as "sex: male" or "gradient[2]"."""
    names: list[str] = []
    for block in layout:
        if block.labels:
            names += [f"{block.name}: {label}" for label in block.labels]
        else:
            names += [block.name] if not block.shape else [f"{block.name}[{index}]" for index in range(block.size)]
    return tuple(names)


def pack(layout: Layout, statistics: Statistics) -> Floats:
    """Returns the statistics as one vector, in the layout's order.

    Raises:
        ProtocolError: names or shapes differ from the layout's.
    """
    if len(statistics) != len(layout):
        raise ProtocolError(f"statistics {sorted(statistics)} do not match their layout")
    parts = []
    for block in layout:
        array = np.asarray(statistics.get(block.name), dtype=np.float64)
        if array.shape != block.shape or block.name not in statistics:
            raise ProtocolError(f"statistic '{block.name}' has shape {array.shape}, its layout says {block.shape}")
        parts.append(array.ravel())
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0)


def unpack(layout: Layout, vector: Floats) -> dict[str, Floats]:
    """Returns the named arrays that `pack` put into `vector`."""
    if vector.shape != (size(layout),):
        raise ProtocolError(f"a vector of shape {vector.shape} does not match a layout of {size(layout)} numbers")
    arrays, start = {}, 0
    for block in layout:
        arrays[block.name] = vector[start : start + block.size].reshape(block.shape)
        start += block.size
    return arrays
