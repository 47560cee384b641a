"""How much noise a budget asks for: the least that keeps it, the same however it is asked."""

import math
from dataclasses import replace
from decimal import ROUND_CEILING, Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.core.errors import StudyError
from cohortium.core.events import Events, Gaussian, Repeated, Sampled, Slack
from cohortium.privacy import calibrate
from cohortium.privacy.accountant import epsilon
from cohortium.privacy.calibrate import Budget, Schedule, multiplier, schedule

ONE = Budget(1.0, 1e-5)


def once(z: float) -> Events:
    return (Gaussian(z),)


def digits_of(value: float) -> int:
    return len(f"{value:.12e}".split("e")[0].replace(".", "").rstrip("0"))


@pytest.mark.parametrize(
    ("at", "sigma"),
    # the least deviation at delta = 1e-5, by bisection of the exact curve with 40 digits
    [(0.1, "30.749566132"), (0.5, "7.03182667558"), (1.0, "3.73063163482"), (4.0, "1.08116184952")],
)
def test_one_release_has_the_least_noise(at: float, sigma: str) -> None:
    unit = Decimal(1).scaleb(Decimal(sigma).adjusted() - 4)
    assert multiplier(Budget(at, 1e-5), once) == float(Decimal(sigma).quantize(unit, rounding=ROUND_CEILING))


@given(
    at=st.floats(0.05, 20),
    failing=st.sampled_from([1e-4, 1e-6]),
    times=st.integers(1, 300),
    rate=st.sampled_from([1.0, 0.2, 0.03]),
)
@settings(max_examples=5, deadline=None)
def test_the_budget_is_kept_and_nearly_spent(at: float, failing: float, times: int, rate: float) -> None:
    def form(z: float) -> Events:
        return (Repeated(times, Sampled(rate, Gaussian(z))), Slack(failing / 100))

    found = multiplier(Budget(at, failing), form)
    assert digits_of(found) <= 5
    assert at * 0.999 <= epsilon(form(found), failing) <= at
    # a hundred-thousandth less noise would be too little
    assert epsilon(form(found * (1 - 1.01 * 10.0 ** (math.floor(math.log10(found)) - 4) / found)), failing) > at


@given(
    at=st.floats(0.1, 10),
    times=st.integers(1, 2000),
    share=st.none() | st.floats(0.01, 0.9),
    slack=st.sampled_from([0.0, 1e-7]),
)
@settings(max_examples=30, deadline=None)
def test_without_sampling_a_schedule_is_the_closed_form(
    at: float, times: int, share: float | None, slack: float
) -> None:
    found = schedule(Budget(at, 1e-5), times, 1.0, share, slack)
    whole = multiplier(Budget(at, 1e-5), lambda z: (Gaussian(z), Slack(slack)))
    left = 1 / whole**2
    if share is not None:
        assert found.preprocessing is not None and digits_of(found.preprocessing) <= 4
        assert whole / math.sqrt(share) * (1 - 1e-4) <= found.preprocessing <= whole / math.sqrt(share) * 1.001
        left -= 1 / found.preprocessing**2
    assert digits_of(found.training) <= 4
    assert math.sqrt(times / left) * (1 - 1e-3) <= found.training <= math.sqrt(times / left) * 1.001
    assert 0.997 * at <= epsilon(found.events, 1e-5) <= at


@pytest.mark.parametrize(
    ("at", "times", "rate", "expected"),
    [(1.0, 1000, 0.1, 12.51), (0.5, 1000, 0.01, 2.497), (8.0, 40, 0.05, 0.6198)],
)
def test_sampled_schedules_keep_the_budget(at: float, times: int, rate: float, expected: float) -> None:
    found = schedule(Budget(at, 1e-5), times, rate, 0.1, 1e-7)
    assert found.training == expected
    assert 0.998 * at <= epsilon(found.events, 1e-5) <= at
    less = replace(found, training=found.training - 10.0 ** (math.floor(math.log10(found.training)) - 3))
    assert epsilon(less.events, 1e-5) > at
    # by orders, which the calibration never looked at, it is not far away
    assert epsilon(found.events, 1e-5) <= epsilon(found.events, 1e-5, "rdp") <= 2 * at


def test_a_schedule_says_what_it_costs() -> None:
    found = Schedule(4.0, 20.0, 40, 0.5, 1e-7)
    assert found.events == (Gaussian(4.0), Repeated(40, Sampled(0.5, Gaussian(20.0))), Slack(1e-7))
    assert Schedule(None, 20.0, 40, 1.0, 0.0).events == (Repeated(40, Gaussian(20.0)),)


def test_equal_arguments_give_equal_bits() -> None:
    found = schedule(ONE, 30, 0.2, 0.1, 1e-7)
    calibrate._schedule.cache_clear()
    assert schedule(ONE, rounds=30, rate=0.2, share=0.1, slack=1e-7) == found
    assert schedule(ONE, 30, 0.2, 0.1, 1e-7) is schedule(ONE, 30, 0.2, 0.1, 1e-7)


def test_where_it_starts_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    for times, rate in ((7, 1.0), (20, 0.3)):

        def form(z: float, times: int = times, rate: float = rate) -> Events:
            return (Repeated(times, Sampled(rate, Gaussian(z))),)

        found = multiplier(ONE, form)
        for guess in (found / 3, found * 20):
            with monkeypatch.context() as patched:
                patched.setattr(calibrate, "_guess", lambda *_, guess=guess: guess)
                assert multiplier(ONE, form) == found


def test_what_no_noise_can_keep_is_refused() -> None:
    with pytest.raises(StudyError, match="already spends it"):
        multiplier(ONE, lambda z: (Gaussian(1.0), Gaussian(z)))
    with pytest.raises(StudyError, match="leaves nothing of delta"):
        schedule(ONE, 1, 1.0, None, 1e-5)


@pytest.mark.parametrize(
    ("rounds", "rate", "share", "slack"),
    [(0, 1.0, None, 0.0), (1, 0.0, None, 0.0), (1, 1.1, None, 0.0), (1, 1.0, 1.0, 0.0), (1, 1.0, None, -1e-9)],
)
def test_impossible_schedules_are_refused(rounds: int, rate: float, share: float | None, slack: float) -> None:
    with pytest.raises(ValueError, match="no schedule"):
        schedule(ONE, rounds, rate, share, slack)


@pytest.mark.parametrize(("at", "failing"), [(0.0, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_a_budget_is_a_budget(at: float, failing: float) -> None:
    with pytest.raises(ValueError, match="no budget"):
        Budget(at, failing)


def test_significant_digits_are_numbered_in_order() -> None:
    for digits in (4, 5):
        for value in (1.0, 9.999, 0.001, 123.4, 9.9995e7):
            number = calibrate._number(value, digits)
            found = calibrate._numbered(number, digits)
            assert calibrate._number(found, digits) == number
            assert found < calibrate._numbered(number + 1, digits) <= found * (1 + 1.001 * 10.0 ** (1 - digits))
