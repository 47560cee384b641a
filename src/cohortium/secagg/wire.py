"""Residues of any width as they travel: where a width fills no whole bytes, its bits follow each other closely."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import ProtocolError
from cohortium.secagg.quantise import Residues, residue_kind, signed_kind

_AT_ONCE = 1 << 16
"""Residues packed at a time; a multiple of 8, so that each stretch ends with a whole byte."""


def packed_length(length: int, bits: int) -> int:
    """Returns how many entries the array has that carries `length` residues."""
    return length if _fills(bits) else -(-length * bits // 8)


def to_wire(residues: Residues, bits: int) -> NDArray[Any]:
    """Returns the low `bits` bits of each residue, as they are or packed into bytes."""
    if _fills(bits):
        return residues
    parts = []
    for start in range(0, len(residues), _AT_ONCE):
        part = np.ascontiguousarray(residues[start : start + _AT_ONCE])
        rows = part.view(np.uint8).reshape(-1, part.itemsize)
        parts.append(np.packbits(np.unpackbits(rows, axis=1, count=bits, bitorder="little"), bitorder="little"))
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def from_wire(carried: NDArray[Any], length: int, bits: int) -> Residues:
    """Returns the residues that `to_wire` packed; bits above the width are zero.

    Raises:
        ProtocolError: the array has another length or type than such an array has.
    """
    kind = residue_kind(bits) if _fills(bits) else np.dtype(np.uint8)
    if carried.shape != (packed_length(length, bits),) or carried.dtype != kind:
        raise ProtocolError(f"an array of shape {carried.shape} and type {carried.dtype} carries no such residues")
    if _fills(bits):
        return carried
    residues = np.empty(length, residue_kind(bits))
    width = residues.itemsize
    for start in range(0, length, _AT_ONCE):
        part = residues[start : start + _AT_ONCE]
        stretch = carried[start * bits // 8 : -(-(start + len(part)) * bits // 8)]
        digits = np.unpackbits(stretch, count=len(part) * bits, bitorder="little").reshape(-1, bits)
        padded = np.zeros((len(part), 8 * width), np.uint8)
        padded[:, :bits] = digits
        part[:] = np.packbits(padded, axis=1, bitorder="little").reshape(-1).view(part.dtype)
    return residues


def sign_extended(residues: Residues, bits: int) -> Residues:
    """Returns residues of `bits` bits as two's complement numbers of their whole type."""
    spare = 8 * residues.itemsize - bits
    if not spare:
        return residues
    signed = (residues << residues.dtype.type(spare)).view(signed_kind(bits)) >> spare
    return signed.view(residues.dtype)


def _fills(bits: int) -> bool:
    return bits in (16, 32, 64)
