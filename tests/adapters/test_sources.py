"""Patients' identifiers: text as it is written, whatever the file or frame holds."""

import csv
import gzip
import io
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cohortium.adapters.sources import FileSource, FrameSource
from cohortium.core.errors import DataError
from cohortium.core.features import Category, Feature, Number
from cohortium.learning.contract import conform, typed
from cohortium.site.cohort import Subset

BIG = (2**53 + 1, 2**53)
NUMBER = Number(unit="1", range=(0, 10), missing="impute", outside="clip")
TEXTS = [str(number) for number in BIG]


def identifiers(source: Any) -> list[str | None]:
    columns = source.read(["id", "x"], as_text={"id"})
    assert typed({"x": NUMBER}, columns)["x"].dtype.kind == "f"
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


def test_a_text_file_is_text_whatever_stands_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,x,y\n1,1,f\n2,,m\n")
    columns = FileSource(tmp_path / "a.csv").read(["y", "id", "x"])
    assert {name: column.tolist() for name, column in columns.items()} == {
        "y": ["f", "m"],
        "id": ["1", "2"],
        "x": ["1", None],
    }
    with pytest.raises(DataError, match="column 'patient' is missing"):
        FileSource(tmp_path / "a.csv").read(["patient"], as_text={"patient"})


def test_a_subset_tells_big_identifiers_apart_and_prints_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"id,x\n{BIG[0]},1\n{BIG[1]},2\n")
    subset = Subset(FileSource(tmp_path / "a.csv"), "id", frozenset(TEXTS[1:]))
    assert subset.read(["x"])["x"].tolist() == ["2"]
    assert identifiers(subset) == TEXTS[1:]
    assert TEXTS[1] not in repr(subset)


