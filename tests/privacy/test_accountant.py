"""What events come to: against the exact curve, published figures, and laws that any accountant must keep."""

import math
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf, ncdf
from scipy.special import ndtr

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.events import Events, Gaussian, Repeated, Sampled, Slack
from cohortium.privacy.accountant import delta, effective, epsilon, parts

MNIST = 256 / 60_000


def rounds(times: int, rate: float, multiplier: float) -> Events:
    return (Repeated(times, Sampled(rate, Gaussian(multiplier))),)


def exact_delta(multiplier: float, at: float) -> mpf:
    """The delta of a Gaussian release, with 40 digits (Balle and Wang 2018, theorem 8)."""
    with mp.workdps(40):
        z, e = mpf(multiplier), mpf(at)
        return ncdf(1 / (2 * z) - e * z) - mp.exp(e) * ncdf(-1 / (2 * z) - e * z)


def sampled_delta(rate: float, z: float, at: float) -> float:
    """The delta of one sampled release, integrated: the larger one of adding and removing a unit."""
    # the outcome at which (1 - q) + q exp((2 x - 1) / (2 z^2)) is exp(epsilon), and exp(-epsilon)
    removed = z**2 * math.log((math.expm1(at) + rate) / rate) + 0.5
    with_unit = (1 - rate) * ndtr(-removed / z) + rate * ndtr((1 - removed) / z)
    remove = with_unit - math.exp(at) * ndtr(-removed / z)
    if math.exp(-at) <= 1 - rate:
        return float(remove)
    added = z**2 * math.log((math.expm1(-at) + rate) / rate) + 0.5
    add = ndtr(added / z) - math.exp(at) * ((1 - rate) * ndtr(added / z) + rate * ndtr((added - 1) / z))
    return float(max(remove, add))


@pytest.mark.parametrize("at", [0.1, 0.5, 1.0, 4.0, 8.0])
@pytest.mark.parametrize("failing", [1e-3, 1e-5, 1e-8])
def test_one_release_costs_what_the_exact_curve_says(at: float, failing: float) -> None:
    low, high = 1e-2, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if exact_delta(middle, at) > failing else (low, middle)
    assert epsilon((Gaussian(high),), failing) == pytest.approx(at, rel=1e-9)
    assert delta((Gaussian(high),), at) == pytest.approx(failing, rel=1e-8)


def test_figures_that_were_printed() -> None:
    # Abadi et al. 2016, section 3.2: 1.26 by the moments accountant, and 9.34 by strong composition
    abadi = rounds(10_000, 0.01, 4.0)
    assert epsilon(abadi, 1e-5) < epsilon(abadi, 1e-5, "rdp") < 1.26
    # Bu et al. 2020, figure 4: mu = 0.35 after 20 epochs and 1.78 after 70
    assert 1 / effective(rounds(int(20 / MNIST), MNIST, 1.06)) == pytest.approx(0.35, abs=0.005)
    assert 1 / effective(rounds(int(70 / MNIST), MNIST, 0.638)) == pytest.approx(1.78, abs=0.005)


@pytest.mark.parametrize("times", [1, 7, 1000])
def test_gaussian_releases_compose_exactly(times: int) -> None:
    once = epsilon((Gaussian(3.0),), 1e-5)
    assert epsilon((Repeated(times, Gaussian(3.0 * math.sqrt(times))),), 1e-5) == pytest.approx(once, rel=1e-9)
    together = (Gaussian(5.0), Repeated(2, Gaussian(7.0)))
    assert epsilon(together, 1e-5) == pytest.approx(epsilon((Gaussian((1 / 25 + 2 / 49) ** -0.5),), 1e-5), rel=1e-9)


def test_at_rate_1_the_accountant_is_the_analytic_gaussian() -> None:
    plain = (Repeated(40, Gaussian(25.0)),)
    assert epsilon((Repeated(40, Sampled(1.0, Gaussian(25.0))),), 1e-5) == epsilon(plain, 1e-5)
    exact = epsilon(plain, 1e-5)
    assert exact <= epsilon(plain, 1e-5, "pld") <= exact * 1.0002
    assert exact <= epsilon(rounds(40, 1 - 1e-9, 25.0), 1e-5) <= exact * 1.0002
    assert exact < epsilon(plain, 1e-5, "rdp") < 1.12 * exact


@pytest.mark.parametrize(("rate", "z"), [(0.01, 1.0), (0.3, 0.7), (0.1, 4.0), (0.001, 20.0)])
@pytest.mark.parametrize("share", [0.3, 1.0, 2.0])
def test_one_sampled_release_costs_what_its_integral_says(rate: float, z: float, share: float) -> None:
    at = share * rate / z
    true = sampled_delta(rate, z, at)
    found = delta((Sampled(rate, Gaussian(z)),), at)
    assert true <= found <= true * (1 + 2e-3) + 2e-12


@given(
    rate=st.floats(0.002, 0.9),
    z=st.floats(0.6, 20),
    times=st.integers(1, 2000),
    before=st.none() | st.floats(0.8, 50),
    failing=st.sampled_from([1e-3, 1e-5, 1e-7]),
)
@settings(max_examples=8, deadline=None)
def test_pld_is_at_most_rdp(rate: float, z: float, times: int, before: float | None, failing: float) -> None:
    events = rounds(times, rate, z) + (() if before is None else (Gaussian(before),))
    tight = epsilon(events, failing, "pld")
    assert tight <= epsilon(events, failing, "rdp") * (1 + 1e-9) + 1e-3 * rate
    # and sampling never costs more than taking everybody
    assert tight <= epsilon((Repeated(times, Gaussian(z)), *events[1:]), failing) * (1 + 1e-3)


