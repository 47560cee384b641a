"""The noise stage: shares that add up, wrap and decode; deviations that suffice; costs as events."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.events import Gaussian, Sampled, Slack, decode, encode
from cohortium.core.layout import Block, Noise
from cohortium.core.random import Randomness
from cohortium.privacy.bounds import aliasing, precision, rounded_norm
from cohortium.privacy.gaussian import law, sample
from cohortium.privacy.noise import NoiseShares, margin, noise_shares

KEY = Randomness.of_seed(5)
QUIET = Block("counts", (2, 2), 100.0)
LOUD = Block("gradient", (3,), 10.0, noise=Noise(1.0, 2.0))
LONG = Block("weights", (40_000,), 10.0, noise=Noise(2.0, 1.5))
LAYOUT = (QUIET, LOUD, LONG)


def stage(bits: int = 64, honest: int = 4) -> NoiseShares:
    return noise_shares(LAYOUT, (10, 10, 10), bits, honest, 1, 1, 1e-12)


def variance(deviation: float) -> float:
    """Returns a share's exact variance: the normal's, and that of rounding at each level."""
    chosen = law(deviation)
    squares = sum(256**level for level in range(chosen.levels))
    return (chosen.deviation**2 + 1 / 12) * squares


@pytest.mark.parametrize(("bits", "kind"), [(12, "<u2"), (25, "<u4"), (32, "<u4"), (50, "<u8"), (64, "<u8")])
def test_encoding_adds_the_share_modulo_the_word(bits: int, kind: str) -> None:
    adding = stage(bits)
    top = np.iinfo(kind).max
    for start in (0, 7, top, top // 2):
        vector = np.full(40_007, start, kind)
        before = vector.copy()
        noisy = adding.encode(vector, KEY)
        assert noisy.dtype == np.dtype(kind) and np.array_equal(vector, before)
        assert np.array_equal(noisy[:4], vector[:4])
        loud = sample(adding.deviations[1], 3, KEY.child("noise", 1))
        long = sample(adding.deviations[2], 40_000, KEY.child("noise", 2))
        expected = [(start + int(share)) % (top + 1) for share in (*loud, *long)]
        assert noisy[4:].tolist() == expected


def test_sums_of_residues_hold_the_sum_and_its_noise() -> None:
    adding, sites = stage(), 6
    values = [np.arange(40_007, dtype=np.int64) * (-1) ** site * (site + 1) for site in range(sites)]
    total = sum(adding.encode(value.view("<u8"), KEY.child(site)) for site, value in enumerate(values))
    noise = adding.decode(total).view("<i8") - np.sum(values, axis=0)
    assert not noise[:4].any()
    spread = math.sqrt(sites * variance(adding.deviations[2]))
    assert stats.kstest(noise[7:] / spread, "norm").pvalue > 1e-3


def test_equal_randomness_gives_equal_bytes_and_blocks_differ() -> None:
    adding = noise_shares((LONG, LONG), (10, 10), 64, 1, 1, 1, 0.0)
    zeros = np.zeros(80_000, "<u8")
    first = adding.encode(zeros, KEY)
    assert np.array_equal(first, adding.encode(zeros, KEY))
    assert (first[:40_000] == first[40_000:]).mean() < 0.01
    assert (first == adding.encode(zeros, KEY.child(1))).mean() < 0.01


def test_no_share_leaves_its_margin() -> None:
    adding = stage(honest=1)
    noisy = adding.encode(np.zeros(40_007, "<u8"), KEY).view("<i8")
    most = [margin(block, 10, 1, 1, 1, 1e-12) for block in LAYOUT]
    assert most[0] == 0
    assert np.abs(noisy[4:7]).max() <= most[1] and np.abs(noisy[7:]).max() <= most[2]
    assert all(
        13 * deviation < limit < 16 * deviation
        for deviation, limit in zip(adding.deviations[1:], most[1:], strict=True)
    )


def test_margins_cover_every_exponent() -> None:
    limits = [margin(LOUD, exponent, 4, 2, 3, 1e-12) for exponent in range(1001)]
    assert limits == sorted(limits) and limits[-1] == 1 << 64


@pytest.mark.parametrize("kind", ["<u2", "<u4", "<i8", "<f8"])
def test_other_vectors_are_refused(kind: str) -> None:
    with pytest.raises(ProtocolError, match="does not fit its layout"):
        stage(64).encode(np.zeros(40_007, kind), KEY)
    with pytest.raises(ProtocolError, match="does not fit its layout"):
        stage(64).encode(np.zeros(40_006, "<u8"), KEY)


@given(
    st.integers(1, 40),
    st.integers(0, 10),
    st.integers(0, 10),
    st.floats(0.3, 20),
    st.floats(0.01, 100),
    st.integers(8, 40),
    st.sampled_from([1, 2]),
    st.integers(1, 4),
    st.integers(1, 3_000),
)
@settings(deadline=None, max_examples=60)
def test_the_summed_noise_suffices_whoever_is_lost_or_colludes(
    honest: int,
    lost: int,
    colluding: int,
    multiplier: float,
    norm: float,
    exponent: int,
    factor: int,
    copies: int,
    dimension: int,
) -> None:
    block = Block("sum", (dimension,), 1.0, noise=Noise(norm, multiplier))
    try:
        adding = noise_shares((block,), (exponent,), 64, honest, factor, copies, 1e-12)
    except StudyError:
        return
    sites = honest + lost + colluding
    sensitivity = copies * rounded_norm(factor * norm * 2.0**exponent, dimension, 1e-12)
    # at the worst only honest shares count; whoever is neither lost nor colluding adds more
    assert (sites - lost - colluding) * variance(adding.deviations[0]) >= (multiplier * sensitivity) ** 2
    assert adding.deviations[0] <= multiplier * sensitivity / math.sqrt(honest) * (1 + 1e-14)
    assert np.issubdtype(adding.encode(np.zeros(dimension, "<u8"), KEY).dtype, np.integer)


def test_a_share_below_the_smallest_deviation_is_refused() -> None:
    small = Block("mean", (1,), 1.0, noise=Noise(1.0, 2.0))
    with pytest.raises(StudyError, match=r"statistic 'mean' would have a deviation of 1 steps.*bits: 64"):
        noise_shares((small,), (0,), 32, 16, 1, 1, 0.0)
    with pytest.raises(StudyError, match="larger than any sum here can carry"):
        noise_shares((small,), (100,), 64, 1, 1, 1, 0.0)


@pytest.mark.parametrize(("honest", "factor", "copies"), [(0, 1, 1), (1, 3, 1), (1, 0, 1), (1, 1, 0)])
def test_nonsense_is_refused(honest: int, factor: int, copies: int) -> None:
    with pytest.raises(ValueError, match="noise needs an honest share"):
        noise_shares((LOUD,), (10,), 64, honest, factor, copies, 0.0)


def test_the_cost_is_one_gaussian_and_a_slack() -> None:
    event, slack = stage().events()
    assert isinstance(event, Gaussian) and isinstance(slack, Slack)
    # 1/4 + 1/2.25 = 25/36
    assert event.multiplier <= 6 / 5 and math.isclose(event.multiplier, 6 / 5, rel_tol=1e-12)
    left = sum(
        aliasing(deviation, 4, block.size) + precision(deviation, 4, block.size, block.noise.multiplier)
        for block, deviation in zip(LAYOUT, stage().deviations, strict=True)
        if block.noise is not None
    )
    # the short block's bound is certain, the long one's is not
    assert math.isclose(slack.delta, left + 1e-12, rel_tol=1e-9)
    assert decode(encode(stage().events())) == stage().events()


def test_one_block_costs_its_multiplier_and_certain_rounding_no_beta() -> None:
    event, slack = noise_shares((LOUD,), (10,), 64, 4, 2, 3, 1e-6).events()
    assert event == Gaussian(2.0)
    assert isinstance(slack, Slack) and slack.delta < 1e-25
    certain = noise_shares((LONG,), (10,), 64, 4, 1, 1, 0.0)
    likely = noise_shares((LONG,), (10,), 64, 4, 1, 3, 1e-6)
    for adding, delta in ((certain, 0.0), (likely, 3e-6)):
        slack = adding.events()[1]
        assert isinstance(slack, Slack) and math.isclose(slack.delta, delta, rel_tol=1e-9, abs_tol=1e-20)
    assert certain.deviations[0] > likely.deviations[0] / 3


def test_secret_samples_are_events_of_their_own() -> None:
    sampled = Block("gradient", (3,), 10.0, noise=Noise(1.0, 2.0, rate=0.1))
    event, _ = noise_shares((QUIET, sampled), (10, 10), 64, 4, 1, 1, 0.0).events()
    assert event == Sampled(0.1, Gaussian(2.0))
    with pytest.raises(ValueError, match="at one rate"):
        noise_shares((sampled, LOUD), (10, 10), 64, 4, 1, 1, 0.0)


def test_without_noise_nothing_is_added_and_nothing_costs() -> None:
    still = noise_shares((QUIET,), (10,), 32, 1, 1, 1, 0.0)
    vector = np.arange(4, dtype="<u4")
    assert still.events() == () and still.deviations == (0.0,)
    assert np.array_equal(still.encode(vector, KEY), vector)
