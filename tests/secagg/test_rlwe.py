"""Sums under encryption: exact at the edge of the range, open to the right key only, and as the reference has them."""

import importlib.util
import json
from collections.abc import Callable
from fractions import Fraction
from math import comb
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.random import Randomness
from cohortium.secagg import ring, rlwe
from cohortium.secagg.group import MOST_ENCRYPTING
from cohortium.secagg.quantise import residue_kind, signed_kind
from cohortium.secagg.rlwe import (
    DELTA,
    LARGEST,
    LARGEST_NOISE,
    RING,
    add,
    ciphertext_shape,
    decrypt,
    encrypt,
    secret_key,
    slots,
)

CONTEXT = bytes(range(32))


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rlwe_reference", Path(__file__).with_name("rlwe_reference.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()
VECTORS: dict[str, Any] = json.loads(reference.VECTORS.read_text(encoding="utf-8"))


def residues(values: Any, bits: int) -> np.ndarray:
    return np.asarray(values).astype(signed_kind(bits)).view(residue_kind(bits))


def fresh(seed: int, *labels: str | int) -> Randomness:
    return Randomness.of_seed(seed).child(*labels)


def summed(vectors: list[np.ndarray], bits: int, seed: int = 0, context: bytes = CONTEXT) -> tuple[Any, Any]:
    """Returns the summed ciphertext and the summed secret of sites with these vectors."""
    total = np.zeros(ciphertext_shape(len(vectors[0]), bits), np.uint32)
    key = np.zeros(RING, np.int64)
    for site, vector in enumerate(vectors):
        randomness = fresh(seed, site)
        secret = secret_key(randomness)
        add(total, encrypt(secret, context, residues(vector, bits), bits, randomness))
        key += secret
    return total, key


# The reference


def test_the_vectors_are_what_the_reference_says() -> None:
    assert json.loads(json.dumps(reference.vectors())) == VECTORS


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_encryption_agrees_with_the_reference(case: dict[str, Any]) -> None:
    bits, length, context = case["bits"], case["length"], bytes.fromhex(case["context"])
    total = np.zeros(ciphertext_shape(length, bits), np.uint32)
    key = np.zeros(RING, np.int32)
    for name, site in case["sites"].items():
        randomness = Randomness(bytes.fromhex(site["randomness"]))
        secret = secret_key(randomness)
        assert secret[:8].tolist() == site["secret_start"]
        assert reference.digest(secret.tolist(), 2) == site["secret_sha256"]
        vector = reference.values(name, length, bits)
        ciphertext = encrypt(secret, context, residues(vector, bits), bits, randomness)
        assert ciphertext[:, :, :3].tolist() == site["ciphertext_start"]
        assert [reference.digest(chunk.ravel().tolist()) for chunk in ciphertext] == site["ciphertext_sha256"]
        add(total, ciphertext)
        key += secret
    opened = decrypt(total, key, context, length, bits).view(signed_kind(bits)).tolist()
    assert opened[:4] == case["sum_start"]
    assert reference.digest(opened, 8) == case["sum_sha256"]


# Exact sums


def parts_of(total: int, sites: int, bits: int, rng: np.random.Generator) -> list[int]:
    """Returns one number for each site, all of `bits` bits and often extreme, that add up to `total`."""
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    result = []
    for left in range(sites - 1, -1, -1):
        low, high = max(least, total - left * most), min(most, total - left * least)
        pick = [low, high, int(rng.integers(low, high, endpoint=True))][rng.integers(3)] if left else total
        result.append(pick)
        total -= pick
    return result


