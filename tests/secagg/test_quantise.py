"""Fixed point: no sum ever wraps, the error is what the proof says, and what breaks a bound is not sent."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.layout import Block
from cohortium.secagg.quantise import FixedPoint, fixed_point, residue_kind, signed_kind

SITES = st.integers(3, 50)
WIDTHS = (12, 16, 25, 32, 50, 64)
BITS = st.sampled_from(WIDTHS)
BOUNDS = st.one_of(st.floats(1e-12, 1e9), st.integers(-30, 29).map(lambda power: 2.0**power))


def kind(bits: int) -> np.dtype[Any]:
    """Returns the smallest type of 16, 32 or 64 bits that holds a width."""
    return np.dtype("<u2" if bits <= 16 else "<u4" if bits <= 32 else "<u8")


def stage(bound: float, sites: int, bits: int, excess: Any = "refuse", length: int = 3) -> FixedPoint:
    return fixed_point((Block("x", (length,), bound, excess),), sites, bits)


def signed(total: int, bits: int) -> int:
    return (total + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


class TestRangeProof:
    @settings(max_examples=400, deadline=None)
    @given(BOUNDS, SITES, BITS)
    @example(1.0, 4, 64)  # 2^63 - 1 is no float: its neighbour 2^63 would let four sites wrap
    @example(1.0, 8, 64)
    @example(1.0, 4, 32)
    @example(1.0, 4, 12)
    @example(1.0, 4, 16)
    @example(40.0, 50, 12)
    @example(2.0**29, 3, 32)
    @example(0.3, 50, 25)
    @example(2.0**43, 50, 50)
    @example(2.0**30 - 1, 16, 64)
    @example(1e-300, 3, 32)
    @example(5e-324, 3, 64)
    def test_exact(self, bound: float, sites: int, bits: int) -> None:
        most = Fraction(2 ** (bits - 1) - 1)
        assume(sites * (Fraction(bound) + Fraction(1, 2)) <= most)
        (exponent,) = stage(bound, sites, bits).exponents
        assert sites * (Fraction(bound) * Fraction(2) ** exponent + Fraction(1, 2)) <= most
        # and the next power of two would be too much, unless the bound is next to nothing
        assert sites * (Fraction(bound) * Fraction(2) ** (exponent + 1) + Fraction(1, 2)) > most or exponent == 1000

    @settings(max_examples=400, deadline=None)
    @given(BOUNDS, SITES, BITS)
    @example(1.0, 4, 64)
    @example(1.0, 32, 64)
    @example(1.0, 4, 32)
    @example(3.0, 5, 64)
    @example(1.0, 50, 12)
    @example(7.0, 4, 16)
    @example(1.0, 4, 50)
    def test_the_worst_sum_never_wraps(self, bound: float, sites: int, bits: int) -> None:
        assume(sites * (Fraction(bound) + Fraction(1, 2)) <= 2 ** (bits - 1) - 1)
        fixed = stage(bound, sites, bits, length=2)
        residues = fixed.encode(np.array([bound, -bound]))
        one = [signed(int(residue), bits) for residue in residues]
        for entry in one:
            assert abs(sites * entry) <= 2 ** (bits - 1) - 1
        # a wider type than the width holds whole numbers of its own, as a sum comes out of the secure sum
        whole = 8 * residues.dtype.itemsize
        total = np.array([sites * entry % 2**whole for entry in one], dtype=residues.dtype)
        error = sites / 2 * 2.0 ** -fixed.exponents[0] + 1e-6 * sites * bound
        assert fixed.decode(total) == pytest.approx([sites * bound, -sites * bound], abs=error)

    @settings(max_examples=200, deadline=None)
    @given(SITES, BITS, st.floats(0.2, 5))
    def test_refused_exactly_where_not_even_whole_numbers_fit(self, sites: int, bits: int, share: float) -> None:
        room = Fraction(2 ** (bits - 1) - 1, sites) - Fraction(1, 2)
        bound = float(room) * share
        if Fraction(bound) <= room:
            assert stage(bound, sites, bits).exponents[0] >= 0
        else:
            with pytest.raises(StudyError, match="the range proof fails: statistic 'x'"):
                stage(bound, sites, bits)

    @pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), 1e300])
    def test_a_bound_that_is_none(self, bound: float) -> None:
        for bits in WIDTHS:
            with pytest.raises(StudyError, match="the range proof fails"):
                stage(bound, 3, bits)

    def test_each_block_has_a_scale_of_its_own(self) -> None:
        layout = (Block("a", (2,), 1.0), Block("b", (), 1000.0), Block("c", (0,), 1.0), Block("d", (1, 2), 0.1))
        a, b, c, d = fixed_point(layout, 3, 32).exponents
        assert (a, b) == (29, 19)
        assert (c, d) == (29, 32)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_fifty_sites_of_any_width(self, bits: int) -> None:
        """The largest bound that passes, by its own definition, and the next number that does not."""
        largest = Fraction(2 ** (bits - 1) - 1, 50) - Fraction(1, 2)
        under, over = float(largest), float(largest)
        while Fraction(under) > largest:
            under = float(np.nextafter(under, 0.0))
        while Fraction(over) <= largest:
            over = float(np.nextafter(over, np.inf))
        fixed = stage(under, 50, bits, length=1)
        assert fixed.exponents == (0,)
        (residue,) = fixed.encode(np.array([under]))
        assert 50 * int(residue) <= 2 ** (bits - 1) - 1
        with pytest.raises(StudyError, match=f"their sum could overflow {bits} bits"):
            stage(over, 50, bits)

    def test_says_what_would_help(self) -> None:
        with pytest.raises(StudyError, match=r"overflow 32 bits; lower cohort\.maximum or set aggregation\.bits: 64"):
            stage(1e9, 3, 32)


@st.composite
def federations(draw: st.DrawFn) -> tuple[float, int, Any, np.ndarray]:
    bound, sites, bits = draw(BOUNDS), draw(SITES), draw(BITS)
    assume(sites * (Fraction(bound) + Fraction(1, 2)) <= 2 ** (bits - 1) - 1)
    units = draw(st.lists(st.floats(-1, 1), min_size=3, max_size=3))
    spread = np.random.default_rng(draw(st.integers(0, 999))).uniform(-1, 1, (sites, 3))
    return bound, sites, bits, np.where(draw(st.booleans()), spread, np.array(units)) * bound


class TestSum:
    @settings(max_examples=300, deadline=None)
    @given(federations())
    def test_is_within_half_a_step_for_each_site(self, federation: tuple[float, int, Any, np.ndarray]) -> None:
        bound, sites, bits, vectors = federation
        fixed = stage(bound, sites, bits)
        encoded = [fixed.encode(vector) for vector in vectors]
        total = np.add.reduce(encoded, dtype=encoded[0].dtype)
        step = Fraction(1, 1) / Fraction(2) ** fixed.exponents[0]
        for place, found in enumerate(fixed.decode(total).tolist()):
            exact = sum((Fraction(float(vector[place])) for vector in vectors), Fraction(0))
            rounding = abs(Fraction(found)) * Fraction(1, 2**52) if bits >= 54 else 0
            assert abs(Fraction(found) - exact) <= sites * step / 2 + rounding

    @settings(max_examples=100, deadline=None)
    @given(federations())
    def test_equals_integer_arithmetic(self, federation: tuple[float, int, Any, np.ndarray]) -> None:
        bound, sites, bits, vectors = federation
        fixed = stage(bound, sites, bits)
        scale = Fraction(2) ** fixed.exponents[0]
        encoded = [fixed.encode(vector) for vector in vectors]
        for vector, residues in zip(vectors, encoded, strict=True):
            # Python's round, like numpy's, takes a half to the even neighbour
            whole = 8 * residues.dtype.itemsize
            assert residues.tolist() == [round(Fraction(float(entry)) * scale) % 2**whole for entry in vector]

    def test_types_and_shapes(self) -> None:
        for bits in WIDTHS:
            residues = stage(10.0, 3, bits).encode(np.array([0.0, -10.0, 10.0]))
            assert residues.dtype == kind(bits)
            assert residues.shape == (3,)
            decoded = stage(10.0, 3, bits).decode(residues)
            assert decoded.dtype == np.float64
            # ten times a power of two is whole
            assert decoded.tolist() == [0.0, -10.0, 10.0]

    def test_the_type_is_the_smallest_that_holds_the_width(self) -> None:
        for bits in range(1, 65):
            assert residue_kind(bits) == kind(bits)
            assert signed_kind(bits) == np.dtype(f"<i{kind(bits).itemsize}")
            assert bits <= 8 * residue_kind(bits).itemsize

    def test_length(self) -> None:
        layout = (Block("a", (2, 3), 1.0), Block("b", (), 1000.0), Block("c", (0,), 1.0))
        assert fixed_point(layout, 3, 32).length == 7
        assert stage(1.0, 3, 12, length=0).length == 0

    @settings(max_examples=150, deadline=None)
    @given(federations())
    def test_precision_is_an_upper_bound_of_each_sites_error(
        self, federation: tuple[float, int, int, np.ndarray]
    ) -> None:
        bound, sites, bits, vectors = federation
        fixed = stage(bound, sites, bits)
        for vector in vectors:
            back = fixed.decode(fixed.encode(vector)).tolist()
            for found, exact in zip(back, vector.tolist(), strict=True):
                assert abs(Fraction(found) - Fraction(exact)) <= Fraction(fixed.precision) * Fraction(bound)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_precision_is_not_far_from_the_largest_error(self, bits: int) -> None:
        """Half a step is met by what lies between two whole numbers."""
        fixed = stage(10.0, 3, bits)
        step = 2.0 ** -fixed.exponents[0]
        worst = abs(fixed.decode(fixed.encode(np.array([1.5 * step, 0.0, 0.0])))[0] - 1.5 * step) / 10.0
        assert worst <= fixed.precision <= worst + 2.0**-50

    def test_precision_is_that_of_the_coarsest_block(self) -> None:
        layout = (Block("fine", (2,), 1.0), Block("coarse", (2,), 600.0))
        fine, coarse = (fixed_point((block,), 3, 12).precision for block in layout)
        assert fine != coarse
        assert fixed_point(layout, 3, 12).precision == max(fine, coarse)

    def test_nothing_given_is_changed(self) -> None:
        fixed, vector = stage(10.0, 3, 32), np.array([1.0, -10.0 * (1 + 1e-12), 3.3])
        before = vector.copy()
        residues = fixed.encode(vector)
        kept = residues.copy()
        fixed.decode(residues)
        assert (vector == before).all()
        assert (residues == kept).all()

    def test_no_entries(self) -> None:
        fixed = stage(1.0, 3, 32, length=0)
        assert fixed.encode(np.empty(0)).shape == fixed.decode(np.empty(0, dtype=np.uint32)).shape == (0,)


class TestRefusals:
    @pytest.mark.parametrize("excess", ["refuse", "clip"])
    @pytest.mark.parametrize("place", range(3))
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_no_number(self, value: float, place: int, excess: Any) -> None:
        vector = np.array([1.0, -1.0, 0.5])
        vector[place] = value
        with pytest.raises(ProtocolError, match=r"statistic 'x' is not finite or exceeds its bound 2$"):
            stage(2.0, 3, 32, excess).encode(vector)

    @settings(max_examples=100, deadline=None)
    @given(BOUNDS, st.floats(1.0 + 1e-8, 1e6), st.sampled_from([-1, 1]), st.integers(0, 2))
    def test_over_the_bound(self, bound: float, factor: float, sign: int, place: int) -> None:
        assume(bound < 2.0**29)
        vector = np.zeros(3)
        vector[place] = sign * bound * factor
        with pytest.raises(ProtocolError, match="exceeds its bound"):
            stage(bound, 3, 32).encode(vector)

    @pytest.mark.parametrize("excess", [1e-16, 1e-12, 5e-10])
    def test_a_rounding_error_over_the_bound_counts_as_the_bound(self, excess: float) -> None:
        fixed = stage(3.0, 3, 64)
        at_bound = fixed.encode(np.array([3.0, -3.0, 0.0]))
        assert (fixed.encode(np.array([3.0, -3.0, 0.0]) * (1 + excess)) == at_bound).all()

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.floats(-1e300, 1e300), min_size=3, max_size=3), BITS)
    def test_clip_blocks_send_the_bound(self, values: list[float], bits: int) -> None:
        fixed = stage(2.5, 3, bits, "clip")
        clipped = [min(2.5, max(-2.5, value)) for value in values]
        assert (fixed.encode(np.array(values)) == fixed.encode(np.array(clipped))).all()

    def test_only_the_block_at_fault_decides(self) -> None:
        layout = (Block("wide", (2,), 100.0), Block("narrow", (1,), 1.0), Block("clipped", (1,), 1.0, "clip"))
        fixed = fixed_point(layout, 3, 32)
        fixed.encode(np.array([100.0, -100.0, 1.0, 100.0]))
        with pytest.raises(ProtocolError, match="'narrow'"):
            fixed.encode(np.array([100.0, -100.0, 1.1, 100.0]))
        with pytest.raises(ProtocolError, match="'wide'"):
            fixed.encode(np.array([100.0, -101.0, 1.1, 100.0]))

    @pytest.mark.parametrize(
        "vector",
        [np.zeros(2), np.zeros(4), np.zeros((3, 1)), np.array(0.0), np.zeros(3, dtype=np.float32), np.zeros(3, int)],
    )
    def test_another_shape_or_type(self, vector: np.ndarray) -> None:
        with pytest.raises(ProtocolError, match="does not fit its layout"):
            stage(1.0, 3, 32).encode(vector)

    def test_a_refusal_names_no_value(self) -> None:
        with pytest.raises(ProtocolError) as refused:
            stage(2.0, 3, 32).encode(np.array([0.0, 73.25, 0.0]))
        assert "73" not in str(refused.value)
