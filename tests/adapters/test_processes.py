"""Work in processes of its own: all of it comes back, errors as they were raised, and a death is told."""

import math
import operator
import os
from functools import partial

import pytest

from cohortium.adapters.processes import spread
from cohortium.core.errors import CohortiumError


def test_every_task_is_done_on_one_thread() -> None:
    before = dict(os.environ)
    assert sorted(spread(math.isqrt, [49, 4, 9], 2)) == [2, 3, 7]
    assert list(spread(os.getenv, ["OMP_NUM_THREADS"], 1)) == ["1"]
    assert dict(os.environ) == before
    assert list(spread(math.isqrt, [], 2)) == []


def test_an_error_comes_back_as_it_was_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(spread(partial(operator.truediv, 1), [0], 1))


def test_a_process_that_dies_is_told_in_one_sentence() -> None:
    with pytest.raises(CohortiumError, match="ended without an answer: was memory short"):
        list(spread(os._exit, [3], 1))
