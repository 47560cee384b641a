"""Patients' identifiers: text as it is written, whatever the file or frame holds."""

from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pytest

from cohortium.adapters.sources import FileSource, FrameSource
from cohortium.core.errors import DataError
from cohortium.site.cohort import Subset

BIG = (2**53 + 1, 2**53)
TEXTS = [str(number) for number in BIG]


def identifiers(source: Any) -> list[str | None]:
    columns = source.read(["id", "x"], as_text={"id"})
    assert columns["x"].dtype.kind == "f"
    return columns["id"].tolist()


@pytest.mark.parametrize(
    ("name", "written", "expected"),
    [
        ("big.csv", f"id,x\n{BIG[0]},1\n{BIG[1]},2\n,3\n", [*TEXTS, None]),
        ("huge.csv", f"id,x\n{10**41},1\n{10**41 + 1},2\n", [str(10**41), str(10**41 + 1)]),
        ("zeros.csv", "id,x\n007,1\n7,2\n", ["007", "7"]),
        ("fractions.tsv", "id\tx\n1.0\t1\n1.00\t2\n", ["1.0", "1.00"]),
        ("quoted.csv", 'id;x\n"a;b";1\nc;2\n', ["a;b", "c"]),
        ("last.csv", "x,id\n1,5\n2,6\n", ["5", "6"]),
        ("big.json", f'[{{"id": {BIG[0]}, "x": 1}}, {{"id": {BIG[1]}, "x": 2}}]', TEXTS),
    ],
)
def test_text_files(name: str, written: str, expected: list[str | None], tmp_path: Path) -> None:
    (tmp_path / name).write_text(written)
    assert identifiers(FileSource(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("BIGINT", [*BIG, None], [*TEXTS, None]),
        ("DOUBLE", [1.0, 2.5, None], ["1", "2.5", None]),
        ("VARCHAR", ["007", "7.0"], ["007", "7.0"]),
    ],
)
def test_parquet(kind: str, values: list[Any], expected: list[str | None], tmp_path: Path) -> None:
    with duckdb.connect(":memory:") as connection:
        connection.execute(f"CREATE TABLE t (id {kind}, x DOUBLE)")
        connection.executemany("INSERT INTO t VALUES (?, 1)", [[value] for value in values])
        connection.execute(f"COPY t TO '{tmp_path / 'data.parquet'}'")
    assert identifiers(FileSource(tmp_path / "data.parquet")) == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pd.Series([1.0, None, 2.5]), ["1", None, "2.5"]),
        (pd.Series([BIG[0], None, BIG[1]], dtype="Int64"), [TEXTS[0], None, TEXTS[1]]),
        (pd.Series(["007", None, "7"]), ["007", None, "7"]),
        (pl.Series([BIG[0], None, BIG[1]]), [TEXTS[0], None, TEXTS[1]]),
        (pl.Series([1.0, None, 2.0]), ["1", None, "2"]),
    ],
)
def test_frames(column: Any, expected: list[str | None]) -> None:
    frame = pd.DataFrame if isinstance(column, pd.Series) else pl.DataFrame
    assert identifiers(FrameSource(frame({"id": column, "x": [1.0, 2.0, 3.0]}))) == expected


def test_other_columns_keep_their_type(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,x,y\n1,1,f\n2,,m\n")
    columns = FileSource(tmp_path / "a.csv").read(["y", "id", "x"])
    assert {name: column.dtype.kind for name, column in columns.items()} == {"y": "O", "id": "f", "x": "f"}
    with pytest.raises(DataError, match="column 'patient' is missing"):
        FileSource(tmp_path / "a.csv").read(["patient"], as_text={"patient"})


def test_a_subset_tells_big_identifiers_apart_and_prints_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"id,x\n{BIG[0]},1\n{BIG[1]},2\n")
    subset = Subset(FileSource(tmp_path / "a.csv"), "id", frozenset(TEXTS[1:]))
    assert subset.read(["x"])["x"].tolist() == [2.0]
    assert identifiers(subset) == TEXTS[1:]
    assert TEXTS[1] not in repr(subset)
