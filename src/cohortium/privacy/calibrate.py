"""How much noise a budget asks for: the accountant, turned round.

A noise multiplier is a number of few significant digits, and the smallest such number with which the accountant finds
the budget kept. So it does not depend on how it was searched for. On one machine equal arguments give equal bits;
different machines, whose arithmetic differs in the last bits of an epsilon, agree as well unless the epsilon of some
candidate happens to lie within those bits of the budget. A run whose halves disagreed would stop, because they would
lay out different sums.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from cohortium.core.errors import StudyError
from cohortium.core.events import Events, Gaussian, Repeated, Sampled, Slack
from cohortium.privacy.accountant import effective, epsilon, library

_DIGITS, _DIGITS_OF_A_SCHEDULE = 5, 4
_LEAST, _MOST = 1e-6, 1e12
"""The range in which a multiplier is looked for."""


@dataclass(frozen=True)
class Budget:
    """The most that may be lost: (epsilon, delta)-differential privacy.

    Raises:
        ValueError: epsilon or delta is none.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and 0 < self.delta < 1):
            raise ValueError(f"epsilon {self.epsilon} and delta {self.delta} are no budget")


@dataclass(frozen=True)
class Schedule:
    """The noise of a study's releases.

    Attributes:
        preprocessing: the multiplier of the one release before training; None where there is none.
        training: the multiplier of each round.
        rounds: the number of rounds.
        rate: the share of units that is drawn secretly for a round.
        slack: the share of delta that is left to what else may fail; not the releases' own.
    """

    preprocessing: float | None
    training: float
    rounds: int
    rate: float
    slack: float

    @property
    def events(self) -> Events:
        """What all of it costs."""
        return _events(self.preprocessing, self.training, self.rounds, self.rate, self.slack)


def multiplier(budget: Budget, form: Callable[[float], Events]) -> float:
    """Returns the smallest noise multiplier, of five significant digits, whose releases keep the budget.

    Args:
        budget: epsilon and delta.
        form: the releases with a multiplier; more noise must not make them cost more.

    Raises:
        StudyError: no noise is enough, because slack or what `form` holds fixed uses up the budget.
    """
    return _smallest(budget, form, _DIGITS)


def schedule(budget: Budget, rounds: int, rate: float, share: float | None, slack: float) -> Schedule:
    """Returns the noise with which a study keeps its budget: one release for preprocessing, and equal rounds.

    Preprocessing gets `share` of the budget in the sense in which costs of Gaussian releases add up, that of the
    inverse variance: if multiplier z spends all of (epsilon, delta - slack) in one release, preprocessing gets
    z / sqrt(share). Training then gets the least noise with which everything together keeps the budget. All multipliers
    are rounded up to four significant digits; without sampling, training's is
    sqrt(rounds / (1 / z^2 - 1 / preprocessing^2)).

    Results are cached, because the halves of a run each ask for them; a schedule without sampling takes a millisecond,
    one of 1,000 sampled rounds a second or two.

    Args:
        budget: epsilon and delta of the whole study.
        rounds: how often training releases a sum.
        rate: the probability with which each unit takes part in a round, independently and secretly.
        share: the share of preprocessing, between 0 and 1; None without preprocessing.
        slack: the part of delta to be left to rounding and samplers.

    Raises:
        StudyError: slack leaves nothing of delta, or dp-accounting is not installed.
        ValueError: rounds, rate or share is out of range.
    """
    return _schedule(budget, rounds, rate, share, slack)


@lru_cache(maxsize=256)
def _schedule(budget: Budget, rounds: int, rate: float, share: float | None, slack: float) -> Schedule:
    if rounds < 1 or not 0 < rate <= 1 or not slack >= 0 or not (share is None or 0 < share < 1):
        raise ValueError(f"no schedule has {rounds} rounds, rate {rate}, share {share} and slack {slack}")
    before = None if share is None else _rounded_up(_whole(budget, slack) / math.sqrt(share), _DIGITS_OF_A_SCHEDULE)

    def form(training: float) -> Events:
        return _events(before, training, rounds, rate, slack)

    found = Schedule(before, _smallest(budget, form, _DIGITS_OF_A_SCHEDULE), rounds, rate, slack)
    spent = epsilon(found.events, budget.delta)
    if not spent <= budget.epsilon:  # the search has seen to it; nothing is released on its word alone
        raise StudyError(f"a schedule for epsilon {budget.epsilon:g} would spend {spent:.6g}: this is a fault here")
    return found


