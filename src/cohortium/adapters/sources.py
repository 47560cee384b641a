"""Datasets as a site may hold them: files that DuckDB reads, and data frames in memory."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from cohortium.core.errors import DataError
from cohortium.core.filter import Column
from cohortium.learning.contract import raw_columns, require_columns

# a level is compared as it is written: DuckDB would make a truth value of "yes" and a date of "2020-01-01"
_TEXT = "sample_size=-1, auto_type_candidates=['BIGINT', 'DOUBLE', 'VARCHAR']"
_READERS: Mapping[str, str] = {
    ".csv": f"read_csv(?, {_TEXT})",
    ".tsv": f"read_csv(?, {_TEXT}, delim='\t')",
    ".parquet": "read_parquet(?)",
    ".json": "read_json(?)",
    ".ndjson": "read_json(?)",
}


@dataclass(frozen=True)
class FileSource:
    """A CSV, TSV, Parquet or JSON file; text files may be compressed (.gz, .zst)."""

    path: Path

    def read(self, names: Sequence[str], *, as_text: Collection[str] = ()) -> Mapping[str, Column]:
        reader = self._reader()
        self.fingerprint()
        try:
            with duckdb.connect(":memory:") as connection:
                relation = connection.sql(f"SELECT * FROM {reader}", params=[str(self.path)])
                kinds = dict(zip(relation.columns, map(str, relation.types), strict=True))
                require_columns(names, list(kinds))
                texts = [name for name in names if name in as_text]
                if texts and reader.startswith("read_csv"):
                    # read again as it is written: 007 is not 7; the names were found, so there is a header
                    types = ", ".join(f"{_quoted(name)}: 'VARCHAR'" for name in texts)
                    again = f"{reader.removesuffix(')')}, header=true, types={{{types}}})"
                    relation = connection.sql(f"SELECT * FROM {again}", params=[str(self.path)])
                    kinds |= dict.fromkeys(texts, "VARCHAR")
                wanted = relation.select(*(_as_float_or_text(name, kinds[name], name in as_text) for name in names))
                return {name: _plain(column) for name, column in wanted.fetchnumpy().items()}
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
        return f"{self.path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"

    def _reader(self) -> str:
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        kind = next((suffix for suffix in reversed(suffixes) if suffix not in (".gz", ".zst")), "")
        if kind not in _READERS:
            reason = f"a data file of type '{kind or 'none'}' is not offered"
            raise DataError(f"{self.path}: {reason}: use {', '.join(_READERS)}.", public=reason)
        return _READERS[kind]


@dataclass(frozen=True)
class FrameSource:
    """A pandas, Polars or Arrow frame that nobody changes meanwhile."""

    frame: Any = field(repr=False)

    def read(self, names: Sequence[str], *, as_text: Collection[str] = ()) -> Mapping[str, Column]:
        return raw_columns(self.frame, names, as_text)

    def fingerprint(self) -> str:
        return str(id(self.frame))


_NUMERIC = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL", "BOOLEAN")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


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
