"""Masks that cancel in the sum and nowhere else, bit for bit as an implementation of its own has them."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cohortium.core.errors import ProtocolError
from cohortium.core.messages import Announcement
from cohortium.core.random import Randomness
from cohortium.secagg.masking import Masker, broadcast_nonce, masker, random_residues

CHUNK = 1 << 18
"""Bytes of a stream that are expanded at a time; shorter vectors take another way."""


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("masking_reference", Path(__file__).with_name("reference.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()
VECTORS: dict[str, Any] = json.loads(reference.VECTORS.read_text(encoding="utf-8"))


def kind(bits: int) -> Any:
    return np.uint32 if bits == 32 else np.uint64


def federation(count: int, bits: Any, seed: int = 0) -> list[Masker]:
    """Returns the maskers of a run with that many sites, of which no two names begin alike."""
    names = [f"{chr(97 + (index * 7) % 26)}{index}" for index in range(count)]
    keys = [Randomness.of_seed(seed).child(name).bytes(32) for name in names]
    privates = [X25519PrivateKey.from_private_bytes(key) for key in keys]
    everybody = [
        Announcement("run", name, private.public_key().public_bytes_raw(), bytes(64))
        for name, private in zip(names, privates, strict=True)
    ]
    return [masker(private, mine, everybody, bits) for private, mine in zip(privates, everybody, strict=True)]


FEDERATIONS = {(count, bits): federation(count, bits) for count in range(3, 16) for bits in (32, 64)}


def vectors_of(count: int, length: int, bits: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2**bits, length, dtype=kind(bits)) for _ in range(count)]


def total_of(vectors: list[np.ndarray]) -> np.ndarray:
    """Returns the sum in the vectors' own type; numpy's own choice for small integers is a wider one."""
    return np.add.reduce(vectors, dtype=vectors[0].dtype)


def around(bits: int, peers: int) -> list[int]:
    """Lengths at which the way that streams are expanded changes."""
    whole, at_once = CHUNK * 8 // bits, CHUNK * 8 // (bits * peers)
    return [0, 1, 2, 3, at_once, at_once + 1, whole - 1, whole, whole + 1, 2 * whole, 2 * whole + 5]


class TestSum:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(3, 15), st.sampled_from([32, 64]), st.integers(1, 2**40), st.binary(max_size=40), st.data())
    def test_masks_cancel(self, count: int, bits: int, number: int, broadcast: bytes, data: st.DataObject) -> None:
        length = data.draw(st.one_of(st.integers(0, 300), st.sampled_from(around(bits, count - 1))), label="length")
        vectors = vectors_of(count, length, bits, number % 1000)
        masked = [
            site.mask(number, broadcast, vector)[0]
            for site, vector in zip(FEDERATIONS[count, bits], vectors, strict=True)
        ]
        assert all(vector.dtype == kind(bits) and vector.shape == (length,) for vector in masked)
        total, plain = total_of(masked), total_of(vectors)
        assert (total == plain).all()
        if length >= 4:
            for index in range(count):
                assert (masked[index] != vectors[index]).any()
                assert (total - masked[index] != plain - vectors[index]).any()

    @pytest.mark.parametrize("bits", [32, 64])
    @pytest.mark.parametrize("count", [3, 5])
    def test_masks_cancel_at_every_length_around_the_chunk(self, bits: int, count: int) -> None:
        for length in around(bits, count - 1):
            vectors = vectors_of(count, length, bits, length)
            sites = FEDERATIONS[count, bits]
            masked = [site.mask(9, b"model", vector)[0] for site, vector in zip(sites, vectors, strict=True)]
            assert (total_of(masked) == total_of(vectors)).all(), length

    @pytest.mark.parametrize("bits", [32, 64])
    def test_no_part_of_the_sites_opens_anything(self, bits: int) -> None:
        """Every proper subset's sum differs from the plain one, and looks uniform although the vectors are zero."""
        count, length = 5, 4000
        zeros = np.zeros(length, dtype=kind(bits))
        masked = [site.mask(1, b"", zeros)[0] for site in FEDERATIONS[count, bits]]
        for chosen in range(1, 2**count - 1):
            part = total_of([masked[index] for index in range(count) if chosen >> index & 1])
            assert (part == 0).sum() <= 1
            share = np.unpackbits(part.view(np.uint8)).mean()
            assert abs(share - 0.5) < 6 * 0.5 / np.sqrt(length * bits)
        assert not total_of(masked).any()

    def test_the_vector_given_stays_as_it_was(self) -> None:
        for length in (5, CHUNK):
            vector = np.arange(length, dtype=np.uint32)
            FEDERATIONS[3, 32][0].mask(1, b"", vector)
            assert (vector == np.arange(length)).all()

    def test_many_sites_in_one_round_differ_from_each_other_and_from_other_rounds(self) -> None:
        zeros = np.zeros(8, dtype=np.uint64)
        seen = set()
        for site in FEDERATIONS[6, 64]:
            for number in range(1, 40):
                masked, site = site.mask(number, b"same", zeros)
                seen.add(masked.tobytes())
        assert len(seen) == 6 * 39


