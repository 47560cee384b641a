"""The mask stream: the keystream of AES-256 in counter mode, added to a vector in place.

A key's stream is cut into segments of 1 MiB. Segment i is the keystream of AES-256-GCM under the nonce i (12 bytes),
which is bit for bit that of counter mode starting at block nonce || 2 (NIST SP 800-38D, section 7.1). Which of the two
a machine runs is its own affair: the faster one differs between versions of OpenSSL and between processors. Segments
are independent of each other, so several threads can share a vector.

Trust: without its key a stream cannot be told from random bytes. A key is used for one stream only.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

Mode = Literal["ctr", "gcm"]
Task = Callable[[], None]
Spread = Callable[[Sequence[Task]], None]
"""Runs tasks that do not depend on each other, and returns when all are done."""

SEGMENT = 1 << 20
"""Bytes of a stream under one nonce."""
_BLOCK = 1 << 18
"""Bytes expanded at a time: few enough for the processor's cache, enough for threads not to wait for each other."""
_AT_ONCE = 1 << 18
"""Bytes of streams below which calls cost more than arithmetic."""
_TAG = 16
_ZEROS = bytes(_AT_ONCE)
_FIRST_BLOCK = (2).to_bytes(4, "big")


def in_turn(tasks: Sequence[Task]) -> None:
    """Runs tasks one after the other."""
    for task in tasks:
        task()


@dataclass(frozen=True)
class Means:
    """What a machine brings to a sum. Mode, threads and their number decide its speed, never its result.

    Attributes:
        mode: the cipher mode that is faster here; `cohortium.adapters.machine` measures it.
        spread: runs independent tasks, on threads or in turn.
        tasks: into how many a long vector is cut.
        ckks: the consortium's CKKS key for studies that ask for it: secret at a site, public at the coordinator.
        training: held while a site trains; a lock where several sites share a process.
    """

    mode: Mode = "ctr"
    spread: Spread = in_turn
    tasks: int = 1
    ckks: bytes = field(default=b"", repr=False)
    training: AbstractContextManager[object] = field(default_factory=nullcontext)


PLAIN = Means()
"""One thread and counter mode."""


def keystream(key: bytes, length: int, segment: int = 0) -> bytes:
    """Returns the first `length` bytes of a segment of a key's stream; beyond 1 MiB its counter goes on."""
    if length <= _AT_ONCE:
        return AESGCM(key).encrypt(segment.to_bytes(12, "big"), _ZEROS[:length], None)[:length]
    expanded: bytes = _encryptor(key, segment, "ctr").update(bytes(length))
    return expanded


def add_streams(vector: NDArray[Any], add: Sequence[bytes], subtract: Sequence[bytes], means: Means = PLAIN) -> None:
    """Adds the streams of some keys to a vector of unsigned integers and subtracts others', in place.

    Memory beyond the vector: some 300 KiB for each task, with its ciphers.
    """
    if vector.nbytes * (len(add) + len(subtract)) <= _AT_ONCE:
        _add_at_once(vector, add, subtract)
        return
    each = SEGMENT // vector.itemsize
    parts = [(place, vector[start : start + each]) for place, start in enumerate(range(0, len(vector), each))]

    def task(mine: Sequence[tuple[int, NDArray[Any]]]) -> Task:
        return lambda: _add_segments(mine, add, subtract, means.mode)

    means.spread([task(parts[first :: means.tasks]) for first in range(min(means.tasks, len(parts)))])


def _add_segments(
    parts: Sequence[tuple[int, NDArray[Any]]], add: Sequence[bytes], subtract: Sequence[bytes], mode: Mode
) -> None:
    stream = bytearray(_BLOCK + _TAG)
    zeros = memoryview(_ZEROS)
    for segment, part in parts:
        plus = [_encryptor(key, segment, mode).update_into for key in add]
        minus = [_encryptor(key, segment, mode).update_into for key in subtract]
        step = _BLOCK // part.itemsize
        for start in range(0, len(part), step):
            block = part[start : start + step]
            random = np.frombuffer(stream, part.dtype, len(block))
            nothing = zeros[: block.nbytes]
            for expand in plus:
                expand(nothing, stream)
                np.add(block, random, out=block)
            for expand in minus:
                expand(nothing, stream)
                np.subtract(block, random, out=block)


def _add_at_once(vector: NDArray[Any], add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
    size, zeros, nonce = vector.nbytes, _ZEROS[: vector.nbytes], bytes(12)
    streams = b"".join([AESGCM(key).encrypt(nonce, zeros, None) for key in (*add, *subtract)])
    rows = np.frombuffer(streams, np.uint8).reshape(-1, size + _TAG)[:, :size].view(vector.dtype)
    vector += np.add.reduce(rows[: len(add)], dtype=vector.dtype)
    vector -= np.add.reduce(rows[len(add) :], dtype=vector.dtype)


def _encryptor(key: bytes, segment: int, mode: Mode) -> Any:
    nonce = segment.to_bytes(12, "big")
    chosen = modes.GCM(nonce) if mode == "gcm" else modes.CTR(nonce + _FIRST_BLOCK)
    return Cipher(algorithms.AES(key), chosen).encryptor()
