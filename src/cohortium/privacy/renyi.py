"""The currency of a site's ledger: Renyi divergences at one order, in whole numbers that add up without rounding.

A ledger charges releases whose cost nobody knew beforehand: which studies come next, and how much noise they add,
depends on what earlier ones released. The usual composition theorems presume costs that are fixed in advance. Stopping
once the divergences at one order, fixed in advance, would add up to more than a limit is sound all the same; the
released whole then has at most that divergence (a Renyi filter). Each patient may have a sum of his own.

One order, and not the best of several: a filter that goes on as long as some order is within its limit ends at an order
that depends on what was released. Each order's limit bounds the probability of a large loss in those courses of events
that it itself lets through, so that with k orders k such probabilities add up (a union bound), and each would need a
limit for delta / k.

Limits are rounded down and costs up, in units of 10^-12 for a divergence and 10^-18 for slack: a sum of charges is
exact, and the same on every machine that wrote the charges down.

Trust: a unit that never spent more than `limit(budget, order)` has (epsilon, delta)-differential privacy against an
attacker who sees all releases together and may have chosen each in the light of those before.

Source:
    Feldman and Zrnic 2021, "Individual Privacy Accounting via a Renyi Filter"; Lecuyer 2021, "Practical Privacy Filters
    and Odometers with Renyi Differential Privacy and Applications to Differentially Private Deep Learning" (filters);
    Mironov 2017, "Renyi Differential Privacy", proposition 7 (the Gaussian); Mironov, Talwar and Zhang 2019, "Renyi
    Differential Privacy of the Sampled Gaussian Mechanism", section 3 (sampling); Canonne, Kamath and Steinke 2020,
    "The Discrete Gaussian for Differential Privacy", proposition 12 (epsilon).
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.special import gammaln, logsumexp

from cohortium.core.errors import StudyError
from cohortium.core.events import Events
from cohortium.core.layout import Floats
from cohortium.privacy.accountant import Part, parts
from cohortium.privacy.calibrate import Budget

DIVERGENCE, SLACK = 10**12, 10**18
"""Units to one, of a divergence and of a probability."""

_FOR_SLACK = Fraction(1, 10)
"""The share of delta within which slack may add up."""
_ORDERS = (*range(2, 32), *(step << octave for octave in range(12) for step in range(32, 64)))
"""Whole numbers up to 129,024, 3% apart: neighbours differ in worth by far more than a machine's rounding."""
_MARGIN = 1e-9
"""Relative rounding of the series for a sampled release, from above: logarithms of factorials lose some digits."""


@dataclass(frozen=True)
class Price:
    """What releases cost a unit, or may cost it.

    Attributes:
        divergence: the Renyi divergence at the ledger's order, in units of 10^-12.
        slack: the probability that a release's bound does not hold, in units of 10^-18.
    """

    divergence: int
    slack: int

    def __add__(self, other: "Price") -> "Price":
        return Price(self.divergence + other.divergence, self.slack + other.slack)

    def within(self, limit: "Price") -> bool:
        """Returns whether this is no more than a limit, in both parts."""
        return self.divergence <= limit.divergence and self.slack <= limit.slack


def order_for(budget: Budget) -> int:
    """Returns the order at which a budget buys the most Gaussian releases; a whole number from 2 up.

    Nine tenths of delta are converted and one tenth is kept for slack, as in `limit`. For small epsilon the order is
    about 2 log(1 / delta) / epsilon. Releases of small samples with little noise cost more at it than at a lower one,
    because a high order weighs the rare case in which the unit is drawn.

    Raises:
        StudyError: epsilon is too small for any order.
    """
    orders = np.array(_ORDERS, dtype=np.float64)
    worth = _most(budget, orders) / orders
    if not worth.max() > 0:
        raise StudyError(f"epsilon {budget.epsilon:g} is too small for a ledger's arithmetic: choose a larger budget")
    return int(_ORDERS[worth.argmax()])


