"""Compression: no level leaves its range, no sum wraps, rounding is unbiased and the error is what it should be."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.layout import Block
from cohortium.core.random import Randomness
from cohortium.secagg import compress
from cohortium.secagg.compress import Compressed, compressed
from cohortium.secagg.quantise import fixed_point, residue_kind, signed_kind

SIGNS = bytes(range(32))
ROOT = Randomness.of_seed(7)
LENGTHS = [*range(1, 11), 39, 40, 41, 127, 128, 129, 1599, 1600, 1601, 4095, 4096, 4097]
GOLDEN_SIGNS = [1, -1, -1, -1, -1, 1, 1, 1, 1, -1, 1, -1, 1, -1, 1, 1]


def only(
    length: int, levels: int = 8, rotation: bool = True, norm: float | None = 1.0, bound: float = 1.0, sites: int = 15
) -> Compressed:
    return compressed((Block("x", (length,), bound, "clip"),), sites, levels, rotation, norm, SIGNS)


def mixed(sites: int = 15, levels: int = 8, rotation: bool = True, length: int = 50) -> Compressed:
    layout = (
        Block("weight", (), 1.0),
        Block("update", (length,), 10.0, "clip"),
        Block("loss", (), 16.0, "clip"),
        Block("counts", (3,), 1e6),
        Block("none", (0,), 1.0, "clip"),
        Block("control", (2, 4), 100.0, "clip"),
    )
    return compressed(layout, sites, levels, rotation, 5.0, SIGNS)


def total(stage: Compressed, vectors: Any, root: Randomness = ROOT) -> Any:
    encoded = [stage.encode(vector, root.child(site)) for site, vector in enumerate(vectors)]
    # numbers of stage.bits bits, as they come out of the secure sum
    exact = np.add.reduce([residues.view(signed_kind(stage.bits)).astype(object) for residues in encoded])
    wrapped = (exact + 2 ** (stage.bits - 1)) % 2**stage.bits - 2 ** (stage.bits - 1)
    return wrapped.astype(signed_kind(stage.bits)).view(residue_kind(stage.bits))


def heavy_tailed(length: int, seed: int = 0) -> Any:
    """A network's update in which one layer of a sixth of the entries is 100 times larger than the others."""
    vector = np.random.default_rng(seed).standard_normal(length)
    vector[length // 3 : length // 2] *= 100
    return vector


def error(stage: Compressed, vector: Any, root: Randomness = ROOT) -> float:
    """Normalised mean squared error of one site's vector."""
    difference = stage.decode(stage.encode(vector, root)) - vector
    return float(difference @ difference / (vector @ vector))


class TestMatrices:
    @pytest.mark.parametrize("order", compress._ORDERS)
    def test_are_hadamard(self, order: int) -> None:
        matrix = compress._hadamard(order)
        assert np.isin(matrix, (-1, 1)).all()
        assert (matrix.astype(int) @ matrix.T.astype(int) == order * np.eye(order, dtype=int)).all()

    def test_primes(self) -> None:
        assert all(prime % 4 == 3 and all(prime % d for d in range(2, prime)) for prime in compress._PRIMES)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_padding_is_short(self, length: int) -> None:
        padded = math.prod(compress._orders(length))
        assert length <= padded < 2 * length
        assert compress._orders(1) == (1,)

    def test_padding_of_long_vectors(self) -> None:
        lengths = np.random.default_rng(3).integers(10_000, 3_000_000, 100).tolist()
        shares = [math.prod(compress._orders(length)) / length for length in lengths]
        assert min(shares) >= 1
        assert max(shares) < 1.05
        assert np.mean(shares) < 1.03

    @pytest.mark.parametrize("length", LENGTHS)
    def test_the_whole_is_their_kronecker_product(self, length: int) -> None:
        (part,) = only(length).parts
        rng = np.random.default_rng(length)
        one, two = rng.standard_normal((2, part.length))
        rotated = compress._rotated(part, one)
        if part.length < 200:
            whole = np.ones((1, 1))
            for order in part.orders:
                whole = np.kron(whole, compress._hadamard(order))
            assert rotated == pytest.approx(whole @ one)
        # orthogonal up to the factor sqrt(length): inverse and inner products
        assert compress._rotated(part, rotated, back=True) / part.length == pytest.approx(one, abs=1e-12)
        inner = rotated @ compress._rotated(part, two) / part.length
        assert inner == pytest.approx(one @ two, abs=1e-9 * part.length)

    @pytest.mark.parametrize("length", [1600, 4097])
    def test_energy_is_spread_evenly(self, length: int) -> None:
        (part,) = only(length).parts
        spike = np.zeros(part.length)
        spike[length // 2] = 3.0
        assert (np.abs(compress._rotated(part, spike)) == 3.0).all()


class TestRange:
    def test_fifteen_sites_at_eight_bits_need_twelve(self) -> None:
        assert only(10).bits == mixed().bits == 12

    @settings(max_examples=200, deadline=None)
    @given(st.integers(1, 1000), st.integers(2, 16))
    def test_bits_are_the_fewest_that_hold(self, sites: int, levels: int) -> None:
        most, bits = sites * (2 ** (levels - 1) - 1), only(3, levels, sites=sites).bits
        assert most <= 2 ** (bits - 1) - 1
        assert most > 2 ** (bits - 2) - 1

    @settings(max_examples=100, deadline=None)
    @given(
        st.sampled_from(LENGTHS[:14]),
        st.integers(2, 16),
        st.booleans(),
        st.floats(1e-30, 1e30),
        st.floats(1e-30, 1e30),
        st.integers(0, 10**6),
        st.floats(-300, 300),
    )
    @example(1, 16, True, 1.0, 1.0, 0, 0.0)
    @example(4, 8, False, 1e30, 1e-30, 0, 300.0)
    def test_no_level_exceeds_it(
        self, length: int, levels: int, rotation: bool, norm: float, bound: float, seed: int, power: float
    ) -> None:
        stage = only(length, levels, rotation, norm, bound)
        rng = np.random.default_rng(seed)
        for vector in (rng.standard_normal(length) * 10.0**power, np.full(length, bound), np.full(length, -1.7e308)):
            found = stage.encode(vector, Randomness.of_seed(seed)).view(signed_kind(stage.bits)).astype(int)
            assert np.abs(found).max() <= 2 ** (levels - 1) - 1

    @pytest.mark.parametrize("levels", [2, 8, 12, 13, 16])
    def test_not_even_where_floating_point_rounds_up(self, levels: int) -> None:
        most = 2 ** (levels - 1) - 1

        class Highest:
            def random(self, size: int, dtype: Any) -> Any:
                return np.full(size, np.nextafter(dtype.type(1), dtype.type(0)))

        kind: Any = np.float32 if levels <= 12 else np.float64
        above = np.nextafter(kind(most), kind(2 * most))
        scaled = np.array([most, above, -above, 2 * most, -2 * most], dtype=kind)
        generator: Any = Highest()
        found = compress._rounded(scaled, levels, generator)
        assert found.tolist()[0::3] == [most, most]
        assert np.abs(found).max() == most

    @settings(max_examples=80, deadline=None)
    @given(st.integers(3, 50), st.integers(2, 16), st.booleans(), st.sampled_from([-1.0, 1.0]))
    def test_the_worst_sum_never_wraps(self, sites: int, levels: int, rotation: bool, sign: float) -> None:
        stage = mixed(sites, levels, rotation)
        vector = sign * np.concatenate([[1.0], np.full(50, 10.0), [16.0], [1e6] * 3, np.full(8, 100.0)])
        (residues,) = [stage.encode(vector, ROOT)]
        levels_sent = residues.view(signed_kind(stage.bits)).astype(int)
        assert np.abs(levels_sent).max() <= 2 ** (levels - 1) - 1
        assert np.abs(sites * levels_sent).max() <= 2 ** (stage.bits - 1) - 1
        # and the greatest level of all, whatever the vector
        top = np.full(stage.length, 2 ** (levels - 1) - 1, dtype=np.int64) * sites
        assert (top.astype(signed_kind(stage.bits)) == top).all()
        assert top.max() <= 2 ** (stage.bits - 1) - 1


class TestExactBlocks:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(3, 50), st.integers(2, 16), st.booleans(), st.integers(0, 10**6))
    def test_equal_fixed_point(self, sites: int, levels: int, rotation: bool, seed: int) -> None:
        stage = mixed(sites, levels, rotation)
        plain = fixed_point((Block("weight", (), 1.0), Block("loss", (), 16.0), Block("counts", (3,), 1e6)), sites, 53)
        places = [0, 51, 52, 53, 54]
        rng = np.random.default_rng(seed)
        vectors = rng.uniform(-1, 1, (sites, 63)) * np.where(rng.random((sites, 1)) < 0.3, 0.0, 1.0)
        vectors[:, places] *= [1.0, 16.0, 1e6, 1e6, 1e6]
        vectors[0, places] = [1.0, -16.0, 1e6, -1e6, 0.0]
        found = stage.decode(total(stage, vectors))[places]
        numbers = np.add.reduce([plain.encode(vector[places]).view(np.int64) for vector in vectors])
        assert (found == plain.decode(numbers.view(np.uint64))).all()
        steps = np.array([2.0**-exponent for exponent in np.repeat(plain.exponents, [1, 1, 3])])
        assert (np.abs(found - vectors[:, places].sum(axis=0)) <= sites * steps / 2 + 1e-9).all()

    def test_are_all_where_nothing_is_clipped(self) -> None:
        layout = (Block("a", (), 4.0), Block("b", (2, 2), 3.0))
        stage = compressed(layout, 5, 8, False, None, SIGNS)
        assert stage.length == 5 * stage.digits
        vector = np.array([4.0, 3.0, -3.0, 0.0, 1 / 3])
        assert stage.decode(stage.encode(vector, ROOT)) == pytest.approx(vector, rel=1e-14, abs=0)

    def test_none_at_all(self) -> None:
        assert compressed((), 5, 8, False, None, SIGNS).decode(np.empty(0, dtype="<u2")).shape == (0,)
        assert only(30, rotation=False).length == 30

    def test_a_single_number_that_is_clipped(self) -> None:
        stage = mixed()
        vector = np.zeros(63)
        vector[51] = 1e9
        assert stage.decode(stage.encode(vector, ROOT))[51] == 16.0


class TestRounding:
    @pytest.mark.parametrize("rotation", [False, True])
    @pytest.mark.parametrize("levels", [2, 4, 8, 12, 13, 16])
    def test_is_unbiased(self, levels: int, rotation: bool) -> None:
        draws, length = 800, 24
        vector = np.random.default_rng(levels).uniform(-1, 1, length)
        vector *= 0.9 / np.linalg.norm(vector)
        stage = only(length, levels, rotation)
        (part,) = stage.parts
        decoded = np.array([stage.decode(stage.encode(vector, ROOT.child(draw))) for draw in range(draws)])
        # an entry's variance is at most a quarter of a squared step; a rotation averages those of all entries
        step = part.unit * math.sqrt(part.length) if rotation else part.unit
        deviations = (decoded.mean(axis=0) - vector) / (step / 2 / math.sqrt(draws))
        assert np.abs(deviations).max() < 4
        assert (decoded.std(axis=0) <= step * 0.55).all()
        assert (decoded.std(axis=0) > 0).any()

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9])
    def test_takes_the_nearer_level_more_often(self, share: float) -> None:
        stage = only(40_000, 8, rotation=False, norm=None, bound=127.0)
        for whole in (-127, -3, 0, 126):
            found = stage.encode(np.full(40_000, whole + share), ROOT).view(np.int16)
            assert set(found.tolist()) <= {whole, whole + 1}
            deviation = math.sqrt(share * (1 - share) / 40_000)
            assert abs((found - whole).mean() - share) <= 4 * deviation + 1e-5

    @pytest.mark.parametrize("length", [2000, 10_000, 30_000])
    @pytest.mark.parametrize("levels", [4, 8, 12, 13])
    def test_error_with_rotation(self, levels: int, length: int) -> None:
        vector = heavy_tailed(length)
        stage = only(length, levels, norm=float(np.linalg.norm(vector)), bound=1e4)
        expected = 25 / (6 * (2 ** (levels - 1) - 1) ** 2)
        # only the padding's share of the error is dropped
        assert error(stage, vector) == pytest.approx(expected * length / stage.parts[0].length, rel=0.05)

    @pytest.mark.parametrize("levels", range(2, 17))
    def test_leaves_the_dither_thirteen_bits_after_the_point(self, levels: int) -> None:
        stage = only(1, levels, rotation=False)
        (largest,) = stage._scaled(stage.parts[0], np.ones(1))
        assert largest == pytest.approx(2 ** (levels - 1) - 1)
        assert np.spacing(largest) <= 2.0**-13

    def test_error_without_is_far_larger(self) -> None:
        vector = heavy_tailed(30_000)
        bound = float(np.abs(vector).max())
        plain = only(30_000, rotation=False, norm=None, bound=bound)
        small = np.r_[0:10_000, 15_000:30_000]
        found = plain.decode(plain.encode(vector, ROOT))[small]
        rotated = only(30_000, norm=float(np.linalg.norm(vector)), bound=bound)
        assert error(rotated, vector) < 2.8e-4
        assert error(plain, vector) > error(rotated, vector)
        # the small layers drown in the steps of the large one
        assert np.mean((found - vector[small]) ** 2) / np.mean(vector[small] ** 2) > 0.25

    def test_error_without_rotation(self) -> None:
        vector = np.random.default_rng(1).uniform(-3, 3, 20_000)
        stage = only(20_000, rotation=False, norm=None, bound=3.0)
        found = stage.decode(stage.encode(vector, ROOT)) - vector
        assert np.mean(found**2) == pytest.approx((3 / 127) ** 2 / 6, rel=0.05)
        assert np.abs(found).max() < 3 / 127 * 1.0001

    @pytest.mark.parametrize("places", [1, 2, 5])
    def test_error_of_sparse_vectors_is_at_most_a_quarter_step_squared(self, places: int) -> None:
        vector = np.zeros(5000)
        vector[:: 5000 // places] = 1.0
        stage = only(5000, norm=float(np.linalg.norm(vector)))
        assert error(stage, vector) < 25 / (4 * 127**2) * 1.05

    def test_clipping_is_rare_and_small(self) -> None:
        vector = np.random.default_rng(2).standard_normal(300_000)
        stage = only(300_000, 16, norm=float(np.linalg.norm(vector)), bound=1e2)
        clipped = np.abs(stage.encode(vector, ROOT).view("<i4")) == 2**15 - 1
        assert clipped.sum() <= 3  # 0.17 are expected
        assert error(stage, vector) < 1e-6


class TestNorm:
    @pytest.mark.parametrize("rotation", [False, True])
    @pytest.mark.parametrize("length", [7, 500])
    def test_a_longer_vector_is_scaled_down(self, length: int, rotation: bool) -> None:
        vector = np.random.default_rng(5).standard_normal(length)
        vector *= 40 / np.linalg.norm(vector)
        stage = only(length, 16, rotation, norm=2.0, bound=100.0)
        found = stage.decode(stage.encode(vector, ROOT))
        assert found == pytest.approx(vector / 20, abs=0.002)
        assert np.linalg.norm(found) == pytest.approx(2.0, rel=1e-3)

    @pytest.mark.parametrize("rotation", [False, True])
    def test_a_shorter_one_is_not(self, rotation: bool) -> None:
        vector = np.random.default_rng(5).standard_normal(500)
        stage = only(500, 16, rotation, norm=100.0, bound=100.0)
        assert stage.decode(stage.encode(vector, ROOT)) == pytest.approx(vector, abs=0.01)

    @pytest.mark.parametrize("rotation", [False, True])
    def test_entries_are_clipped_to_the_bound_first(self, rotation: bool) -> None:
        stage = only(4, 16, rotation, norm=10.0, bound=1.0)
        for huge in (3.0, 1e300, 1.7e308):
            found = stage.decode(stage.encode(np.array([huge, -huge, 0.5, 0.0]), ROOT))
            assert found == pytest.approx([1.0, -1.0, 0.5, 0.0], abs=0.002)

    def test_the_smaller_of_bound_and_norm_is_the_range(self) -> None:
        assert only(9, rotation=False, norm=None, bound=3.0).parts[0].unit == pytest.approx(3 / 127)
        assert only(9, rotation=False, norm=2.0, bound=3.0).parts[0].unit == pytest.approx(2 / 127)
        assert only(9, rotation=False, norm=4.0, bound=3.0).parts[0].unit == pytest.approx(3 / 127)

    @pytest.mark.parametrize("power", [-300, -100, 0, 90])
    def test_whatever_the_unit(self, power: int) -> None:
        scale = 10.0 ** max(power, -90)
        stage = only(20, 16, norm=scale, bound=scale)
        found = stage.decode(stage.encode(np.full(20, 10.0**power / 5), ROOT))
        assert found == pytest.approx(np.full(20, 10.0**power / 5), abs=scale * 1e-3)

    def test_no_entry_of_a_short_vector_can_be_clipped_after_rotation(self) -> None:
        for length in range(1, 25):
            (part,) = only(length, norm=2.0).parts
            assert part.gain * 2.0 * math.sqrt(part.length) == pytest.approx(127)


class TestStage:
    @pytest.mark.parametrize("length", LENGTHS)
    @pytest.mark.parametrize("rotation", [False, True])
    def test_every_length(self, length: int, rotation: bool) -> None:
        stage = only(length, 16, rotation)
        vector = np.random.default_rng(length).standard_normal(length)
        vector /= np.linalg.norm(vector)
        residues = stage.encode(vector, ROOT)
        assert residues.shape == (stage.length,)
        assert residues.dtype == np.uint32
        assert stage.decode(residues) == pytest.approx(vector, abs=0.001)
        assert error(stage, vector) < 25 / (2 * 32767**2) * (1 if rotation else length)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(3, 20), st.integers(2, 16), st.booleans(), st.integers(0, 10**6))
    def test_is_linear(self, sites: int, levels: int, rotation: bool, seed: int) -> None:
        stage = mixed(sites, levels, rotation)
        vectors = np.random.default_rng(seed).uniform(-1, 1, (sites, 63))
        each = [stage.decode(stage.encode(vector, ROOT.child(site))) for site, vector in enumerate(vectors)]
        assert stage.decode(total(stage, vectors)) == pytest.approx(np.sum(each, axis=0), abs=1e-9)

    def test_the_sum_of_survivors_is_near(self) -> None:
        vectors = np.random.default_rng(8).uniform(-0.1, 0.1, (9, 63))
        stage = mixed(levels=12)
        assert stage.decode(total(stage, vectors)) == pytest.approx(vectors.sum(axis=0), abs=0.02)

    def test_each_block_comes_back_in_its_place(self) -> None:
        stage = mixed(levels=16)
        vector = np.arange(63) / 100
        assert stage.decode(stage.encode(vector, ROOT)) == pytest.approx(vector, abs=0.01)

    def test_equal_randomness_gives_equal_bytes(self) -> None:
        vector = np.arange(63) / 100
        assert mixed().encode(vector, ROOT).tobytes() == mixed().encode(vector.copy(), ROOT).tobytes()
        assert mixed().encode(vector, ROOT).tobytes() != mixed().encode(vector, ROOT.child(1)).tobytes()

    def test_sites_round_independently(self) -> None:
        stage = only(20_000, rotation=False, norm=None)
        vector = np.full(20_000, 0.3 / 127)
        one, two = (stage.encode(vector, ROOT.child(site)).view(np.int16) for site in range(2))
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / math.sqrt(20_000)
        # so that the error of a sum grows as the root of the number of sites
        sums = sum(stage.encode(vector, ROOT.child(site)).view(np.int16).astype(int) for site in range(10))
        assert np.var(sums) == pytest.approx(10 * 0.3 * 0.7, rel=0.05)

    def test_blocks_round_and_rotate_independently(self) -> None:
        layout = (Block("a", (4096,), 1.0, "clip"), Block("b", (4096,), 1.0, "clip"))
        vector = np.tile(np.random.default_rng(4).standard_normal(4096) / 64, 2)
        both = compressed(layout, 15, 8, True, 1.0, SIGNS).encode(vector, ROOT).view(np.int16)
        assert abs(np.corrcoef(both[:4096], both[4096:])[0, 1]) < 4 / 64
        plain = compressed(layout, 15, 8, False, 1.0, SIGNS).encode(vector, ROOT).view(np.int16)
        assert (plain[:4096] != plain[4096:]).any()

    def test_other_signs_rotate_otherwise(self) -> None:
        vector = np.random.default_rng(4).standard_normal(4096) / 64
        layout = (Block("x", (4096,), 1.0, "clip"),)
        one, two = (compressed(layout, 15, 8, True, 1.0, bytes([key] * 32)) for key in range(2))
        first = one.encode(vector, ROOT).view(np.int16)
        second = two.encode(vector, ROOT).view(np.int16)
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / 64
        assert two.decode(two.encode(vector, ROOT)) == pytest.approx(vector, abs=0.01)

    def test_signs_are_fair_and_stay_the_same(self) -> None:
        stage = only(20_000)
        signs = stage._signed(stage.parts[0], np.ones(20_000))
        assert abs(signs.mean()) < 4 / math.sqrt(20_000)
        # sites and coordinator with other versions of numpy must agree
        assert signs[:16].astype(int).tolist() == GOLDEN_SIGNS

    def test_nothing_given_is_changed(self) -> None:
        for stage in (mixed(), mixed(rotation=False)):
            vector = np.linspace(-1, 200, 63)
            vector[0] = 1.0
            before = vector.copy()
            residues = stage.encode(vector, ROOT)
            kept = residues.copy()
            stage.decode(residues)
            assert (vector == before).all()
            assert (residues == kept).all()

    def test_costs_no_privacy(self) -> None:
        assert mixed().events() == ()

    def test_types(self) -> None:
        assert only(4, 8).encode(np.zeros(4), ROOT).dtype == np.uint16
        assert only(4, 16).encode(np.zeros(4), ROOT).dtype == np.uint32
        decoded = only(4, 8).decode(np.zeros(4, dtype=np.uint16))
        assert decoded.dtype == np.float64


