"""Rounding never leads further than bounded, and sums of shares are as private as a normal distribution."""

import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr, ndtr

from cohortium.privacy import bounds, gaussian
from cohortium.privacy.bounds import aliasing, precision, rounded_norm
from cohortium.privacy.gaussian import law

EPSILONS = np.concatenate([[0.0, 0.01, 0.1], np.arange(0.25, 12, 0.25)])

# Rounding


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=12, max_size=12),
    st.lists(st.floats(-1000, 1000), min_size=12, max_size=12),
)
def test_dithered_rounding_never_moves_a_difference_beyond_the_certain_bound(
    difference: list[float], dither: list[float], base: list[float]
) -> None:
    v, u, x = np.array(difference), np.array(dither[: len(difference)]), np.array(base[: len(difference)])
    moved = np.floor(x + v + u) - np.floor(x + u)
    # what floating point adds to the sums
    slack = 1e-10 * len(v)
    if np.abs((x + v + u) % 1 - 0.5).max() < 0.5 - 1e-9 and np.abs((x + u) % 1 - 0.5).max() < 0.5 - 1e-9:
        assert np.linalg.norm(moved) <= rounded_norm(float(np.linalg.norm(v)), len(v), 0.0) + slack


@pytest.mark.parametrize("shape", ["even", "single", "halves", "many small"])
@pytest.mark.parametrize("norm", [0.3, 3.0, 40.0])
@pytest.mark.parametrize("dimension", [1, 10, 300])
def test_the_bound_fails_no_more_often_than_it_says(shape: str, norm: float, dimension: int) -> None:
    rng = np.random.default_rng(7)
    v = {
        "even": np.ones(dimension),
        "single": np.eye(1, dimension)[0],
        "halves": np.floor(np.linspace(1, 5, dimension)) + 0.5,
        "many small": rng.normal(size=dimension),
    }[shape]
    v *= norm / np.linalg.norm(v)
    x = rng.uniform(-100, 100, dimension)
    trials = 600_000 // max(30, dimension)
    u = rng.random((trials, dimension))
    lengths = np.linalg.norm(np.floor(x + v + u) - np.floor(x + u), axis=1)
    assert lengths.max() <= rounded_norm(norm, dimension, 0.0)
    for beta in (0.3, 0.05, 1e-2, 1e-3):
        most = beta + 4 * math.sqrt(beta / trials)
        assert (lengths > rounded_norm(norm, dimension, beta)).mean() <= most


def test_the_bound_is_the_papers() -> None:
    for norm, dimension, beta in [(10.0, 400, 0.01), (1e6, 10_000_000, 1e-12), (2.0**45, 31, 1e-9)]:
        root = math.sqrt(dimension)
        likely = math.sqrt(norm**2 + dimension / 4 + math.sqrt(2 * math.log(1 / beta)) * (norm + root / 2))
        expected = min(norm + root, likely)
        assert expected <= rounded_norm(norm, dimension, beta) <= expected * (1 + 1e-9)
        assert norm + root <= rounded_norm(norm, dimension, 0.0) <= (norm + root) * (1 + 1e-9)


@given(st.floats(0, 1e300), st.integers(1, 10**9), st.floats(0, 0.999))
def test_the_bound_grows_with_all_it_should(norm: float, dimension: int, beta: float) -> None:
    found = rounded_norm(norm, dimension, beta)
    assert found >= norm
    assert rounded_norm(norm * 1.01, dimension, beta) >= found
    assert rounded_norm(norm, dimension + 1, beta) >= found * (1 - 1e-12)
    assert rounded_norm(norm, dimension, beta / 2) >= found * (1 - 1e-12)
    assert math.isinf(rounded_norm(math.inf, dimension, beta))


@pytest.mark.parametrize(
    "arguments", [(-1.0, 1, 0.1), (math.nan, 1, 0.1), (1.0, 0, 0.1), (1.0, 1, 1.0), (1.0, 1, -0.1)]
)
def test_no_bound_for_nonsense(arguments: tuple[float, int, float]) -> None:
    with pytest.raises(ValueError, match="a norm is not negative"):
        rounded_norm(*arguments)


# The theorem, at deviations so small that its error shows


def integral(x: mpmath.mpf, deviation: mpmath.mpf) -> mpmath.mpf:
    """The normal distribution function's integral: its differences average a density over intervals."""
    z = x / deviation
    return x * mpmath.ncdf(z) + deviation * mpmath.npdf(z)