class TestBroadcast:
    """Sites that were sent different models do not open anything."""

    @pytest.mark.parametrize("length", [40, CHUNK // 4 + 1])
    def test_a_different_broadcast_leaves_noise(self, length: int) -> None:
        zeros = np.zeros(length, dtype=np.uint32)
        one, two, three = FEDERATIONS[3, 32]
        honest = one.mask(1, b"model", zeros)[0] + two.mask(1, b"model", zeros)[0]
        assert not (honest + three.mask(1, b"model", zeros)[0]).any()
        total = honest + three.mask(1, b"modem", zeros)[0]
        assert (total != 0).sum() >= length - 2

    def test_of_a_subset_leaves_no_stream_in_common(self) -> None:
        """Three sites that got one model and one that got another: the pairs among the three still cancel."""
        zeros = np.zeros(64, dtype=np.uint64)
        sites = FEDERATIONS[4, 64]
        usual = [site.mask(2, b"a", zeros)[0] for site in sites]
        odd = sites[3].mask(2, b"b", zeros)[0]
        assert (usual[3] != odd).all()
        assert ((total_of(usual[:3]) + odd) != 0).all()

    def test_the_nonce_is_its_blake2b_digest(self) -> None:
        # RFC 7693 gives BLAKE2b-512 of "abc"; this is BLAKE2b-256 of it, from b2sum -l 256
        expected = "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319"
        assert broadcast_nonce(b"abc").hex() == expected


class TestRounds:
    def test_a_round_is_masked_once_and_later_ones_only(self) -> None:
        site, vector = FEDERATIONS[3, 32][0], np.ones(3, dtype=np.uint32)
        _, later = site.mask(5, b"", vector)
        for number in (5, 4, 1, 0, -1):
            with pytest.raises(ProtocolError, match=f"round {number} was refused: round 5 is already masked"):
                later.mask(number, b"other", vector)
        with pytest.raises(ProtocolError):
            site.mask(0, b"", vector)
        assert later.mask(6, b"", vector)[1].last_round == 6
        assert site.last_round == 0

    @pytest.mark.parametrize("case", ["bad_replayed_round", "bad_earlier_round", "bad_round_zero"])
    def test_bad_orders_are_refused_at_their_last_round(self, case: str) -> None:
        *before, last = VECTORS[case]
        site, vector = FEDERATIONS[3, 32][0], np.ones(3, dtype=np.uint32)
        for number in before:
            _, site = site.mask(number, b"", vector)
        with pytest.raises(ProtocolError):
            site.mask(last, b"", vector)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(1, 100), min_size=1, max_size=6, unique=True).map(sorted))
    @example([15, 16, 17, 31, 32])
    @example([1, 2**63])
    def test_what_a_round_gives_does_not_depend_on_the_rounds_before(self, numbers: list[int]) -> None:
        first, vector = FEDERATIONS[3, 64][1], np.arange(4, dtype=np.uint64)
        site = first
        for number in numbers:
            masked, site = site.mask(number, b"x", vector)
            assert (masked == first.mask(number, b"x", vector)[0]).all()


def from_vectors(name: str, bits: Any) -> Masker:
    everybody = [
        Announcement(VECTORS["run"], site, bytes.fromhex(entry["public"]), bytes.fromhex(entry["signature"]))
        for site, entry in VECTORS["sites"].items()
    ]
    private = X25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["sites"][name]["private"]))
    return masker(private, next(entry for entry in everybody if entry.site == name), everybody, bits)


class TestVectors:
    @pytest.mark.parametrize("name", list(VECTORS["sites"]))
    @pytest.mark.parametrize("entry", VECTORS["rounds"], ids=lambda entry: f"round-{entry['round']}")
    def test_masked_vectors(self, entry: dict[str, Any], name: str) -> None:
        plain = np.array(entry["plain"][name], dtype=kind(entry["bits"]))
        site = from_vectors(name, entry["bits"])
        masked, _ = site.mask(entry["round"], bytes.fromhex(entry["broadcast"]), plain)
        assert masked.tolist() == entry["masked"][name]

    @pytest.mark.parametrize("entry", VECTORS["rounds"], ids=lambda entry: f"round-{entry['round']}")
    def test_the_vectors_add_up(self, entry: dict[str, Any]) -> None:
        for place, total in enumerate(entry["sum"]):
            for side in ("plain", "masked"):
                assert sum(vector[place] for vector in entry[side].values()) % 2 ** entry["bits"] == total

    @pytest.mark.parametrize("pair", VECTORS["pairs"], ids=lambda pair: "-".join(pair["sites"]))
    def test_round_seeds(self, pair: dict[str, Any]) -> None:
        own, peer = pair["sites"]
        site, zeros = from_vectors(own, 64), np.zeros(1, dtype=np.uint64)
        place = [name for name in sorted(VECTORS["sites"]) if name != own].index(peer)
        assert site.keys[place].hex() == pair["key"]
        for number, seed in pair["seeds"].items():
            _, later = site.mask(int(number), b"", zeros)
            offset = int(number) % 16 * 32
            assert later.block_seeds[place][offset : offset + 32].hex() == seed

    @pytest.mark.parametrize("bits", [32, 64])
    def test_a_longer_vector_against_the_reference(self, bits: int) -> None:
        own, length = "bergen", CHUNK * 8 // bits + 7
        keys = {}
        for pair in VECTORS["pairs"]:
            if own in pair["sites"]:
                (peer,) = set(pair["sites"]) - {own}
                keys[peer] = bytes.fromhex(pair["key"])
        vector = vectors_of(1, length, bits, 4)[0]
        masked, _ = from_vectors(own, bits).mask(18, b"long", vector)
        assert masked.tolist() == reference.masked(vector.tolist(), own, keys, 18, b"long", bits)


