"""From a dataset to the study's cohort at this site: filter, contract, patients counted once, and enough of them."""

from collections.abc import Mapping

import numpy as np

from cohortium.core.errors import DataError
from cohortium.core.filter import Column, is_missing
from cohortium.learning.contract import after_missing, conform, conform_target, typed
from cohortium.learning.table import Table
from cohortium.plan import Plan
from cohortium.site.ports import DataSource


def columns_needed(plan: Plan) -> list[str]:
    """Returns the columns that a study reads: the patient's identifier, the features and the target."""
    cohort = plan.study.cohort
    target = [cohort.target.name] if cohort.target else []
    return [cohort.patient, *cohort.features, *target]


def load(plan: Plan, source: DataSource) -> Table:
    """Returns the cohort's patients, one row each, as the study's data contract describes them.

    Raises:
        DataError: the data break the contract, no patient passes, or there are too few or too many.
    """
    cohort = plan.study.cohort
    raw = source.read(columns_needed(plan))
    columns = typed(cohort.features, raw)
    if plan.where is not None:
        passes = plan.where(columns)
        columns = {name: column[passes] for name, column in columns.items()}
        raw = {name: column[passes] for name, column in raw.items()}
    _one_row_each(cohort.patient, raw)
    conformed = {name: conform(name, feature, columns[name]) for name, feature in cohort.features.items()}
    stay = np.ones(len(raw[cohort.patient]), dtype=bool)
    for name, feature in cohort.features.items():
        stay &= after_missing(name, feature.missing, conformed[name])
    target = None
    if cohort.target is not None:
        target = conform_target(cohort.target, raw[cohort.target.name])
        stay &= after_missing(cohort.target.name, cohort.target.missing, target)
    table = Table(len(stay), conformed, target).take(stay)
    _enough(table.rows, cohort.minimum, cohort.maximum)
    return table


def _one_row_each(patient: str, raw: Mapping[str, Column]) -> None:
    identifiers = raw[patient]
    missing = is_missing(identifiers)
    if missing.any():
        reason = f"column '{patient}' lacks the identifier of some patients"
        raise DataError(f"{reason} ({missing.sum()} rows). Nothing was sent. Complete it.", public=reason)
    repeated = len(identifiers) - len(np.unique(identifiers))
    if repeated:
        reason = f"column '{patient}' names some patients more than once, and a row must be one patient"
        raise DataError(f"{reason} ({repeated} repeated rows). Nothing was sent. Keep one row for each.", public=reason)


def _enough(rows: int, minimum: int, maximum: int) -> None:
    if rows == 0:
        reason = "no patients pass the study's filter"
        raise DataError(f"{reason}. Nothing was sent. Check cohort.where and the data's units.", public=reason)
    if rows < minimum:
        reason = f"fewer patients than the study's minimum of {minimum}"
        raise DataError(f"{rows} patients pass, {reason}. Nothing was sent.", public=reason)
    if rows > maximum:
        reason = f"more patients than the study's maximum of {maximum}, on which its range proof rests"
        raise DataError(f"{rows} patients pass, {reason}. Nothing was sent. Raise cohort.maximum.", public=reason)
