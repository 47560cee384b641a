"""The data contract: frames of every make mean the same, and what breaks the contract is named, never quoted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.core.errors import DataError
from cohortium.core.features import BinaryTarget, Category, CountTarget, Feature, Number, NumberTarget
from cohortium.learning.contract import after_missing, conform, conform_target, raw_columns, typed

NAN = float("nan")
AGE = Number(unit="a", range=(18, 110))
SEX = Category(levels=("f", "m"))
YES = Category(levels=("0", "1"))

NUMBER_COLUMNS: dict[str, Callable[[], Any]] = {
    "pandas float": lambda: pd.DataFrame({"x": [40.0, None, 60.0]}),
    "pandas float32": lambda: pd.DataFrame({"x": pd.Series([40, None, 60], dtype="float32")}),
    "pandas Int64": lambda: pd.DataFrame({"x": pd.Series([40, None, 60], dtype="Int64")}),
    "pandas UInt8": lambda: pd.DataFrame({"x": pd.Series([40, None, 60], dtype="UInt8")}),
    "pandas Float64": lambda: pd.DataFrame({"x": pd.Series([40, None, 60], dtype="Float64")}),
    "polars int": lambda: pl.DataFrame({"x": [40, None, 60]}),
    "polars float": lambda: pl.DataFrame({"x": [40.0, None, 60.0]}),
    "polars nan": lambda: pl.DataFrame({"x": [40.0, NAN, 60.0]}),
    "polars float32": lambda: pl.DataFrame({"x": pl.Series([40, None, 60], dtype=pl.Float32)}),
    "polars decimal": lambda: pl.DataFrame({"x": pl.Series(["40", None, "60"]).cast(pl.Decimal(9, 2))}),
    "mapping": lambda: {"x": np.array([40.0, NAN, 60.0]), "ignored": None},
}
TEXT_COLUMNS: dict[str, Callable[[], Any]] = {
    "pandas text": lambda: pd.DataFrame({"x": ["f", None, "m"]}),
    "pandas object": lambda: pd.DataFrame({"x": pd.Series(["f", None, "m"], dtype=object)}),
    "pandas object nan": lambda: pd.DataFrame({"x": pd.Series(["f", NAN, "m"], dtype=object)}),
    "pandas object NA": lambda: pd.DataFrame({"x": pd.Series(["f", pd.NA, "m"], dtype=object)}),
    "pandas string": lambda: pd.DataFrame({"x": pd.Series(["f", None, "m"], dtype="string")}),
    "pandas category": lambda: pd.DataFrame({"x": pd.Categorical(["f", None, "m"], categories=["m", "f", "d"])}),
    "polars text": lambda: pl.DataFrame({"x": ["f", None, "m"]}),
    "polars categorical": lambda: pl.DataFrame({"x": pl.Series(["f", None, "m"], dtype=pl.Categorical)}),
    "polars enum": lambda: pl.DataFrame({"x": pl.Series(["f", None, "m"], dtype=pl.Enum(["f", "m"]))}),
    "mapping": lambda: {"x": np.array(["f", None, "m"], dtype=object)},
}
TRUTH_COLUMNS: dict[str, Callable[[], Any]] = {
    "pandas bool": lambda: pd.DataFrame({"x": [False, True, True]}),
    "pandas boolean": lambda: pd.DataFrame({"x": pd.Series([False, True, True], dtype="boolean")}),
    "pandas int": lambda: pd.DataFrame({"x": [0, 1, 1]}),
    "pandas float": lambda: pd.DataFrame({"x": [0.0, 1.0, 1.0]}),
    "pandas text": lambda: pd.DataFrame({"x": ["0", "1", "1"]}),
    "pandas category of int": lambda: pd.DataFrame({"x": pd.Categorical([0, 1, 1])}),
    "polars bool": lambda: pl.DataFrame({"x": [False, True, True]}),
    "polars int": lambda: pl.DataFrame({"x": [0, 1, 1]}),
    "polars int8": lambda: pl.DataFrame({"x": pl.Series([0, 1, 1], dtype=pl.Int8)}),
    "polars text": lambda: pl.DataFrame({"x": ["0", "1", "1"]}),
}


def read(frame: Any, feature: Feature) -> list[float]:
    raw = raw_columns(frame, ["x"])
    return conform("x", feature, typed({"x": feature}, raw)["x"]).tolist()


class TestFrames:
    @pytest.mark.parametrize("make", NUMBER_COLUMNS.values(), ids=list(NUMBER_COLUMNS))
    def test_numbers(self, make: Callable[[], Any]) -> None:
        raw = raw_columns(make(), ["x"])
        assert set(raw) == {"x"}
        assert raw["x"].dtype == np.float64
        assert read(make(), AGE) == pytest.approx([40.0, NAN, 60.0], nan_ok=True)

    @pytest.mark.parametrize("make", TEXT_COLUMNS.values(), ids=list(TEXT_COLUMNS))
    def test_labels(self, make: Callable[[], Any]) -> None:
        assert raw_columns(make(), ["x"])["x"].tolist() == ["f", None, "m"]
        assert read(make(), SEX) == pytest.approx([0.0, NAN, 1.0], nan_ok=True)

    @pytest.mark.parametrize("make", TRUTH_COLUMNS.values(), ids=list(TRUTH_COLUMNS))
    def test_truth_values(self, make: Callable[[], Any]) -> None:
        assert read(make(), YES) == [0.0, 1.0, 1.0]
        target = conform_target(BinaryTarget(name="x"), raw_columns(make(), ["x"])["x"])
        assert target.tolist() == [0.0, 1.0, 1.0]

    @pytest.mark.parametrize("dtype", ["boolean", "Int64", "Float64"])
    def test_a_missing_truth_value(self, dtype: str) -> None:
        frame = pd.DataFrame({"x": pd.Series([True, None, False], dtype=dtype)})
        assert read(frame, YES) == pytest.approx([1.0, NAN, 0.0], nan_ok=True)

    def test_numbers_as_levels_are_written_as_short_as_can_be(self) -> None:
        levels = Category(levels=("1", "2.5", "-3", "1000000", "0.1"))
        frame = pd.DataFrame({"x": [0.1, 1.0, 2.5, -3.0, 1e6, 0.1 + 1e-17]})
        assert read(frame, levels) == [4.0, 0.0, 1.0, 2.0, 3.0, 4.0]

    def test_columns_wanted_as_text(self) -> None:
        big = 2**53 + 1
        for frame in (
            pd.DataFrame({"x": pd.Series([big, None, 7], dtype="Int64")}),
            pl.DataFrame({"x": [big, None, 7]}),
        ):
            assert raw_columns(frame, ["x"], as_text={"x"})["x"].tolist() == [str(big), None, "7"]
        for number in (pd.DataFrame({"x": [1.0, NAN, 2.5]}), {"x": np.array([1.0, NAN, 2.5])}):
            assert raw_columns(number, ["x"], as_text={"x"})["x"].tolist() == ["1", None, "2.5"]

    def test_no_rows(self) -> None:
        assert read(pl.DataFrame({"x": []}, schema={"x": pl.Float64}), AGE) == []
        assert read(pl.DataFrame({"x": []}, schema={"x": pl.String}), SEX) == []

    def test_a_column_that_is_empty_is_missing_whatever_it_was_meant_to_be(self) -> None:
        for frame in (pd.DataFrame({"x": [None, None]}), pl.DataFrame({"x": [None, None]})):
            assert read(frame, AGE) == pytest.approx([NAN, NAN], nan_ok=True)
            assert read(frame, SEX) == pytest.approx([NAN, NAN], nan_ok=True)

    @pytest.mark.parametrize("thing", [[1, 2], "x", 5, None, np.zeros(3), pl.LazyFrame({"x": [1]})])
    def test_what_is_no_frame(self, thing: Any) -> None:
        with pytest.raises(DataError, match="is no data frame: pass a pandas or Polars frame"):
            raw_columns(thing, ["x"])

    @pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, dict])
    def test_a_column_that_is_not_there(self, make: Any) -> None:
        frame = make({"age_years": [1.0], "sex": ["f"]})
        with pytest.raises(DataError, match=r"column 'age' is missing; did you mean 'age_years'\? Add it"):
            raw_columns(frame, ["sex", "age"])
        with pytest.raises(DataError, match=r"column 'zzz' is missing\. Add it") as refused:
            raw_columns(frame, ["zzz"])
        assert refused.value.public == "column 'zzz' is missing"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(18, 110)), max_size=20))
def test_pandas_and_polars_agree(values: list[float | None]) -> None:
    plain = [NAN if value is None else value for value in values]
    for frame in (
        pd.DataFrame({"x": pd.Series(values, dtype="Float64")}),
        pd.DataFrame({"x": pd.Series(plain, dtype=float)}),
        pl.DataFrame({"x": values}, schema={"x": pl.Float64}),
    ):
        assert read(frame, AGE) == pytest.approx(plain, nan_ok=True, abs=0)


class TestRanges:
    def column(self, *values: float) -> np.ndarray:
        return np.array(values, dtype=np.float64)

    def test_the_ends_belong_to_the_range(self) -> None:
        assert conform("age", AGE, self.column(18, 110, NAN)).tolist()[:2] == [18.0, 110.0]

    @pytest.mark.parametrize(
        ("values", "sentence"),
        [
            ((17.99, 50, 12), "2 values below the study's range 18..110"),
            ((110.01, 50), "1 values above the study's range 18..110"),
            ((0, 50, 111, 112), "1 values below and 2 values above the study's range 18..110"),
        ],
    )
    def test_refuse(self, values: tuple[float, ...], sentence: str) -> None:
        with pytest.raises(DataError, match=sentence) as refused:
            conform("age", AGE, self.column(*values))
        assert refused.value.public == "column 'age' holds values outside the study's range 18..110 (a)"

    def test_clip_and_missing(self) -> None:
        column = self.column(10, 50, 200, NAN)
        clip, missing = (Number(unit="a", range=(18, 110), outside=rule) for rule in ("clip", "missing"))  # type: ignore[arg-type]
        assert conform("age", clip, column) == pytest.approx([18, 50, 110, NAN], nan_ok=True)
        assert conform("age", missing, column) == pytest.approx([NAN, 50, NAN, NAN], nan_ok=True)
        assert column.tolist()[:3] == [10, 50, 200]

    @pytest.mark.parametrize("rule", ["refuse", "clip", "missing"])
    @pytest.mark.parametrize("value", [np.inf, -np.inf])
    def test_infinity_is_refused_under_every_rule(self, rule: Any, value: float) -> None:
        feature = Number(unit="a", range=(18, 110), outside=rule)
        with pytest.raises(DataError, match="column 'age' holds an infinite value"):
            conform("age", feature, self.column(50, value))

    def test_text_where_numbers_belong(self) -> None:
        raw = raw_columns(pl.DataFrame({"x": ["40", "41.5", None, "high"]}), ["x"])
        with pytest.raises(DataError, match=r"column 'x' holds text, and the study expects numbers \(a\)"):
            typed({"x": AGE}, raw)

    def test_text_that_is_a_number_is_one(self) -> None:
        cells = ["40", "+41.5", " 5.e1 ", ".6E+2", "", "  ", None, "NaN"]
        frame = pl.DataFrame({"x": cells})
        assert read(frame, AGE) == pytest.approx([40, 41.5, 50, 60, NAN, NAN, NAN, NAN], nan_ok=True, abs=0)
        target = conform_target(NumberTarget(name="x", unit="a", range=(0, 99)), raw_columns(frame, ["x"])["x"])
        assert target == pytest.approx([40, 41.5, 50, 60, NAN, NAN, NAN, NAN], nan_ok=True, abs=0)

    @pytest.mark.parametrize("cell", ["?", "NA", "1_0", "1,5", "0x1F", "1e", "e1", ".", "--1", "1 2", "\u0661", "true"])
    def test_what_is_no_number(self, cell: str) -> None:
        with pytest.raises(DataError, match="column 'x' holds text") as refused:
            read(pl.DataFrame({"x": ["40", cell]}), AGE)
        assert refused.value.public == "column 'x' holds text, and the study expects numbers (a)"

    @pytest.mark.parametrize("cell", ["inf", "-Infinity", "1e400"])
    def test_text_that_is_infinite(self, cell: str) -> None:
        with pytest.raises(DataError, match="column 'x' holds an infinite value"):
            read(pl.DataFrame({"x": ["40", cell]}), AGE)


class TestLevels:
    def labels(self, *values: str | None) -> np.ndarray:
        return np.array(values, dtype=object)

    def test_codes_follow_the_studys_order(self) -> None:
        feature = Category(levels=("b", "a", "c"))
        assert conform("x", feature, self.labels("a", "b", "c", "a")).tolist() == [1.0, 0.0, 2.0, 1.0]

    @pytest.mark.parametrize("label", ["F", "f ", " f", "", "0", "female"])
    def test_a_level_is_compared_as_it_is_written(self, label: str) -> None:
        with pytest.raises(DataError, match=r"not among its levels f, m \(2 patients\)") as refused:
            conform("sex", SEX, self.labels("f", label, label, "m"))
        assert refused.value.public == "column 'sex' holds values that are not among its levels f, m"

    def test_a_number_is_compared_as_it_is_written_and_then_as_a_number(self) -> None:
        frame = pl.DataFrame({"x": ["1", "1.0", "01", " 1e0 ", "02", "0", "-0.0", "nan", None]})
        feature = Category(levels=("0", "1", "02"))
        assert read(frame, feature) == pytest.approx([1, 1, 1, 1, 2, 0, 0, NAN, NAN], nan_ok=True)

    def test_treated_as_missing(self) -> None:
        feature = Category(levels=("f", "m"), outside="missing")
        coded = conform("sex", feature, self.labels("f", "x", None, "m"))
        assert coded == pytest.approx([0, NAN, NAN, 1], nan_ok=True)


class TestTargets:
    def test_binary_predicts_the_second_level(self) -> None:
        target = BinaryTarget(name="y", levels=("no", "yes"))
        raw = np.array(["yes", "no", None], dtype=object)
        assert conform_target(target, raw) == pytest.approx([1, 0, NAN], nan_ok=True)
        with pytest.raises(
            DataError, match=r"not among its levels no, yes .* Correct them, or change the target's levels"
        ):
            conform_target(target, np.array(["maybe"], dtype=object))

    def test_number(self) -> None:
        target = NumberTarget(name="y", unit="d", range=(0, 10))
        assert conform_target(target, np.array([0.0, 10.0])).tolist() == [0.0, 10.0]
        with pytest.raises(DataError, match="1 values above"):
            conform_target(target, np.array([11.0]))
        clipped = NumberTarget(name="y", unit="d", range=(0, 10), outside="clip")
        assert conform_target(clipped, np.array([11.0, -1.0])).tolist() == [10.0, 0.0]
        with pytest.raises(DataError, match="holds text"):
            conform_target(target, np.array(["a"], dtype=object))

    def test_count(self) -> None:
        target = CountTarget(name="y", maximum=9)
        assert conform_target(target, np.array([0.0, 9.0, NAN])) == pytest.approx([0, 9, NAN], nan_ok=True)
        for wrong, sentence in (([1.5], "fractions"), ([10.0], "above"), ([-1.0], "below"), ([np.inf], "infinite")):
            with pytest.raises(DataError, match=sentence):
                conform_target(target, np.array(wrong))


class TestMissing:
    COLUMN = np.array([1.0, NAN, 3.0, NAN])

    def test_rules(self) -> None:
        assert after_missing("x", "exclude", self.COLUMN).tolist() == [True, False, True, False]
        assert after_missing("x", "impute", self.COLUMN).all()
        assert after_missing("x", "refuse", self.COLUMN[[0, 2]]).all()
        with pytest.raises(DataError, match=r"column 'x' has 2 missing values.*impute or exclude") as refused:
            after_missing("x", "refuse", self.COLUMN)
        assert refused.value.public == "column 'x' has missing values (NaN or empty)"


def test_what_others_may_read_holds_no_count_and_no_value() -> None:
    """Each refusal of these columns has its counts in the message for the staff, and in that alone."""
    features: dict[str, Feature] = {"x": Number(unit="a", range=(1, 2))}
    broken: list[Callable[[], Any]] = [
        lambda: conform("x", features["x"], np.array([737.0] * 37)),
        lambda: conform("x", features["x"], np.array([np.inf] * 37)),
        lambda: conform("x", SEX, np.array(["secret 737"] * 37, dtype=object)),
        lambda: conform_target(CountTarget(name="x", maximum=2), np.array([1.737] * 37)),
        lambda: after_missing("x", "refuse", np.array([NAN] * 37)),
        lambda: typed(features, {"x": np.array(["secret 737"] * 37, dtype=object)}),
    ]
    for refusal in broken:
        with pytest.raises(DataError) as refused:
            refusal()
        assert not any(word in refused.value.public for word in ("37", "secret"))
        assert not any(word in str(refused.value) for word in ("737", "secret"))
