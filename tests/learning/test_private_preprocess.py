"""Preprocessing with differential privacy: exact without noise, bounded by unit, and plausible whatever the noise."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.core import codec
from cohortium.core.errors import ProtocolError
from cohortium.core.features import Category, Feature, Number
from cohortium.core.random import Randomness
from cohortium.learning import private_preprocess
from cohortium.learning.algorithm import in_the_clear
from cohortium.learning.preprocess import Encoder, Fitted, Preprocess
from cohortium.learning.private_preprocess import PrivatePreprocess, shares, sum_of_averages
from cohortium.learning.table import Table

FEATURES: dict[str, Feature] = {
    "age": Number(unit="a", range=(18, 110)),
    "crp": Number(unit="mg/L", range=(0, 400), missing="impute"),
    "sex": Category(levels=("f", "m")),
    "stage": Category(levels=("I", "II", "III"), missing="impute"),
}
ROOT = Randomness.of_seed(3)


def cohort(rows: int, seed: int, gaps: float = 0.2) -> Table:
    rng = np.random.default_rng(seed)
    columns = {
        "age": np.clip(rng.normal(60, 15, rows), 18, 110),
        "crp": np.clip(rng.lognormal(3.5, 0.8, rows), 0, 400),
        "sex": rng.integers(0, 2, rows).astype(float),
        "stage": rng.choice(3, rows, p=[0.2, 0.5, 0.3]).astype(float),
    }
    for name in ("crp", "stage"):
        columns[name][rng.random(rows) < gaps] = np.nan
    return Table(rows, columns)


def fit(
    tables: list[Table], scale: Any = "standard", unit: Any = "patient", noise: float = 0.0, **other: Any
) -> Fitted:
    features, multiplier = other.get("features", FEATURES), other.get("multiplier")
    algorithm = PrivatePreprocess(features, 10_000, scale, unit, multiplier)
    return in_the_clear(algorithm, tables, other.get("randomness", ROOT), noise)


class TestWithoutNoise:
    def test_equals_preprocessing_without_privacy(self) -> None:
        tables = [cohort(100, 1), cohort(57, 2)]
        found, expected = fit(tables), in_the_clear(Preprocess(FEATURES, 10_000), tables, ROOT)
        assert found.means == pytest.approx(expected.means, rel=1e-6)
        assert found.deviations == pytest.approx(expected.deviations, rel=1e-6)
        assert found.modes == {"sex": 0, "stage": 1}
        assert found.patients == pytest.approx(157)

    @pytest.mark.parametrize("scale", ["range", "none"])
    def test_asks_only_for_what_the_study_needs(self, scale: Any) -> None:
        algorithm = PrivatePreprocess(FEATURES, 100, scale, "patient", 1.0)
        (block,) = algorithm.layout(algorithm.broadcast(algorithm.init()))
        stages = ("stage: I", "stage: II", "stage: III")
        assert block.labels == ("patients", "crp: missing", "crp: sum", *stages)
        table = cohort(200, 4)
        found = fit([table], scale)
        assert found.means["crp"] == pytest.approx(np.nanmean(table.columns["crp"]), rel=1e-6)
        assert (found.means["age"], found.deviations["age"], found.deviations["crp"]) == (64.0, 46.0, 200.0)

    def test_nothing_but_the_count_where_nothing_is_needed(self) -> None:
        features = {name: feature for name, feature in FEATURES.items() if feature.missing == "refuse"}
        algorithm = PrivatePreprocess(features, 100, "range", "patient", 1.0)
        (block,) = algorithm.layout(algorithm.broadcast(algorithm.init()))
        assert block.labels == ("patients",)
        assert block.noise is not None
        assert block.noise.norm == pytest.approx(1)

    def test_a_unit_counts_once_however_many_records_it_has(self) -> None:
        """Against averages by patient, taken one by one."""
        table, rng = cohort(120, 5), np.random.default_rng(6)
        owners = np.unique(rng.integers(0, 40, 120) ** 2 // 40, return_inverse=True)[1]
        table = Table(table.rows, table.columns, patient=owners)
        weights = np.array([1 / (owners == owner).sum() for owner in owners])
        found = fit([table])
        assert found.patients == pytest.approx(owners.max() + 1)
        for name in ("age", "crp"):
            values = table.columns[name]
            known = ~np.isnan(values)
            mean = np.average(values[known], weights=weights[known])
            variance = np.average((values[known] - mean) ** 2, weights=weights[known])
            assert found.means[name] == pytest.approx(mean, rel=1e-6)
            assert found.deviations[name] == pytest.approx(variance**0.5, rel=1e-6)

    @pytest.mark.parametrize(("unit", "units"), [("patient", 30), ("record", 120), ("site", 1)])
    def test_counts_units(self, unit: Any, units: int) -> None:
        table = cohort(120, 5)
        table = Table(120, table.columns, patient=np.arange(120) % 30)
        assert fit([table], unit=unit).patients == pytest.approx(units)

    def test_shares_add_up_to_the_units(self) -> None:
        assert shares(np.array([0, 2, 2, 1, 2, 1]), 6) == pytest.approx([1, 1 / 3, 1 / 3, 1 / 2, 1 / 3, 1 / 2])
        assert shares(None, 3).tolist() == [1, 1, 1]
        assert shares(np.array([], dtype=np.intp), 0).tolist() == []

    def test_a_narrow_feature_is_not_blown_up(self) -> None:
        table = cohort(50, 7)
        table.columns["age"][:] = 60.0
        assert fit([table]).deviations["age"] == pytest.approx(0.01 * 46)


class TestSumOfAverages:
    @pytest.mark.parametrize("at_once", [1, 7, 20, 10**6])
    @pytest.mark.parametrize("several", [True, False])
    def test_however_many_records_are_held_at_a_time(self, at_once: int, several: bool, monkeypatch: Any) -> None:
        """A unit's records may lie in several parts, and it is clipped once, as a whole."""
        monkeypatch.setattr(private_preprocess, "_AT_ONCE", at_once)
        rng = np.random.default_rng(2)
        vectors = rng.normal(0, 1, (40, 2))
        owners = rng.integers(0, 6, 40) if several else None
        found = sum_of_averages(lambda rows: vectors[rows], 2, owners, 40, 0.4)
        groups = [vectors[owners == unit] for unit in range(6)] if owners is not None else vectors[:, None]
        means = [group.mean(axis=0) for group in groups]
        expected = np.sum([mean * min(1, 0.4 / np.linalg.norm(mean)) for mean in means], axis=0)
        assert found == pytest.approx(expected, rel=1e-5)

    def test_nobody(self) -> None:
        for owners in (None, np.array([], dtype=np.intp)):
            assert sum_of_averages(lambda rows: np.ones((len(rows), 3)), 3, owners, 0, 1.0).tolist() == [0, 0, 0]


