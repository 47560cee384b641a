"""AdaSSP: least squares from one sum, a ridge where noise asks for it, and one unit's reach."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import roc_auc_score

from cohortium.core.errors import CohortError, ProtocolError, StudyError
from cohortium.core.features import BinaryTarget, Category, CountTarget, Feature, Number, NumberTarget
from cohortium.core.models import Penalty, Regression
from cohortium.core.random import Randomness
from cohortium.core.training import Newton, OneShot
from cohortium.learning.algorithm import Then, in_the_clear
from cohortium.learning.coefficients import CoefficientFit
from cohortium.learning.glm import Glm
from cohortium.learning.oneshot import OneShotRegression
from cohortium.learning.preprocess import Encoder, FitBroadcast, Fitted, Preprocess
from cohortium.learning.private_preprocess import PrivatePreprocess
from cohortium.learning.table import Table, pooled

FEATURES: dict[str, Feature] = {
    "age": Number(unit="a", range=(18, 110)),
    "crp": Number(unit="mg/L", range=(0, 100)),
    "sex": Category(levels=("f", "m")),
}
TARGETS: dict[str, Any] = {
    "logistic": BinaryTarget(name="died"),
    "linear": NumberTarget(name="stay", unit="d", range=(-20, 80)),
    "poisson": CountTarget(name="visits", maximum=60),
}
KINDS: list[Any] = ["logistic", "linear"]
ROOT = Randomness.of_seed(0)


def cohort(kind: str, rows: int, seed: int, base: float = 0.0) -> Table:
    rng = np.random.default_rng(seed)
    columns = {
        "age": np.clip(rng.normal(60, 15, rows), 18, 110),
        "crp": np.clip(rng.lognormal(2.5, 0.6, rows), 0, 100),
        "sex": rng.integers(0, 2, rows).astype(float),
    }
    eta = base + 0.03 * (columns["age"] - 60) + 0.01 * columns["crp"] - 0.5 * columns["sex"]
    if kind == "logistic":
        target = (rng.random(rows) < 1 / (1 + np.exp(-eta))).astype(float)
    else:
        target = np.clip(20 + 8 * eta + rng.normal(0, 6, rows), -20, 80)
    return Table(rows, columns, target)


TABLES = {kind: [cohort(kind, rows, seed) for seed, rows in enumerate((150, 90, 260))] for kind in KINDS}


def design(table: Table) -> np.ndarray:
    return np.column_stack([table.columns["age"], table.columns["crp"], table.columns["sex"]])


def regress(fitted: Fitted, kind: Any, **other: Any) -> OneShotRegression:
    scale, unit, multiplier = (
        other.pop("scale", "standard"),
        other.pop("unit", "patient"),
        other.pop("multiplier", None),
    )
    model = Regression(kind=kind, penalty=Penalty(l2=other.pop("l2", 0.0)))
    spread, training = other.pop("spread", 1.0), OneShot(**other)
    encoder = Encoder(FEATURES, fitted)
    return OneShotRegression(encoder, TARGETS[kind], model, training, scale, 20_000, unit, multiplier, spread)


def fitted(tables: list[Table], patients: float | None = None) -> Fitted:
    return replace(in_the_clear(Preprocess(FEATURES, 20_000), tables, ROOT), patients=patients)


def fit(kind: Any, tables: list[Table], **other: Any) -> CoefficientFit:
    algorithm = regress(fitted(tables, other.pop("patients", None)), kind, **other)
    return in_the_clear(algorithm, tables, ROOT)


def auc(found: CoefficientFit, table: Table) -> float:
    return float(roc_auc_score(table.target, found.predict_mean(design(table))))


class TestWithoutNoise:
    @pytest.mark.parametrize("scale", ["standard", "range", "none"])
    def test_a_linear_fit_is_least_squares(self, scale: Any) -> None:
        table = pooled(TABLES["linear"])
        expected = LinearRegression().fit(design(table), table.target)
        found = fit("linear", TABLES["linear"], scale=scale)
        assert found.coefficients[1:] == pytest.approx(expected.coef_, rel=1e-5)
        assert found.coefficients[0] == pytest.approx(expected.intercept_, rel=1e-5)
        assert (found.patients, found.rounds, found.loss) == (500, 1, None)

    def test_a_penalty_is_ridge_on_the_studys_scale(self) -> None:
        table = pooled(TABLES["linear"])
        x = design(table)
        shift, width = x.mean(axis=0), x.std(axis=0)
        shift[2], width[2] = 0, 1
        expected = Ridge(alpha=30.0).fit((x - shift) / width, table.target)
        for clip in (None, 12.0):
            found = fit("linear", TABLES["linear"], l2=30.0, clip=clip)
            # so wide a clip has a coarse grid
            assert found.coefficients[1:] == pytest.approx(expected.coef_ / width, rel=1e-4)

    def test_a_clip_is_weighted_least_squares(self) -> None:
        table = pooled(TABLES["linear"])
        x = design(table)
        shift, width = x.mean(axis=0), x.std(axis=0)
        shift[2], width[2] = 0, 1
        weights = np.minimum(1, 1.5**2 / (1 + (((x - shift) / width) ** 2).sum(axis=1)))
        assert 0.2 < (weights < 1).mean() < 0.9
        expected = LinearRegression().fit(x, table.target, weights)
        found = fit("linear", TABLES["linear"], clip=1.5)
        assert found.coefficients[1:] == pytest.approx(expected.coef_, rel=1e-5)

    def test_a_unit_counts_once(self) -> None:
        table = pooled(TABLES["linear"])
        owners = np.unique(np.random.default_rng(3).integers(0, 120, 500), return_inverse=True)[1]
        weights = 1 / np.bincount(owners)[owners]
        expected = LinearRegression().fit(design(table), table.target, weights)
        found = fit("linear", [replace(table, patient=owners)], clip=12.0)
        assert found.coefficients[1:] == pytest.approx(expected.coef_, rel=1e-4)
        assert found.patients == owners.max() + 1

    @pytest.mark.parametrize("base", [0.0, -2.5])
    def test_a_logistic_fit_is_one_newton_step_from_the_model_without_features(self, base: float) -> None:
        table = cohort("logistic", 1500, 3, base)
        assert table.target is not None
        x = np.column_stack([np.ones(table.rows), design(table)])
        p = table.target.mean()
        step = np.linalg.solve(p * (1 - p) * x.T @ x, x.T @ (table.target - p))
        expected = step + np.array([np.log(p / (1 - p)), 0, 0, 0])
        assert fit("logistic", [table]).coefficients == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("base", [0.0, -2.5])
    def test_it_ranks_patients_as_the_full_fit_does(self, base: float) -> None:
        table, held = cohort("logistic", 2000, 3, base), cohort("logistic", 2000, 4, base)
        encoder = Encoder(FEATURES, fitted([table]))
        glm = Glm(encoder, TARGETS["logistic"], Regression(kind="logistic"), Newton(), "standard", 5000)
        full, one = in_the_clear(glm, [table], ROOT), fit("logistic", [table], clip=2.5)
        assert auc(one, held) == pytest.approx(roc_auc_score(held.target, full.predict_mean(design(held))), abs=0.003)
        assert np.abs(one.predict_mean(design(held)) - full.predict_mean(design(held))).mean() < 0.02

    @settings(max_examples=15, deadline=None)
    @given(st.sampled_from(KINDS), st.sampled_from([None, 1.5]), st.integers(0, 10**6), st.integers(1, 6))
    def test_any_split_gives_the_pooled_fit(self, kind: Any, clip: Any, seed: int, sites: int) -> None:
        table = replace(pooled(TABLES[kind]), patient=np.arange(500) // 3)
        site = np.random.default_rng(seed).integers(0, sites, 167)[np.arange(500) // 3]
        tables = [table.take(site == index) for index in np.unique(site)]
        apart, together = fit(kind, tables, clip=clip), fit(kind, [table], clip=clip)
        assert apart.coefficients == pytest.approx(together.coefficients, rel=1e-6)

    def test_a_feature_that_repeats_another(self) -> None:
        table = pooled(TABLES["linear"])
        table.columns["crp"][:] = table.columns["age"] / 2
        with pytest.raises(CohortError, match="repeat others"):
            fit("linear", [table])


class TestWithNoise:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("clip", [None, 2.0])
    def test_the_norm_is_that_of_the_longest_record(self, kind: Any, clip: Any) -> None:
        algorithm = regress(fitted(TABLES[kind], 500.0), kind, scale="range", clip=clip, multiplier=2.0)
        (block,) = algorithm.layout(FitBroadcast())
        length = 2.0  # the intercept and three features of at most 1
        assert block.noise is not None
        assert block.noise.norm == pytest.approx(2**0.5 * length**2, rel=1e-5)
        ends = {"age": np.array([110.0]), "crp": np.array([100.0]), "sex": np.array([1.0])}
        longest = Table(1, ends, np.array([{"logistic": 1.0, "linear": 80.0}[kind]]))
        vector = algorithm.local(FitBroadcast(), longest, {}, ROOT)[0]["moments"]
        assert np.linalg.norm(vector) == pytest.approx(block.noise.norm, rel=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_hundred_records_of_a_patient_count_as_one(self, kind: Any) -> None:
        table = pooled(TABLES[kind]).take(np.arange(160))
        everybody = replace(table, patient=np.minimum(np.arange(160), 60))
        algorithm = regress(fitted([table], 61.0), kind, multiplier=1.0, clip=1.0)
        sums = [
            algorithm.local(FitBroadcast(), rows, {}, ROOT)[0]["moments"]
            for rows in (everybody, everybody.take(np.arange(60)))
        ]
        assert 0 < np.linalg.norm(sums[0] - sums[1]) <= algorithm.norm

    def test_private_fits_are_near_the_optimum(self) -> None:
        tables = [cohort("logistic", 4000, seed) for seed in range(3)]
        held = cohort("logistic", 4000, 9)
        algorithm = Then(
            PrivatePreprocess(FEATURES, 20_000, "standard", "patient", 22.0),
            Fitted,
            lambda found: regress(found, "logistic", clip=2.5, multiplier=7.4),
            1,
        )
        found = [in_the_clear(algorithm, tables, Randomness.of_seed(i), 1.0)[1] for i in range(5)]
        assert min(auc(one, held) for one in found) > auc(fit("logistic", tables), held) - 0.01

    def test_the_ridge_grows_with_the_noise_that_is_known_of(self) -> None:
        tables, some = TABLES["linear"], {"multiplier": 2.0, "clip": 2.0, "patients": 500.0}
        sizes = [np.abs(fit("linear", tables, spread=spread, **some).coefficients[1]) for spread in (1.0, 30.0, 900.0)]
        assert sizes[0] > sizes[1] > sizes[2]
        # the sums themselves carry no noise here, and little noise asks for no ridge
        exact = fit("linear", tables, clip=2.0).coefficients
        assert fit("linear", tables, **{**some, "multiplier": 1e-6}).coefficients == pytest.approx(exact, rel=1e-5)

    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(KINDS), st.sampled_from([None, 0.5, 3.0]), st.integers(0, 10**6), st.sampled_from([1, 1e3, 1e9])
    )
    def test_no_noise_is_too_large(self, kind: Any, clip: Any, seed: int, multiplier: float) -> None:
        tables = TABLES[kind][:1]
        algorithm = regress(fitted(tables, 1.0), kind, clip=clip, multiplier=multiplier)
        found = in_the_clear(algorithm, tables, Randomness.of_seed(seed), 1.0)
        assert np.isfinite(found.predict_mean(design(tables[0]))).all()

    def test_what_is_solved_is_never_indefinite(self) -> None:
        """Least squares on the noisy matrix itself would at times explode where few patients are."""
        tables = TABLES["linear"][:1]
        algorithm = regress(fitted(tables, 150.0), "linear", multiplier=60.0, clip=2.0)
        found = [in_the_clear(algorithm, tables, Randomness.of_seed(i), 1.0) for i in range(200)]
        shift, width = np.array([60, 14, 0.5]), np.array([15, 9, 0.5])
        predictions = np.array([one.predict_mean(shift + width * np.eye(3)) for one in found])
        # a ridge as large as the noise keeps predictions within a few times the target's range
        assert np.abs(predictions - 30).max() < 50 * 10


def test_poisson_is_refused() -> None:
    with pytest.raises(StudyError, match=r"'adassp' fits linear and logistic models only"):
        regress(fitted(TABLES["linear"]), "poisson")


def test_one_round_in_its_order() -> None:
    algorithm = regress(fitted(TABLES["linear"]), "linear")
    algorithm.admit(FitBroadcast(), None)
    with pytest.raises(ProtocolError, match="one round"):
        algorithm.admit(FitBroadcast(), FitBroadcast())