def limit(budget: Budget, order: int) -> Price:
    """Returns the most that a unit may spend at an order, rounded down.

    A tenth of delta is kept for slack, and the divergence is the one that comes to epsilon at the other nine tenths.

    Raises:
        StudyError: nothing can be spent at this order.
    """
    _require(order)
    # a few units less than the floating-point value, which is good to 15 digits
    most = math.floor(float(_most(budget, np.array(float(order)))) * DIVERGENCE * (1 - _MARGIN)) - 1
    if most <= 0:
        raise StudyError(
            f"epsilon {budget.epsilon:g} at delta {budget.delta:g} leaves nothing to spend at order {order}: choose "
            "another order or a larger budget"
        )
    return Price(most, math.floor(Fraction(budget.delta) * _FOR_SLACK * SLACK))


def cost(events: Events, order: int) -> Price:
    """Returns what releases cost at an order, rounded up: costs of two releases add up to the cost of both.

    Raises:
        ProtocolError: an event is of an unknown kind, or none that a release could have.
    """
    _require(order)
    listed, slack = parts(events)
    return Price(
        sum(part.times * _once(part, order) for part in listed),
        sum(math.ceil(Fraction(delta) * SLACK) for delta in slack),
    )


def spent_epsilon(price: Price, order: int, delta: float) -> float:
    """Returns the epsilon that a spend comes to at delta, for people.

    It is 0 for nothing, infinite where slack uses up delta.
    It rises with the spend, from a first step far above 0, because a divergence at one order says little about rare
    events: a spend of the whole limit comes to the budget's epsilon, and half of it to more than half.
    """
    _require(order)
    rest = delta - price.slack / SLACK
    if price.divergence == 0:
        return 0.0 if rest >= 0 else math.inf
    if rest <= 0:
        return math.inf
    return max(0.0, price.divergence / DIVERGENCE + float(_added(np.array(float(order)), rest)))


def divergence(rate: float, multiplier: float, order: int) -> float:
    """Returns the Renyi divergence of a Gaussian release on a Poisson sample, under adding or removing one unit.

    At a whole order a it is log(1 + S) / (a - 1), where S sums C(a, k) (1 - q)^(a - k) q^k (exp(k (k - 1) / 2 z^2) - 1)
    over k from 2 to a. All terms are positive, so that digits are not lost however little a release costs. This is the
    divergence of the outcome with the unit from that without; the other way round it is never larger (Mironov, Talwar
    and Zhang 2019, section 3.1), so it holds for adding and for removing.
    """
    _require(order)
    if rate == 1:
        return order / 2 / multiplier / multiplier
    k = np.arange(2, order + 1, dtype=np.float64)
    chosen = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    drawn = k * math.log(rate) + (order - k) * math.log1p(-rate)
    with np.errstate(over="ignore", divide="ignore"):
        exponent = k * (k - 1) / 2 / multiplier / multiplier
        # log(exp(x) - 1), for small and for large x
        gain = exponent + np.log(-np.expm1(-exponent))
    return float(np.logaddexp(0.0, logsumexp(chosen + drawn + gain))) / (order - 1)


def _once(part: Part, order: int) -> int:
    """Returns the divergence of one release in whole units, rounded up."""
    plain = math.ceil(Fraction(order * DIVERGENCE, 2) / Fraction(part.multiplier) ** 2)
    if part.rate == 1:
        return plain
    sampled = divergence(part.rate, part.multiplier, order)
    # a sample costs at most what everybody does (quasi-convexity), also where the series leaves the range of floats
    return min(plain, math.ceil(sampled * DIVERGENCE * (1 + _MARGIN)) + 1) if math.isfinite(sampled) else plain


def _most(budget: Budget, orders: Floats) -> Floats:
    """Returns the divergence at each order that comes to epsilon at the share of delta which slack leaves."""
    return budget.epsilon - _added(orders, float(Fraction(budget.delta) * (1 - _FOR_SLACK)))


def _added(orders: Floats, delta: float) -> Floats:
    """Returns by how much epsilon at delta exceeds the divergence at each order (Canonne, Kamath and Steinke 2020)."""
    added: Floats = np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return added


def _require(order: int) -> None:
    if order < 2:
        raise ValueError(f"order {order}: prices are stated at a whole order from 2 up")
