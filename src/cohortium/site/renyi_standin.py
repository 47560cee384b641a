"""Stands in for `cohortium.privacy.renyi` until that is there; removed then."""

import math
from dataclasses import dataclass

from cohortium.core.events import Events, Repeated, Sampled, Slack
from cohortium.privacy.calibrate import Budget

_UNIT = 2**40


@dataclass(frozen=True)
class Price:
    divergence: int
    slack: int


def order_for(budget: Budget) -> int:
    return 16


def cost(events: Events, order: int) -> Price:
    divergence = slack = 0
    for event in events:
        times, once = (event.times, event.event) if isinstance(event, Repeated) else (1, event)
        if isinstance(once, Slack):
            slack += math.ceil(once.delta * 2**60)
            continue
        plain = once.event if isinstance(once, Sampled) else once
        divergence += times * math.ceil(order / 2 / plain.multiplier**2 * _UNIT)
    return Price(divergence, slack)


def limit(budget: Budget, order: int) -> Price:
    rest = budget.epsilon - math.log(2 / budget.delta) / (order - 1)
    return Price(math.floor(max(rest, 0) * _UNIT), math.floor(budget.delta / 2 * 2**60))


def spent_epsilon(price: Price, order: int, delta: float) -> float:
    return price.divergence / _UNIT + math.log(2 / delta) / (order - 1)
