"""A site's cohort as arrays, already checked against the study's data contract."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cohortium.core.layout import Floats
from cohortium.core.random import Randomness

Unit = Literal["patient", "record", "site"]
Owners = NDArray[np.intp]


@dataclass(frozen=True)
class Table:
    """A row for each record. No patient identifier is in it.

    Attributes:
        columns: each feature as `(n_rows,)` floats: a number in its unit, or a category's level index; NaN is missing.
        target: `(n_rows,)` floats: 0 or 1, a number in its unit, or a count; None without a target.
        patient: `(n_rows,)` the number, from 0, of the patient whom a row belongs to; None where each row is another
            patient's.
    """

    rows: int
    columns: Mapping[str, Floats] = field(repr=False)
    target: Floats | None = field(default=None, repr=False)
    patient: Owners | None = field(default=None, repr=False)

    @property
    def patients(self) -> int:
        """How many patients the rows belong to."""
        return self.rows if self.patient is None else len(np.unique(self.patient))

    def owners(self, unit: Unit) -> Owners | None:
        """Returns which privacy unit each row belongs to, `(n_rows,)` numbers from 0; None: each to another one."""
        if unit == "site":
            return np.zeros(self.rows, dtype=np.intp)
        return self.patient if unit == "patient" else None

    def drawn(self, unit: Unit, rate: float, randomness: Randomness) -> "Table":
        """Returns the rows of the units that `sampled` draws."""
        return self if rate == 1 else self.take(sampled(self.owners(unit), self.rows, rate, randomness))

    def take(self, rows: np.ndarray) -> "Table":
        """Returns the given rows (indices or a mask) as a table of their own."""
        target = None if self.target is None else self.target[rows]
        columns = {name: column[rows] for name, column in self.columns.items()}
        count = int(rows.sum()) if rows.dtype == bool else len(rows)
        patient = None if self.patient is None else np.unique(self.patient[rows], return_inverse=True)[1]
        return Table(count, columns, target, patient)


def sampled(owners: Owners | None, rows: int, rate: float, randomness: Randomness) -> NDArray[np.bool_]:
    """Returns which rows a round draws, `(n_rows,)`: all of a unit's or none.

    Poisson sampling: every unit is drawn or not on its own, whatever its data and however many others there are.

    Args:
        owners: the unit of each row, `(n_rows,)` numbers from 0; None: each row is another unit.
        rows: how many rows there are.
        rate: a unit's probability.
        randomness: secret, and another one each round: whoever knows it knows who took part.
    """
    units = np.arange(rows) if owners is None else owners
    drawn: NDArray[np.bool_] = randomness.generator().random(int(units.max(initial=-1)) + 1) < rate
    return drawn[units]


def pooled(tables: "list[Table]") -> Table:
    """Returns all rows in one table: what a federation never has, for comparisons in simulations and tests."""
    targets = [table.target for table in tables if table.target is not None]
    columns = {name: np.concatenate([table.columns[name] for table in tables]) for name in tables[0].columns}
    target = np.concatenate(targets) if targets else None
    return Table(sum(table.rows for table in tables), columns, target, _numbered(tables))


def _numbered(tables: "list[Table]") -> Owners | None:
    """Returns each row's patient, no two tables sharing one; None if each row is another patient's."""
    if all(table.patient is None for table in tables):
        return None
    firsts = np.cumsum([0, *(table.patients for table in tables)])
    own = [np.arange(table.rows) if table.patient is None else table.patient for table in tables]
    return np.concatenate([first + numbers for first, numbers in zip(firsts, own, strict=False)])