# The primitives

# NIST SP 800-38A, F.5.5: AES-256 in counter mode
CTR_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
CTR_START = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
CTR_PLAIN = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
CTR_SECRET = bytes.fromhex(
    "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
    "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
)
# McGrew and Viega, "The Galois/Counter Mode of Operation", test case 18: AES-256 under a nonce of 60 bytes
GCM_KEY = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
GCM_NONCE = bytes.fromhex(
    "9313225df88406e555909c5aff5269aa6a7a9538534f7da1e4c303d2a318a728"
    "c3c0c95156809539fcf0e2429a6b525416aedbf5a0de6a57a637b39b"
)
GCM_PLAIN = bytes.fromhex(
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
)
GCM_DATA = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
GCM_SECRET = bytes.fromhex(
    "5a8def2f0c9e53f1f75d7853659e2a20eeb2b22aafde6419a058ab4f6f746bf4"
    "0fc0c3b780f244452da3ebf1c5d82cdea2418997200ef82e44ae7e3f"
)
GCM_TAG = bytes.fromhex("a44a8266ee1c8eb0c8b5d4cf5ae9f19a")


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


class TestPrimitives:
    def test_counter_mode_of_the_block_function(self) -> None:
        start = int.from_bytes(CTR_START, "big")
        counters = b"".join(((start + index) % 2**128).to_bytes(16, "big") for index in range(4))
        assert xor(reference.aes256(CTR_KEY, counters), CTR_PLAIN) == CTR_SECRET
        assert Cipher(algorithms.AES(CTR_KEY), modes.CTR(CTR_START)).encryptor().update(CTR_PLAIN) == CTR_SECRET

    def test_galois_counter_mode_under_a_long_nonce(self) -> None:
        assert AESGCM(GCM_KEY).encrypt(GCM_NONCE, GCM_PLAIN, GCM_DATA) == GCM_SECRET + GCM_TAG
        assert Cipher(algorithms.AES(GCM_KEY), modes.GCM(GCM_NONCE)).encryptor().update(GCM_PLAIN) == GCM_SECRET
        assert xor(reference.gcm_keystream(GCM_KEY, GCM_NONCE, len(GCM_PLAIN)), GCM_PLAIN) == GCM_SECRET

    @settings(max_examples=60, deadline=None)
    @given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), st.integers(0, 200))
    @example(bytes(32), bytes(32), 16)
    def test_the_stream_is_its_keystream(self, seed: bytes, nonce: bytes, count: int) -> None:
        for bits in (32, 64):
            expected = reference.gcm_keystream(seed, nonce, count * bits // 8)
            found = b"".join(piece.tobytes() for piece in random_residues(seed, nonce, count, bits))
            assert found == expected

    @pytest.mark.parametrize("bits", [32, 64])
    def test_in_one_call_and_in_chunks_it_is_the_same_stream(self, bits: Any) -> None:
        seed, nonce = bytes(range(32)), bytes(range(32, 64))
        count = 2 * CHUNK * 8 // bits + 3
        whole = AESGCM(seed).encrypt(nonce, bytes(count * bits // 8), None)[:-16]
        pieces = [piece.copy() for piece in random_residues(seed, nonce, count, bits)]
        assert len(pieces) == 3
        assert np.concatenate(pieces).tobytes() == whole

    def test_the_counter_wraps_within_its_last_four_bytes(self) -> None:
        """A nonce whose first counter is near 2^32, as about one in a hundred thousand has for these lengths."""
        seed = bytes(32)
        nonce = next(
            candidate.to_bytes(32, "big")
            for candidate in range(10**6)
            if int.from_bytes(first_counter(seed, candidate.to_bytes(32, "big"))[12:], "big") > 2**32 - 2**20
        )
        count = 2**24 // 4 + 64
        start = int.from_bytes(first_counter(seed, nonce)[12:], "big")
        assert start + count * 4 // 16 > 2**32
        last = np.concatenate([piece.copy() for piece in random_residues(seed, nonce, count, 32)])[-64:]
        assert last.tobytes() == reference.gcm_keystream(seed, nonce, count * 4)[-256:]


def first_counter(seed: bytes, nonce: bytes) -> bytes:
    return bytes(reference.ghash(seed, nonce + bytes(8) + (8 * len(nonce)).to_bytes(8, "big")))
