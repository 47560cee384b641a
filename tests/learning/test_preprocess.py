"""Imputation, scaling and one-hot coding from sums against scikit-learn on the pooled rows."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler

from cohortium.core.errors import CohortError
from cohortium.core.features import Category, Feature, Number
from cohortium.core.random import Randomness
from cohortium.learning.algorithm import in_the_clear
from cohortium.learning.preprocess import Encoder, FitBroadcast, Fitted, Preprocess, middle_and_half, to_unit
from cohortium.learning.table import Table, pooled

NUMBERS = ["age", "crp", "temperature"]
CATEGORIES = ["sex", "stage"]
FEATURES: dict[str, Feature] = {
    "age": Number(unit="a", range=(18, 110), missing="impute"),
    "crp": Number(unit="mg/L", range=(0, 400), missing="impute"),
    "sex": Category(levels=("f", "m"), missing="impute"),
    "stage": Category(levels=("I", "II", "III"), missing="impute"),
    "temperature": Number(unit="Cel", range=(30, 45), missing="impute"),
}
RANDOMNESS = Randomness.of_seed(0)


def cohort(rows: int, seed: int, gaps: float = 0.2) -> Table:
    rng = np.random.default_rng(seed)
    columns = {
        "age": np.clip(rng.normal(60, 15, rows), 18, 110),
        "crp": np.clip(rng.lognormal(2.5, 0.8, rows), 0, 400),
        "sex": (rng.random(rows) < 0.6).astype(float),
        "stage": rng.choice(3, rows, p=[0.2, 0.5, 0.3]).astype(float),
        "temperature": np.clip(rng.normal(37, 0.8, rows), 30, 45),
    }
    for column in columns.values():
        column[rng.random(rows) < gaps] = np.nan
    return Table(rows, columns)


def fit(tables: list[Table], features: dict[str, Feature] = FEATURES) -> Fitted:
    return in_the_clear(Preprocess(features, 10_000), tables, RANDOMNESS)


def stacked(table: Table, names: list[str]) -> np.ndarray:
    return np.stack([table.columns[name] for name in names], axis=1)


TABLES = [cohort(90, 1), cohort(40, 2, 0.6), cohort(160, 3, 0.0)]
ALL = pooled(TABLES)


class TestAgainstScikitLearn:
    def test_means_and_deviations(self) -> None:
        fitted, scaler = fit(TABLES), StandardScaler().fit(stacked(ALL, NUMBERS))
        assert list(fitted.means) == list(fitted.deviations) == NUMBERS
        assert list(fitted.means.values()) == pytest.approx(scaler.mean_.tolist(), rel=1e-12)
        assert list(fitted.deviations.values()) == pytest.approx(scaler.scale_.tolist(), rel=1e-9)

    def test_modes(self) -> None:
        imputer = SimpleImputer(strategy="most_frequent").fit(stacked(ALL, CATEGORIES))
        assert list(fit(TABLES).modes.values()) == imputer.statistics_.tolist()

    def reference(self, table: Table, scale: str) -> np.ndarray:
        numbers = SimpleImputer(strategy="mean").fit(stacked(ALL, NUMBERS)).transform(stacked(table, NUMBERS))
        if scale == "standard":
            numbers = StandardScaler().fit(stacked(ALL, NUMBERS)).transform(numbers)
        elif scale == "range":
            ends = np.array([FEATURES[name].range for name in NUMBERS]).T  # type: ignore[union-attr]
            numbers = MinMaxScaler((-1, 1)).fit(ends).transform(numbers)
        codes = SimpleImputer(strategy="most_frequent").fit(stacked(ALL, CATEGORIES))
        hot = OneHotEncoder(drop="first", categories=[[0, 1], [0, 1, 2]], sparse_output=False)
        hot.fit(codes.transform(stacked(ALL, CATEGORIES)))
        coded = hot.transform(codes.transform(stacked(table, CATEGORIES)))
        # in the study's order: age, crp, sex, stage, temperature
        return np.column_stack([numbers[:, :2], coded, numbers[:, 2:]])

    @pytest.mark.parametrize("scale", ["standard", "range", "none"])
    @pytest.mark.parametrize("index", range(3))
    def test_designs(self, index: int, scale: Any) -> None:
        encoder = Encoder(FEATURES, fit(TABLES))
        assert encoder.columns == ("age", "crp", "sex[m]", "stage[II]", "stage[III]", "temperature")
        design = encoder.design(TABLES[index], scale)
        assert design == pytest.approx(self.reference(TABLES[index], scale), rel=1e-9, abs=1e-9)

    @pytest.mark.parametrize("scale", ["standard", "range", "none"])
    def test_the_affine_map_leads_from_raw_to_scaled(self, scale: Any) -> None:
        encoder = Encoder(FEATURES, fit(TABLES))
        shift, width = encoder.affine(scale)
        assert shift.shape == width.shape == (6,)
        raw, scaled = encoder.design(ALL, "none"), encoder.design(ALL, scale)
        assert scaled * width + shift == pytest.approx(raw, rel=1e-12)
        assert (shift[2:5] == 0).all()
        assert (width[2:5] == 1).all()

    def test_without_numbers_or_categories(self) -> None:
        for names in (NUMBERS, CATEGORIES):
            features = {name: FEATURES[name] for name in names}
            encoder = Encoder(features, fit(TABLES, features))
            assert encoder.design(ALL, "standard").shape == (ALL.rows, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_any_split_gives_the_pooled_fit(seed: int, sites: int) -> None:
    site = np.random.default_rng(seed).integers(0, sites, ALL.rows)
    apart, together = fit([ALL.take(site == index) for index in range(sites)]), fit([ALL])
    assert apart.means == pytest.approx(together.means, rel=1e-12)
    assert apart.deviations == pytest.approx(together.deviations, rel=1e-9)
    assert apart.modes == together.modes


def test_a_site_that_knows_nothing_of_a_feature_still_takes_part() -> None:
    blind = cohort(50, 9)
    blind.columns["crp"][:] = np.nan
    blind.columns["stage"][:] = np.nan
    fitted = fit([*TABLES, blind])
    assert fitted.means["crp"] == pytest.approx(np.nanmean(ALL.columns["crp"]))
    assert fitted.modes["stage"] == fit(TABLES).modes["stage"]
    design = Encoder(FEATURES, fitted).design(blind, "none")
    assert design[:, 1] == pytest.approx(np.full(50, fitted.means["crp"]))
    assert (design[:, 3:5] == [fitted.modes["stage"] == 1, fitted.modes["stage"] == 2]).all()


def test_a_tie_goes_to_the_earlier_level() -> None:
    features: dict[str, Feature] = {"g": Category(levels=("x", "y", "z"), missing="impute")}
    table = Table(5, {"g": np.array([2.0, 1.0, 2.0, 1.0, 0.0])})
    assert fit([table], features).modes == {"g": 1}


class TestWhatCannotBeFitted:
    def with_column(self, name: str, values: Any) -> list[Table]:
        table = cohort(30, 5)
        table.columns[name][:] = values
        return [table]

    @pytest.mark.parametrize("name", NUMBERS)
    def test_a_number_missing_everywhere(self, name: str) -> None:
        with pytest.raises(CohortError, match=f"feature '{name}' is missing for every patient at every site"):
            fit(self.with_column(name, np.nan))

    @pytest.mark.parametrize("value", [18.0, 60.0, 110.0, 61.123456789])
    def test_a_constant_number(self, value: float) -> None:
        with pytest.raises(CohortError, match="feature 'age' is constant over all sites"):
            fit(self.with_column("age", value))

    def test_a_constant_number_at_each_site_with_a_value_of_its_own(self) -> None:
        one, other = self.with_column("age", 40.0)[0], self.with_column("age", 60.0)[0]
        assert fit([one, other]).deviations["age"] == pytest.approx(10.0)

    @pytest.mark.parametrize("level", [0.0, 2.0, np.nan])
    def test_a_constant_category(self, level: float) -> None:
        with pytest.raises(CohortError, match="feature 'stage' is constant over all sites"):
            fit(self.with_column("stage", level))

    def test_a_level_at_no_site(self) -> None:
        with pytest.raises(CohortError, match="level 'II' of feature 'stage' occurs at no site"):
            fit(self.with_column("stage", [0.0, 2.0] * 15))

    def test_a_level_at_one_site_suffices(self) -> None:
        lacking = self.with_column("stage", [0.0, 2.0] * 15)
        assert set(fit([*lacking, *TABLES]).modes) == {"sex", "stage"}


class TestUnitScale:
    @settings(max_examples=200, deadline=None)
    @given(
        st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.lists(st.floats(0, 1), min_size=1, max_size=5), st.booleans()
    )
    def test_never_leaves_its_ends(self, low: float, length: float, shares: list[float], at_end: bool) -> None:
        high = low + length
        if not low < high:
            return
        inside = np.clip(np.array([low, high, *(low + share * length for share in shares)]), low, high)
        unit = to_unit(inside, (low, high))
        assert np.abs(unit).max() <= 1
        assert (np.diff(unit[np.argsort(inside)]) >= 0).all()
        middle, half = middle_and_half((low, high))
        assert unit * half + middle == pytest.approx(inside, rel=1e-6, abs=1e-6 * (abs(low) + abs(high)))

    def test_examples(self) -> None:
        assert to_unit(np.array([18.0, 64.0, 110.0]), (18, 110)).tolist() == [-1.0, 0.0, 1.0]
        assert middle_and_half((18, 110)) == (64.0, 46.0)


def test_what_is_sent_is_counts_and_sums_on_the_unit_scale() -> None:
    table = Table(4, {"age": np.array([18.0, 110.0, np.nan, 87.0]), "sex": np.array([1.0, np.nan, 1.0, 0.0])})
    features = {name: FEATURES[name] for name in ("age", "sex")}
    statistics, memory = Preprocess(features, 10).local(FitBroadcast(), table, {}, RANDOMNESS)
    assert {name: array.tolist() for name, array in statistics.items()} == {"age": [3.0, 0.5, 2.25], "sex": [1.0, 2.0]}
    assert memory == {}
