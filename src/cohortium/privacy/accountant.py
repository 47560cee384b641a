"""What events come to: epsilon at a given delta, and delta at a given epsilon.

Events compose before anything is converted, across rounds, stages and studies alike. Every figure here is an upper
bound on what was lost: where the arithmetic rounds, it rounds against us, and an event of a kind that this module does
not know is refused, because a release that nobody can price must not pass for a free one.

Trust: epsilon says what an attacker learns of one privacy unit who sees everything that was released, knows everything
about everybody else, and has no limit on computing time. It presumes that noise and samples were drawn as the event
says, and kept secret.

Source:
    Balle and Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy: Analytical Calibration and Optimal
    Denoising", theorem 8 (exact); Doroshenko et al. 2022, "Connect the Dots: Tighter Discrete Approximations of
    Privacy Loss Distributions" (pld); Mironov 2017, "Renyi Differential Privacy", and Canonne, Kamath and Steinke 2020,
    "The Discrete Gaussian for Differential Privacy", proposition 12 (rdp).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy.special import log_ndtr

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.events import Events, Gaussian, Repeated, Sampled, Slack

Method = Literal["exact", "pld", "rdp"]

_ROUNDED = 1e-12
"""What Fourier transforms may round away of a tail's probability; it is counted as lost."""
_LEAST_DELTA = 1e-10
"""Below it, that is no longer small beside delta, and Renyi orders take over from PLD."""
_FINENESS = 32
"""Grid points of a privacy loss distribution to one release's share of the deviation: epsilon is 0.01% too large."""
_COARSEST, _MOST_POINTS = 2.0**-8, 2**15
_LEAST, _MOST = 0.02, 1e6
"""Beyond these multipliers, which no study has use for, a grid of losses loses its digits: sampling is passed over."""
_ORDERS = (*range(2, 64), 72, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024)
"""Whole ones only: those between have a series that does not converge everywhere."""


@dataclass(frozen=True)
class Part:
    """Releases of one kind, with finite noise.

    Attributes:
        rate: the share of units that is drawn secretly; 1 takes everybody.
        multiplier: the noise's deviation, relative to the sensitivity.
        times: how many there are, at least 1.
    """

    rate: float
    multiplier: float
    times: int


@dataclass(frozen=True)
class Releases:
    """Events by what they cost, sorted: composition does not depend on the order, and neither do the last bits here.

    Attributes:
        sampled: each pair of a sampling rate below 1 and a multiplier, and how often it occurs.
        plain: each multiplier without sampling, and how often it occurs.
        slack: the sum of what the events' bounds may fail by.
    """

    sampled: tuple[tuple[float, float, int], ...]
    plain: tuple[tuple[float, int], ...]
    slack: float

    @property
    def multiplier(self) -> float:
        """The multiplier of the one Gaussian that all plain ones come to, infinite without any.

        Releases with noise of variance z^2 tell as much, together, as one in which the inverse variances add up: their
        privacy losses are normal, with mean 1 / (2 z^2) and variance 1 / z^2 (Dong, Roth and Su 2022, corollary 3.3).
        """
        information = _sum(times / z / z for z, times in self.plain)
        return 1 / math.sqrt(information) if information > 0 else math.inf


def parts(events: Events) -> tuple[tuple[Part, ...], tuple[float, ...]]:
    """Returns what was released and what slack it has, as listed; what costs nothing is left out.

    Raises:
        ProtocolError: an event is of an unknown kind, or none that a release could have.
    """
    found: list[Part] = []
    slack: list[float] = []
    for event in events:
        if isinstance(event, Slack):
            slack.append(_in_range(event.delta, "slack"))
            continue
        times, once = (event.times, event.event) if isinstance(event, Repeated) else (1, event)
        rate, noise = (_in_range(once.rate, "rate"), once.event) if isinstance(once, Sampled) else (1.0, once)
        if not isinstance(noise, Gaussian):
            raise ProtocolError(f"an event of kind {type(noise).__name__} is unknown here, so nobody can say its cost")
        if isinstance(times, bool) or not isinstance(times, int) or times < 0:
            raise ProtocolError(f"an event is repeated {times} times, which is no number of times")
        if not noise.multiplier > 0:
            raise ProtocolError(f"a noise multiplier is {noise.multiplier}: without noise there is no privacy")
        if rate > 0 and times > 0 and noise.multiplier < math.inf:
            found.append(Part(rate, noise.multiplier, times))
    return tuple(found), tuple(slack)