def lattice(deviation: float, reach: int) -> dict[int, mpmath.mpf]:
    """Returns the law of a rounded Gaussian."""
    return {
        k: mpmath.ncdf((k + mpmath.mpf(0.5)) / deviation) - mpmath.ncdf((k - mpmath.mpf(0.5)) / deviation)
        for k in range(-reach, reach + 1)
    }


@pytest.mark.parametrize("deviation", [0.8, 1.0, 1.5, 2.5])
def test_two_shares_are_one_normal_with_bounded_noise_up_to_the_factor(deviation: float) -> None:
    with mpmath.workdps(60):
        one = lattice(deviation, math.ceil(40 * deviation))
        joint = mpmath.sqrt(2) * deviation
        factor = 2.01 * mpmath.exp(-(mpmath.pi**2) * deviation**2)
        seen = mpmath.mpf(0)
        for k in range(math.ceil(8 * deviation)):
            total = mpmath.fsum(p * one.get(k - j, 0) for j, p in one.items())
            smooth = integral(mpmath.mpf(k + 1), joint) - 2 * integral(mpmath.mpf(k), joint)
            smooth += integral(mpmath.mpf(k - 1), joint)
            seen = max(seen, abs(total / smooth - 1))
        # bounded, and the bound is no more than some times too large
        assert factor / 20 < seen <= factor


@pytest.mark.parametrize(("deviation", "ratio"), [(2.0, 2), (2.5, 4), (5.0, 4), (6.0, 8)])
def test_two_levels_are_one_normal_with_bounded_noise_up_to_the_factor(deviation: float, ratio: int) -> None:
    with mpmath.workdps(60):
        one = lattice(deviation, math.ceil(30 * deviation))
        joint = deviation * mpmath.sqrt(1 + ratio**2)
        factor = 2.01 * mpmath.exp(-2 * mpmath.pi**2 * deviation**2 / (1 + ratio**2))
        seen = mpmath.mpf(0)
        for k in range(0, math.ceil(4 * joint), 3):
            total = mpmath.fsum(p * one.get(k - ratio * j, 0) for j, p in one.items())
            edges = [k + side * mpmath.mpf(0.5) + end * mpmath.mpf(ratio) / 2 for side in (1, -1) for end in (1, -1)]
            smooth = integral(edges[0], joint) - integral(edges[1], joint)
            smooth += integral(edges[3], joint) - integral(edges[2], joint)
            seen = max(seen, abs(total / (smooth / ratio) - 1))
        assert factor / 20 < seen <= factor


# Domination


def law_of(deviation: float, shares: int) -> np.ndarray:
    """Returns the law of a sum of shares as they are drawn, from -k to k: no more than sums of positive numbers."""
    chosen = law(deviation)
    tails = gaussian._tails(chosen.base)
    cells = [2**128 - 2 * tails[0], *(a - b for a, b in pairwise([*tails, 0]))]
    half = np.array([cell / 2**128 for cell in cells])
    table = one = np.concatenate([half[:0:-1], half])
    for _ in range(shares - 1):
        one = np.convolve(one, table)
    total = one
    for level in range(1, chosen.levels):
        step, fine = 16**level, total
        total = np.zeros(len(fine) + step * (len(one) - 1))
        for place, probability in enumerate(one):
            total[step * place : step * place + len(fine)] += probability * fine
    assert abs(total.sum() - 1) < 1e-12
    return total


def hockey_stick(law: np.ndarray, shift: tuple[int, ...], epsilon: float) -> float:
    """Returns the exact divergence between a law on a grid and itself shifted."""
    wide = np.pad(law, [(step, step) for step in shift])
    moved = np.roll(wide, shift, range(len(shift)))
    return float(np.maximum(wide - math.exp(epsilon) * moved, 0).sum())


def normal(ratio: float, epsilon: float) -> float:
    """Returns delta of the Gaussian mechanism (Balle and Wang 2018, theorem 8) for sensitivity over deviation."""
    return float(ndtr(ratio / 2 - epsilon / ratio) - math.exp(epsilon + log_ndtr(-ratio / 2 - epsilon / ratio)))


