"""Work spread over processes of this machine."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

from cohortium.core.errors import CohortiumError

T = TypeVar("T")
R = TypeVar("R")
_ONE_THREAD: Mapping[str, str] = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)
"""What NumPy's linear algebra, PyTorch and numba ask for when they start."""


def spread(work: Callable[[T], R], tasks: Sequence[T], jobs: int) -> Iterator[R]:
    """Yields the result of each task as it is done, in any order.

    Each process is a fresh interpreter that does its work on one thread. So results do not depend on how many there
    are, even where sums in floating point depend on the number of threads; and a single job is a process of its own,
    too. Whoever calls this from a script of their own must guard it by `if __name__ == "__main__"`, because a fresh
    interpreter imports that script.

    Args:
        work: a function of a module, or a partial of one: it travels to the processes.
        tasks: its arguments.
        jobs: the most processes.

    Raises:
        CohortiumError: a process died; and what `work` raises, at the first task that fails.
    """
    if not tasks:
        return
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn"), initializer=_quietly)
    try:
        with _environment(_ONE_THREAD):
            futures = [pool.submit(work, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise CohortiumError(
            "a process that computed a part ended without an answer: was memory short? Run it again, with fewer --jobs"
        ) from None
    finally:
        # what has not begun will not begin
        pool.shutdown(cancel_futures=True)


def _quietly() -> None:
    """Lets an interrupt end a worker at once and without a word: the process that asked for the work tells of it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
