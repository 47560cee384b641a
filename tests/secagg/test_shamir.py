"""Sharing: enough shares give the secret back, fewer say nothing at all, and false ones are noticed."""

import importlib.util
import itertools
import math
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cohortium.core.errors import ProtocolError
from cohortium.core.random import Randomness
from cohortium.secagg import shamir
from cohortium.secagg.shamir import PRIME, SECRET_WORDS, from_words, reconstruct, share, to_words


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("masking_reference", Path(__file__).with_name("reference.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()
SHAPES = [(1,), (7,), (2, 18), (3, 1, 2), (0, 18)]


def secret_of(shape: tuple[int, ...], seed: int, prime: int = PRIME) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, prime, shape).astype(np.uint16)


@st.composite
def schemes(draw: st.DrawFn, most: int = 50) -> tuple[int, int]:
    holders = draw(st.integers(2, most))
    return holders, draw(st.integers(2, holders))


class TestOpening:
    @settings(max_examples=120, deadline=None)
    @given(schemes(), st.sampled_from(SHAPES), st.integers(0, 2**32), st.data())
    @example((50, 50), (2, 18), 1, None)
    @example((50, 26), (2, 18), 2, None)
    @example((2, 2), (7,), 3, None)
    def test_any_threshold_of_shares(
        self, scheme: tuple[int, int], shape: tuple[int, ...], seed: int, data: Any
    ) -> None:
        holders, threshold = scheme
        secret = secret_of(shape, seed % 1000)
        shares = share(secret, holders, threshold, Randomness.of_seed(seed))
        assert shares.shape == (holders, *shape)
        assert shares.dtype == np.uint16
        assert (shares < PRIME).all()
        everybody = range(holders)
        chosen = list(everybody)[-threshold:]
        if data is not None:
            chosen = data.draw(st.permutations(everybody))[: data.draw(st.integers(threshold, holders))]
        found = reconstruct({holder: shares[holder] for holder in chosen}, threshold)
        assert found.dtype == np.uint16
        assert found.shape == shape
        assert np.array_equal(found, secret)

    @settings(max_examples=60, deadline=None)
    @given(schemes(20), st.integers(1, 40), st.integers(0, 2**64))
    @example((5, 3), 18, 0)
    def test_shares_are_the_references(self, scheme: tuple[int, int], words: int, seed: int) -> None:
        holders, threshold = scheme
        secret, randomness = secret_of((words,), seed % 1000), Randomness.of_seed(seed)
        expected = reference.shared(secret.tolist(), holders, threshold, randomness.key)
        assert share(secret, holders, threshold, randomness).tolist() == expected

    @settings(max_examples=60, deadline=None)
    @given(schemes(20), st.integers(0, 2**32), st.data())
    def test_any_values_open_as_the_reference_opens_them(
        self, scheme: tuple[int, int], seed: int, data: st.DataObject
    ) -> None:
        """Also values that nobody dealt: any `threshold` of them lie on one polynomial."""
        holders, threshold = scheme
        chosen = data.draw(st.permutations(range(holders)))[:threshold]
        values = secret_of((holders, 3), seed)
        expected = [
            reference.at_zero({holder: int(values[holder, column]) for holder in chosen}) for column in range(3)
        ]
        assert reconstruct({holder: values[holder] for holder in chosen}, threshold).tolist() == expected

    @pytest.mark.parametrize("size", [1, 25, 49, 50])
    def test_products_are_exact_at_the_largest_values(self, size: int) -> None:
        left = np.full((50, size), PRIME - 1)
        right = np.full((size, 36), PRIME - 1, np.uint16)
        # (p - 1)^2 is 1 modulo p, so that a sum of `size` products is `size`
        assert (shamir._product(left, right, PRIME) == size % PRIME).all()
        rng = np.random.default_rng(size)
        left, right = rng.integers(PRIME - 9, PRIME, (50, size)), rng.integers(PRIME - 9, PRIME, (size, 36))
        assert (shamir._product(left, right, PRIME) == left.astype(object) @ right.astype(object) % PRIME).all()

    def test_no_sum_of_products_leaves_the_exact_range(self) -> None:
        assert 1000 * (PRIME - 1) ** 2 < 2**53
        # the documentation's own bound: rows shorter than 2^20 of products below 2^32
        assert (2**20 - 1) * (2**16 - 1) ** 2 < 2**53 < (2**21 + 2**7) * (2**16 - 1) ** 2

    @pytest.mark.parametrize("threshold", [2, 26, 50])
    def test_the_extreme_secrets_of_fifty_sites(self, threshold: int) -> None:
        for word in (0, 1, PRIME - 1):
            secret = np.full((50, SECRET_WORDS), word, np.uint16)
            shares = share(secret, 50, threshold, Randomness.of_seed(threshold))
            for start in (0, 50 - threshold):
                chosen = range(start, start + threshold)
                assert np.array_equal(reconstruct({i: shares[i] for i in chosen}, threshold), secret)

    def test_other_randomness_gives_other_shares(self) -> None:
        secret = np.zeros(100, np.uint16)
        one, other = (share(secret, 3, 2, Randomness.of_seed(seed)) for seed in (1, 2))
        assert (one != other).sum() > 250
        assert np.array_equal(one, share(secret, 3, 2, Randomness.of_seed(1)))


class TestRefusals:
    @pytest.mark.parametrize(("holders", "threshold"), [(3, 0), (3, 4), (3, -1), (PRIME, 2), (0, 0)])
    def test_no_such_scheme(self, holders: int, threshold: int) -> None:
        with pytest.raises(ValueError, match=f"{threshold} of {holders} shares do not make a scheme modulo 65521"):
            share(np.zeros(1, np.uint16), holders, threshold, Randomness.of_seed(1))

    @pytest.mark.parametrize("given_shares", range(4))
    def test_too_few(self, given_shares: int) -> None:
        shares = share(secret_of((18,), 1), 6, 4, Randomness.of_seed(1))
        with pytest.raises(ProtocolError, match=f"{given_shares} shares were given, and it takes 4"):
            reconstruct({holder: shares[holder] for holder in range(given_shares)}, 4)

    @settings(max_examples=80, deadline=None)
    @given(st.integers(3, 50), st.integers(0, 1000), st.integers(1, PRIME - 1), st.data())
    def test_one_false_word_among_more_than_needed(
        self, holders: int, seed: int, error: int, data: st.DataObject
    ) -> None:
        threshold = data.draw(st.integers(2, holders - 1))
        present = data.draw(st.permutations(range(holders)))[: data.draw(st.integers(threshold + 1, holders))]
        shares = share(secret_of((2, 3), seed), holders, threshold, Randomness.of_seed(seed))
        liar, place = data.draw(st.sampled_from(present)), data.draw(st.integers(0, 5))
        word = shares[liar].reshape(-1)[place]
        shares[liar].reshape(-1)[place] = (int(word) + error) % PRIME
        with pytest.raises(ProtocolError, match="do not belong together: at least one site gave a false one"):
            reconstruct({holder: shares[holder] for holder in present}, threshold)

    def test_shares_of_two_secrets(self) -> None:
        one, other = (share(secret_of((4,), seed), 5, 3, Randomness.of_seed(seed)) for seed in (1, 2))
        with pytest.raises(ProtocolError, match="do not belong together"):
            reconstruct({0: one[0], 1: one[1], 2: other[2], 4: other[4]}, 3)
        with pytest.raises(ProtocolError, match="do not belong together"):
            reconstruct({0: one[0], 1: one[1], 2: one[3], 3: one[2]}, 3)

    def test_with_no_share_to_spare_a_false_one_changes_the_secret(self) -> None:
        """What the documentation says: there is nothing to compare with."""
        secret = secret_of((4,), 1)
        shares = share(secret, 5, 3, Randomness.of_seed(1))
        false = (shares[2].astype(int) + 1) % PRIME
        found = reconstruct({0: shares[0], 1: shares[1], 2: false.astype(np.uint16)}, 3)
        assert (found != secret).all()


SMALL = [
    (prime, holders, threshold)
    for prime in (5, 7)
    for holders in range(2, prime)
    for threshold in range(2, min(holders, 4) + 1)
]


class TestFewerThanThresholdSayNothing:
    """In fields so small that every polynomial can be dealt: the real `share`, given each possible draw."""

    @staticmethod
    def dealt(monkeypatch: pytest.MonkeyPatch, prime: int, holders: int, threshold: int) -> dict[int, list[Any]]:
        """Returns, for each secret, what `share` deals for every coefficient vector it can draw."""
        vectors = list(itertools.product(range(prime), repeat=threshold - 1))
        dealt = {}
        for secret in range(prime):
            # one word for each vector, so that one call deals them all
            coefficients = np.array(vectors, np.uint16).T.reshape(-1)
            drawn: list[tuple[int, int]] = []

            def every_one(count: int, randomness: Randomness, modulus: int, made: Any = coefficients) -> Any:
                drawn.append((count, modulus))  # noqa: B023
                return made

            monkeypatch.setattr(shamir, "_uniform", every_one)
            words = np.full(len(vectors), secret, np.uint16)
            shares = share(words, holders, threshold, Randomness.of_seed(0), prime)
            # as many numbers are drawn as there are coefficients: all of them were tried
            assert drawn == [((threshold - 1) * len(vectors), prime)]
            dealt[secret] = list(zip(*shares.tolist(), strict=True))
        return dealt

    @pytest.mark.parametrize(("prime", "holders", "threshold"), SMALL)
    def test_what_fewer_hold_is_uniform_whatever_the_secret(
        self, prime: int, holders: int, threshold: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dealt = self.dealt(monkeypatch, prime, holders, threshold)
        for size in range(1, threshold):
            expected = dict.fromkeys(itertools.product(range(prime), repeat=size), prime ** (threshold - 1 - size))
            for group in itertools.combinations(range(holders), size):
                for shares in dealt.values():
                    assert Counter(tuple(values[holder] for holder in group) for values in shares) == expected

    @pytest.mark.parametrize(("prime", "holders", "threshold"), SMALL)
    def test_enough_of_them_belong_to_one_secret(
        self, prime: int, holders: int, threshold: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dealt = self.dealt(monkeypatch, prime, holders, threshold)
        for group in itertools.combinations(range(holders), threshold):
            owner: dict[tuple[int, ...], int] = {}
            for secret, shares in dealt.items():
                for values in shares:
                    assert owner.setdefault(tuple(values[holder] for holder in group), secret) == secret
            assert len(owner) == prime**threshold
            held = {holder: np.array([seen[i] for seen in owner], np.uint16) for i, holder in enumerate(group)}
            assert reconstruct(held, threshold, prime).tolist() == list(owner.values())

    @pytest.mark.parametrize(("prime", "holders", "threshold"), SMALL)
    def test_shares_are_values_of_the_polynomial(
        self, prime: int, holders: int, threshold: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dealt = self.dealt(monkeypatch, prime, holders, threshold)
        for secret, shares in dealt.items():
            polynomials = itertools.product(range(prime), repeat=threshold - 1)
            for values, rest in zip(shares, polynomials, strict=True):
                expected = [reference.value_at([secret, *rest], point + 1, prime) for point in range(holders)]
                assert list(values) == expected

    @pytest.mark.parametrize("prime", [5, 7])
    def test_real_draws_reach_all_of_them(self, prime: int) -> None:
        """With `_uniform` itself: each share of each secret takes every value about equally often."""
        count = 7000
        for secret in range(prime):
            shares = share(np.full(count, secret, np.uint16), 3, 3, Randomness.of_seed(secret), prime)
            for one, other in itertools.combinations(shares.tolist(), 2):
                seen = Counter(zip(one, other, strict=True))
                cells = prime * prime
                assert len(seen) == cells
                distance = sum((found - count / cells) ** 2 / (count / cells) for found in seen.values())
                # chi-square with cells - 1 degrees of freedom: mean, and six deviations above it
                assert distance < cells - 1 + 6 * math.sqrt(2 * (cells - 1))


class TestUniform:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 5000), st.integers(0, 2**64), st.sampled_from([PRIME, 5, 7, 257, 32771, 65537 - 98]))
    @example(200_000, 1, PRIME)
    @example(200_000, 2, 32771)
    def test_is_the_stream_without_what_is_beyond(self, count: int, seed: int, prime: int) -> None:
        randomness = Randomness.of_seed(seed)
        found = shamir._uniform(count, randomness, prime)
        assert found.dtype == np.uint16
        assert found.tolist() == reference.uniform(randomness.bytes(32), count, prime)

    @pytest.mark.parametrize("prime", [PRIME, 7, 32771])
    def test_every_draw_below_the_limit_and_none_beyond(self, prime: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each 16-bit number once: every value is then kept equally often, to the last one."""
        numbers = np.random.default_rng(prime).permutation(1 << 16)
        everything = numbers.astype("<u2").tobytes()
        # and enough beyond the limit at the beginning for a second and third turn
        beyond = np.full(70_000, 65535, "<u2").tobytes()
        monkeypatch.setattr(shamir, "keystream", lambda key, length: (beyond + everything + everything)[:length])
        most = 65536 // prime
        found = shamir._uniform(most * prime, Randomness.of_seed(1), prime)
        assert Counter(found.tolist()) == dict.fromkeys(range(prime), most)
        assert found.tolist() == [number % prime for number in numbers.tolist() if number < most * prime]

    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_looks_uniform(self, seed: int) -> None:
        count = 500_000
        found = shamir._uniform(count, Randomness.of_seed(seed), PRIME)
        assert int(found.max()) == PRIME - 1
        counts = np.bincount(found, minlength=PRIME)
        distance = ((counts - count / PRIME) ** 2 / (count / PRIME)).sum()
        assert abs(distance - (PRIME - 1)) < 6 * math.sqrt(2 * (PRIME - 1))
        # neighbours are independent: pairs of coarse values fill a table evenly
        coarse = found.astype(int) * 32 // PRIME
        table = np.bincount(coarse[0::2] * 32 + coarse[1::2], minlength=1024)
        distance = ((table - count / 2 / 1024) ** 2 / (count / 2 / 1024)).sum()
        assert abs(distance - 1023) < 6 * math.sqrt(2 * 1023) + 5


class TestWords:
    EDGES = (bytes(32), b"\xff" * 32, bytes(31) + b"\1", b"\x80" + bytes(31), bytes(range(32)))

    @pytest.mark.parametrize("secret", EDGES, ids=["zeros", "ones", "lowest", "highest", "range"])
    def test_of_one_secret(self, secret: bytes) -> None:
        words = to_words([secret])
        assert words.shape == (1, SECRET_WORDS)
        assert words.dtype == np.uint16
        assert words[0].tolist() == reference.words_of(secret)
        assert from_words(words) == [secret]

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=12))
    def test_inverse(self, secrets: list[bytes]) -> None:
        words = to_words(secrets)
        assert words.tolist() == [reference.words_of(secret) for secret in secrets]
        assert from_words(words) == secrets
        assert [reference.bytes_of(row) for row in words.tolist()] == secrets

    def test_all_words_fit_the_field(self) -> None:
        assert int(to_words([b"\xff" * 32]).max()) == 2**15 - 1 < PRIME