@settings(max_examples=12, deadline=None)
@given(bits=st.integers(1, 50), sites=st.integers(1, 50), seed=st.integers(0, 2**32))
@example(bits=1, sites=50, seed=0)
@example(bits=25, sites=50, seed=0)
@example(bits=50, sites=50, seed=0)
def test_sums_are_exact_to_the_edge_of_their_range(bits: int, sites: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # all slots of the first coefficients, at their extremes and in between
    totals = [[least, most, 0, -1][rng.integers(4)] for _ in range(40)]
    # slots of one coefficient are 4096 values apart
    length = (slots(bits) - 1) * RING + 10
    vectors = np.zeros((sites, length), np.int64)
    expected = np.zeros(length, np.int64)
    for entry, total in enumerate(totals):
        at = min(entry // 10, slots(bits) - 1) * RING + entry % 10
        vectors[:, at] = parts_of(total, sites, bits, rng)
        expected[at] = total
    ciphertext, key = summed(list(vectors), bits, seed)
    opened = decrypt(ciphertext, key, CONTEXT, length, bits)
    assert opened.dtype == residue_kind(bits)
    np.testing.assert_array_equal(opened.view(signed_kind(bits)), expected)


@pytest.mark.parametrize("bits", range(1, 51))
def test_every_width_holds_its_extremes_in_every_slot(bits: int) -> None:
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    length = slots(bits) * RING
    pattern = np.array([least, most, 0, -1, least, least, most, most])
    vector = np.resize(pattern, length)
    # neighbours in a coefficient differ too
    vector = vector[(np.arange(length) // RING * 3 + np.arange(length)) % 8 % length]
    total, key = summed([vector], bits)
    np.testing.assert_array_equal(decrypt(total, key, CONTEXT, length, bits).view(signed_kind(bits)), vector)


@pytest.mark.parametrize("bits", [12, 25, 32, 50])
def test_any_length_fits(bits: int) -> None:
    chunk = slots(bits) * RING
    assert ciphertext_shape(0, bits) == (0, 2, RING)
    rng = np.random.default_rng(bits)
    for length in (
        0,
        1,
        2,
        RING - 1,
        RING,
        RING + 1,
        chunk - 1,
        chunk,
        chunk + 1,
        4 * chunk,
        4 * chunk + 1,
        9 * chunk - 1,
    ):
        vectors = [rng.integers(-(2 ** (bits - 3)), 2 ** (bits - 3), length) for _ in range(2)]
        total, key = summed(vectors, bits)
        assert total.shape == (-(-length // chunk), 2, RING)
        opened = decrypt(total, key, CONTEXT, length, bits).view(signed_kind(bits))
        np.testing.assert_array_equal(opened, vectors[0] + vectors[1])


def test_two_slots_of_25_bits_cost_four_bytes_a_value() -> None:
    assert [slots(bits) for bits in (1, 12, 25, 26, 50)] == [50, 4, 2, 1, 1]
    assert 4 * np.prod(ciphertext_shape(2 * RING, 25)) == 4 * (2 * RING)


def test_encrypting_is_repeatable_and_leaves_the_vector_alone() -> None:
    vector = residues(np.arange(-50, 50), 25)
    before = vector.copy()
    vector.flags.writeable = False
    randomness = fresh(1)
    one, two = (encrypt(secret_key(randomness), CONTEXT, vector, 25, randomness) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(vector, before)


# The public factor, secrets and errors


def public(context: bytes, chunk: int) -> np.ndarray:
    """Returns a chunk's public residues, `(2, 4096)`."""
    stream = rlwe._public(context)
    for _ in range(chunk + 1):
        row = stream.take(1)[0]
    assert ring._uniform(row, ring.tables().primes)
    return row[: 2 * RING].reshape(2, RING).copy()


def looks_uniform(numbers: np.ndarray, limit: int) -> None:
    counts = np.bincount((numbers.astype(np.uint64) * 64 // limit).astype(np.int64).ravel(), minlength=64)
    assert len(counts) == 64
    assert stats.chisquare(counts).pvalue > 1e-6
    low = np.bincount((numbers.astype(np.int64) % 64).ravel(), minlength=64)
    assert stats.chisquare(low).pvalue > 1e-6


def test_the_public_factor_is_uniform_and_differs_between_contexts_chunks_and_primes() -> None:
    found = [public(context, chunk) for context in (CONTEXT, bytes(32), bytes(31) + b"\1") for chunk in range(3)]
    for index, prime in enumerate(ring.PRIMES):
        stacked = np.stack([part[index] for part in found])
        assert stacked.max() < prime
        looks_uniform(stacked, prime)
    rows = [row for part in found for row in part]
    for one, first in enumerate(rows):
        for second in rows[:one]:
            assert (first == second).sum() < 5


def pmf() -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of X + 2 Y and their exact probabilities."""
    weights = np.zeros(2 * LARGEST + 1)
    for ones in range(25):
        for twos in range(41):
            weights[ones + 2 * twos] += comb(24, ones) * comb(40, twos) / 2**64
    return np.arange(-LARGEST, LARGEST + 1), weights


def follows_the_distribution(sample: np.ndarray) -> None:
    values, weights = pmf()
    count = sample.size
    assert abs(sample.mean()) < 6 * (46 / count) ** 0.5
    assert abs(sample.var() / 46 - 1) < 6 * (2 / count) ** 0.5
    inner = np.abs(values) <= 22
    expected = np.append(weights[inner], weights[~inner].sum()) * count
    observed = np.append([(sample == value).sum() for value in values[inner]], (np.abs(sample) > 22).sum())
    assert stats.chisquare(observed, expected * (count / expected.sum())).pvalue > 1e-6


def test_secrets_and_errors_are_sums_of_binomials() -> None:
    values, weights = pmf()
    assert weights.sum() == pytest.approx(1, abs=1e-15)
    assert (weights * values**2).sum() == pytest.approx(46)
    secrets = np.stack([secret_key(fresh(7, index)) for index in range(16)])
    follows_the_distribution(secrets.astype(np.int64))
    # under a secret of zero, whatever the public factor, a ciphertext of zero is the error
    zero = np.zeros(RING, np.int16)
    ciphertext = encrypt(zero, CONTEXT, residues(np.zeros(16 * RING), 50), 50, fresh(8)).astype(np.int64)
    errors = [
        np.where(part > 2**29, part - prime, part)
        for part, prime in zip(ciphertext.transpose(1, 0, 2), ring.PRIMES, strict=True)
    ]
    np.testing.assert_array_equal(*errors)
    follows_the_distribution(errors[0])
    assert len({row.tobytes() for row in errors[0]}) == 16


@pytest.mark.parametrize("coins", [0, 2**64 - 1, 2**24 - 1, 2**64 - 2**24, 1, 2**24])
def test_coins_weigh_one_or_two(coins: int) -> None:
    secret = np.empty(1, np.int16)
    rlwe._draw(np.array([coins], np.uint64), secret)
    assert secret[0] == reference.small(coins)


def test_other_randomness_gives_other_secrets_and_errors() -> None:
    secrets = [secret_key(fresh(seed)) for seed in range(3)]
    assert len({secret.tobytes() for secret in secrets}) == 3
    zero = residues(np.zeros(5), 25)
    ciphertexts = [encrypt(secrets[0], CONTEXT, zero, 25, fresh(seed)) for seed in range(3)]
    assert len({ciphertext.tobytes() for ciphertext in ciphertexts}) == 3


def test_a_ciphertext_of_zero_looks_uniform() -> None:
    randomness = fresh(11)
    ciphertext = encrypt(secret_key(randomness), CONTEXT, residues(np.zeros(16 * RING), 50), 50, randomness)
    for index, prime in enumerate(ring.PRIMES):
        looks_uniform(ciphertext[:, index], prime)


# Noise


def tail(sites: int, limit: int) -> Fraction:
    """Returns the exact probability that the errors of `sites` sites add up to `limit` or more in magnitude."""
    ones, twos = 24 * sites, 40 * sites
    at_least = [0]
    for count in range(ones, -1, -1):
        at_least.append(at_least[-1] + comb(ones, count))
    at_least.reverse()
    mean = LARGEST * sites
    ways = 0
    for count in range(twos + 1):
        needed = max(0, mean + limit - 2 * count)
        ways += comb(twos, count) * (at_least[needed] if needed <= ones else 0)
    return Fraction(2 * ways, 2 ** (64 * sites))


def test_the_noise_of_fifty_sites_stays_below_half_of_delta() -> None:
    assert DELTA == 1023 and LARGEST_NOISE < DELTA // 2
    # the figures of decision 0012
    assert Fraction(1, 2**82) < tail(MOST_ENCRYPTING, LARGEST_NOISE + 1) < Fraction(1, 2**81)
    assert Fraction(1, 2**87) < tail(MOST_ENCRYPTING, DELTA // 2 + 1) < Fraction(1, 2**86)
    # up to nine sites it cannot happen
    assert tail(9, LARGEST_NOISE + 1) == 0
    assert tail(1, LARGEST) == Fraction(2, 2**64)


def opened_noise(total: np.ndarray, key: np.ndarray) -> np.ndarray:
    noisy = np.empty((1, RING), np.int64)
    ring.unmask(rlwe._public(CONTEXT).take(1), ring.factor(key.astype(np.int64)), total, noisy)
    return noisy[0] - DELTA * np.floor_divide(noisy[0] + DELTA // 2, DELTA)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_secrets_add_nothing_to_the_noise(sign: int) -> None:
    secret = np.full(RING, sign * LARGEST, np.int16)
    total = np.zeros((1, 2, RING), np.uint32)
    for site in range(50):
        add(total, encrypt(secret, CONTEXT, residues(np.full(5, 2**18), 25), 25, fresh(site)))
    noise = opened_noise(total, 50 * secret.astype(np.int64))
    assert np.abs(noise).max() < 300 < LARGEST_NOISE
    assert noise.var() == pytest.approx(50 * 46, rel=0.15)
    opened = decrypt(total, 50 * secret.astype(np.int32), CONTEXT, 5, 25)
    assert (opened.view(np.int32) == 50 * 2**18).all()


def test_without_one_of_fifty_keys_nothing_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    total, key = summed([np.full(2 * RING, 1000)] * 50, 25)
    one_less = key - secret_key(fresh(0, 49))
    with pytest.raises(ProtocolError, match="not that of the summed ciphertexts"):
        decrypt(total, one_less, CONTEXT, 2 * RING, 25)
    monkeypatch.setattr(rlwe, "LARGEST_NOISE", 2**20)
    assert (decrypt(total, key, CONTEXT, 2 * RING, 25) == 50_000).all()
    looks_uniform(decrypt(total, one_less, CONTEXT, 2 * RING, 25) % 2**25, 2**25)
    # another context, or a key that is off by one at one place, opens as little
    off = key.copy()
    off[17] += 1
    looks_uniform(decrypt(total, key, bytes(32), 2 * RING, 25) % 2**25, 2**25)
    looks_uniform(decrypt(total, off, CONTEXT, 2 * RING, 25) % 2**25, 2**25)


# Refusals


def refuses(error: type[Exception], match: str, function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(error, match=match):
        function(*arguments)


@pytest.mark.parametrize("bits", VECTORS["bad_bits"])
def test_impossible_widths_are_refused(bits: int) -> None:
    vector, randomness = np.zeros(3, np.uint64), fresh(1)
    total, key = np.zeros((1, 2, RING), np.uint32), np.zeros(RING, np.int64)
    refuses(StudyError, "cannot be encrypted", slots, bits)
    refuses(StudyError, "cannot be encrypted", ciphertext_shape, 3, bits)
    refuses(StudyError, "cannot be encrypted", encrypt, secret_key(randomness), CONTEXT, vector, bits, randomness)
    refuses(StudyError, "cannot be encrypted", decrypt, total, key, CONTEXT, 3, bits)


@pytest.mark.parametrize(("bits", "value"), VECTORS["bad_value_too_wide"])
@pytest.mark.parametrize("place", [0, 4095, 4096, 4 * 4096 * 4 + 7])
def test_values_wider_than_their_bits_are_refused(bits: int, value: int, place: int) -> None:
    vector = np.zeros(place + 1, signed_kind(bits))
    vector[place] = value
    randomness = fresh(1)
    arguments = secret_key(randomness), CONTEXT, residues(vector, bits), bits, randomness
    refuses(ProtocolError, f"does not fit into {bits} bits", encrypt, *arguments)


def test_vectors_of_another_type_or_shape_are_refused() -> None:
    randomness = fresh(1)
    secret = secret_key(randomness)
    for vector in (np.zeros(3, np.uint64), np.zeros(3, np.int32), np.zeros((3, 1), np.uint32), np.zeros(3)):
        refuses(ProtocolError, "cannot be encrypted", encrypt, secret, CONTEXT, vector, 25, randomness)


@pytest.mark.parametrize("context", VECTORS["bad_context"])
def test_contexts_of_another_length_are_refused(context: str) -> None:
    randomness, vector = fresh(1), np.zeros(3, np.uint32)
    secret, total = secret_key(randomness), np.zeros((1, 2, RING), np.uint32)
    refuses(ProtocolError, "32 bytes", encrypt, secret, bytes.fromhex(context), vector, 25, randomness)
    refuses(ProtocolError, "32 bytes", decrypt, total, secret, bytes.fromhex(context), 3, 25)


def with_entry(entry: int, kind: Any) -> np.ndarray:
    array = np.zeros(RING, kind)
    array[-1] = entry
    return array


def test_what_is_no_secret_is_refused() -> None:
    vector, randomness = np.zeros(3, np.uint32), fresh(1)
    bad = [with_entry(entry, np.int16) for entry in VECTORS["bad_secret_entry"]]
    for secret in (*bad, np.zeros(RING, np.int64), np.zeros(RING - 1, np.int16), np.zeros((1, RING), np.int16)):
        refuses(ProtocolError, "no secret key", encrypt, secret, CONTEXT, vector, 25, randomness)


def test_what_is_no_summed_secret_is_refused() -> None:
    total = np.zeros((1, 2, RING), np.uint32)
    for entry in VECTORS["bad_summed_secret_entry"]:
        refuses(ProtocolError, "do not add up", decrypt, total, with_entry(entry, np.int64), CONTEXT, 3, 25)
    for key in (np.zeros(RING), np.zeros(RING, np.uint32), np.zeros(RING + 1, np.int32), np.zeros((2, RING), np.int64)):
        refuses(ProtocolError, "4096 whole numbers", decrypt, total, key, CONTEXT, 3, 25)


@pytest.mark.parametrize(("index", "value"), VECTORS["bad_residue"])
@pytest.mark.parametrize("place", [0, 4095])
def test_entries_that_are_no_residues_are_refused(index: int, value: int, place: int) -> None:
    total, ciphertext = np.zeros((2, 3, 2, RING), np.uint32)
    ciphertext[2, index, place] = value
    refuses(ProtocolError, "not a residue", add, total, ciphertext)
    assert not total.any()
    refuses(ProtocolError, "not a residue", add, ciphertext, total)
    key = np.zeros(RING, np.int64)
    refuses(ProtocolError, "not a residue", decrypt, ciphertext, key, CONTEXT, 3 * 2 * RING, 25)


def test_ciphertexts_of_another_shape_or_type_are_refused() -> None:
    total = np.zeros((2, 2, RING), np.uint32)
    for shape in ((1, 2, RING), (3, 2, RING), (2, 1, RING), (2, 2, RING - 1), (2 * 2 * RING,), (2, 2, RING, 1)):
        refuses(ProtocolError, "was refused", add, total, np.zeros(shape, np.uint32))
        refuses(ProtocolError, "does not hold", decrypt, np.zeros(shape, np.uint32), total, CONTEXT, 4 * RING, 25)
    refuses(ProtocolError, "was refused", add, total, total.astype(np.int64))
    refuses(ProtocolError, "was refused", add, total.astype(np.int64), total)
    refuses(ProtocolError, "was refused", add, np.zeros((2, 3), np.uint32), np.zeros((2, 3), np.uint32))
    refuses(ProtocolError, "was refused", add, total, np.zeros((2, 2, 2 * RING), np.uint32)[:, :, ::2])
    key = np.zeros(RING, np.int64)
    refuses(ProtocolError, "was refused", decrypt, total.astype(np.int64), key, CONTEXT, 4 * RING, 25)


def test_ciphertexts_read_from_a_message_can_be_added() -> None:
    randomness = fresh(2)
    secret = secret_key(randomness)
    sent = encrypt(secret, CONTEXT, residues([1, -2, 3], 25), 25, randomness).tobytes()
    received = np.frombuffer(sent, np.uint32).reshape(1, 2, RING)
    total = np.zeros_like(received)
    add(total, received)
    assert decrypt(received, secret, CONTEXT, 3, 25).view(np.int32).tolist() == [1, -2, 3]
    assert decrypt(total, secret, CONTEXT, 3, 25).view(np.int32).tolist() == [1, -2, 3]
