"""The rules of a site's privacy budget: who can pay for what, and what a steward is shown of it.

A unit may take part in a release as long as all that its data were ever charged, this release included, stays within
one fixed limit. What it is charged for may depend on earlier releases, and the promise holds nevertheless: a Renyi
filter (Feldman and Zrnic 2021, "Individual Privacy Accounting via a Renyi Filter", theorem 4.3) at one order, in whole
numbers that add up without rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cohortium.core.events import DpEvent, Events, Gaussian, Repeated, Sampled, Slack
from cohortium.learning.disclosure import suppress
from cohortium.privacy import renyi
from cohortium.privacy.calibrate import Budget
from cohortium.privacy.renyi import Price
from cohortium.site.chain import Charged

SITE = b"\xff(site)"
"""The one unit of a study that protects whole sites: bytes that no text encodes to, so no patient's identifier."""
SMALL = 5
"""Smaller counts of patients are hidden, even from the steward's screen, which others may see."""
HIDDEN = "hidden"
_BINS = 10
_USUAL = Budget(1.0, 1e-5)
"""Charges are counted as under this budget where the policy has none."""

Spent = NDArray[np.int64]
"""What each unit was charged so far, `(n_units, 2)`: divergence and slack."""


def events_for(events: Events, records: int) -> Events:
    """Returns what events that protect one record cost somebody who has `records` of them.

    His records together move a sum by `records` times as much, so that the noise protects him by a multiplier that is
    as many times smaller: `records` squared times the Renyi divergence. Sampling is passed over for more than one,
    because one of his records or another is drawn far more often than each: given which ones are, the divergence is at
    most that with all of them, and so is the mixture's (quasi-convexity; van Erven and Harremoes 2014, theorem 13).
    The bound of each of his records may fail, so slack adds up.

    Raises:
        ValueError: `records` is below 1.
    """
    if records < 1:
        raise ValueError(f"{records} records: somebody who is charged has at least one")
    return events if records == 1 else tuple(_for_group(event, records) for event in events)


def _for_group(event: DpEvent, records: int) -> DpEvent:
    match event:
        case Gaussian():
            return Gaussian(event.multiplier / records)
        case Sampled():
            return Gaussian(event.event.multiplier / records)
        case Repeated():
            once = event.event.event if isinstance(event.event, Sampled) else event.event
            return Repeated(event.times, Gaussian(once.multiplier / records))
        case Slack():
            return Slack(min(1.0, event.delta * records))


@dataclass(frozen=True)
class Tariff:
    """How charges are counted: the Renyi order of the budget in force, and what a unit may spend at that order.

    Attributes:
        limit: None: everything is counted and nobody is refused.
        delta: the delta at which spends are shown.
    """

    order: int
    limit: Price | None
    delta: float

    def price(self, events: Events) -> Price:
        """Returns what events cost a unit."""
        return renyi.cost(events, self.order)

    def price_of(self, charged: Charged) -> Price:
        """Returns what a charge counts for now: what was written then, or its events anew if the order was another."""
        if charged.order != self.order:
            return self.price(charged.events)
        return Price(charged.divergence, charged.slack)

    def epsilon(self, price: Price) -> float:
        """Returns the epsilon that a spend comes to, infinite where its slack leaves nothing of delta."""
        return renyi.spent_epsilon(price, self.order, self.delta)


def tariff(budget: Budget | None) -> Tariff:
    """Returns how charges are counted under a budget."""
    usual = budget or _USUAL
    order = renyi.order_for(usual)
    return Tariff(order, renyi.limit(budget, order) if budget else None, usual.delta)


def can_pay(spent: Spent, price: Price, limit: Price | None) -> NDArray[np.bool_]:
    """Returns which units stay within the limit after a price; without a limit all of them."""
    if limit is None:
        return np.ones(len(spent), dtype=bool)
    # the price is taken from the limit, because a sum could leave the range of 64 bits
    left = limit.divergence - price.divergence, limit.slack - price.slack
    if min(left) < 0:
        return np.zeros(len(spent), dtype=bool)
    return (spent[:, 0] <= left[0]) & (spent[:, 1] <= left[1])


@dataclass(frozen=True)
class Charge:
    """A round that was charged, without its patients: when, for which run of which study, and the price of each."""

    time: str
    run: str
    study: str
    round: int
    price: Price


@dataclass(frozen=True)
class StudyCost:
    """What a study was charged at this site, from all of its runs.

    Attributes:
        most: the most that a unit paid for it.
    """

    study: str
    runs: int
    rounds: int
    first: str
    last: str
    most: Price


def study_cost(study: str, charges: Sequence[Charge], most: Price) -> StudyCost:
    """Returns a study's charges, oldest first and at least one, added up."""
    runs = len({charge.run for charge in charges})
    return StudyCost(study, runs, len(charges), charges[0].time, charges[-1].time, most)


@dataclass(frozen=True)
class Accounts:
    """A ledger as its site may read it.

    Attributes:
        tariff: how charges are counted.
        studies: what each study cost, in the order of their first charge.
        prices: every price that was ever charged.
        patients: what each patient spent who was ever charged, in no telling order; `(n, 2)`.
        site: what the site itself spent, the unit of studies that protect whole sites.
    """

    tariff: Tariff
    studies: tuple[StudyCost, ...]
    prices: frozenset[Price]
    patients: Spent = field(repr=False)
    site: Price


@dataclass(frozen=True)
class Distribution:
    """How much of their budget patients have spent.

    Attributes:
        bins: patients by the share spent, in tenths, without those who are out of budget.
        out: those who could not pay for any round that was ever charged here. They are in no bin.
    """

    bins: tuple[int, ...]
    out: int


def distribution(accounts: Accounts) -> Distribution | None:
    """Returns how much of their budget patients have spent, or None where nothing limits them."""
    limit, spent = accounts.tariff.limit, accounts.patients
    if limit is None:
        return None
    able = np.zeros(len(spent), dtype=bool)
    for price in accounts.prices:
        able |= can_pay(spent, price, limit)
    limits = np.maximum(np.array([limit.divergence, limit.slack], dtype=np.float64), 1.0)
    shares = (spent[able] / limits).max(axis=1, initial=0.0)
    tenths = np.minimum((shares * _BINS).astype(int), _BINS - 1)
    return Distribution(tuple(np.bincount(tenths, minlength=_BINS).tolist()), int((~able).sum()))


def shown(spread: Distribution) -> tuple[int | str, ...]:
    """Returns the bins, and after them those who are out of budget, as they may be shown.

    Counts below `SMALL` are hidden, 0 among them. Where the hidden ones add up to less, the smallest other count is
    hidden with them, and looks like them: so what a known total leaves for them is 0, or at least `SMALL`, or the
    total. This is disclosure control (`cohortium.learning.disclosure`) and no more: who knows the rule can narrow
    hidden counts to a range, and what is shown today and tomorrow can be subtracted.
    """
    kept = suppress(np.array([*spread.bins, spread.out], dtype=np.float64), SMALL)
    return tuple(int(count) if count else HIDDEN for count in kept)
