"""Clipping: the bound holds after rounding, a unit's records count together, and sums are exact."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cohortium.privacy.clip import by_unit, clipped, sum_clipped

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
ROWS = arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 5)), elements=NUMBERS)
NORMS = st.floats(1e-3, 1e3)


@given(ROWS, NORMS)
def test_no_row_is_longer_than_the_norm(rows: np.ndarray, norm: float) -> None:
    assert (np.linalg.norm(clipped(rows, norm), axis=1) <= norm).all()


@given(ROWS, NORMS)
def test_clipping_scales_and_keeps_direction(rows: np.ndarray, norm: float) -> None:
    lengths = np.maximum(np.linalg.norm(rows, axis=1), 1e-300)
    expected = rows * np.minimum(1, norm / lengths)[:, None]
    assert np.allclose(clipped(rows, norm), expected, atol=norm * 2**-24)


@given(ROWS, NORMS)
def test_one_unit_more_changes_the_sum_by_at_most_the_norm_exactly(rows: np.ndarray, norm: float) -> None:
    everybody = sum_clipped(rows, None, norm)
    for index in range(len(rows)):
        rest = sum_clipped(np.delete(rows, index, axis=0), None, norm)
        # exact: no order of adding, and no number of others, changes what one unit adds
        assert (everybody - rest == clipped(rows[index : index + 1], norm)[0]).all()


@given(ROWS, NORMS)
def test_sums_do_not_depend_on_the_order(rows: np.ndarray, norm: float) -> None:
    assert (sum_clipped(rows, None, norm) == sum_clipped(rows[::-1], None, norm)).all()


def test_a_patient_of_many_records_is_clipped_once() -> None:
    rows = np.ones((100, 4))
    owners = np.zeros(100, dtype=np.intp)
    assert np.linalg.norm(sum_clipped(rows, owners, 1.0)) <= 1.0
    assert np.linalg.norm(sum_clipped(rows, None, 1.0)) == pytest.approx(100, rel=1e-6)


def test_records_add_up_by_unit() -> None:
    owners = np.array([1, 0, 1, 2])
    assert (by_unit(np.arange(8.0).reshape(4, 2), owners) == [[2, 3], [4, 6], [6, 7]]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200], ids=["nan", "inf", "minus-inf", "overflow"])
def test_what_is_not_finite_adds_nothing(bad: float) -> None:
    rows = np.array([[bad, 1.0], [0.5, 0.0]])
    assert (sum_clipped(rows, None, 1.0) == [0.5, 0.0]).all()


def test_nobody_adds_nothing() -> None:
    assert (sum_clipped(np.empty((0, 3)), None, 1.0) == 0).all()
    assert (sum_clipped(np.empty((0, 3)), np.empty(0, dtype=np.intp), 1.0) == 0).all()