def releases(events: Events) -> Releases:
    """Returns the events as an accountant sees them.

    Raises:
        ProtocolError: an event is of an unknown kind, or none that a release could have.
    """
    listed, slack = parts(events)
    sampled: Counter[tuple[float, float]] = Counter()
    plain: Counter[float] = Counter()
    # a sample costs at most as much as taking everybody (van Erven and Harremoes 2014, theorem 13: quasi-convexity)
    noise = [part.multiplier for part in listed]
    countable = bool(listed) and min(noise) >= _LEAST
    for part in listed:
        if part.rate < 1 and countable and part.multiplier <= _MOST:
            sampled[part.rate, part.multiplier] += part.times
        else:
            plain[part.multiplier] += part.times
    return Releases(
        tuple((*pair, times) for pair, times in sorted(sampled.items())),
        tuple(sorted(plain.items())),
        math.fsum(slack),
    )


def epsilon(events: Events, delta: float, method: Method | None = None) -> float:
    """Returns an epsilon with which the events together are (epsilon, delta)-private, infinite where there is none.

    Args:
        events: what was released; slack counts against delta.
        delta: the probability that epsilon need not cover.
        method: "exact" takes the Gaussian's own curve, for events without sampling; "pld" composes discretised
            distributions of the privacy loss; "rdp" takes the best of many Renyi orders. None takes the tightest one
            that holds: exact without sampling, else pld, and rdp where delta is too small for pld's arithmetic.

    Raises:
        ProtocolError: an event is unknown or malformed.
        StudyError: slack leaves nothing of delta, or dp-accounting is not installed.
        ValueError: delta is no probability, or `method` is "exact" and an event is sampled.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}, and must lie between 0 and 1")
    what = releases(events)
    rest = delta - what.slack
    if rest < 0 or (rest == 0 and (what.plain or what.sampled)):
        raise StudyError(
            f"rounding and sampling may break the bound with probability {what.slack:.3g}, which leaves nothing of "
            f"delta = {delta:.3g}: choose a larger delta, or arithmetic with more bits"
        )
    if not what.plain and not what.sampled:
        return 0.0
    if method is None:
        method = "exact" if not what.sampled else "pld" if rest >= _LEAST_DELTA else "rdp"
    if method == "exact" and what.sampled:
        raise ValueError("only events without sampling have an exact curve; choose 'pld' or 'rdp'")
    return _epsilon(what, rest, method)


def delta(events: Events, epsilon: float) -> float:
    """Returns a delta with which the events together are (epsilon, delta)-private, by the Gaussian's curve or by PLD.

    Raises:
        ProtocolError: an event is unknown or malformed.
        StudyError: dp-accounting is not installed.
        ValueError: epsilon is negative or no number.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon}, and must not be negative")
    what = releases(events)
    if not what.plain and not what.sampled:
        return min(1.0, what.slack)
    if what.sampled:
        lost = float(_accountant(what, "pld").get_delta(epsilon)) + _ROUNDED
    else:
        lost = _gaussian_delta(what.multiplier, epsilon)
    return min(1.0, lost + what.slack)


def effective(events: Events) -> float:
    """Returns roughly the multiplier of one Gaussian that costs as much as all events: a first guess, and no bound.

    Source: Bu et al. 2020, "Deep Learning with Gaussian Differential Privacy", corollary 5.4 (a central limit theorem).
    """
    what = releases(events)
    return math.sqrt(1 / variance) if (variance := _variance(what)) > 0 else math.inf


def library() -> Any:
    """Returns the module `dp_accounting`, which takes seconds to import and is needed by few studies only.

    Raises:
        StudyError: it is not installed.
    """
    try:
        import dp_accounting
    except ImportError:
        raise StudyError(
            "accounting for differential privacy needs dp-accounting, which is not installed here: "
            "run pip install 'cohortium[privacy]'"
        ) from None
    return dp_accounting


