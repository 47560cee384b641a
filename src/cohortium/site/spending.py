"""What a study's releases cost a cohort: which units pay, how much, and who is left to take part."""

import numpy as np

from cohortium.core.errors import BudgetExceeded
from cohortium.core.events import Events
from cohortium.core.filter import Column
from cohortium.core.study import Study
from cohortium.site.budget import SITE, events_for
from cohortium.site.cohort import Roster


def units(study: Study, roster: Roster) -> Column:
    """Returns who pays, as text: the cohort's patients, or the site itself where sites are the privacy unit."""
    return np.array([SITE], dtype=object) if study.privacy.unit == "site" else roster.patients


def price(study: Study, roster: Roster, cost: Events) -> Events:
    """Returns what events cost each of those who pay.

    Where records are the privacy unit, a patient pays for all of his: the most that any patient of the cohort has.
    """
    if study.privacy.unit != "record" or roster.table.patient is None:
        return cost
    return events_for(cost, int(np.bincount(roster.table.patient).max(initial=1)))


def remaining(study: Study, roster: Roster, paid: np.ndarray) -> Roster:
    """Returns the roster of those who can pay, `paid` being a mask over `units`.

    Raises:
        BudgetExceeded: fewer are left than the study's least number of patients.
    """
    stay = np.full(len(roster.patients), bool(paid[0])) if study.privacy.unit == "site" else paid
    if stay.all():
        return roster
    left, minimum = int(stay.sum()), study.cohort.minimum
    if left < minimum:
        raise BudgetExceeded(
            f"{left} of {len(stay)} patients have enough of their privacy budget left, fewer than the study's minimum "
            f"of {minimum}. Nothing was sent. The site's steward decides on the budget (policy.yaml).",
            public="the privacy budget of this site's patients is spent",
        )
    return roster.only(stay)
