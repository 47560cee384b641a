"""Rounded Gaussians: the table against mpmath, draws against their exact law, and the vectors of the specification."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cohortium.core.errors import StudyError
from cohortium.core.random import Randomness
from cohortium.privacy import gaussian
from cohortium.privacy.gaussian import LARGEST, SEGMENT, SMALLEST, largest, law, sample


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("noise_reference", Path(__file__).with_name("noise_reference.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()
VECTORS: list[dict[str, Any]] = json.loads(reference.VECTORS.read_text(encoding="utf-8"))
KEY = Randomness.of_seed(2024)


def probabilities(deviation: float) -> np.ndarray:
    """Returns the exact law of one share, from -k to k."""
    chosen = law(deviation)
    tails = gaussian._tails(chosen.base)
    cells = [2**128 - 2 * tails[0], *(a - b for a, b in zip(tails, [*tails[1:], 0], strict=True))]
    half = np.array([cell / 2**128 for cell in cells])
    one = np.concatenate([half[:0:-1], half])
    total = one
    for level in range(1, chosen.levels):
        total = _sparse(total, one, 16**level)
    return total


def _sparse(fine: np.ndarray, coarse: np.ndarray, step: int) -> np.ndarray:
    total = np.zeros(len(fine) + step * (len(coarse) - 1))
    for place, probability in enumerate(coarse):
        total[step * place : step * place + len(fine)] += probability * fine
    return total


def entries_of(base: int) -> list[int]:
    table = gaussian._table(base)
    return [int(high) << 64 | int(low) for high, low in zip(table.high[:-1], table.low, strict=True)]


@pytest.mark.parametrize("deviation", [5.0, 5.3, 7.77, 31.0, 80.0, 400.1, 1282.4, 1e6, 2.0**40])
def test_the_table_is_the_normal_law_to_128_bits(deviation: float) -> None:
    chosen = law(deviation)
    tails = gaussian._tails(chosen.base)
    with mpmath.workprec(420):
        b = mpmath.mpf(chosen.base) / 2**32
        some = sorted({0, 1, 2, len(tails) - 1, *range(0, len(tails), max(1, len(tails) // 40))})
        for k in some:
            exact = mpmath.ldexp(mpmath.erfc((k + mpmath.mpf(0.5)) / (b * mpmath.sqrt(2))) / 2, 128)
            # to the nearest: half a unit, and no more than the last digits of the reckoning beyond
            assert abs(tails[k] - exact) <= mpmath.mpf(0.5) + mpmath.ldexp(1, -50)
        beyond = mpmath.ldexp(mpmath.erfc((len(tails) + mpmath.mpf(0.5)) / (b * mpmath.sqrt(2))) / 2, 128)
        assert beyond < 0.5
    assert len(tails) <= chosen.reach


@pytest.mark.parametrize("deviation", [5.0, 100.0, 1282.4, 1e6])
def test_the_table_is_symmetric_and_adds_up_to_one(deviation: float) -> None:
    entries = entries_of(law(deviation).base)
    assert entries == sorted(entries) and entries[0] > 0 and entries[-1] < 2**128
    assert all(low + high == 2**128 for low, high in zip(entries, reversed(entries), strict=True))


@given(st.floats(SMALLEST, LARGEST))
@settings(deadline=None)
def test_levels_carry_the_deviation_and_no_more(deviation: float) -> None:
    chosen = law(deviation)
    squares = sum(256**level for level in range(chosen.levels))
    numerator, denominator = deviation.as_integer_ratio()
    wanted = (numerator << 32) ** 2
    assert chosen.base**2 * squares * denominator**2 >= wanted > (chosen.base - 1) ** 2 * squares * denominator**2
    assert chosen.levels == 1 or chosen.deviation >= 80
    assert chosen.deviation < 80 * math.sqrt(257)
    assert (chosen.levels, chosen.base) == reference.levels_and_base(deviation)
    assert 13 * deviation < largest(deviation) < 2**63


@pytest.mark.parametrize("deviation", [4.999, 0.0, -5.0, math.nan, math.inf, 2.0**58 * 1.001])
def test_other_deviations_are_refused(deviation: float) -> None:
    with pytest.raises(ValueError, match="is not offered"):
        sample(deviation, 1, KEY)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['deviation']:g} from {vector['from']}")
def test_vectors(vector: dict[str, Any]) -> None:
    key, start = bytes.fromhex(vector["key"]), vector["from"]
    found = sample(vector["deviation"], vector["count"], Randomness(key))
    assert found.dtype == np.int64 and found[start:].tolist() == vector["draws"]


def test_the_vectors_are_what_the_reference_says() -> None:
    assert reference.vectors() == VECTORS


def test_the_keystream_is_aes_in_counter_mode() -> None:
    stream = KEY.stream(1000)
    assert [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(125)] == reference.words(KEY.key, 125)
    assert KEY.stream(17) == stream[:17] and KEY.stream(0) == b""


@pytest.mark.parametrize("deviation", [5.0, 1300.0, 2.0**40])
def test_a_key_decides_every_draw(deviation: float) -> None:
    first = sample(deviation, 40_000, KEY.child("a"))
    assert np.array_equal(first, sample(deviation, 40_000, KEY.child("a")))
    # a longer share begins with a shorter one
    assert np.array_equal(first[:20_000], sample(deviation, 20_000, KEY.child("a")))
    assert (first == sample(deviation, 40_000, KEY.child("b"))).mean() < 0.1
    assert len(sample(deviation, 0, KEY)) == 0


@pytest.mark.parametrize("deviation", [5.0, 6.5, 40.0])
def test_draws_follow_the_exact_law(deviation: float) -> None:
    exact = probabilities(deviation)
    assert chi_square(sample(deviation, 1_000_000, KEY.child("chi", int(deviation))), exact, 1) > 1e-3


@pytest.mark.parametrize("deviation", [1300.0, 2500.0])
def test_draws_of_two_levels_follow_their_exact_law(deviation: float) -> None:
    drawn = sample(deviation, 1_000_000, KEY.child("chi", int(deviation)))
    exact = probabilities(deviation)
    assert abs(exact.sum() - 1) < 1e-12
    # the lowest digit in fine bins, and all of it in coarser ones
    assert chi_square(drawn, exact, 10) > 1e-3
    assert chi_square(drawn, exact, 157) > 1e-3
    residues = np.bincount(drawn % 16, minlength=16)
    assert stats.chisquare(residues).pvalue > 1e-3


def chi_square(drawn: np.ndarray, exact: np.ndarray, width: int) -> float:
    middle = len(exact) // 2
    places = np.clip((drawn + middle) // width, 0, None)
    bins = -(-len(exact) // width)
    expected = np.add.reduceat(exact, np.arange(0, len(exact), width)) * len(drawn)
    observed = np.bincount(places, minlength=bins)
    enough = expected >= 20
    rest = expected[~enough].sum()
    counts, means = observed[enough], expected[enough]
    if rest > 5:
        counts, means = np.append(counts, observed[~enough].sum()), np.append(means, rest)
    return float(stats.chisquare(counts, means * counts.sum() / means.sum()).pvalue)


@pytest.mark.parametrize("deviation", [5.0, 300.0, 1300.0, 1e6, 2.0**40, 2.0**58])
def test_moments_are_the_normals(deviation: float) -> None:
    count = 1_000_000
    unit = sample(deviation, count, KEY.child("moments")) / deviation
    assert abs(unit.mean()) < 4 / math.sqrt(count)
    # rounding adds a twelfth of each level's square
    rounding = 1 / (12 * law(deviation).deviation ** 2)
    assert abs(unit.var() - 1 - rounding) < 4 * math.sqrt(2 / count)
    assert abs((unit**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs(stats.kurtosis(unit)) < 4 * math.sqrt(24 / count)
    assert np.abs(unit).max() < 7


def test_large_draws_are_normal() -> None:
    drawn = sample(2.0**40, 300_000, KEY.child("normal"))
    assert stats.kstest(drawn / 2.0**40, "norm").pvalue > 1e-3
    # the lowest level is there: no two of 300,000 draws are alike in 2^41
    assert len(np.unique(drawn)) > 299_900


@pytest.mark.parametrize("deviation", [5.0, 1e6])
def test_neighbours_and_levels_are_independent(deviation: float) -> None:
    drawn = sample(deviation, 400_000, KEY.child("neighbours")) / deviation
    for lag in (1, 2, 7, SEGMENT):
        assert abs((drawn[lag:] * drawn[:-lag]).mean()) < 4 / math.sqrt(len(drawn) - lag)
        assert abs((drawn[lag:] ** 2 * drawn[:-lag] ** 2).mean() - drawn.var() ** 2) < 4 * 3 / math.sqrt(len(drawn))


def test_ties_of_the_upper_half_are_decided_by_the_lower_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # P(X <= -1), P(X <= 0) and P(X <= 1) differ in their lower halves only
    half, third = 1 << 63, 1 << 62
    table = gaussian._arranged([half << 64 | third, half << 64 | 2 * third, half << 64 | 3 * third], 1)
    high = [half] * 7 + [half - 1, half + 1, 0, 2**64 - 1]
    low = [0, third - 1, third, 2 * third - 1, 2 * third, 3 * third, 2**64 - 1, 2**64 - 1, 0, 0, 2**64 - 1]
    streams = {KEY.child("high").key: high, KEY.child("low").key: low}
    monkeypatch.setattr(gaussian, "_words", lambda below, count: np.array(streams[below.key], np.uint64)[:count])
    drawn = np.zeros(len(high), np.int64)
    gaussian._add_level(table, 16, KEY, drawn)
    assert (drawn // 16).tolist() == [-1, -1, 0, 0, 1, 2, 2, -1, 2, -1, 2]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.sampled_from([5.0, 100.0]))
@settings(max_examples=300, deadline=None)
def test_a_draw_is_an_inversion(high: int, low: int, deviation: float) -> None:
    table, entries = gaussian._table(law(deviation).base), entries_of(law(deviation).base)
    expected = sum(entry <= (high << 64 | low) for entry in entries) - table.centre
    assert gaussian._drawn(table, high, low) == expected
    drawn = np.zeros(1, np.int64)
    words = np.array([high], np.uint64)
    if not gaussian._add_draws(words, 0, table.high, table.guide, table.shift, table.centre, 1, drawn):
        assert high in table.high
    else:
        assert drawn[0] == expected


def test_extreme_words_draw_the_extremes() -> None:
    table = gaussian._table(law(5.0).base)
    assert gaussian._drawn(table, 0, 0) == -table.centre
    assert gaussian._drawn(table, 2**64 - 1, 2**64 - 1) == table.centre
    assert table.centre <= largest(5.0)


def test_without_numba_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    spec = importlib.util.spec_from_file_location("gaussian_without_numba", gaussian.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(StudyError, match=r"numba.*pip install 'cohortium\[privacy\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
