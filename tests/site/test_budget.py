"""The rules of a privacy budget: groups of records, limits, and what a steward is shown."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cohortium.core.events import Events, Gaussian, Repeated, Sampled, Slack
from cohortium.privacy.calibrate import Budget
from cohortium.privacy.renyi import Price
from cohortium.site.budget import (
    HIDDEN,
    SMALL,
    Accounts,
    Charge,
    Distribution,
    can_pay,
    distribution,
    events_for,
    shown,
    study_cost,
    tariff,
)
from cohortium.site.chain import Charged

MULTIPLIERS = st.floats(0.5, 1e4)
NOISES = MULTIPLIERS.map(Gaussian)
SAMPLES = st.builds(Sampled, st.floats(0.001, 0.9), NOISES)
ONCE = NOISES | SAMPLES
EVENTS = st.lists(
    ONCE | st.builds(Repeated, st.integers(1, 50), ONCE) | st.builds(Slack, st.floats(0, 1e-4)), max_size=5
)
PRICES = st.builds(Price, st.integers(0, 2**62), st.integers(0, 2**62))


def test_one_record_pays_for_itself() -> None:
    events: Events = (Sampled(0.1, Gaussian(2.0)), Slack(1e-9))
    assert events_for(events, 1) is events


def test_several_records_pay_for_the_group() -> None:
    events: Events = (
        Gaussian(6.0),
        Sampled(0.1, Gaussian(3.0)),
        Repeated(4, Gaussian(9.0)),
        Repeated(5, Sampled(0.2, Gaussian(12.0))),
        Slack(1e-6),
        Slack(0.5),
    )
    assert events_for(events, 3) == (
        Gaussian(2.0),
        Gaussian(1.0),
        Repeated(4, Gaussian(3.0)),
        Repeated(5, Gaussian(4.0)),
        Slack(3e-6),
        Slack(1.0),
    )


@pytest.mark.parametrize("records", [0, -1])
def test_nobody_pays_without_a_record(records: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        events_for((Gaussian(1.0),), records)


@given(multiplier=MULTIPLIERS, records=st.integers(1, 30))
def test_a_group_pays_its_square_times_the_divergence(multiplier: float, records: int) -> None:
    rules = tariff(Budget(4.0, 1e-5))
    one = rules.price((Gaussian(multiplier),))
    group = rules.price(events_for((Gaussian(multiplier),), records))
    assert group.divergence == pytest.approx(records**2 * one.divergence, rel=1e-6, abs=records**2)


@given(events=EVENTS, records=st.integers(1, 30))
def test_more_records_never_pay_less(events: list[Gaussian], records: int) -> None:
    rules = tariff(Budget(1.0, 1e-5))
    fewer, more = (rules.price(events_for(tuple(events), count)) for count in (records, records + 1))
    assert fewer.divergence <= more.divergence and fewer.slack <= more.slack


@given(spent=st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**62)), max_size=8), price=PRICES, limit=PRICES)
def test_who_can_pay_is_decided_in_whole_numbers(spent: list[tuple[int, int]], price: Price, limit: Price) -> None:
    told = can_pay(np.array(spent, dtype=np.int64).reshape(-1, 2), price, limit)
    assert told.tolist() == [
        divergence + price.divergence <= limit.divergence and slack + price.slack <= limit.slack
        for divergence, slack in spent
    ]


def test_without_a_limit_everybody_can_pay() -> None:
    assert can_pay(np.full((3, 2), 2**62), Price(2**62, 2**62), None).all()


def test_a_whole_budget_spent_comes_to_its_epsilon() -> None:
    for budget in (Budget(0.5, 1e-6), Budget(1.0, 1e-5), Budget(8.0, 1e-5)):
        rules = tariff(budget)
        assert rules.limit is not None and rules.delta == budget.delta
        assert rules.epsilon(rules.limit) <= budget.epsilon * (1 + 1e-9)
        assert rules.epsilon(Price(rules.limit.divergence, 0)) > 0.5 * budget.epsilon


def test_a_charge_counts_as_written_at_its_order_and_anew_at_another() -> None:
    rules = tariff(Budget(1.0, 1e-5))
    events: Events = (Gaussian(4.0), Slack(1e-8))
    assert rules.price_of(Charged(events, rules.order, 7, 8)) == Price(7, 8)
    assert rules.price_of(Charged(events, rules.order + 1, 7, 8)) == rules.price(events)


def test_a_study_is_charged_for_all_its_runs() -> None:
    charges = [Charge(f"day {day}", run, "s", 1, Price(1, 0)) for day, run in enumerate("aabca")]
    cost = study_cost("s", charges, Price(4, 0))
    assert (cost.runs, cost.rounds, cost.first, cost.last, cost.most) == (3, 5, "day 0", "day 4", Price(4, 0))


def accounts(shares: list[float], prices: frozenset[Price], budget: Budget | None = Budget(2.0, 1e-5)) -> Accounts:
    rules = tariff(budget)
    limit = rules.limit or Price(1, 1)
    spent = np.array([[int(share * limit.divergence), 0] for share in shares], dtype=np.int64).reshape(-1, 2)
    return Accounts(rules, (), prices, spent, Price(0, 0))


def test_patients_are_spread_by_the_share_that_is_spent() -> None:
    shares = [0.0, 0.05, 0.11, 0.999, 1.0, 1.0, 1.3]
    spread = distribution(accounts(shares, frozenset({Price(10, 0), Price(2**40, 5)})))
    assert spread is not None
    assert spread.bins == (2, 1, 0, 0, 0, 0, 0, 0, 0, 1)
    assert spread.out == 3
    assert sum(spread.bins) + spread.out == len(shares)


def test_slack_counts_where_it_is_the_larger_share() -> None:
    rules = tariff(Budget(2.0, 1e-5))
    assert rules.limit is not None
    spent = np.array([[0, int(0.75 * rules.limit.slack)]], dtype=np.int64)
    spread = distribution(Accounts(rules, (), frozenset({Price(1, 0)}), spent, Price(0, 0)))
    assert spread is not None and spread.bins[7] == 1


def test_nothing_to_spread() -> None:
    assert distribution(accounts([0.5], frozenset({Price(1, 0)}), None)) is None
    spread = distribution(accounts([], frozenset()))
    assert spread is not None and (sum(spread.bins), spread.out) == (0, 0)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((0, 0, 700_000, SMALL), (HIDDEN, HIDDEN, 700_000, SMALL)),
        ((1, 20, 9, 30), (HIDDEN, 20, HIDDEN, 30)),
        ((1, 4, 9, 30), (HIDDEN, HIDDEN, 9, 30)),
        ((9, 30, 9, 1), (HIDDEN, 30, 9, HIDDEN)),
        ((30, 0, 0, 4), (HIDDEN, HIDDEN, HIDDEN, HIDDEN)),
        ((0, 0, 4, 0), (HIDDEN, HIDDEN, HIDDEN, HIDDEN)),
    ],
)
def test_small_counts_are_not_shown(counts: tuple[int, ...], expected: tuple[int | str, ...]) -> None:
    assert shown(Distribution(counts[:-1], counts[-1])) == expected


@given(counts=st.lists(st.integers(0, 12) | st.integers(0, 10**6), min_size=2, max_size=11))
def test_what_a_known_total_leaves_is_no_small_count(counts: list[int]) -> None:
    told = shown(Distribution(tuple(counts[:-1]), counts[-1]))
    assert all(one == HIDDEN or (one == count and count >= SMALL) for one, count in zip(told, counts, strict=True))
    left = sum(counts) - sum(one for one in told if isinstance(one, int))
    assert left == 0 or left >= SMALL or left == sum(counts)
