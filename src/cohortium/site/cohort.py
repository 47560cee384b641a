"""From a dataset to the study's cohort at this site: filter, contract, patients counted once, and enough of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Subset:
    """The rows of a dataset whose patients are listed, as text. Itself a data source."""

    source: DataSource
    patient: str
    keep: frozenset[str] = field(repr=False)

    def read(self, names: Sequence[str], *, as_text: Collection[str] = ()) -> Mapping[str, Column]:
        columns = self.source.read(list({self.patient: None, **dict.fromkeys(names)}), as_text={self.patient, *as_text})
        rows = np.array([identifier in self.keep for identifier in columns[self.patient]], dtype=bool)
        return {name: columns[name][rows] for name in names}

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} {hash(self.keep)}"


def load(plan: Plan, source: DataSource) -> Table:
    """Returns the cohort as `assemble` does, if the site has enough patients for the study and not too many.

    Raises:
        DataError: the data break the contract, no patient passes, or there are too few or too many.
    """
    _, table = assemble(plan, source)
    _enough(table.rows, plan.study.cohort.minimum, plan.study.cohort.maximum)
    return table


def assemble(plan: Plan, source: DataSource) -> tuple[Column, Table]:
    """Returns the identifiers (as text) and the rows of the cohort's patients, as the data contract describes them.

    Raises:
        DataError: the data break the contract.
    """
    cohort = plan.study.cohort
    raw = source.read(columns_needed(plan), as_text={cohort.patient})
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
        stay &= after_missing(cohort.target.name, cohort.target.missing, target, "exclude")
    return raw[cohort.patient][stay], Table(len(stay), conformed, target).take(stay)


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