@lru_cache(maxsize=256)
def _epsilon(what: Releases, rest: float, method: Method) -> float:
    """Returns epsilon at what slack leaves of delta; cached, because a study is priced more than once on its way."""
    match method:
        case "exact":
            if _gaussian_delta(what.multiplier, 0.0) <= rest:
                return 0.0
            # where epsilon and delta are tiny, its search passes points whose delta is 0 in floating point
            with np.errstate(divide="ignore"):
                return float(library().get_epsilon_gaussian(what.multiplier, rest))
        case "pld":
            return float(_accountant(what, method).get_epsilon(rest - _ROUNDED))
        case "rdp":
            return float(_accountant(what, method).get_epsilon(rest))


def _accountant(what: Releases, method: Literal["pld", "rdp"]) -> Any:
    """Returns the library's accountant after all releases, plain ones as the one Gaussian that they come to."""
    dp = library()
    events = [
        dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(z)), times)
        for rate, z, times in what.sampled
    ]
    if what.plain:
        events.append(dp.GaussianDpEvent(what.multiplier))
    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    if method == "pld":
        accountant = dp.pld.PLDAccountant(relation, _interval(what))
    else:
        accountant = dp.rdp.RdpAccountant(_ORDERS, relation)
    return accountant.compose(dp.ComposedDpEvent(events))


def _interval(what: Releases) -> float:
    """Returns the grid of a privacy loss distribution: a power of two, so that near events have the same one.

    Spreading a loss over two neighbouring points adds at most a quarter of the squared interval to each release's
    variance, so the grid follows from the whole variance and the number of releases: a fixed one would be far too
    coarse for many rounds of a small sample, and needlessly fine for one release with little noise.
    """
    count = sum(times for *_, times in what.sampled) + bool(what.plain)
    fine = math.sqrt(_variance(what) / count) / _FINENESS
    widest = max(_width(rate, z) for rate, z in [(1.0, what.multiplier), *((rate, z) for rate, z, _ in what.sampled)])
    wanted = max(min(fine, _COARSEST), widest / _MOST_POINTS)
    return float(2.0 ** math.floor(math.log2(wanted)))


def _width(rate: float, multiplier: float) -> float:
    """Returns the length of the range, ten deviations to either side, in which a release's privacy loss lies."""
    middle, reach = 1 / multiplier / multiplier / 2, 10 / multiplier
    if rate == 1:
        return 2 * reach
    largest = middle + reach
    gain = math.log1p(rate * math.expm1(largest)) if largest < 700 else largest + math.log(rate)
    return gain - math.log1p(-rate)


def _variance(what: Releases) -> float:
    """Returns roughly the variance of the whole privacy loss; beside little noise, at most that without sampling."""
    sampled = (times * min(rate**2 * math.expm1(min(1 / z / z, 100.0)), 1 / z / z) for rate, z, times in what.sampled)
    return _sum([*sampled, *(times / z / z for z, times in what.plain)])


def _sum(numbers: Iterable[float]) -> float:
    """Returns the sum of numbers that are not negative; unlike `fsum`, also of those whose sum no float can hold."""
    listed = list(numbers)
    return math.fsum(listed) if sum(listed) < math.inf else math.inf


def _gaussian_delta(multiplier: float, epsilon: float) -> float:
    """Returns the exact delta of a Gaussian release (Balle and Wang 2018, theorem 8)."""
    if multiplier == 0 or math.isinf(multiplier):
        return 1.0 if multiplier == 0 else 0.0
    half, reach = 1 / multiplier / 2, epsilon * multiplier
    first, second = float(log_ndtr(half - reach)), epsilon + float(log_ndtr(-half - reach))
    return math.exp(first) * -math.expm1(min(second - first, 0.0)) if first > -math.inf else 0.0


def _in_range(value: float, name: str) -> float:
    """Returns a probability of an event's.

    Raises:
        ProtocolError: it is none.
    """
    if not 0 <= value <= 1:
        raise ProtocolError(f"an event's {name} is {value}, which is no probability")
    return value
