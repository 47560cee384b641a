"""Datasets as a site may hold them: files that DuckDB reads, and data frames in memory."""

import csv
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from cohortium.core.errors import DataError
from cohortium.core.filter import Column
from cohortium.learning.contract import raw_columns, require_columns

# Nothing is inferred from the rows: one patient's value must not change how another's is read. So a cell of a text file
# is the text that is written there, and the study says what it means (`cohortium.learning.contract`).
_LINES = (
    "SELECT line FROM read_csv(?, auto_detect=false, header=false, columns={'line': 'VARCHAR'}, delim=chr(1), "
    "quote='', escape='', comment='', nullstr=chr(2), new_line='\\n', strict_mode=false, parallel=false, "
    "hive_partitioning=false)"
)
_RECORDS = "SELECT json FROM read_json_objects(?, format='auto', hive_partitioning=false)"
_PARQUET = "SELECT * FROM read_parquet(?, hive_partitioning=false)"
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
_KINDS = (".csv", ".tsv", ".parquet", ".json", ".ndjson")


@dataclass(frozen=True)
class FileSource:
    """A CSV, TSV, Parquet or JSON file; text files may be compressed (.gz, .zst).

    A cell of a text file is read as the text that it is, whatever stands in other rows; Parquet declares its types.
    """

    path: Path

    def read(self, names: Sequence[str], *, as_text: Collection[str] = ()) -> Mapping[str, Column]:
        kind = self._kind()
        self.fingerprint()
        try:
            with duckdb.connect(":memory:") as connection:
                if kind == ".parquet":
                    return _parquet(connection.sql(_PARQUET, params=[str(self.path)]), names, as_text)
                query = _LINES if kind in _DELIMITERS else _RECORDS
                (texts,) = connection.sql(query, params=[str(self.path)]).fetchnumpy().values()
            texts = np.array(["" if text is None else text for text in _plain(texts)], dtype=object)
            if kind in _DELIMITERS:
                return _table(texts, _DELIMITERS[kind], names)
            return _objects(texts, names, as_text)
        except _Malformed as error:
            raise DataError(f"{self.path}: {error}. Nothing was sent. Correct the file.", public=str(error)) from None
        except duckdb.Error as error:
            # DuckDB quotes the offending line, which may be a patient's
            kind = type(error).__name__
            reason = f"the data file cannot be read ({kind})"
            raise DataError(
                f"{self.path}: {reason}. Nothing was sent. Open it in DuckDB to see the line.", public=reason
            ) from None

    def fingerprint(self) -> str:
        try:
            status = self.path.stat()
        except OSError as error:
            reason = "the data file is gone or cannot be opened"
            raise DataError(
                f"{self.path}: {reason} ({error.strerror}). Nothing was sent. Restore it.", public=reason
            ) from None
        return f"{self.path} {status.st_size} {status.st_mtime_ns} {status.st_ino}"

    def _kind(self) -> str:
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        kind = next((suffix for suffix in reversed(suffixes) if suffix not in (".gz", ".zst")), "")
        if kind not in _KINDS:
            reason = f"a data file of type '{kind or 'none'}' is not offered"
            raise DataError(f"{self.path}: {reason}: use {', '.join(_KINDS)}.", public=reason)
        return kind


@dataclass(frozen=True)
class FrameSource:
    """A pandas, Polars or Arrow frame that nobody changes meanwhile."""

    frame: Any = field(repr=False)

    def read(self, names: Sequence[str], *, as_text: Collection[str] = ()) -> Mapping[str, Column]:
        return raw_columns(self.frame, names, as_text)

    def fingerprint(self) -> str:
        return str(id(self.frame))


_NUMERIC = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL", "BOOLEAN")


class _Malformed(Exception):
    """A text file is not a table. The message holds no value."""


def _table(lines: Column, delimiters: str, names: Sequence[str]) -> Mapping[str, Column]:
    """Returns columns of delimited text (RFC 4180) as text, None where a cell is empty.

    The header alone decides the delimiter: the first of `delimiters` under which it has all the names.
    """
    try:
        headers = [next(csv.reader(lines[:1], delimiter=each), []) for each in delimiters]
        header = next((each for each in headers if set(names) <= set(each)), headers[0])
        require_columns(names, header)
        for name in names:
            if header.count(name) > 1:
                raise _Malformed(f"the header names column '{name}' more than once")
        delimiter = delimiters[headers.index(header)]
        rows = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
        if next(rows) != header:
            raise _Malformed("the header's quotes are not closed")
        cells: list[list[str | None]] = [[] for _ in names]
        places = [header.index(name) for name in names]
        for row in filter(None, rows):
            if len(row) != len(header):
                raise _Malformed("a row has more or fewer cells than the header")
            for column, place in zip(cells, places, strict=True):
                column.append(row[place] or None)
    except csv.Error:
        raise _Malformed("a row's quotes are not closed, or text stands beside them") from None
    return {name: np.array(column, dtype=object) for name, column in zip(names, cells, strict=True)}


def _objects(texts: Column, names: Sequence[str], as_text: Collection[str]) -> Mapping[str, Column]:
    """Returns values of JSON objects as text, a number as it is written; None where one is null or not there."""
    try:
        # a number stays the text that it is
        rows = [json.loads(text, parse_int=str, parse_float=str, parse_constant=str) for text in texts]
    except (ValueError, RecursionError):
        raise _Malformed("a record is not JSON") from None
    if not all(isinstance(row, dict) for row in rows):
        raise _Malformed("a record is no JSON object")
    require_columns(names, list(dict.fromkeys(key for row in rows for key in row)))
    return {name: np.array([_written(row.get(name), name in as_text) for row in rows], dtype=object) for name in names}


def _written(value: Any, as_text: bool) -> str | None:
    if value is None or isinstance(value, str):
        return value
    # the levels of a truth value are 0 and 1
    return str(int(value)) if isinstance(value, bool) and not as_text else json.dumps(value)


def _parquet(relation: Any, names: Sequence[str], as_text: Collection[str]) -> Mapping[str, Column]:
    kinds = dict(zip(relation.columns, map(str, relation.types), strict=True))
    require_columns(names, list(kinds))
    wanted = relation.select(*(_as_float_or_text(name, kinds[name], name in as_text) for name in names))
    return {name: _plain(column) for name, column in wanted.fetchnumpy().items()}


def _as_float_or_text(name: str, kind: str, as_text: bool) -> duckdb.Expression:
    column = duckdb.ColumnExpression(name)
    if as_text and kind in ("FLOAT", "DOUBLE"):
        # whole numbers are written like those of an integer column
        text, end = column.cast("VARCHAR"), duckdb.ConstantExpression(r"\.0$")
        return duckdb.FunctionExpression("regexp_replace", text, end, duckdb.ConstantExpression("")).alias(name)
    numeric = kind.removeprefix("U").startswith(_NUMERIC) and not as_text
    return column.cast("DOUBLE" if numeric else "VARCHAR").alias(name)


def _plain(column: Any) -> Column:
    """Returns a column without numpy's mask: NaN or None where it was missing."""
    numeric = column.dtype.kind == "f"
    plain = np.array(np.ma.getdata(column), dtype=np.float64 if numeric else object)
    plain[np.ma.getmaskarray(column)] = np.nan if numeric else None
    return plain