def _events(before: float | None, training: float, rounds: int, rate: float, slack: float) -> Events:
    once = Gaussian(training) if rate == 1 else Sampled(rate, Gaussian(training))
    first: Events = () if before is None else (Gaussian(before),)
    return (*first, Repeated(rounds, once), *((Slack(slack),) if slack else ()))


def _whole(budget: Budget, slack: float) -> float:
    """Returns the multiplier at which one release spends the whole budget (Balle and Wang 2018, algorithm 1)."""
    rest = budget.delta - slack
    if not rest > 0:
        raise StudyError(
            f"slack {slack:.3g} leaves nothing of delta {budget.delta:.3g}: choose a larger delta, or arithmetic with "
            "more bits"
        )
    return float(library().get_sigma_gaussian(budget.epsilon, rest))


def _smallest(budget: Budget, form: Callable[[float], Events], digits: int) -> float:
    """Returns the smallest number of `digits` significant digits whose events keep the budget.

    Numbers of so many digits are numbered in their order, so that this is a search among integers. It goes by secants
    of log epsilon over log multiplier, which is nearly a line, and halves the bracket at times, so that it ends
    whatever the accountant does.
    """
    too_little, enough = _number(_LEAST, digits), _number(_MOST, digits)
    aim = math.log(budget.epsilon)
    at = _number(_guess(budget, form), digits)
    known: dict[int, float] = {}
    while enough - too_little > 1:
        spent = epsilon(form(_numbered(at, digits)), budget.delta)
        if spent <= budget.epsilon:
            enough = at
        else:
            too_little = at
        if 0 < spent < math.inf:
            known[at] = math.log(spent)
        at = _next(known, aim, too_little, enough, digits)
    if enough == _number(_MOST, digits):
        raise StudyError(
            f"no noise keeps epsilon {budget.epsilon:g} at delta {budget.delta:g}: what is fixed already spends it"
        )
    return _numbered(enough, digits)


def _next(known: dict[int, float], aim: float, too_little: int, enough: int, digits: int) -> int:
    """Returns the number to try next, between the two ends: where the last two would put it, or the middle."""
    middle = (too_little + enough) // 2
    if len(known) < 2:
        # epsilon falls about as 1 / z, so one point and a slope of -1 are a start
        (at, value), slope = (next(iter(known.items())) if known else (middle, aim)), -1.0
        place = math.log(_numbered(at, digits))
    else:
        (first, above), (at, value) = list(known.items())[-2:]
        start, place = math.log(_numbered(first, digits)), math.log(_numbered(at, digits))
        slope = (value - above) / (place - start) if place != start else 0.0
    if slope >= 0 or len(known) % 8 == 7:
        return middle
    target = min(max(place + (aim - value) / slope, math.log(_LEAST)), math.log(_MOST))
    return min(max(_number(math.exp(target), digits), too_little + 1), enough - 1)


def _guess(budget: Budget, form: Callable[[float], Events]) -> float:
    """Returns roughly the multiplier wanted: that with which the central limit theorem finds the budget spent."""
    whole = _whole(budget, math.fsum(event.delta for event in form(1.0) if isinstance(event, Slack)))
    low, high = math.log(_LEAST), math.log(_MOST)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(form(math.exp(middle))) < whole else (low, middle)
    return math.exp(high)


def _rounded_up(value: float, digits: int) -> float:
    number = _number(value, digits)
    return _numbered(number, digits) if _numbered(number, digits) >= value else _numbered(number + 1, digits)


def _number(value: float, digits: int) -> int:
    """Returns the place of the nearest number of `digits` significant digits among all such numbers."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    ones: int = 10 ** (digits - 1)
    return int(exponent) * 9 * ones + int(mantissa.replace(".", "")) - ones


def _numbered(number: int, digits: int) -> float:
    """Returns the number at a place, as the double that is nearest to it on every machine."""
    ones: int = 10 ** (digits - 1)
    exponent, rest = divmod(number, 9 * ones)
    return float(f"{ones + rest}e{exponent - digits + 1}")