class TestWithNoise:
    @pytest.mark.parametrize("size", [0.0, 1.0, 1e3, 1e9])
    @pytest.mark.parametrize("scale", ["standard", "range", "none"])
    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 10**6))
    def test_whatever_the_noise_the_result_is_plausible(self, scale: Any, size: float, seed: int) -> None:
        algorithm = PrivatePreprocess(FEATURES, 100, scale, "patient", 2.0)
        rng = np.random.default_rng(seed)
        layout = algorithm.layout(algorithm.broadcast(algorithm.init()))
        total = {"sums": rng.normal(0, size, layout[0].shape)}
        found = algorithm.finish(algorithm.update(algorithm.init(), total))
        Encoder(FEATURES, found)  # refuses what is implausible
        assert found.patients is not None
        assert 1 <= found.patients < float("inf")
        for name, (low, high) in {"age": (18, 110), "crp": (0, 400)}.items():
            half = (high - low) / 2
            assert low <= found.means[name] <= high
            assert 0.01 * half * (1 - 1e-12) <= found.deviations[name] <= half * (1 + 1e-12)

    def test_the_count_carries_the_noise_that_was_asked_for(self) -> None:
        algorithm = PrivatePreprocess(FEATURES, 10_000, "standard", "patient", 3.0)
        # 1 for the count, 9/8 for each scaled number, 1 for an imputed category
        norm = (1 + 9 / 8 + 9 / 8 + 1) ** 0.5
        assert algorithm.norm == pytest.approx(norm, rel=1e-5)
        table = cohort(400, 1)
        counts = [
            fit([table], noise=1.0, multiplier=3.0, randomness=Randomness.of_seed(i)).patients for i in range(400)
        ]
        assert np.mean(counts) == pytest.approx(400, abs=5 * 3 * norm / 20)
        assert np.std(counts) == pytest.approx(3 * norm, rel=0.15)

    def test_means_and_deviations_are_close_for_many_patients(self) -> None:
        tables = [cohort(4000, seed) for seed in range(3)]
        exact, noisy = fit(tables), fit(tables, noise=1.0, multiplier=20.0)
        for name, half in (("age", 46), ("crp", 200)):
            assert noisy.means[name] == pytest.approx(exact.means[name], abs=0.03 * half)
            assert noisy.deviations[name] == pytest.approx(exact.deviations[name], rel=0.3)
        assert noisy.modes == exact.modes

    def test_a_deviation_lost_in_noise_is_taken_for_large(self) -> None:
        """Too small a one would blow a column up until every patient is clipped."""
        table = cohort(300, 7)
        table.columns["age"][:] = 60.0
        found = [
            fit([table], noise=1.0, multiplier=5.0, randomness=Randomness.of_seed(i)).deviations["age"]
            for i in range(50)
        ]
        assert min(found) > 0.1 * 46


def test_one_round_in_its_order() -> None:
    algorithm = PrivatePreprocess(FEATURES, 100, "standard", "patient", 1.0)
    broadcast = algorithm.broadcast(algorithm.init())
    algorithm.admit(broadcast, None)
    with pytest.raises(ProtocolError, match="one round"):
        algorithm.admit(broadcast, broadcast)


class TestFitted:
    def test_the_number_of_patients_travels(self) -> None:
        found = fit([cohort(50, 1)], noise=1.0, multiplier=1.0)
        assert codec.decode(codec.encode(found), Fitted) == found
        without = Fitted(found.means, found.deviations, found.modes)
        assert codec.decode(codec.encode(without), Fitted) == without

    @pytest.mark.parametrize("patients", [0.0, 0.99, -5.0, float("nan"), float("inf")])
    def test_an_impossible_number_of_patients_is_refused(self, patients: float) -> None:
        found = fit([cohort(50, 1)])
        with pytest.raises(ProtocolError, match="cannot have been fitted"):
            Encoder(FEATURES, Fitted(found.means, found.deviations, found.modes, patients))
