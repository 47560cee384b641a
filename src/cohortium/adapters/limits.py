"""What an agent's process may use of its machine: memory, processors, and its turn among others."""

import os
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

from cohortium.adapters.site_config import Limits
from cohortium.core.errors import SiteError

_MEGABYTE = 1 << 20
THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
)
"""What NumPy's linear algebra, PyTorch and numba ask for when they start."""


def impose(limits: Limits, environment: MutableMapping[str, str] | None = None) -> None:
    """Limits this process and all that it starts; once, before anything is computed.

    Memory beyond the limit fails as `MemoryError`, which the agent turns into a refusal. Processors are kept to by the
    system, for threads that libraries have begun already too; libraries that come later begin as many threads.

    Args:
        environment: where libraries look for their number of threads; the process's own if none is given.

    Raises:
        SiteError: the system cannot limit what is to be limited.
    """
    if limits == Limits():
        return
    if os.name != "posix":
        raise _unusable("limits are kept on POSIX systems only: take them out of site.yaml")
    if limits.memory_mb is not None:
        _memory(limits.memory_mb * _MEGABYTE)
    if limits.cpus is not None:
        _processors(limits.cpus, os.environ if environment is None else environment)
    if limits.nice is not None:
        with suppress(OSError):
            # it is a courtesy, so an agent that may not be nicer goes on
            os.nice(max(0, limits.nice - os.nice(0)))


def _memory(most: int) -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    except (OSError, ValueError):
        raise _unusable("the system does not let it limit its memory: take limits.memory_mb out of site.yaml") from None


def _processors(count: int, environment: MutableMapping[str, str]) -> None:
    environment.update(dict.fromkeys(THREADS, str(count)))
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))[:count]
        # it binds one thread, and linear algebra began its own when NumPy was loaded; later ones take after these
        for thread in _threads():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, allowed)


def _threads() -> list[int]:
    """Returns this process's threads, or just the calling one where the system does not tell."""
    tasks = Path("/proc/self/task")
    return [int(task.name) for task in tasks.iterdir()] if tasks.exists() else [0]


def _unusable(reason: str) -> SiteError:
    return SiteError(f"the agent cannot start: {reason}", public="this site's agent cannot start")
