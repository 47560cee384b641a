"""What this machine is good at: its faster cipher mode and its threads."""

import ctypes
import gc
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from threading import Lock

import numpy as np

from cohortium.secagg.stream import Means, Mode, Task, add_streams

_PROBE = 1 << 20
"""Bytes of the measurement's vector: some milliseconds in all."""
_MALLOPT = ((-1, 1 << 30), (-2, 16 << 20), (-3, 1 << 30))
"""glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD, in bytes."""
_REPEATS = 4
_CLEARLY = 0.9


def cores() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def threads(work: str) -> ThreadPoolExecutor | None:
    """Returns the pool for one kind of work, a thread for each processor, or None if there is just one.

    Work that waits for other work must not share a pool with it.
    """
    return ThreadPoolExecutor(cores(), work) if cores() > 1 else None


@cache
def means() -> Means:
    """Returns how this machine expands streams fastest, measured once in a process."""
    pool = threads("streams")
    return Means(faster_mode()) if pool is None else Means(faster_mode(), _on(pool), cores())


def shared_means() -> Means:
    """Returns the means of one of several sites that share this process: its threads serve them in turn."""
    return Means(faster_mode(), training=Lock())


@cache
def faster_mode(clock: Callable[[], float] = time.perf_counter) -> Mode:
    """Returns counter mode, or GCM where its best time over a few repeats is clearly the shorter."""
    vector = np.zeros(_PROBE // 4, np.uint32)

    def seconds(mode: Mode) -> float:
        started = clock()
        add_streams(vector, [bytes(32)] * 2, [], Means(mode))
        return clock() - started

    # in turn, so that a change of the processor's speed meets both
    counter, gcm = zip(*((seconds("ctr"), seconds("gcm")) for _ in range(_REPEATS)), strict=True)
    return "gcm" if min(gcm) < _CLEARLY * min(counter) else "ctr"


def keep_memory() -> None:
    """Has this process keep the memory that it frees, where the C library can: each round wants as much again.

    Asking the system for fresh pages, and clearing them, takes longer than moving a model through them.
    """
    # what is there at the start stays, and need not be looked through again and again
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for parameter, value in _MALLOPT:
            library.mallopt(parameter, value)


def _on(pool: ThreadPoolExecutor) -> Callable[[Sequence[Task]], None]:
    def spread(tasks: Sequence[Task]) -> None:
        for future in [pool.submit(task) for task in tasks]:
            future.result()

    return spread
