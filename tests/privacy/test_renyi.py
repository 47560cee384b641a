"""A ledger's currency: divergences against closed forms and published figures, and sums that are exact."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf, quad

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.events import DpEvent, Events, Gaussian, Repeated, Sampled, Slack
from cohortium.privacy.accountant import epsilon, library
from cohortium.privacy.calibrate import Budget, multiplier
from cohortium.privacy.renyi import DIVERGENCE, SLACK, Price, cost, divergence, limit, order_for, spent_epsilon

MNIST = 256 / 60_000
ORDERS = (*range(2, 64), 80, 128, 256, 512)
ONE = Budget(1.0, 1e-5)

releases = st.one_of(
    st.builds(Gaussian, st.floats(0.1, 1e4)),
    st.builds(Sampled, st.floats(1e-4, 1), st.builds(Gaussian, st.floats(0.3, 1e4))),
)
events = st.lists(
    st.one_of(releases, st.builds(Repeated, st.integers(0, 500), releases), st.builds(Slack, st.floats(0, 1e-6))),
    max_size=4,
).map(tuple)


def moments(rate: float, multiplier: float, times: int, orders: tuple[int, ...] = ORDERS) -> float:
    """Epsilon at delta = 1e-5 as the moments accountant had it, by Mironov 2017, proposition 3."""
    return min(times * divergence(rate, multiplier, a) + math.log(1e5) / (a - 1) for a in orders)


@pytest.mark.parametrize(
    ("rate", "z", "times", "printed", "near"),
    [
        # Abadi et al. 2016, section 3.2; they looked at orders up to 33
        (0.01, 4.0, 10_000, 1.26, 0.005),
        # the MNIST tutorial of TensorFlow Privacy, as printed in 2019; it looked at orders between whole ones too
        (MNIST, 1.3, 3_515, 1.19, 0.005),
        (MNIST, 1.1, 14_062, 3.01, 0.005),
        (MNIST, 0.7, 10_546, 7.10, 0.03),
        # Bu et al. 2020, figure 4
        (MNIST, 1.3, 4_687, 1.34, 0.015),
    ],
)
def test_figures_that_were_printed(rate: float, z: float, times: int, printed: float, near: float) -> None:
    assert moments(rate, z, times) == pytest.approx(printed, abs=near)


@given(rate=st.floats(1e-4, 1), z=st.floats(0.4, 50), order=st.integers(2, 300))
@settings(max_examples=60, deadline=None)
def test_divergences_are_those_of_the_library(rate: float, z: float, order: int) -> None:
    dp = library()
    accountant = dp.rdp.RdpAccountant([order])
    accountant.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(z)))
    # the library sums the whole series and loses the digits of small divergences
    assert divergence(rate, z, order) == pytest.approx(accountant._rdp[0], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("rate", "z", "order"), [(0.3, 0.8, 2), (0.01, 1.5, 9), (0.5, 3.0, 20)])
def test_divergences_are_integrals_and_the_other_way_round_is_smaller(rate: float, z: float, order: int) -> None:
    with mp.workdps(30):
        q, s = mpf(rate), mpf(z)

        def ratio(x: mpf) -> mpf:
            return 1 - q + q * mp.exp((2 * x - 1) / (2 * s**2))

        def moment(power: int) -> mpf:
            points = [-40 * s, 0, 1, order, order + 40 * s]
            return quad(lambda x: ratio(x) ** power * mp.npdf(x, 0, s), points)

        removed, added = (mp.log(moment(power)) / (order - 1) for power in (order, 1 - order))
    assert divergence(rate, z, order) == pytest.approx(float(removed), rel=1e-12)
    assert added <= removed


@given(first=events, second=events, order=st.integers(2, 64))
@settings(max_examples=80, deadline=None)
def test_costs_are_whole_and_add_up(first: Events, second: Events, order: int) -> None:
    both = cost(first + second, order)
    assert both == cost(first, order) + cost(second, order) == cost(second + first, order)
    assert isinstance(both.divergence, int) and isinstance(both.slack, int)


@given(event=releases, times=st.integers(0, 10_000), order=st.integers(2, 64))
@settings(max_examples=50, deadline=None)
def test_repeating_multiplies(event: Gaussian | Sampled, times: int, order: int) -> None:
    assert cost((Repeated(times, event),), order).divergence == times * cost((event,), order).divergence


@given(rate=st.floats(1e-6, 1), z=st.floats(1e-3, 1e6), order=st.integers(2, 500))
@settings(max_examples=80, deadline=None)
def test_costs_are_rounded_up_and_sampling_never_adds(rate: float, z: float, order: int) -> None:
    plain = cost((Gaussian(z),), order).divergence
    sampled = cost((Sampled(rate, Gaussian(z)),), order).divergence
    assert plain * 2 * Fraction(z) ** 2 >= order * DIVERGENCE
    assert 0 < sampled <= plain
    assert sampled >= min(divergence(rate, z, order) * DIVERGENCE, plain)


@given(event=releases, order=st.integers(2, 40))
@settings(max_examples=50, deadline=None)
def test_more_noise_and_smaller_samples_cost_less(event: Gaussian | Sampled, order: int) -> None:
    rate, noise = (event.rate, event.event) if isinstance(event, Sampled) else (1.0, event)
    price = cost((Sampled(rate, noise),), order).divergence
    assert cost((Sampled(rate, Gaussian(noise.multiplier * 1.01)),), order).divergence <= price
    assert cost((Sampled(rate * 0.99, noise),), order).divergence <= price


@pytest.mark.parametrize("at", [0.01, 0.1, 0.5, 1.0, 4.0, 8.0])
@pytest.mark.parametrize("failing", [1e-3, 1e-5, 1e-9])
def test_what_fits_a_limit_keeps_the_budget(at: float, failing: float) -> None:
    budget = Budget(at, failing)
    order = order_for(budget)
    most = limit(budget, order)
    # as many Gaussians as a limit pays for, and all of its slack
    z = math.sqrt(order / 2 * DIVERGENCE / most.divergence) * (1 + 1e-9)
    spent = (Gaussian(z), Slack((most.slack - 1) / SLACK))
    assert cost(spent, order).within(most)
    true = epsilon(spent, failing)
    assert true <= at
    # what a single order knows less than the exact curve stays moderate
    assert multiplier(budget, lambda z: (Gaussian(z), Slack(failing / 10))) > 0.65 * z
    assert true > 0.65 * at


@pytest.mark.parametrize(("times", "rate", "z"), [(80, 0.1, 4.0), (800, 0.05, 6.0)])
def test_sampled_releases_within_a_limit_keep_the_budget(times: int, rate: float, z: float) -> None:
    order = order_for(ONE)
    once = (Sampled(rate, Gaussian(z)),)
    affordable = limit(ONE, order).divergence // cost(once, order).divergence
    assert affordable >= times
    assert epsilon((Repeated(affordable, once[0]),), 0.9 * ONE.delta) <= ONE.epsilon


@pytest.mark.parametrize("at", [0.5, 1.0, 8.0])
def test_the_order_is_the_best_one(at: float) -> None:
    budget = Budget(at, 1e-5)
    best = order_for(budget)

    def bought(order: int) -> float:
        try:
            return limit(budget, order).divergence / order
        except StudyError:
            return 0.0

    assert bought(best) == max(bought(order) for order in range(2, 64) if order < 32 or order % 2 == 0)


def test_orders_are_told() -> None:
    found = {at: order_for(Budget(at, 1e-5)) for at in (0.001, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 1000.0)}
    # a change here makes every ledger count its charges anew
    assert found == {0.001: 5120, 0.1: 128, 0.5: 32, 1.0: 18, 2.0: 10, 4.0: 6, 8.0: 4, 1000.0: 2}


@pytest.mark.parametrize("at", [0.1, 1.0, 8.0])
def test_a_spend_comes_to_epsilon(at: float) -> None:
    budget = Budget(at, 1e-5)
    order = order_for(budget)
    most = limit(budget, order)
    assert spent_epsilon(Price(0, 0), order, budget.delta) == 0.0
    assert spent_epsilon(most, order, budget.delta) == pytest.approx(at, rel=1e-8)
    assert spent_epsilon(most, order, budget.delta) <= at
    shown = [
        spent_epsilon(Price(most.divergence * step // 20, most.slack * step // 20), order, budget.delta)
        for step in range(21)
    ]
    assert shown == sorted(shown)
    assert spent_epsilon(Price(1, SLACK), order, budget.delta) == math.inf
    assert spent_epsilon(Price(0, SLACK), order, budget.delta) == math.inf


def test_what_is_shown_covers_what_was_spent() -> None:
    order = order_for(ONE)
    for times in (1, 5, 30):
        spent: Events = (Repeated(times, Gaussian(30.0)), Slack(1e-7))
        assert spent_epsilon(cost(spent, order), order, ONE.delta) >= epsilon(spent, ONE.delta)


def test_prices_are_compared_in_both_parts() -> None:
    assert Price(3, 4).within(Price(3, 4))
    assert not Price(4, 4).within(Price(3, 4))
    assert not Price(3, 5).within(Price(3, 4))
    assert Price(1, 2) + Price(3, 4) == Price(4, 6)


def test_slack_is_rounded_up() -> None:
    assert cost((Slack(1e-7), Slack(1e-30)), 8).slack == math.ceil(1e-7 * SLACK) + 1
    assert limit(ONE, 18).slack == 10**12


@pytest.mark.parametrize(
    "event",
    [
        Repeated(2, Slack(0.1)),  # type: ignore[arg-type]
        Gaussian(0.0),
        Gaussian(math.nan),
        Sampled(2.0, Gaussian(1.0)),
        "Gaussian",
    ],
    ids=str,
)
def test_unknown_and_malformed_events_are_refused(event: DpEvent) -> None:
    with pytest.raises(ProtocolError):
        cost((event,), 8)


@pytest.mark.parametrize("z", [1e-300, 1e-9, 1e300])
def test_extremes_have_a_price(z: float) -> None:
    assert cost((Sampled(0.5, Gaussian(z)),), 8).divergence >= 1
    assert cost((Gaussian(math.inf),), 8) == Price(0, 0)


def test_what_buys_nothing_is_refused() -> None:
    with pytest.raises(StudyError, match="leaves nothing to spend"):
        limit(ONE, 3)
    with pytest.raises(StudyError, match="too small"):
        order_for(Budget(1e-6, 1e-12))
    with pytest.raises(ValueError, match="order 1"):
        cost((), 1)
