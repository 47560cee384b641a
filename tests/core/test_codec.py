"""Bytes for values: what is sent arrives, and hostile bytes end in a `ProtocolError`, whatever they are."""

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cohortium.core import codec
from cohortium.core.errors import ProtocolError
from cohortium.core.messages import (
    Announcement,
    CloseRun,
    Endorsed,
    Endorsement,
    FromSite,
    KeySet,
    MaskedUpdate,
    OpenRound,
    OpenRun,
    Refusal,
    Reveal,
    Survivors,
    ToSite,
    decode_from_site,
    decode_to_site,
)

TRAVELLING = ["<f8", "<f4", "|u1", "<u2", "<u4", "<u8", "<i8", "|b1"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ARRAYS = st.sampled_from(TRAVELLING).flatmap(
    lambda kind: arrays.arrays(np.dtype(kind), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
KEYS, SIGNATURES = (st.binary(min_size=length, max_size=length) for length in (32, 64))
ANNOUNCEMENTS = st.builds(Announcement, TEXT, TEXT, KEYS, SIGNATURES)
ROUNDS = st.integers(1, 10**9)
SEALED = st.lists(st.binary(max_size=60), max_size=4).map(tuple)
NAMES = st.lists(TEXT, max_size=4).map(tuple)
TAGS = st.lists(KEYS, max_size=4).map(tuple)
TO_SITE: st.SearchStrategy[ToSite] = st.one_of(
    st.builds(OpenRun, TEXT, st.binary(max_size=200)),
    st.builds(KeySet, TEXT, st.lists(ANNOUNCEMENTS, max_size=4).map(tuple)),
    st.builds(OpenRound, TEXT, ROUNDS, st.binary(max_size=200), SEALED),
    st.builds(Survivors, TEXT, ROUNDS, NAMES, SIGNATURES, SEALED),
    st.builds(Endorsed, TEXT, ROUNDS, NAMES, TAGS, ARRAYS),
    st.builds(CloseRun, TEXT, TEXT),
)
FROM_SITE: st.SearchStrategy[FromSite] = st.one_of(
    ANNOUNCEMENTS,
    st.builds(MaskedUpdate, TEXT, TEXT, ROUNDS, ARRAYS, SEALED),
    st.builds(Endorsement, TEXT, TEXT, ROUNDS, TAGS),
    st.builds(Reveal, TEXT, TEXT, ROUNDS, ARRAYS),
    st.builds(Refusal, TEXT, TEXT, TEXT),
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, msgspec.Struct) and type(one) is type(other):
        return all(same(getattr(one, name), getattr(other, name)) for name in one.__struct_fields__)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return bool(one == other) and type(one) is type(other)


class TestRoundTrip:
    @settings(max_examples=200, deadline=None)
    @given(TO_SITE)
    def test_to_a_site(self, message: ToSite) -> None:
        assert same(decode_to_site(codec.encode(message)), message)

    @settings(max_examples=200, deadline=None)
    @given(FROM_SITE)
    def test_from_a_site(self, message: FromSite) -> None:
        assert same(decode_from_site(codec.encode(message)), message)

    @settings(max_examples=200, deadline=None)
    @given(ARRAYS)
    @example(np.array([np.nan, -0.0, np.inf]))
    @example(np.zeros((0, 3)))
    @example(np.arange(12.0).reshape(3, 4).T)
    @example(np.arange(20, dtype=np.uint32)[::3])
    def test_arrays_keep_their_type_shape_and_every_bit(self, array: np.ndarray) -> None:
        assert same(codec.decode(codec.encode(array), np.ndarray), array)

    def test_what_arrives_is_read_only(self) -> None:
        with pytest.raises(ValueError, match="read-only"):
            codec.decode(codec.encode(np.zeros(3)), np.ndarray)[0] = 1.0

    def test_an_array_travels_as_kind_shape_and_little_endian_bytes(self) -> None:
        plain = msgspec.msgpack.decode(codec.encode(np.array([[1, 2], [3, 2**32 - 1]], dtype=np.uint32)))
        assert plain == ["<u4", [2, 2], bytes.fromhex("010000000200000003000000ffffffff")]


@dataclass(frozen=True)
class Nested:
    counts: dict[str, float]
    weights: tuple[np.ndarray, ...]


class TestDeterminism:
    def test_equal_values_give_equal_bytes_whatever_the_order_of_insertion(self) -> None:
        weights = (np.ones(2), np.zeros((1, 2), dtype=np.float32))
        one, other = Nested({"a": 1.0, "b": 2.0}, weights), Nested({"b": 2.0, "a": 1.0}, weights)
        assert codec.encode(one) == codec.encode(other)

    def test_a_view_gives_the_bytes_of_its_copy(self) -> None:
        matrix = np.arange(12.0).reshape(3, 4)
        assert codec.encode(matrix.T) == codec.encode(matrix.T.copy())

    def test_golden(self) -> None:
        assert (
            codec.encode(CloseRun("r", "finished")).hex()
            == "83"
            + ("a474797065" + "a8" + b"CloseRun".hex() + "a372756e" + "a172" + "a7" + b"outcome".hex() + "a8")
            + b"finished".hex()
        )


class TestRefusedToTravel:
    @pytest.mark.parametrize(
        "value",
        [
            np.array([object()]),
            np.array(["text"]),
            np.array([1], dtype=">u4"),
            np.array([1], dtype=np.int32),
            np.array([1], dtype=np.complex128),
            np.array(["2020-01-01"], dtype="datetime64[D]"),
            np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
            object(),
            lambda: None,
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_on_the_way_out(self, value: object) -> None:
        with pytest.raises(TypeError, match="do not travel"):
            codec.encode(value)

    @pytest.mark.parametrize(
        ("kind", "shape", "data"),
        [
            ("|O", [1], bytes(8)),
            ("O", [1], bytes(8)),
            ("<U1", [1], b"a\0\0\0"),
            (">f8", [1], bytes(8)),
            ("<f8,<f8", [1], bytes(16)),
            ("<f8", [2], bytes(8)),
            ("<f8", [1], bytes(9)),
            ("<f8", [], b""),
            ("<f8", [0], bytes(8)),
            ("<f8", [-1], bytes(8)),
            ("<f8", [-1, -1], bytes(8)),
            ("<f8", [2**62, 4], b""),
            ("<f8", [0, 2**64 - 1], b""),
            ("<f8", [2**63, 2], b""),
            ("<f8", [1] * 9, bytes(8)),
            ("<f8", ["1"], bytes(8)),
            ("<f8", [1.0], bytes(8)),
            ("<f8", 1, bytes(8)),
            (None, [1], bytes(8)),
            ("<f8", [1], "text"),
            ("<f8", [1], None),
        ],
    )
    def test_on_the_way_in(self, kind: object, shape: object, data: object) -> None:
        with pytest.raises(ProtocolError):
            codec.decode(msgspec.msgpack.encode([kind, shape, data]), np.ndarray)
        with pytest.raises(ProtocolError):
            content = {"type": "MaskedUpdate", "run": "r", "site": "s", "round": 1, "values": [kind, shape, data]}
            decode_from_site(msgspec.msgpack.encode(content))

    def test_more_parts_than_an_array_has(self) -> None:
        with pytest.raises(ProtocolError):
            codec.decode(msgspec.msgpack.encode(["<f8", [1], bytes(8), 0]), np.ndarray)


VALID_TO_SITE = [
    OpenRun("run", b'{"study":"x"}'),
    KeySet("run", tuple(Announcement("run", site, bytes(32), bytes(64)) for site in "abc")),
    OpenRound("run", 3, codec.encode(Nested({"a": 0.5}, (np.ones(3),))), (b"before",)),
    Survivors("run", 3, ("a", "b", "c"), bytes(64), (b"for me", b"and me")),
    Endorsed("run", 3, ("b", "c"), (bytes(32), bytes(32)), np.zeros(0, np.uint8)),
    CloseRun("run", "finished"),
]
VALID_FROM_SITE = [
    Announcement("run", "a", bytes(range(32)), bytes(range(64))),
    MaskedUpdate("run", "a", 3, np.arange(7, dtype=np.uint32)),
    MaskedUpdate("run", "a", 3, np.ones((2, 0), dtype=np.float64), (b"for b", b"for c")),
    Endorsement("run", "a", 3, (bytes(32), bytes(32))),
    Reveal("run", "a", 3, np.zeros((3, 2, 18), np.uint16)),
    Refusal("run", "a", "no"),
]


@st.composite
def mutated(draw: st.DrawFn, messages: list[Any]) -> bytes:
    data = bytearray(codec.encode(draw(st.sampled_from(messages))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 4)))
        data[start:stop] = draw(st.binary(max_size=4))
    return bytes(data)


def wellformed_or_refused(decode: Any, data: bytes, kinds: tuple[type, ...]) -> None:
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert isinstance(message, kinds)
    assert same(decode(codec.encode(message)), message)


class TestHostileBytes:
    @settings(max_examples=400, deadline=None)
    @given(mutated(VALID_TO_SITE))
    def test_mutated_to_a_site(self, data: bytes) -> None:
        wellformed_or_refused(decode_to_site, data, (OpenRun, KeySet, OpenRound, Survivors, Endorsed, CloseRun))

    @settings(max_examples=400, deadline=None)
    @given(mutated(VALID_FROM_SITE))
    def test_mutated_from_a_site(self, data: bytes) -> None:
        wellformed_or_refused(decode_from_site, data, (Announcement, MaskedUpdate, Endorsement, Reveal, Refusal))

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=80))
    def test_noise(self, data: bytes) -> None:
        wellformed_or_refused(decode_to_site, data, (OpenRun, KeySet, OpenRound, Survivors, Endorsed, CloseRun))
        wellformed_or_refused(decode_from_site, data, (Announcement, MaskedUpdate, Endorsement, Reveal, Refusal))
        wellformed_or_refused(lambda raw: codec.decode(raw, np.ndarray), data, (np.ndarray,))

    @pytest.mark.parametrize("message", VALID_TO_SITE, ids=lambda message: type(message).__name__)
    def test_every_truncation_to_a_site(self, message: ToSite) -> None:
        data = codec.encode(message)
        for length in range(len(data)):
            with pytest.raises(ProtocolError):
                decode_to_site(data[:length])
        with pytest.raises(ProtocolError):
            decode_to_site(data + b"\0")

    @pytest.mark.parametrize("message", VALID_FROM_SITE, ids=lambda message: type(message).__name__)
    def test_every_truncation_from_a_site(self, message: FromSite) -> None:
        data = codec.encode(message)
        for length in range(len(data)):
            with pytest.raises(ProtocolError):
                decode_from_site(data[:length])

    @pytest.mark.parametrize("message", VALID_FROM_SITE, ids=lambda message: type(message).__name__)
    def test_a_sites_message_is_none_of_the_coordinators(self, message: FromSite) -> None:
        with pytest.raises(ProtocolError):
            decode_to_site(codec.encode(message))

    def test_unknown_and_missing_fields(self) -> None:
        good = {"type": "CloseRun", "run": "r", "outcome": "finished"}
        assert decode_to_site(msgspec.msgpack.encode(good)) == CloseRun("r", "finished")
        for bad in (
            good | {"extra": 1},
            {"type": "CloseRun", "run": "r"},
            good | {"type": "OpenDoor"},
            good | {"run": 5},
            good | {"outcome": None},
            {"run": "r", "outcome": "finished"},
        ):
            with pytest.raises(ProtocolError):
                decode_to_site(msgspec.msgpack.encode(bad))

    def test_deep_nesting(self) -> None:
        for data in (b"\x91" * 100_000, b"\x81\xa1a" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"):
            with pytest.raises(ProtocolError):
                decode_to_site(data)
            with pytest.raises(ProtocolError):
                codec.decode(data, np.ndarray)

    def test_too_long(self) -> None:
        data = codec.encode(np.zeros(100))
        assert len(codec.decode(data, np.ndarray, len(data))) == 100
        with pytest.raises(ProtocolError, match="is the most here"):
            codec.decode(data, np.ndarray, len(data) - 1)

    @pytest.mark.parametrize(
        "message",
        [
            Announcement("run", "a", bytes(31), bytes(64)),
            Announcement("run", "a", bytes(1 << 20), bytes(64)),
            Announcement("run", "a", bytes(32), bytes(65)),
            Refusal("run", "a", "x" * 1001),
            Refusal("r" * 81, "a", "no"),
        ],
        ids=lambda message: type(message).__name__,
    )
    def test_fields_of_another_length(self, message: FromSite) -> None:
        with pytest.raises(ProtocolError):
            decode_from_site(codec.encode(message))
