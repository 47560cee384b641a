"""Small cells: a site hides the counts that could point at single patients, before anything leaves.

Two rules, with `least` the study's `small_cells`:

- `known_values`: of one feature, the patients whose value is known and those whose value is missing are 0 or at least
  `least` each. Where few are missing, some known values are treated as missing too.
- `suppress`: of counts whose total is known, those below `least` become 0, and where the hidden ones add up to less
  than `least`, the smallest remaining count is hidden with them.

Guaranteed, for one study at one site: each count that is sent is 0 or at least `least`, and so is the difference
between a known total and the sent counts that make it up, so no hidden count can be had by one subtraction. Sums over
sites inherit the first half: each is 0 or at least `least`.

Not guaranteed: this is a heuristic of disclosure control, NOT differential privacy. Who knows the rule can narrow a
hidden count to a range (with `least` = 2 at times to one value), two studies over cohorts that differ by one patient
can be subtracted, and a sum over `least` patients is still a function of their values. Means and variances are of all
known values and are not withheld: of a number that takes few values, such as one coded 0 and 1, they give a hidden
count away. Declare such a number as a category.

The cost: cells are biased downward. In a vector of counts a site lowers each by at most `least` - 1, except that it may
hide whole the smallest of those that reach `least`. Of a feature it leaves out at most `least` - 1 known values, or all
of them if fewer than `least` would remain.
"""

import numpy as np

from cohortium.core.layout import Floats


def suppress(counts: Floats, least: int) -> Floats:
    """Returns the counts with the smallest set to zero, until the hidden ones add up to 0 or at least `least`.

    No count is raised, those that remain are unchanged, and suppressing twice is suppressing once.

    Args:
        counts: `(n_cells,)` whole numbers whose total is 0 or at least `least`; a smaller total is hidden altogether.
        least: the smallest count that may be sent; 1 changes nothing.
    """
    order = np.argsort(counts, kind="stable")
    ascending = counts[order]
    smaller = np.cumsum(ascending) - ascending
    stays = (ascending >= least) & ((smaller == 0) | (smaller >= least))
    kept = np.zeros_like(counts)
    kept[order[stays]] = ascending[stays]
    return kept


def known_values(column: Floats, least: int) -> Floats:
    """Returns the values of a feature that may be described, `(n_known,)`.

    Where values must be left out, the last rows' are: choosing them anew in each round or run would give them away.

    Args:
        column: `(n_rows,)`, NaN where missing.
        least: the smallest number of known, and of missing, values that may show. With fewer rows none are returned.
    """
    known = column[~np.isnan(column)]
    if 0 < len(column) - len(known) < least:
        known = known[: max(0, len(column) - least)]
    return known if len(known) >= least else known[:0]
