"""Table 1 with differential privacy: exact without noise, honest and consistent with it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.features import BinaryTarget, Category, Feature, Number
from cohortium.core.models import Descriptive
from cohortium.core.random import Randomness
from cohortium.learning.algorithm import in_the_clear
from cohortium.learning.descriptive import CategorySummary, Describe, NumberSummary, Summary
from cohortium.learning.preprocess import FitBroadcast
from cohortium.learning.private_descriptive import PrivateDescribe, nearest_cells, quantile, whole
from cohortium.learning.table import Table, pooled

FEATURES: dict[str, Feature] = {
    "age": Number(unit="a", range=(18, 110)),
    "crp": Number(unit="mg/L", range=(0, 400), missing="impute"),
    "stage": Category(levels=("I", "II", "III"), missing="impute"),
}
TARGET = BinaryTarget(name="died", levels=("no", "yes"))
ROOT = Randomness.of_seed(3)


def cohort(rows: int, seed: int, gaps: float = 0.2) -> Table:
    rng = np.random.default_rng(seed)
    columns = {
        "age": np.clip(rng.normal(60, 15, rows), 18, 110),
        "crp": np.clip(rng.lognormal(3.5, 0.8, rows), 0, 400),
        "stage": rng.choice(3, rows, p=[0.2, 0.5, 0.3]).astype(float),
    }
    for name in ("crp", "stage"):
        columns[name][rng.random(rows) < gaps] = np.nan
    return Table(rows, columns, rng.integers(0, 2, rows).astype(float))


def describe(tables: list[Table], noise: float = 0.0, **other: Any) -> Summary:
    model = Descriptive(bins=other.get("bins", 20), refinements=0, small_cells=1)
    unit, multiplier = other.get("unit", "patient"), other.get("multiplier")
    algorithm = PrivateDescribe(FEATURES, TARGET, model, 20_000, unit, multiplier)
    return in_the_clear(algorithm, tables, other.get("randomness", ROOT), noise)


class TestWithoutNoise:
    def test_equals_the_description_without_privacy(self) -> None:
        tables = [cohort(100, 1), cohort(57, 2)]
        model = Descriptive(bins=20, refinements=0, small_cells=1)
        found, expected = describe(tables), in_the_clear(Describe(FEATURES, TARGET, model, 20_000), tables, ROOT)
        assert found.n == expected.n == 157
        for mine, theirs in zip(found.features, expected.features, strict=True):
            assert (mine.name, mine.known, mine.missing) == (theirs.name, theirs.known, theirs.missing)
            assert mine.missing_rate == pytest.approx(theirs.missing_rate, abs=1e-6)
            if isinstance(mine, NumberSummary) and isinstance(theirs, NumberSummary):
                assert mine.histogram == theirs.histogram
                assert mine.mean == pytest.approx(theirs.mean, rel=1e-6)
                assert mine.sd == pytest.approx(theirs.sd, rel=1e-5)
                for q, other in zip(mine.quantiles, theirs.quantiles, strict=True):
                    assert abs(q.value - other.value) <= q.within + other.within
            else:
                assert mine == replace(theirs, missing_rate=mine.missing_rate)  # type: ignore[type-var]

    def test_quantiles_are_within_what_they_say(self) -> None:
        tables = [cohort(400, seed) for seed in range(3)]
        for feature in describe(tables).features:
            if isinstance(feature, NumberSummary):
                values = pooled(tables).columns[feature.name]
                assert [q.q for q in feature.quantiles] == [0.05, 0.25, 0.5, 0.75, 0.95]
                for q in feature.quantiles:
                    assert abs(q.value - np.nanquantile(values, q.q)) <= q.within
                    low, high = FEATURES[feature.name].range  # type: ignore[union-attr]
                    assert q.within <= (high - low) / 20 * (1 + 1e-9)

    def test_a_patient_with_several_records_counts_once(self) -> None:
        table = cohort(90, 3, gaps=0.0)
        owners = np.arange(90) // 3
        found = describe([replace(table, patient=owners)])
        assert found.n == 30
        stage = found.features[2]
        assert isinstance(stage, CategorySummary)
        exact = np.bincount(table.columns["stage"].astype(int), minlength=3) / 3
        assert np.abs(np.array(stage.counts) - exact).max() < 1
        assert sum(stage.counts) == 30
        age = found.features[0]
        assert isinstance(age, NumberSummary)
        assert age.mean == pytest.approx(table.columns["age"].mean(), rel=1e-6)


class TestWithNoise:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10**6), st.sampled_from([0.1, 5.0, 300.0, 1e7]), st.integers(1, 300), st.integers(2, 30))
    def test_whatever_the_noise_the_summary_adds_up(self, seed: int, multiplier: float, rows: int, bins: int) -> None:
        found = describe([cohort(rows, 1)], 1.0, multiplier=multiplier, randomness=Randomness.of_seed(seed), bins=bins)
        assert found.n >= 1
        for feature in found.features:
            assert feature.known >= 0
            assert feature.missing >= 0
            assert feature.known + feature.missing == found.n
            assert 0 <= feature.missing_rate <= 1
            counts = feature.histogram.counts if isinstance(feature, NumberSummary) else feature.counts
            assert min(counts) >= 0
            assert sum(counts) == feature.known
            if not isinstance(feature, NumberSummary):
                assert feature.hidden == 0
                continue
            assert feature.histogram.hidden == 0
            low, high = FEATURES[feature.name].range  # type: ignore[union-attr]
            assert feature.mean is None or low <= feature.mean <= high
            assert feature.sd is None or 0 <= feature.sd <= high - low
            values = [q.value for q in feature.quantiles]
            assert values == sorted(values)
            for q in feature.quantiles:
                assert low <= q.value <= high
                assert 0 <= q.within <= (high - low) * (1 + 1e-12)

    def test_the_noise_is_what_was_asked_for(self) -> None:
        """Of the count of units: a one, for each number a cell and two moments, for each category a cell."""
        norm = (1 + 2 * (1 + 9 / 8) + 2 * 1) ** 0.5
        algorithm = PrivateDescribe(FEATURES, TARGET, Descriptive(refinements=0), 20_000, "patient", 3.0)
        (block,) = algorithm.layout(FitBroadcast())
        assert block.noise is not None
        assert block.noise.norm == pytest.approx(norm, rel=1e-5)
        table = cohort(400, 1)
        counts = [describe([table], 1.0, multiplier=3.0, randomness=Randomness.of_seed(i)).n for i in range(300)]
        assert np.std(counts) == pytest.approx(3 * norm, rel=0.2)

    def test_quantiles_are_mostly_within_what_they_say(self) -> None:
        tables = [cohort(1500, seed) for seed in range(2)]
        exact = {name: pooled(tables).columns[name] for name in ("age", "crp")}
        hits = []
        for seed in range(60):
            for feature in describe(tables, 1.0, multiplier=8.0, randomness=Randomness.of_seed(seed)).features:
                if isinstance(feature, NumberSummary):
                    truth = np.nanquantile(exact[feature.name], [q.q for q in feature.quantiles])
                    hits += [abs(q.value - at) <= q.within for q, at in zip(feature.quantiles, truth, strict=True)]
        assert np.mean(hits) > 0.95

    def test_means_are_close_for_many_patients(self) -> None:
        tables = [cohort(4000, seed) for seed in range(3)]
        for exact, noisy in zip(describe(tables).features, describe(tables, 1.0, multiplier=8.0).features, strict=True):
            if isinstance(exact, NumberSummary) and isinstance(noisy, NumberSummary):
                assert noisy.mean == pytest.approx(exact.mean, rel=0.05)
                assert noisy.sd == pytest.approx(exact.sd, rel=0.1)
            assert noisy.known == pytest.approx(exact.known, rel=0.01)


def test_halves_of_patients_divide_by_nothing_that_is_zero() -> None:
    """Noise may leave one and a half units, of whom half a one is missing."""
    algorithm = PrivateDescribe(FEATURES, TARGET, Descriptive(bins=2, refinements=0), 100, "patient", 1.0)
    (block,) = algorithm.layout(FitBroadcast())
    for units in (0.5, 1.0, 1.5, 2.5):
        for missing in (0.0, 0.5, 1.0, 1.5):
            total = np.array(
                [units if label == "patients" else missing * ("missing" in label) for label in block.labels]
            )
            found = algorithm.finish(algorithm.update(algorithm.init(), {"sums": total}))
            assert all(feature.known + feature.missing == found.n for feature in found.features)


def test_refinements_are_refused() -> None:
    with pytest.raises(StudyError, match=r"model\.refinements is 3.*set it to 0"):
        PrivateDescribe(FEATURES, TARGET, Descriptive(), 100, "patient", 1.0)


def test_one_round_in_its_order() -> None:
    algorithm = PrivateDescribe(FEATURES, TARGET, Descriptive(refinements=0), 100, "patient", 1.0)
    algorithm.admit(FitBroadcast(), None)
    with pytest.raises(ProtocolError, match="one round"):
        algorithm.admit(FitBroadcast(), FitBroadcast())


class TestCells:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.floats(-50, 50), min_size=1, max_size=6), st.floats(0, 60))
    def test_they_are_the_nearest_ones_that_add_up(self, cells: list[float], total: float) -> None:
        """Against a general optimiser."""
        given_cells = np.array(cells)
        found = nearest_cells(given_cells, total)
        assert (found >= 0).all()
        assert found.sum() == pytest.approx(total, abs=1e-9)
        best = minimize(
            lambda c: ((c - given_cells) ** 2).sum(),
            np.full(len(cells), total / len(cells)),
            bounds=[(0, None)] * len(cells),
            constraints=[{"type": "eq", "fun": lambda c: c.sum() - total}],
            method="SLSQP",
        )
        distance = ((found - given_cells) ** 2).sum()
        assert distance <= ((best.x - given_cells) ** 2).sum() + 1e-4 * (1 + distance)

    def test_cells_that_add_up_stay(self) -> None:
        assert nearest_cells(np.array([3.0, 0.0, 4.5]), 7.5).tolist() == [3.0, 0.0, 4.5]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.integers(0, 10**6))
    def test_whole_cells_add_up(self, cells: list[float], total: int) -> None:
        found = whole(np.array(cells), total)
        assert sum(found) == total
        assert min(found) >= 0

    def test_whole_cells_are_the_nearest(self) -> None:
        assert whole(np.array([1.2, 2.7, 3.1]), 7) == (1, 3, 3)
        assert whole(np.array([2.0, 0.0, 5.0]), 7) == (2, 0, 5)


class TestQuantile:
    EDGES = np.array([0.0, 10.0, 20.0, 30.0, 40.0])

    def test_interpolates_in_its_bin(self) -> None:
        found = quantile(0.5, np.array([10.0, 20.0, 10.0, 0.0]), self.EDGES, 0.0)
        assert (found.value, found.within) == (15.0, 5.0)
        assert quantile(0.1, np.array([10.0, 20.0, 10.0, 0.0]), self.EDGES, 0.0).value == pytest.approx(4.0)

    def test_an_empty_bin_holds_none(self) -> None:
        found = quantile(0.75, np.array([0.0, 10.0, 0.0, 10.0]), self.EDGES, 0.0)
        assert found.value == 35.0

    def test_noise_widens_the_doubt(self) -> None:
        cells = np.array([100.0, 100.0, 100.0, 100.0])
        doubts = [quantile(0.4, cells, self.EDGES, noise).within for noise in (0.0, 10.0, 40.0, 1e6)]
        assert doubts == sorted(doubts)
        assert doubts[0] == pytest.approx(6.0)
        # anywhere in the range
        assert doubts[-1] == pytest.approx(24.0)
