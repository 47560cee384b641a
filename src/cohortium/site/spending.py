"""What a study's releases cost a cohort: which units pay, how much, and who is left to take part."""

import numpy as np

from cohortium.core.errors import BudgetExceeded
from cohortium.core.events import Events
from cohortium.core.filter import Column
from cohortium.core.study import Study
from cohortium.site.budget import SITE, events_for
from cohortium.site.cohort import Roster

UNSTATED = "its patients' data do not allow the study; its own staff see why"
"""All that is said outside of why a site refuses a study with differential privacy: reasons are exact answers."""


def units(study: Study, roster: Roster) -> Column:
    """Returns who pays, as text: the cohort's patients, and before them the site where sites are the privacy unit."""
    if study.privacy.unit != "site":
        return roster.patients
    return np.array([SITE, *roster.patients], dtype=object)


def price(study: Study, roster: Roster, cost: Events) -> Events:
    """Returns what events cost each of those who pay.

    Where records are the privacy unit, a patient pays for as many as the study lets him have, and never for another's.
    Where sites are, one patient more or less is one site's data for another's: twice the change that was protected.
    """
    match study.privacy.unit:
        case "site":
            return events_for(cost, 2)
        case "record" if roster.table.patient is not None:
            return events_for(cost, study.privacy.records_per_patient)
    return cost


def eligible(study: Study, roster: Roster) -> Roster:
    """Returns the roster without patients who have more records than a study that protects records lets them have.

    Raises:
        BudgetExceeded: fewer are left than the study's least number of patients.
    """
    owners = roster.table.patient
    if study.privacy.unit != "record" or study.privacy.epsilon is None or owners is None:
        return roster
    return _enough(study, roster, np.bincount(owners) <= study.privacy.records_per_patient, "few enough records")


def remaining(study: Study, roster: Roster, paid: np.ndarray) -> Roster:
    """Returns the roster of those who can pay, `paid` being a mask over `units`.

    Raises:
        BudgetExceeded: the site itself cannot, or fewer patients are left than the study's least number.
    """
    whole = study.privacy.unit != "site"
    stay = paid if whole else paid[1:] & paid[0]
    return _enough(study, roster, stay, "enough of their privacy budget left")


def _enough(study: Study, roster: Roster, stay: np.ndarray, what: str) -> Roster:
    if stay.all():
        return roster
    left, minimum = int(stay.sum()), study.cohort.minimum
    if left < minimum:
        raise BudgetExceeded(
            f"{left} of {len(stay)} patients have {what}, fewer than the study's minimum of {minimum}. Nothing was "
            "sent. The site's steward decides on the budget (policy.yaml).",
            # as if they were not there: who is out of budget leaves no sign outside
            public=UNSTATED,
        )
    return roster.only(stay)
