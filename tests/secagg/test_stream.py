"""The mask stream: the same bytes in either mode, in one piece or many, on one thread or several."""

import importlib.util
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cohortium.secagg.stream import PLAIN, SEGMENT, Means, Mode, Task, add_streams, in_turn, keystream

AT_ONCE = 1 << 18
"""Bytes of streams up to which they are expanded in one call each."""
BLOCK = 1 << 18
MODES: tuple[Mode, ...] = get_args(Mode)
KINDS = [np.uint16, np.uint32, np.uint64]


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("masking_reference", Path(__file__).with_name("reference.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()


def key_of(index: int) -> bytes:
    return sha256(f"stream {index}".encode()).digest()


def random_vector(length: int, kind: Any, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2 ** (8 * np.dtype(kind).itemsize), length, dtype=kind)


def expected_sum(vector: np.ndarray, add: Sequence[bytes], subtract: Sequence[bytes]) -> np.ndarray:
    """Returns what the reference's streams make of a vector."""
    total = vector.copy()
    for key in add:
        total += np.frombuffer(reference.stream_bytes(key, vector.nbytes), vector.dtype)
    for key in subtract:
        total -= np.frombuffer(reference.stream_bytes(key, vector.nbytes), vector.dtype)
    return total


@pytest.fixture(scope="module")
def threads() -> Iterator[Any]:
    """Runs tasks on four threads."""
    with ThreadPoolExecutor(4) as pool:

        def spread(tasks: Sequence[Task]) -> None:
            for done in [pool.submit(task) for task in tasks]:
                done.result()

        yield spread


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
# McGrew and Viega, "The Galois/Counter Mode of Operation", test cases 13 to 16: AES-256 under nonces of 12 bytes
GCM_KEY = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
GCM_NONCE = bytes.fromhex("cafebabefacedbaddecaf888")
GCM_PLAIN = bytes.fromhex(
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
)
GCM_SECRET = bytes.fromhex(
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"
)
GCM = [
    (bytes(32), bytes(12), b"", b"", b"", "530f8afbc74536b9a963b4f1c4cb738b"),
    (
        bytes(32),
        bytes(12),
        bytes(16),
        b"",
        bytes.fromhex("cea7403d4d606b6e074ec5d3baf39d18"),
        "d0d1c8a799996bf0265b98b5d48ab919",
    ),
    (GCM_KEY, GCM_NONCE, GCM_PLAIN, b"", GCM_SECRET, "b094dac5d93471bdec1a502270e3cc6c"),
    (
        GCM_KEY,
        GCM_NONCE,
        GCM_PLAIN[:60],
        bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2"),
        GCM_SECRET[:60],
        "76fc6ece0f4e1768cddf8853bb2d551b",
    ),
]


class TestPrimitives:
    def test_counter_mode_of_the_block_function(self) -> None:
        start = int.from_bytes(CTR_START, "big")
        counters = b"".join(((start + index) % 2**128).to_bytes(16, "big") for index in range(4))
        assert reference.xor(reference.aes256(CTR_KEY, counters), CTR_PLAIN) == CTR_SECRET
        assert Cipher(algorithms.AES(CTR_KEY), modes.CTR(CTR_START)).encryptor().update(CTR_PLAIN) == CTR_SECRET

    @pytest.mark.parametrize(
        ("key", "nonce", "plain", "data", "secret", "tag"), GCM, ids=["case13", "case14", "case15", "case16"]
    )
    def test_galois_counter_mode(
        self, key: bytes, nonce: bytes, plain: bytes, data: bytes, secret: bytes, tag: str
    ) -> None:
        assert AESGCM(key).encrypt(nonce, plain, data) == secret + bytes.fromhex(tag)
        assert reference.gcm_seal(key, nonce, plain, data) == secret + bytes.fromhex(tag)

    @settings(max_examples=60, deadline=None)
    @given(
        st.binary(min_size=32, max_size=32),
        st.binary(min_size=12, max_size=12),
        st.binary(max_size=100),
        st.binary(max_size=40),
    )
    def test_sealing_by_the_reference(self, key: bytes, nonce: bytes, plain: bytes, data: bytes) -> None:
        assert reference.gcm_seal(key, nonce, plain, data) == AESGCM(key).encrypt(nonce, plain, data)

    @settings(max_examples=40, deadline=None)
    @given(st.binary(min_size=32, max_size=32), st.binary(min_size=12, max_size=12), st.integers(0, 3000))
    @example(bytes(32), b"\xff" * 12, SEGMENT)
    def test_the_stream_of_gcm_is_counter_mode_from_block_two(self, key: bytes, nonce: bytes, length: int) -> None:
        galois = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor().update(bytes(length))
        counter = Cipher(algorithms.AES(key), modes.CTR(nonce + b"\0\0\0\2")).encryptor().update(bytes(length))
        assert galois == counter == reference.counter_stream(key, nonce, length)


class TestKeystream:
    @settings(max_examples=40, deadline=None)
    @given(st.binary(min_size=32, max_size=32), st.integers(0, 3000), st.integers(0, 2**40))
    @example(bytes(32), AT_ONCE - 1, 0)
    @example(bytes(32), AT_ONCE, 1)
    @example(bytes(32), AT_ONCE + 1, 2)
    @example(bytes(32), SEGMENT, 2**96 - 1)
    def test_of_any_segment(self, key: bytes, length: int, segment: int) -> None:
        assert keystream(key, length, segment) == reference.counter_stream(key, segment.to_bytes(12, "big"), length)

    def test_a_shorter_one_is_the_beginning_of_a_longer_one(self) -> None:
        whole = keystream(key_of(1), SEGMENT)
        for length in (0, 1, 15, 16, 17, AT_ONCE, AT_ONCE + 1, SEGMENT - 1):
            assert keystream(key_of(1), length) == whole[:length]

    def test_segments_and_keys_differ(self) -> None:
        streams = [keystream(key_of(key), 64, segment) for key in range(4) for segment in range(4)]
        pieces = [stream[start : start + 16] for stream in streams for start in range(0, 64, 16)]
        assert len(set(pieces)) == 64


def around(kind: Any, keys: int) -> list[int]:
    """Lengths at which the way that streams are added changes."""
    size = np.dtype(kind).itemsize
    at_once, block, segment = AT_ONCE // (size * keys), BLOCK // size, SEGMENT // size
    return [
        *(0, 1, 2, 3, 8),
        *(at_once - 1, at_once, at_once + 1),
        *(block - 1, block, block + 1, 2 * block, 2 * block + 5),
        *(segment - 1, segment, segment + 1, segment + block, 2 * segment, 2 * segment + 7),
    ]


class TestAddStreams:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_mode_and_spread_gives_the_references_sum(self, kind: Any, threads: Any) -> None:
        add, subtract = [key_of(1), key_of(2)], [key_of(3)]
        for length in around(kind, 3):
            vector = random_vector(length, kind)
            expected = expected_sum(vector, add, subtract)
            for mode in MODES:
                for spread, tasks in ((in_turn, 1), (in_turn, 3), (threads, 2), (threads, 7)):
                    found = vector.copy()
                    add_streams(found, add, subtract, Means(mode, spread, tasks))
                    assert np.array_equal(found, expected), (length, mode, tasks)

    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(KINDS),
        st.integers(0, 3000),
        st.integers(0, 8),
        st.integers(0, 8),
        st.sampled_from(MODES),
        st.integers(1, 5),
    )
    @example(np.uint32, SEGMENT // 4 * 3 + 11, 2, 2, "ctr", 2)
    @example(np.uint16, SEGMENT + 1, 0, 3, "gcm", 3)
    @example(np.uint64, SEGMENT // 8 + 1, 3, 0, "gcm", 1)
    def test_any_number_of_keys(self, kind: Any, length: int, plus: int, minus: int, mode: Mode, tasks: int) -> None:
        if plus + minus == 0:
            minus = 1
        keys = [key_of(index) for index in range(plus + minus)]
        vector = random_vector(length, kind, length)
        expected = expected_sum(vector, keys[:plus], keys[plus:])
        add_streams(vector, keys[:plus], keys[plus:], Means(mode, in_turn, tasks))
        assert np.array_equal(vector, expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_adding_and_taking_away_is_nothing(self, kind: Any) -> None:
        keys = [key_of(index) for index in range(5)]
        for length in (1, 100, AT_ONCE // 8, SEGMENT // np.dtype(kind).itemsize + 3):
            vector = random_vector(length, kind)
            changed = vector.copy()
            add_streams(changed, keys, [], PLAIN)
            assert np.mean(changed == vector) < 0.05 or length == 1
            add_streams(changed, [], keys[::-1], Means("gcm"))
            assert np.array_equal(changed, vector)
            add_streams(changed, keys, keys)
            assert np.array_equal(changed, vector)

    def test_part_of_a_longer_vector(self) -> None:
        """Entries beside the part stay as they were."""
        for length in (10, SEGMENT // 4 + 9):
            whole = random_vector(length + 8, np.uint32)
            kept = whole.copy()
            add_streams(whole[4:-4], [key_of(1)], [key_of(2)])
            assert np.array_equal(whole[4:-4], expected_sum(kept[4:-4], [key_of(1)], [key_of(2)]))
            assert np.array_equal(whole[:4], kept[:4])
            assert np.array_equal(whole[-4:], kept[-4:])

    def test_the_beginning_does_not_depend_on_the_length(self) -> None:
        longest = np.zeros(3 * SEGMENT // 4, np.uint32)
        add_streams(longest, [key_of(1)], [])
        for length in (1, 1000, AT_ONCE // 4, SEGMENT // 4, SEGMENT // 2 + 1):
            shorter = np.zeros(length, np.uint32)
            add_streams(shorter, [key_of(1)], [])
            assert np.array_equal(shorter, longest[:length])

    def test_no_stretch_of_a_stream_comes_twice(self) -> None:
        """Blocks of 16 bytes across four segments and two keys: all of them differ."""
        blocks = []
        for index in (1, 2):
            vector = np.zeros(4 * SEGMENT // 8, np.uint64)
            add_streams(vector, [key_of(index)], [])
            blocks.append(vector.reshape(-1, 2))
        everything = np.concatenate(blocks).view("V16").reshape(-1)
        assert len(set(everything.tolist())) == 2 * 4 * SEGMENT // 16

    def test_looks_uniform(self) -> None:
        vector = np.zeros(4_000_000, np.uint16)
        add_streams(vector, [key_of(9)], [])
        counts = np.bincount(vector, minlength=1 << 16)
        mean = len(vector) / (1 << 16)
        distance = ((counts - mean) ** 2 / mean).sum()
        # chi-square with 65535 degrees of freedom, within six deviations
        assert abs(distance - 65535) < 6 * math.sqrt(2 * 65535)
        for shift in (1, 8, BLOCK // 2, SEGMENT // 2):
            together = np.corrcoef(vector[:-shift], vector[shift:])[0, 1]
            assert abs(together) < 6 / math.sqrt(len(vector) - shift)


class TestMemory:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("tasks", [1, 4])
    def test_beyond_the_vector(self, mode: Mode, tasks: int, threads: Any) -> None:
        """Fifty keys and two million values take a few blocks for each task, however long the vector is."""
        vector = np.zeros(2_000_000, np.uint32)
        keys = [key_of(index) for index in range(50)]
        means = Means(mode, threads if tasks > 1 else in_turn, tasks)
        tracemalloc.start()
        try:
            add_streams(vector, keys[:25], keys[25:], means)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < tasks * 320 * 1024
        assert vector.any()


class TestMeans:
    def test_shows_no_key(self) -> None:
        secret = b"a key of the consortium"
        assert "consortium" not in repr(Means(ckks=secret)) + str(Means(ckks=secret))

    def test_tasks_are_no_more_than_segments(self) -> None:
        seen: list[int] = []

        def counting(tasks: Sequence[Task]) -> None:
            seen.append(len(tasks))
            in_turn(tasks)

        for segments, tasks in ((1, 4), (3, 4), (4, 4), (9, 4), (9, 1)):
            vector = np.zeros(segments * SEGMENT // 8, np.uint64)
            add_streams(vector, [key_of(1)], [], Means("ctr", counting, tasks))
        assert seen == [1, 3, 4, 4, 1]
