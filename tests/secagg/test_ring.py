"""Products in the ring against the schoolbook, residues at their limits, and the uniform stream."""

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.secagg import ring
from cohortium.secagg.ring import MODULUS, PRIMES, RING, WORDS, add_in_place, factor, mask, reduced, tables, unmask

PLACES = np.array([16 * (place // 16) + place // 4 % 4 + 4 * (place % 4) for place in range(RING)])
"""The power of X at each place of a product."""


def leaves(element: Any, prime: int) -> np.ndarray:
    """Returns an element, given by its coefficients, by its remainders modulo X^4 - r, one root r after the other."""
    bases = (pow(base, (prime - 1) // 2048, prime) for base in range(2, 99))
    eta = next(root for root in bases if pow(root, 1024, prime) != 1)
    orders = [2 * int(f"{4 * (leaf % 256) + leaf // 256:010b}"[::-1], 2) + 1 for leaf in range(1024)]
    roots = np.array([pow(eta, order, prime) for order in orders])
    values = np.zeros((4, 1024), np.int64)
    for power in range(1023, -1, -1):
        values = (values * roots + element[4 * power : 4 * power + 4, None]) % prime
    return values.ravel()


def schoolbook(a: np.ndarray, s: np.ndarray, prime: int) -> np.ndarray:
    """Returns a * s modulo X^4096 + 1 and the prime, for small s: no sum exceeds 2^30 * 52 * 4096 * 50."""
    long = np.append(np.convolve(a, s), 0)
    return (long[:RING] - long[RING:]) % prime


def stream_of(elements: list[np.ndarray]) -> np.ndarray:
    """Returns a stream that expands to the elements, given by their residues modulo each prime."""
    stream = np.zeros((1, WORDS), np.uint32)
    for index, (element, prime) in enumerate(zip(elements, PRIMES, strict=True)):
        stream[0, RING * index : RING * (index + 1)] = leaves(element, prime)
    return stream


def product(elements: list[np.ndarray], s: np.ndarray, message: np.ndarray | None = None) -> np.ndarray:
    out = np.empty((1, 2, RING), np.uint32)
    added = np.zeros((1, RING), np.int64) if message is None else message[None]
    mask(stream_of(elements), factor(s), added, out)
    return out[0]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 52, 2600]))
def test_a_product_is_the_schoolbooks(seed: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    elements = [rng.integers(0, prime, RING) for prime in PRIMES]
    s = rng.integers(-largest, largest + 1, RING)
    found = product(elements, s)
    for index, prime in enumerate(PRIMES):
        np.testing.assert_array_equal(found[index], schoolbook(elements[index], s, prime)[PLACES])


@pytest.mark.parametrize("largest", [52, 2600])
def test_products_of_extremes_do_not_overflow(largest: int) -> None:
    for sign in (1, -1):
        s = np.full(RING, sign * largest)
        elements = [np.full(RING, prime - 1) for prime in PRIMES]
        found = product(elements, s)
        for index, prime in enumerate(PRIMES):
            np.testing.assert_array_equal(found[index], schoolbook(elements[index], s, prime)[PLACES])


def test_products_of_extreme_leaves_do_not_overflow() -> None:
    s = np.random.default_rng(3).integers(-52, 53, RING)
    for fill in (0, 1):
        stream = np.zeros((1, WORDS), np.uint32)
        for index, prime in enumerate(PRIMES):
            stream[0, RING * index : RING * (index + 1)] = prime - 1 if fill else 0
        out = np.empty((1, 2, RING), np.uint32)
        mask(stream, factor(s), np.zeros((1, RING), np.int64), out)
        assert reduced(out)
        # all remainders are -1 - Y - Y^2 - Y^3 whatever the root: the element with these four coefficients
        element = np.zeros(RING, np.int64)
        element[:4] = -fill
        for index, prime in enumerate(PRIMES):
            np.testing.assert_array_equal(out[0, index], schoolbook(element, s, prime)[PLACES])


def test_one_and_x_are_what_they_say() -> None:
    s = np.arange(RING) % 105 - 52
    one, x = np.zeros(RING, np.int64), np.zeros(RING, np.int64)
    one[0] = x[1] = 1
    rotated = np.roll(s, 1)
    rotated[0] *= -1
    for index, prime in enumerate(PRIMES):
        np.testing.assert_array_equal(product([one, one], s)[index], (s % prime)[PLACES])
        np.testing.assert_array_equal(product([x, x], s)[index], (rotated % prime)[PLACES])


def test_messages_are_added_and_come_back_at_every_size() -> None:
    rng = np.random.default_rng(1)
    elements = [rng.integers(0, prime, RING) for prime in PRIMES]
    s = rng.integers(-52, 53, RING)
    message = rng.integers(-(MODULUS // 2), MODULUS // 2, RING)
    message[:6] = [0, 1, -1, MODULUS // 2, -(MODULUS // 2), 2**32]
    masked = product(elements, s, message)
    for index, prime in enumerate(PRIMES):
        expected = (schoolbook(elements[index], s, prime)[PLACES] + message % prime) % prime
        np.testing.assert_array_equal(masked[index], expected)
    opened = np.empty((1, RING), np.int64)
    unmask(stream_of(elements), factor(s), masked[None], opened)
    np.testing.assert_array_equal(opened[0], message)


def test_sums_stay_below_the_primes() -> None:
    total = np.zeros((1, 2, RING), np.uint32)
    largest = np.empty_like(total)
    for index, prime in enumerate(PRIMES):
        largest[0, index] = prime - 1
    for count in range(1, 6):
        add_in_place(total, largest)
        for index, prime in enumerate(PRIMES):
            assert (total[0, index] == prime - count).all()
    assert reduced(largest)
    for index in range(2):
        above = largest.copy()
        above[0, index, RING - 1] += 1
        assert not reduced(above)


def test_words_out_of_range_are_replaced_in_order() -> None:
    stream = np.zeros(WORDS, np.uint32)
    stream[[5, RING - 1]] = PRIMES[0], 2**32 - 1
    stream[RING + 3] = PRIMES[1] + 2**30
    stream[RING + 4] = PRIMES[0] - 1
    # of four spare words, the second is in range for neither prime; the top two bits never count
    stream[2 * RING : 2 * RING + 5] = [11, 2**30 - 1, 12 + 2**31, PRIMES[1] - 1, 13]
    assert ring._uniform(stream, tables().primes)
    assert [stream[5], stream[RING - 1]] == [11, 12]
    assert [stream[RING + 3], stream[RING + 4]] == [PRIMES[1] - 1, 13]
    assert np.count_nonzero(stream[: 2 * RING]) == 4


def test_a_stream_out_of_range_is_refused() -> None:
    message, ciphertext = np.zeros((1, RING), np.int64), np.zeros((1, 2, RING), np.uint32)
    ready = factor(np.zeros(RING, np.int64))
    for function, arguments in ((mask, (message, ciphertext)), (unmask, (ciphertext, message))):
        with pytest.raises(ProtocolError, match="too few words"):
            function(np.full((1, WORDS), 2**30 - 1, np.uint32), ready, *arguments)


def test_without_numba_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    spec = importlib.util.spec_from_file_location("ring_without_numba", ring.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(StudyError, match=r"pip install 'cohortium\[rlwe\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
