"""From a dataset to the study's cohort at this site: filter, contract, patients counted once, and enough of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cohortium.core.errors import DataError, ProtocolError
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


@dataclass(frozen=True)
class Roster:
    """A cohort's patients by their identifiers, and their records. It stays at the site.

    Attributes:
        patients: the identifiers, as text; `table.patient` counts in this order.
    """

    patients: Column = field(repr=False)
    table: Table

    def only(self, stay: np.ndarray) -> "Roster":
        """Returns the roster of some of the patients, `stay` being a mask over them."""
        owners = self.table.patient
        rows = stay if owners is None else stay[owners]
        return Roster(self.patients[stay], self.table.take(rows))


def recorded(whole: Roster, roster: Roster) -> bytes:
    """Returns who of a roster's patients are in a smaller one, a bit for each; empty if all are."""
    if roster is whole:
        return b""
    return np.packbits(np.isin(whole.patients.astype(str), roster.patients.astype(str))).tobytes()


def recovered(whole: Roster, record: bytes) -> Roster:
    """Returns the smaller roster that was recorded.

    Raises:
        ProtocolError: the record is of another roster.
    """
    if not record:
        return whole
    count = len(whole.patients)
    if len(record) != -(-count // 8):
        raise ProtocolError("a cohort that was recorded is not that of these data")
    return whole.only(np.unpackbits(np.frombuffer(record, np.uint8), count=count).astype(bool))


def load(plan: Plan, source: DataSource) -> Roster:
    """Returns the cohort, if the site has enough patients for the study and not too many records.

    Raises:
        DataError: the data break the contract, no patient passes, or there are too few or too many.
    """
    identifiers, table = assemble(plan, source)
    _enough(table, plan.study.cohort.minimum, plan.study.cohort.maximum)
    return Roster(identifiers if table.patient is None else np.unique(identifiers), table)


def assemble(plan: Plan, source: DataSource) -> tuple[Column, Table]:
    """Returns the cohort's records, as the data contract describes them, and whose they are, as text.

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
    _identified(cohort.patient, raw, cohort.records == "one")
    conformed = {name: conform(name, feature, columns[name]) for name, feature in cohort.features.items()}
    stay = np.ones(len(raw[cohort.patient]), dtype=bool)
    for name, feature in cohort.features.items():
        stay &= after_missing(name, feature.missing, conformed[name])
    target = None
    if cohort.target is not None:
        target = conform_target(cohort.target, raw[cohort.target.name])
        stay &= after_missing(cohort.target.name, cohort.target.missing, target, "exclude")
    identifiers = raw[cohort.patient][stay]
    owners = np.unique(identifiers, return_inverse=True)[1] if cohort.records == "several" else None
    return identifiers, replace(Table(len(stay), conformed, target).take(stay), patient=owners)


def _identified(patient: str, raw: Mapping[str, Column], once: bool) -> None:
    identifiers = raw[patient]
    missing = is_missing(identifiers)
    if missing.any():
        reason = f"column '{patient}' lacks the identifier of some patients"
        raise DataError(f"{reason} ({missing.sum()} rows). Nothing was sent. Complete it.", public=reason)
    repeated = len(identifiers) - len(np.unique(identifiers)) if once else 0
    if repeated:
        reason = f"column '{patient}' names some patients more than once, and a row must be one patient"
        raise DataError(
            f"{reason} ({repeated} repeated rows). Nothing was sent. Keep one row for each, or let the study say "
            "cohort.records: several.",
            public=reason,
        )


def _enough(table: Table, minimum: int, maximum: int) -> None:
    what = "patients" if table.patient is None else "records"
    if table.rows == 0:
        reason = "no patients pass the study's filter"
        raise DataError(f"{reason}. Nothing was sent. Check cohort.where and the data's units.", public=reason)
    if table.patients < minimum:
        reason = f"fewer patients than the study's minimum of {minimum}"
        raise DataError(f"{table.patients} patients pass, {reason}. Nothing was sent.", public=reason)
    if table.rows > maximum:
        reason = f"more {what} than the study's maximum of {maximum}, on which its range proof rests"
        raise DataError(f"{table.rows} {what} pass, {reason}. Nothing was sent. Raise cohort.maximum.", public=reason)