def rows_of(path: Path) -> list[list[str | None]]:
    columns = FileSource(path).read(["id", "x"], as_text={"id"})
    return [list(row) for row in zip(columns["id"].tolist(), columns["x"].tolist(), strict=True)]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("crlf.csv", "id,x\r\na,1\r\n\r\nb,2\r\n"),
        ("mark.csv", "\ufeffid,x\na,1\nb,2"),
        ("bars.csv", "id|x|note\na|1|,\nb|2|;,;,;\n"),
        ("one.csv", "id,x,n;o;t;e\na,1,\nb,2,x;y;z\n"),
        ("plain.tsv", "id\tx,y\tx\na\t,\t1\nb\t;\t2\n"),
        ("lines.csv", 'id,x,note\na,1,"two\nlines"\nb,2,"a ""b"" c"\n'),
        ("array.json", '[{"id": "a", "x": 1},\n {"x": "2", "id": "b", "more": [1]}]'),
        ("lines.json", '{"id": "a", "x": 1}\n{"id": "b", "x": 2}\n'),
        ("lines.ndjson", '{"id": "a", "x": 1}\n{"id": "b", "x": 2}'),
    ],
)
@pytest.mark.parametrize("compression", ["", "gz", "zst"])
def test_tables(name: str, written: str, compression: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(written.encode())
    if compression:
        data = {"gz": _gzipped, "zst": _zstandard}[compression](path)
        path = tmp_path / f"{name}.{compression}"
        path.write_bytes(data)
    assert rows_of(path) == [["a", "1"], ["b", "2"]]


def _gzipped(path: Path) -> bytes:
    return gzip.compress(path.read_bytes())


def _zstandard(path: Path) -> bytes:
    """Copies a text's lines by DuckDB, which writes no file of other bytes."""
    lines = path.read_text(encoding="utf-8").split("\n")
    copy = path.with_suffix(".copy")
    with duckdb.connect(":memory:") as connection:
        connection.execute("CREATE TABLE t AS SELECT unnest(?) AS line", [lines])
        options = "FORMAT csv, HEADER false, QUOTE '', ESCAPE '', DELIMITER '\x01', COMPRESSION zstd"
        connection.execute(f"COPY t TO '{copy}' ({options})")
    return copy.read_bytes()


@pytest.mark.parametrize(
    ("name", "written", "reason"),
    [
        ("ragged.csv", "id,x\na,1\nsecret\n", "a row has more or fewer cells than the header"),
        ("ragged.tsv", "id\tx\na\t1\tsecret\n", "a row has more or fewer cells than the header"),
        ("open.csv", 'id,x\na,"secret\n', "a row's quotes are not closed, or text stands beside them"),
        ("beside.csv", 'id,x\n"secret"a,1\n', "a row's quotes are not closed, or text stands beside them"),
        ("two-lines.csv", 'id,x,"y\n"\nsecret,1,2\n', "the header's quotes are not closed"),
        ("twice.csv", "id,x,x\nsecret,1,2\n", "the header names column 'x' more than once"),
        ("header.csv", 'id,x,"y\nsecret,1,2\n', "a row's quotes are not closed, or text stands beside them"),
        ("latin.csv", b"id,x\nsecret\xe9,1\n", "the data file cannot be read (InvalidInputException)"),
        ("empty.csv", "", "column 'id' is missing"),
        ("list.json", '[["secret", 1]]', "a record is no JSON object"),
        ("null.json", '[{"id": "secret", "x": 1}, null]', "a record is no JSON object"),
        ("empty.json", "[]", "column 'id' is missing"),
    ],
)
def test_files_that_are_no_table(name: str, written: str | bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(written.encode() if isinstance(written, str) else written)
    with pytest.raises(DataError) as refused:
        rows_of(tmp_path / name)
    assert refused.value.public == reason
    assert "secret" not in str(refused.value)


def test_json_values_are_as_they_are_written(tmp_path: Path) -> None:
    numbers = ["1152921504606846977", "123456789012345678901234567890", "1.50", "1e2", "0.12345678901234567890"]
    upper = str(uuid.UUID(int=10**37 * 3)).upper()
    written = [*numbers, f'"{upper}"', '"2020-01-01 10:00"', '"007"', "null", "true"]
    records = ",".join(f'{{"id": {value}, "x": {value}}}' for value in written)
    (tmp_path / "a.json").write_text(f'[{records}, {{"other": 1}}]')
    columns = FileSource(tmp_path / "a.json").read(["id", "x"], as_text={"id"})
    plain = [*numbers, upper, "2020-01-01 10:00", "007", None]
    assert columns["id"].tolist() == [*plain, "true", None]
    assert columns["x"].tolist() == [*plain, "1", None]


FEATURES: Mapping[str, Feature] = {
    "smoker": Category(levels=("0", "1"), missing="impute", outside="missing"),
    "code": Category(levels=("01", "02", "2.0"), missing="impute", outside="missing"),
    "x": NUMBER,
}
NAMES = ["id", *FEATURES]
BASE: list[list[str]] = [
    ["007", "1.0", "01", "1.5"],
    ["3FA85F64-5717-4562-B3FC-2C963F66AFA6", "0.0", "02", " 2e0 "],
    [str(2**60 + 1), "1", "2", ""],
    ["2020-01-01 10:00", "", "1", "nan"],
    ["a;b", "true", 'x, "y"', "11"],
]
ODD = ["?", "NA", "", " ", "true", "1e400", "-1e-400", "2020-01-01", "3fa85f64-5717-4562-b3fc-2c963f66afa6", '"', '""']
ODD += ["'", "#", "\\N", "\\", "é\u2028", "\U0001f9ec", "\x00", "\x01", "\x02", "\r", "\n", "\r\n", ";", "|", "\t", ","]
ODD += ["01", "1.0", "1_000", "1,5", "0x1F", "nan", "inf", "١", "9" * 400, "[1]", "{}", "null", "12:30", "a=b"]
CELLS = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ROWS = st.lists(CELLS, min_size=len(NAMES), max_size=len(NAMES))
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encoded(path: Path) -> dict[str, list[Any] | None]:
    """Returns identifiers, and each feature's values as bytes; None for a feature that is refused as a whole."""
    raw = FileSource(path).read(NAMES, as_text={"id"})
    found: dict[str, list[Any] | None] = {"id": raw["id"].tolist()}
    for name, feature in FEATURES.items():
        try:
            column = conform(name, feature, typed({name: feature}, raw)[name])
            found[name] = [value.tobytes() for value in column]
        except DataError:
            found[name] = None
    return found


def assert_others_stay(write: Callable[[Path, Sequence[Any]], None], folder: Path, name: str, row: Any) -> None:
    """Adds a row to the base, below and above, and asks whether the other rows are what they were."""
    path = folder / name
    write(path, BASE)
    before = encoded(path)
    assert all(column is not None for column in before.values())
    for rows, others in (([*BASE, row], slice(0, len(BASE))), ([row, *BASE], slice(-len(BASE), None))):
        write(path, rows)
        try:
            after = encoded(path)
        except DataError:
            continue
        for column, values in after.items():
            assert values is None or values[others] == before[column], column


def delimited(delimiter: str) -> Callable[[Path, Sequence[Any]], None]:
    """Writes lists of cells by the rules, and a text as it is."""

    def write(path: Path, rows: Sequence[Any]) -> None:
        lines = io.StringIO()
        table = csv.writer(lines, delimiter=delimiter, lineterminator="\n")
        table.writerow(NAMES)
        for row in rows:
            if isinstance(row, str):
                lines.write(f"{row}\n")
            else:
                table.writerow(row)
        path.write_bytes(lines.getvalue().encode())

    return write


@MANY
@example(row=["p", "?", "?", "3"], name="a.csv")
@example(row=["p", "1.5", "02a", "4"], name="a.csv")
@given(row=ROWS, name=st.sampled_from(["a.csv", "a.tsv"]))
def test_a_row_of_a_text_file_changes_no_other(row: list[str], name: str, tmp_path: Path) -> None:
    assert_others_stay(delimited("," if name == "a.csv" else "\t"), tmp_path, name, row)


@MANY
@example(line='p,"unterminated,1,1', name="a.csv")
@example(line="p;1;1;1", name="a.csv")
@example(line="# p,1,1,1", name="a.csv")
@given(line=st.lists(CELLS, max_size=6).map(",".join) | st.text("\"',;\t\n\r1a", max_size=12), name=st.just("a.csv"))
def test_whatever_line_stands_in_a_text_file_changes_no_other(line: str, name: str, tmp_path: Path) -> None:
    assert_others_stay(delimited(","), tmp_path, name, line)


JSON = CELLS | st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.lists(st.integers())


@MANY
@example(row=["x1", "?", 1.5, True], name="a.json")
@given(row=st.lists(JSON, min_size=4, max_size=4), name=st.sampled_from(["a.json", "a.ndjson"]))
def test_a_record_of_json_changes_no_other(row: list[Any], name: str, tmp_path: Path) -> None:
    def write(path: Path, rows: Sequence[Any]) -> None:
        records = [json.dumps(dict(zip(NAMES, row, strict=True))) for row in rows]
        path.write_text(f"[{', '.join(records)}]" if name == "a.json" else "\n".join(records))

    assert_others_stay(write, tmp_path, name, row)


@MANY
@given(row=ROWS)
def test_a_row_of_parquet_changes_no_other(row: list[str], tmp_path: Path) -> None:
    def write(path: Path, rows: Sequence[Any]) -> None:
        pl.DataFrame(rows, schema=dict.fromkeys(NAMES, pl.String), orient="row").write_parquet(path)

    assert_others_stay(write, tmp_path, "a.parquet", row)


@MANY
@given(value=st.none() | st.booleans() | st.integers() | st.floats() | CELLS)
def test_a_cell_of_a_frames_objects_changes_no_other(value: Any) -> None:
    """Pandas makes objects of a column of numbers or truth values as soon as one cell is something else."""
    levels = {"x": Category(levels=("0", "1"), missing="impute", outside="missing")}
    for cells in ([True, False, None], [1, 0, 1], [1.0, 0.0, np.nan], ["1", "0.0", None]):
        plain = typed(levels, FrameSource(pd.DataFrame({"x": cells})).read(["x"]))["x"]
        longer = typed(levels, FrameSource(pd.DataFrame({"x": [*cells, value]}, dtype=object)).read(["x"]))["x"]
        assert longer[:-1].tolist() == plain.tolist()
