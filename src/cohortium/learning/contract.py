"""The data contract: raw columns against the study's features, for training at a site and for scoring a patient."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import narwhals as nw
import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import DataError, nearest
from cohortium.core.features import BinaryTarget, Category, Feature, Number, NumberTarget, Target
from cohortium.core.filter import Column, is_missing
from cohortium.core.layout import Floats

# "nan" and "inf" are what programs write for a missing and an infinite number
_NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)
_BLANKS = " \t\r\n"
_RAISE = "Correct them, or raise the target's maximum."
Mask = NDArray[np.bool_]


def raw_columns(frame: Any, names: Sequence[str], as_text: Collection[str] = ()) -> dict[str, Column]:
    """Returns columns of a pandas, Polars or Arrow frame: numbers as floats (missing: NaN), others as text (None).

    A mapping that already holds such columns is taken as it is, but for those in `as_text`, which become text, and
    those that hold neither floats nor text.

    Raises:
        DataError: it is not such a frame, or lacks a column.
    """
    if isinstance(frame, Mapping):
        require_columns(names, list(frame))
        return {
            name: _texts(frame[name].tolist()) if name in as_text or frame[name].dtype.kind != "f" else frame[name]
            for name in names
        }
    try:
        table = nw.from_native(frame, eager_only=True)
    except TypeError:
        reason = f"a {type(frame).__name__} is no data frame"
        raise DataError(f"{reason}: pass a pandas or Polars frame", public=reason) from None
    require_columns(names, table.columns)
    columns: dict[str, Column] = {}
    for name in names:
        series = table[name]
        if name in as_text:
            columns[name] = _texts(series.to_list())
            continue
        if series.dtype == nw.Boolean():
            series = series.cast(nw.Int8())
        if series.dtype.is_numeric():
            columns[name] = series.cast(nw.Float64()).to_numpy().astype(np.float64)
        else:
            columns[name] = _texts(series.to_list())
    return columns


def require_columns(names: Sequence[str], found: Sequence[str]) -> None:
    """Raises a `DataError` for the first of `names` that is not found."""
    for name in names:
        if name not in found:
            reason = f"column '{name}' is missing"
            hint = nearest(name, found) or "."
            raise DataError(f"{reason}{hint} Add it or rename it in the data.", public=reason)


def typed(features: Mapping[str, Feature], raw: Mapping[str, Column]) -> dict[str, Column]:
    """Returns each feature's column as what the study says it is: floats, or labels.

    Each cell is converted alone, by the study and the cell: a differentially private sum rests on that.

    Raises:
        DataError: a number's column holds text that is no number.
    """
    return {
        name: _numbers(name, raw[name], feature.unit) if isinstance(feature, Number) else labels(raw[name], feature)
        for name, feature in features.items()
    }


def conform(name: str, feature: Feature, column: Column) -> Floats:
    """Returns a typed column as a table holds it: numbers within range or level indices, NaN for missing.

    Raises:
        DataError: a value is infinite, outside the range or no level, and the study refuses such values.
    """
    if isinstance(feature, Number):
        return _within(name, column, feature.range, feature.unit, feature.outside)
    return _coded(name, column, feature, "Correct them, add the level, or set outside: missing.")


def conform_target(target: Target, raw: Column) -> Floats:
    """Returns the target as a table holds it: 0 or 1, a number within range, or a count; NaN for missing."""
    if isinstance(target, BinaryTarget):
        advice = "Correct them, or change the target's levels."
        levels = Category(levels=target.levels)
        return _coded(target.name, labels(raw, levels), levels, advice)
    if isinstance(target, NumberTarget):
        numbers = _numbers(target.name, raw, target.unit)
        return _within(target.name, numbers, target.range, target.unit, target.outside)
    counts = _within(target.name, _numbers(target.name, raw, "count"), (0, target.maximum), "count", "refuse", _RAISE)
    if (counts[~np.isnan(counts)] % 1 != 0).any():
        reason = f"column '{target.name}' holds fractions, and a count is a whole number"
        raise DataError(f"{reason}. Nothing was sent.", public=reason)
    return counts


def after_missing(name: str, rule: str, column: Floats, offered: str = "impute or exclude") -> Mask:
    """Returns which rows stay under a rule for missing values ("refuse", "impute" or "exclude").

    Raises:
        DataError: the rule is "refuse" and a value is missing.
    """
    missing = np.isnan(column)
    if rule == "refuse" and missing.any():
        reason = f"column '{name}' has missing values (NaN or empty)"
        raise DataError(
            f"column '{name}' has {missing.sum()} missing values (NaN or empty). Nothing was sent. "
            f"Fill them, or set missing: {offered}.",
            public=reason,
        )
    return ~missing if rule == "exclude" else np.ones(len(column), dtype=bool)


def _numbers(name: str, raw: Column, unit: str) -> Floats:
    if raw.dtype.kind == "f":
        return raw
    try:
        return np.array([np.nan if cell is None else _number(cell) for cell in raw], dtype=np.float64)
    except ValueError:
        reason = f"column '{name}' holds text, and the study expects numbers ({unit})"
        raise DataError(f"{reason}. Nothing was sent. Correct the column's type.", public=reason) from None


def _number(cell: str) -> float:
    """Returns the number that a cell holds, NaN if it is blank, or raises a `ValueError`."""
    text = cell.strip(_BLANKS)
    if not text:
        return np.nan
    if not _NUMBER.fullmatch(text):
        raise ValueError("no number")
    return float(text)


def labels(raw: Column, feature: Category) -> Column:
    """Returns a column as text, None where missing.

    A level is compared as it is written. What is none is compared as a number written as short as it can be, if it is
    one, so that 1.0 and 01 are the level 1.
    """
    if raw.dtype.kind == "f":
        return np.array([_shortest(value) for value in raw], dtype=object)
    return np.array([cell if cell is None or cell in feature.levels else _label(cell) for cell in raw], dtype=object)


def _label(cell: str) -> str | None:
    try:
        return _shortest(_number(cell)) if cell.strip(_BLANKS) else cell
    except ValueError:
        return cell


def _shortest(number: float) -> str | None:
    # the sum makes 0 of -0
    return None if np.isnan(number) else f"{number + 0.0:.15g}"


def _within(
    name: str,
    column: Floats,
    bounds: tuple[float, float],
    unit: str,
    outside: str,
    remedy: str = "Widen the range, or set outside: clip.",
) -> Floats:
    if np.isinf(column).any():
        reason = f"column '{name}' holds an infinite value"
        raise DataError(f"{reason}. Nothing was sent. Correct it or leave it empty.", public=reason)
    low, high = bounds
    below, above = column < low, column > high
    beyond = below | above
    if not beyond.any():
        return column
    if outside == "clip":
        return np.clip(column, low, high)
    if outside == "missing":
        return np.where(beyond, np.nan, column)
    counts = [f"{mask.sum()} values {word}" for mask, word in ((below, "below"), (above, "above")) if mask.any()]
    span = f"the study's range {low:g}..{high:g} ({unit})"
    advice = f"Nothing was sent. {remedy}"
    raise DataError(
        f"column '{name}' holds {' and '.join(counts)} {span}. {advice}",
        public=f"column '{name}' holds values outside {span}",
    )


def _coded(name: str, labels: Column, feature: Category, advice: str) -> Floats:
    codes = np.full(len(labels), np.nan)
    known = is_missing(labels)
    for index, level in enumerate(feature.levels):
        here = labels == level
        codes[here] = index
        known |= here
    if feature.outside == "refuse" and not known.all():
        reason = f"column '{name}' holds values that are not among its levels {', '.join(feature.levels)}"
        raise DataError(
            f"{reason} ({np.count_nonzero(~known)} patients). Nothing was sent. {advice}",
            public=reason,
        )
    return codes


def _texts(values: Sequence[Any]) -> Column:
    return np.array([None if _absent(value) else _text(value) for value in values], dtype=object)


def _text(value: Any) -> str:
    # pandas makes floats of integers, and objects of truth values, where some are missing
    if isinstance(value, bool | np.bool_):
        return str(int(value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _absent(value: Any) -> bool:
    # pandas spells a missing text as None, NaN or NA; comparing NA raises, so its type is asked for first
    return value is None or type(value).__name__ in ("NAType", "NaTType") or value != value
