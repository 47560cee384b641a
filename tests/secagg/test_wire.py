"""Residues on the wire: each takes its bits and no more, and comes back as it was."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.core.errors import ProtocolError
from cohortium.secagg.wire import from_wire, packed_length, sign_extended, to_wire

STRETCH = 1 << 16
"""Residues packed at a time."""
WHOLE = (16, 32, 64)


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("masking_reference", Path(__file__).with_name("reference.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()


def kind(bits: int) -> np.dtype[Any]:
    return np.dtype(f"<u{reference.kind_bits(bits) // 8}")


def residues_of(length: int, bits: int, seed: int = 0) -> np.ndarray:
    """Returns residues that fill their whole type, as masked ones do."""
    rng = np.random.default_rng(seed + bits)
    return rng.integers(0, 2 ** (8 * kind(bits).itemsize), length, dtype=kind(bits))


def low(residues: np.ndarray, bits: int) -> np.ndarray:
    return residues & residues.dtype.type(2**bits - 1)


class TestPacking:
    @pytest.mark.parametrize("bits", range(1, 65))
    def test_every_width_at_short_lengths(self, bits: int) -> None:
        for length in range(21):
            residues = residues_of(length, bits, length)
            carried = to_wire(residues, bits)
            assert carried.shape == (packed_length(length, bits),)
            assert carried.tobytes() == reference.packed(residues.tolist(), bits)
            back = from_wire(carried, length, bits)
            assert back.dtype == residues.dtype
            assert back.tolist() == reference.unpacked(carried.tobytes(), bits, length)
            assert np.array_equal(back, low(residues, bits))

    @pytest.mark.parametrize("bits", [1, 7, 12, 16, 17, 25, 32, 33, 50, 63, 64])
    def test_lengths_around_the_stretch(self, bits: int) -> None:
        for length in (STRETCH - 1, STRETCH, STRETCH + 1, 2 * STRETCH, 2 * STRETCH + 3):
            residues = residues_of(length, bits)
            carried = to_wire(residues, bits)
            assert len(carried) == packed_length(length, bits)
            assert np.array_equal(from_wire(carried, length, bits), low(residues, bits))
            # pieces across the places where stretches meet; a multiple of 8 residues ends with a whole byte
            for start in (0, STRETCH - 8, STRETCH, 2 * STRETCH - 8):
                expected = reference.packed(residues[start : start + 16].tolist(), bits)
                assert carried.tobytes()[start * bits // 8 :][: len(expected)] == expected

    @settings(max_examples=100, deadline=None)
    @given(st.integers(1, 64), st.lists(st.integers(0, 2**64 - 1), max_size=70))
    def test_any_residues(self, bits: int, numbers: list[int]) -> None:
        residues = np.array([number % 2 ** reference.kind_bits(bits) for number in numbers], kind(bits))
        kept = residues.copy()
        carried = to_wire(residues, bits)
        assert carried.tobytes() == reference.packed(numbers, bits)
        assert from_wire(carried, len(numbers), bits).tolist() == [number % 2**bits for number in numbers]
        assert np.array_equal(residues, kept)

    def test_parts_of_a_vector(self) -> None:
        residues = residues_of(64, 12)
        for part in (residues[::2], residues[5:], residues[::-1]):
            assert to_wire(part, 12).tobytes() == reference.packed(part.tolist(), 12)

    def test_a_known_answer(self) -> None:
        # 0xabc, 0x123 and 0xfff in 12 bits: the first one's low byte comes first
        residues = np.array([0xFABC, 0x0123, 0x1FFF], np.uint16)
        assert to_wire(residues, 12).tobytes().hex() == "bc3a12ff0f"
        assert from_wire(np.frombuffer(bytes.fromhex("bc3a12ff0f"), np.uint8), 3, 12).tolist() == [0xABC, 0x123, 0xFFF]


class TestPackedLength:
    def test_counts_bytes_or_whole_residues(self) -> None:
        for bits in range(1, 65):
            for length in (*range(20), 1000, 10_000_000):
                expected = length if bits in WHOLE else (length * bits + 7) // 8
                assert packed_length(length, bits) == expected

    def test_no_byte_more_than_the_bits_need(self) -> None:
        for bits in range(1, 65):
            for length in (0, 1, 5, 1000):
                entry = kind(bits).itemsize if bits in WHOLE else 1
                assert 0 <= 8 * entry * packed_length(length, bits) - length * bits < 8


class TestRefusals:
    @pytest.mark.parametrize("bits", [1, 12, 16, 25, 32, 50, 64])
    @pytest.mark.parametrize("change", [-1, 1, 8], ids=["short", "long", "longer"])
    def test_another_length(self, bits: int, change: int) -> None:
        count = packed_length(10, bits) + change
        carried = np.zeros(count, kind(bits) if bits in WHOLE else np.uint8)
        with pytest.raises(ProtocolError, match=rf"an array of shape \({count},\) .* carries no such residues"):
            from_wire(carried, 10, bits)

    @pytest.mark.parametrize("bits", [12, 16, 25, 32, 50, 64])
    def test_another_type(self, bits: int) -> None:
        right = kind(bits) if bits in WHOLE else np.dtype(np.uint8)
        for wrong in ("u1", "i1", "<u2", ">u2", "<i2", "<u4", ">u4", "<i4", "<u8", ">u8", "<i8", "<f4", "<f8", "?"):
            carried = np.zeros(packed_length(10, bits), wrong)
            if carried.dtype == right:
                from_wire(carried, 10, bits)
            else:
                with pytest.raises(ProtocolError, match=f"type {carried.dtype} carries no such residues"):
                    from_wire(carried, 10, bits)

    @pytest.mark.parametrize("bits", [12, 16, 64])
    def test_another_shape(self, bits: int) -> None:
        right = kind(bits) if bits in WHOLE else np.dtype(np.uint8)
        count = packed_length(10, bits)
        for shape in ((count, 1), (1, count), ()):
            with pytest.raises(ProtocolError, match="carries no such residues"):
                from_wire(np.zeros(shape, right), 10, bits)


class TestSignExtended:
    @pytest.mark.parametrize("bits", range(1, 65))
    def test_is_the_number_in_twos_complement(self, bits: int) -> None:
        edges = [0, 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1]
        residues = residues_of(200, bits)
        residues[: len(edges)] = np.array(edges, kind(bits))
        kept = residues.copy()
        found = sign_extended(residues, bits)
        assert found.dtype == residues.dtype
        numbers = found.view(f"<i{found.itemsize}").tolist()
        assert numbers == [reference.signed(residue, bits) for residue in residues.tolist()]
        assert np.array_equal(residues, kept)

    def test_no_residues(self) -> None:
        for bits in (12, 16, 25, 64):
            assert sign_extended(np.empty(0, kind(bits)), bits).shape == (0,)
