"""Who pays for a study, how much, and who is left: nobody's fate depends on another patient's data."""

from dataclasses import replace

import numpy as np
import pytest

from cohortium.bootstrap import load_example
from cohortium.core.errors import BudgetExceeded
from cohortium.core.events import Gaussian
from cohortium.core.protection import Privacy
from cohortium.core.study import Study
from cohortium.core.training import Descent
from cohortium.learning.table import Table
from cohortium.site.budget import SITE
from cohortium.site.cohort import Roster
from cohortium.site.spending import UNSTATED, eligible, price, remaining, units

COST = (Gaussian(10.0),)


def study(unit: str, **privacy: object) -> Study:
    example = load_example()
    wanted = Privacy(unit=unit, epsilon=1.0, delta=1e-5, **privacy)  # type: ignore[arg-type]
    cohort = replace(example.cohort, records="several", minimum=2)
    return replace(example, training=Descent(clip=1.0), privacy=wanted, cohort=cohort)


def roster(records: list[int]) -> Roster:
    """Returns patients p0, p1, ... with so many records each."""
    owners = np.repeat(np.arange(len(records)), records)
    patients = np.array([f"p{number}" for number in range(len(records))], dtype=object)
    return Roster(patients, Table(len(owners), {"age": np.arange(len(owners), dtype=float)}, patient=owners))


def test_patients_pay_what_a_release_costs() -> None:
    asked, who = study("patient"), roster([1, 3, 2])
    assert list(units(asked, who)) == ["p0", "p1", "p2"]
    assert price(asked, who, COST) == COST


def test_a_site_and_its_patients_pay_for_twice_the_change() -> None:
    asked, who = study("site"), roster([1, 3])
    assert list(units(asked, who)) == [SITE, "p0", "p1"]
    assert price(asked, who, COST) == (Gaussian(5.0),)


@pytest.mark.parametrize("records", [[1, 1, 1], [1, 2, 4], [4, 4, 4]])
def test_with_records_protected_the_price_does_not_depend_on_anybodys_records(records: list[int]) -> None:
    assert price(study("record", records_per_patient=4), roster(records), COST) == (Gaussian(2.5),)


def test_who_has_more_records_than_the_study_admits_is_left_out_alone() -> None:
    asked = study("record", records_per_patient=2)
    left = eligible(asked, roster([1, 3, 2, 9]))
    assert list(left.patients) == ["p0", "p2"]
    assert left.table.rows == 3
    assert left.table.patient is not None and left.table.patient.tolist() == [0, 1, 1]
    assert eligible(study("patient"), roster([1, 3, 2, 9])).table.rows == 15


def test_who_cannot_pay_is_left_out_and_too_few_end_the_run() -> None:
    asked, who = study("patient"), roster([1, 2, 3])
    assert list(remaining(asked, who, np.array([True, False, True])).patients) == ["p0", "p2"]
    with pytest.raises(BudgetExceeded, match="1 of 3 patients") as refused:
        remaining(asked, who, np.array([True, False, False]))
    assert refused.value.public == UNSTATED
    assert not any(character.isdigit() for character in UNSTATED)


def test_a_site_that_cannot_pay_takes_no_part() -> None:
    with pytest.raises(BudgetExceeded):
        remaining(study("site"), roster([1, 1, 1]), np.array([False, True, True, True]))
