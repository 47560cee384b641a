"""What a study's releases cost a cohort: which units pay, how much, and who is left to take part."""

import numpy as np

from cohortium.core.errors import BudgetExceeded
from cohortium.core.events import Events
from cohortium.core.filter import Column
from cohortium.core.study import Study
from cohortium.site.budget import SITE, events_for
from cohortium.site.cohort import Roster


def units(study: Study, roster: Roster) -> Column:
    """Returns who pays, as text: the cohort's patients, and before them the site where sites are the privacy unit."""
    if study.privacy.unit != "site":
        return roster.patients
    return np.array([SITE, *roster.patients], dtype=object)


def price(study: Study, roster: Roster, cost: Events) -> Events:
    """Returns what events cost each of those who pay.

    Where records are the privacy unit, a patient pays for all of his: the most that any patient of the cohort has.
    Where sites are, one patient more or less is one site's data for another's: twice the change that was protected.
    """
    match study.privacy.unit:
        case "site":
            return events_for(cost, 2)
        case "record" if roster.table.patient is not None:
            return events_for(cost, int(np.bincount(roster.table.patient).max(initial=1)))
    return cost


def remaining(study: Study, roster: Roster, paid: np.ndarray) -> Roster:
    """Returns the roster of those who can pay, `paid` being a mask over `units`.

    Raises:
        BudgetExceeded: the site itself cannot, or fewer patients are left than the study's least number.
    """
    whole = study.privacy.unit != "site"
    stay = paid if whole else paid[1:] & paid[0]
    if stay.all():
        return roster
    left, minimum = int(stay.sum()), study.cohort.minimum
    if left < minimum:
        raise BudgetExceeded(
            f"{left} of {len(stay)} patients have enough of their privacy budget left, fewer than the study's minimum "
            f"of {minimum}. Nothing was sent. The site's steward decides on the budget (policy.yaml).",
            # as if they were not there: who is out of budget leaves no sign outside
            public=f"fewer patients than the study's minimum of {minimum}",
        )
    return roster.only(stay)
