"""A site's cohort as arrays, already checked against the study's data contract."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cohortium.core.layout import Floats


@dataclass(frozen=True)
class Table:
    """One row a patient. No patient identifier is in it.

    Attributes:
        columns: each feature as `(n_rows,)` floats: a number in its unit, or a category's level index; NaN is missing.
        target: `(n_rows,)` floats: 0 or 1, a number in its unit, or a count; None without a target.
    """

    rows: int
    columns: Mapping[str, Floats] = field(repr=False)
    target: Floats | None = field(default=None, repr=False)

    def take(self, rows: np.ndarray) -> "Table":
        """Returns the given rows (indices or a mask) as a table of their own."""
        target = None if self.target is None else self.target[rows]
        columns = {name: column[rows] for name, column in self.columns.items()}
        count = int(rows.sum()) if rows.dtype == bool else len(rows)
        return Table(count, columns, target)


def pooled(tables: "list[Table]") -> Table:
    """Returns all rows in one table: what a federation never has, for comparisons in simulations and tests."""
    targets = [table.target for table in tables if table.target is not None]
    columns = {name: np.concatenate([table.columns[name] for table in tables]) for name in tables[0].columns}
    return Table(sum(table.rows for table in tables), columns, np.concatenate(targets) if targets else None)