@given(
    studies=st.lists(
        st.tuples(st.integers(1, 100), st.sampled_from([0.05, 0.2, 1.0]), st.floats(1.5, 10)), min_size=2, max_size=2
    )
)
@settings(max_examples=5, deadline=None)
def test_two_studies_cost_more_than_each_and_at_most_their_sum(studies: list[tuple[int, float, float]]) -> None:
    first, second = (rounds(*study) for study in studies)
    both = epsilon(first + second, 2e-5)
    assert both <= (epsilon(first, 1e-5) + epsilon(second, 1e-5)) * (1 + 1e-3)
    assert both >= max(epsilon(first, 2e-5), epsilon(second, 2e-5)) * (1 - 1e-3)


def test_order_and_grouping_do_not_change_a_bit() -> None:
    one, two = Sampled(0.05, Gaussian(3.0)), Gaussian(9.0)
    listed = epsilon((one, two, one, Repeated(3, one), Slack(1e-8)), 1e-5)
    assert epsilon((Slack(1e-8), Repeated(5, one), two), 1e-5) == listed


def test_slack_comes_off_delta() -> None:
    release = Gaussian(3.0)
    assert epsilon((release, Slack(4e-6), Slack(5e-6)), 1e-5) == pytest.approx(epsilon((release,), 1e-6), rel=1e-9)
    assert delta((release, Slack(1e-6)), 1.0) == pytest.approx(delta((release,), 1.0) + 1e-6, rel=1e-12)
    assert delta((release, Slack(1.0)), 1.0) == 1.0
    for slack in (1e-5, 2e-5):
        with pytest.raises(StudyError, match="leaves nothing of delta"):
            epsilon((release, Slack(slack)), 1e-5)


@pytest.mark.parametrize(
    "events",
    [
        (),
        (Gaussian(math.inf),),
        (Repeated(0, Gaussian(1.0)),),
        (Sampled(0.0, Gaussian(1.0)),),
        (Slack(1e-5),),
    ],
    ids=["nothing", "infinite noise", "no times", "nobody drawn", "slack alone"],
)
def test_what_tells_nothing_costs_nothing(events: Events) -> None:
    assert epsilon(events, 1e-5) == 0.0
    assert delta(events, 0.0) <= 1e-5


class Laplace(msgspec.Struct, frozen=True, tag=True):
    parameter: float


@pytest.mark.parametrize(
    "event",
    [
        Laplace(1.0),
        Repeated(2, Laplace(1.0)),  # type: ignore[arg-type]
        Repeated(2, Repeated(2, Gaussian(1.0))),  # type: ignore[arg-type]
        Repeated(-1, Gaussian(1.0)),
        Repeated(1.5, Gaussian(1.0)),  # type: ignore[arg-type]
        Sampled(0.5, Laplace(1.0)),  # type: ignore[arg-type]
        Sampled(1.5, Gaussian(1.0)),
        Sampled(math.nan, Gaussian(1.0)),
        Gaussian(0.0),
        Gaussian(-1.0),
        Gaussian(math.nan),
        Slack(-1e-6),
        Slack(math.nan),
    ],
    ids=str,
)
def test_unknown_and_malformed_events_are_refused(event: object) -> None:
    events: Events = (Gaussian(3.0), event)  # type: ignore[assignment]
    for price in (lambda: epsilon(events, 1e-5), lambda: delta(events, 1.0), lambda: parts(events)):
        with pytest.raises(ProtocolError):
            price()


def test_impossible_questions_are_refused() -> None:
    for failing in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            epsilon((Gaussian(1.0),), failing)
    for at in (-1.0, math.nan):
        with pytest.raises(ValueError, match="epsilon"):
            delta((Gaussian(1.0),), at)
    with pytest.raises(ValueError, match="exact curve"):
        epsilon(rounds(1, 0.5, 1.0), 1e-5, "exact")


@pytest.mark.parametrize(
    "events",
    [
        (Gaussian(1e-200),),
        (Gaussian(1e300),),
        rounds(10, 0.5, 1e-9),
        rounds(10, 0.01, 1e12),
        (*rounds(100, 1e-9, 1.0), Gaussian(1e-200)),
    ],
    ids=["no noise", "all noise", "sampled with no noise", "sampled with all noise", "beside no noise"],
)
def test_extremes_are_bounded_and_no_accident(events: Events) -> None:
    assert epsilon(events, 1e-5) >= 0
    assert 0 <= delta(events, 1.0) <= 1


def test_tiny_deltas_are_left_to_orders() -> None:
    events = rounds(100, 0.05, 2.0)
    assert epsilon(events, 1e-11) == epsilon(events, 1e-11, "rdp") > epsilon(events, 1e-9)


def test_without_the_library_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(StudyError, match=r"pip install 'cohortium\[privacy\]'"):
        epsilon((Gaussian(1.2345678),), 1e-5)