class TestRefusals:
    @pytest.mark.parametrize("rotation", [False, True])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("place", [0, 1, 50, 51, 52, 55, 62])
    def test_what_is_no_number(self, place: int, value: float, rotation: bool) -> None:
        vector = np.zeros(63)
        vector[place] = value
        with pytest.raises(ProtocolError, match="is not finite"):
            mixed(rotation=rotation).encode(vector, ROOT)

    @pytest.mark.parametrize(("place", "value", "name"), [(0, 1.1, "weight"), (53, -1.1e6, "counts")])
    def test_over_the_bound(self, place: int, value: float, name: str) -> None:
        vector = np.zeros(63)
        vector[place] = value
        with pytest.raises(ProtocolError, match=f"'{name}' is not finite or exceeds its bound") as refused:
            mixed().encode(vector, ROOT)
        assert "1.1" not in str(refused.value)

    @pytest.mark.parametrize(
        "vector",
        [np.zeros(2), np.zeros(4), np.zeros((3, 1)), np.array(0.0), np.zeros(3, dtype=np.float32), np.zeros(3, int)],
    )
    def test_another_shape_or_type(self, vector: Any) -> None:
        with pytest.raises(ProtocolError, match="does not fit its layout"):
            only(3).encode(vector, ROOT)

    @pytest.mark.parametrize("sum_", [np.zeros(3, "<u2"), np.zeros((4, 1), "<u2"), np.zeros(4, "<u4"), np.zeros(4)])
    def test_another_sum(self, sum_: Any) -> None:
        with pytest.raises(ProtocolError, match="does not fit its layout"):
            only(4).decode(sum_)

    @pytest.mark.parametrize("levels", [-1, 0, 1, 17, 32])
    def test_levels_that_are_not_offered(self, levels: int) -> None:
        with pytest.raises(StudyError, match="choose from 2 to 16 bits"):
            only(3, levels)

    def test_a_rotation_without_a_norm(self) -> None:
        with pytest.raises(StudyError, match=r"set aggregation\.compression\.norm to"):
            only(3, norm=None)

    @pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf"), 1e200, 1e-200])
    @pytest.mark.parametrize("rotation", [False, True])
    def test_a_norm_that_is_none(self, norm: float, rotation: bool) -> None:
        with pytest.raises(StudyError, match=r"aggregation\.compression\.norm: .* is no plausible norm"):
            only(3, rotation=rotation, norm=norm)

    @pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), 1e200, 1e-200])
    @pytest.mark.parametrize("rotation", [False, True])
    def test_a_bound_that_is_none(self, bound: float, rotation: bool) -> None:
        with pytest.raises(StudyError, match="the range proof fails: statistic 'x'"):
            only(3, rotation=rotation, bound=bound)

    def test_an_exact_block_without_room(self) -> None:
        with pytest.raises(
            StudyError, match=r"'n' may reach 1e\+15 .*; lower cohort.maximum or leave aggregation.comp"
        ):
            compressed((Block("n", (), 1e15),), 15, 8, False, None, SIGNS)

    def test_signs_of_another_length(self) -> None:
        with pytest.raises(ValueError, match="32 bytes"):
            compressed((Block("x", (3,), 1.0, "clip"),), 15, 8, True, 1.0, b"short")
