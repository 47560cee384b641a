"""What one hospital could fit by itself: a study narrowed to what its own patients can support."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cohortium.core.features import Category, Feature, Number
from cohortium.core.study import Study
from cohortium.learning.table import Table


def narrowed(study: Study, table: Table) -> Study:
    """Returns the study without the features and levels that do not vary among the table's patients."""
    features: dict[str, Feature] = {}
    for name, feature in study.cohort.features.items():
        known = table.columns[name][~np.isnan(table.columns[name])]
        seen = np.unique(known)
        if len(seen) < 2:
            continue
        if isinstance(feature, Category):
            levels = tuple(level for index, level in enumerate(feature.levels) if index in seen)
            features[name] = replace(feature, levels=levels)
        else:
            features[name] = feature
    return replace(study, cohort=replace(study.cohort, features=features))


def recoded(table: Table, wide: Mapping[str, Feature], narrow: Mapping[str, Feature]) -> Table:
    """Returns a table of the wide features in the coding of the narrow ones; levels that are gone become missing."""
    columns = {}
    for name, feature in narrow.items():
        column, before = table.columns[name], wide[name]
        if isinstance(feature, Number) or isinstance(before, Number):
            columns[name] = column
            continue
        code = {before.levels.index(level): float(index) for index, level in enumerate(feature.levels)}
        columns[name] = np.array([code.get(value, np.nan) for value in column])
    return Table(table.rows, columns, table.target)