@pytest.mark.parametrize("deviation", [5.0, 6.3, 8.0])
@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_sums_of_shares_are_as_private_as_a_normal(deviation: float, shares: int) -> None:
    total = law_of(deviation, shares)
    spread = math.sqrt(shares) * deviation
    for shift in (1, 2, 3, 5, 10, 25, 60):
        for epsilon in EPSILONS:
            assert hockey_stick(total, (shift,), epsilon) <= normal(shift / spread, epsilon) + 1e-12


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_sums_of_two_levels_are_as_private_as_a_normal(shares: int) -> None:
    total = law_of(1300.0, shares)
    spread = math.sqrt(shares) * 1300
    for shift in (1, 16, 137, 800, 2600):
        for epsilon in EPSILONS[::4]:
            assert hockey_stick(total, (shift,), epsilon) <= normal(shift / spread, epsilon) + 1e-12


@pytest.mark.parametrize("shift", [(1, 0), (1, 1), (3, 4), (8, 6), (2, 20)])
@pytest.mark.parametrize("shares", [1, 2])
def test_vectors_are_as_private_as_by_their_euclidean_norm(shift: tuple[int, int], shares: int) -> None:
    total = law_of(5.0, shares)
    plane = np.outer(total, total)
    ratio = math.hypot(*shift) / (5 * math.sqrt(shares))
    for epsilon in EPSILONS:
        assert hockey_stick(plane, shift, epsilon) <= normal(ratio, epsilon) + 1e-12


def test_the_normals_curve_is_hardly_too_much() -> None:
    # and so nothing is gained by a bound made for lattices
    one = law_of(8.0, 1)
    for epsilon in (0.5, 1.0, 2.0):
        assert hockey_stick(one, (8,), epsilon) > 0.98 * normal(1, epsilon)


def test_less_noise_is_caught() -> None:
    one = law_of(8.0, 1)
    assert any(hockey_stick(one, (8,), epsilon) > normal(8 / 8.2, epsilon) + 1e-4 for epsilon in EPSILONS)


# What is left over


def test_what_tables_of_few_bits_cost_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = 2.0**-24
    monkeypatch.setattr(bounds, "_CELL", 1.01 * coarse)
    exact = law_of(5.0, 1)
    middle = len(exact) // 2
    tails = np.round(np.cumsum(exact[::-1])[::-1][middle + 1 :] / coarse) * coarse
    cells = np.append(-np.diff(tails), tails[-1])
    rounded = np.concatenate([cells[::-1], [1 - 2 * tails[0]], cells])
    assert (rounded[:30] == 0).all()
    for shares in (1, 3):
        total, ideal = rounded, exact
        for _ in range(shares - 1):
            total, ideal = np.convolve(total, rounded), np.convolve(ideal, exact)
        for shift in (2, 5, 10):
            slack = precision(5.0, shares, 1, 5 * math.sqrt(shares) / shift)
            for epsilon in (0.0, 1.0, 3.0, 8.0, 20.0):
                more = hockey_stick(total, (shift,), epsilon) - hockey_stick(ideal, (shift,), epsilon)
                assert more <= slack


def test_what_is_left_over_is_next_to_nothing() -> None:
    for deviation in (5.0, 80.0, 1282.0, 1283.0, 1e6, 2.0**40):
        for shares in (1, 2, 15, 50):
            assert 0 <= aliasing(deviation, shares, 10_000_000) < 1e-90
            assert 0 < precision(deviation, shares, 10_000_000, 0.3) < 1e-8
            assert 0 < precision(deviation, shares, 10_000_000, 1.0) < 1e-22
    # one draw, rounded, is exactly the Gaussian mechanism
    assert aliasing(1000.0, 1, 10) == 0
    assert aliasing(2.0**50, 2, 1) > 0
    # with next to no noise nothing is promised
    assert precision(5.0, 1, 1, 1e-3) == 1


@given(st.floats(5, 1e12), st.integers(1, 100), st.integers(1, 10**8), st.floats(0.2, 50))
@settings(deadline=None)
def test_what_is_left_over_grows_with_draws(deviation: float, shares: int, dimension: int, multiplier: float) -> None:
    assert aliasing(deviation, shares + 1, dimension) >= aliasing(deviation, shares, dimension)
    assert aliasing(deviation, shares, dimension + 1) >= aliasing(deviation, shares, dimension)
    assert precision(deviation, shares, dimension + 1, multiplier) >= precision(
        deviation, shares, dimension, multiplier
    )
    assert precision(deviation, shares, dimension, multiplier / 2) >= precision(
        deviation, shares, dimension, multiplier
    )
