"""Gradient descent for regressions: the references' optimum without noise, and one unit's reach with it."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge

from cohortium.core import codec
from cohortium.core.errors import ConvergenceError, ProtocolError, StudyError
from cohortium.core.features import BinaryTarget, Category, CountTarget, Feature, Number, NumberTarget
from cohortium.core.models import Penalty, Regression
from cohortium.core.protection import Privacy
from cohortium.core.random import Randomness
from cohortium.core.study import Cohort, Purpose, Sites, Study
from cohortium.core.training import Descent, Preprocessing
from cohortium.learning.algorithm import Then, in_the_clear
from cohortium.learning.coefficients import CoefficientFit, between
from cohortium.learning.descent import DescentBroadcast, GradientDescent
from cohortium.learning.model import GlobalModel, from_bytes
from cohortium.learning.preprocess import Encoder, Fitted, Preprocess
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
KINDS: list[Any] = list(TARGETS)
ROOT = Randomness.of_seed(0)


def cohort(kind: str, rows: int, seed: int) -> Table:
    rng = np.random.default_rng(seed)
    columns = {
        "age": np.clip(rng.normal(60, 15, rows), 18, 110),
        "crp": np.clip(rng.lognormal(2.5, 0.6, rows), 0, 100),
        "sex": rng.integers(0, 2, rows).astype(float),
    }
    eta = 0.03 * (columns["age"] - 60) + 0.02 * columns["crp"] - 0.5 * columns["sex"]
    if kind == "logistic":
        target = (rng.random(rows) < 1 / (1 + np.exp(-eta))).astype(float)
    elif kind == "linear":
        target = np.clip(20 + 8 * eta + rng.normal(0, 6, rows), -20, 80)
    else:
        target = np.minimum(rng.poisson(np.exp(0.4 * eta + 0.5)), 60).astype(float)
    return Table(rows, columns, target)


TABLES = {kind: [cohort(kind, rows, seed) for seed, rows in enumerate((150, 90, 260))] for kind in KINDS}


def visits(kind: str, rows: int, patients: int, seed: int) -> Table:
    """Returns a cohort whose patients have several records each."""
    owners = np.random.default_rng(seed).integers(0, patients, rows)
    return replace(cohort(kind, rows, seed), patient=np.unique(owners, return_inverse=True)[1])


def regress(fitted: Fitted, kind: Any, **other: Any) -> GradientDescent:
    scale, l2, unit = other.pop("scale", "standard"), other.pop("l2", 0.0), other.pop("unit", "patient")
    multiplier, rate = other.pop("multiplier", None), other.pop("rate", 1.0)
    model, training = Regression(kind=kind, penalty=Penalty(l2=l2)), Descent(**other)
    return GradientDescent(
        Encoder(FEATURES, fitted), TARGETS[kind], model, training, scale, 5000, unit, multiplier, rate
    )


def fitted(tables: list[Table], patients: float | None = None) -> Fitted:
    return replace(in_the_clear(Preprocess(FEATURES, 5000), tables, ROOT), patients=patients)


def fit(kind: Any, tables: list[Table], **other: Any) -> CoefficientFit:
    return in_the_clear(regress(fitted(tables, other.pop("patients", None)), kind, **other), tables, ROOT)


def scaled(table: Table, scale: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a design on a study's scale, its shift and its width, in plain arithmetic."""
    raw = np.column_stack([table.columns["age"], table.columns["crp"], table.columns["sex"]])
    shift, width = np.zeros(3), np.ones(3)
    if scale == "standard":
        shift[:2], width[:2] = raw[:, :2].mean(axis=0), raw[:, :2].std(axis=0)
    elif scale == "range":
        shift[:2], width[:2] = (64, 50), (46, 50)
    return (raw - shift) / width, shift, width


def reference(kind: str, x: np.ndarray, y: np.ndarray, l2: float, weights: Any = None) -> np.ndarray:
    small = max(l2, 1e-9)
    total = len(y) if weights is None else weights.sum()
    models: dict[str, Any] = {
        "logistic": lambda: LogisticRegression(C=1 / small, tol=1e-13, max_iter=1000, solver="newton-cholesky"),
        "linear": lambda: Ridge(alpha=small, tol=1e-14),
        "poisson": lambda: PoissonRegressor(alpha=small / total, tol=1e-13, max_iter=1000, solver="newton-cholesky"),
    }
    model = models[kind]().fit(x, y, sample_weight=weights)
    return np.concatenate([np.ravel(model.intercept_), np.ravel(model.coef_)])


def raw(beta: np.ndarray, shift: np.ndarray, width: np.ndarray) -> np.ndarray:
    slopes = beta[1:] / width
    return np.concatenate([[beta[0] - slopes @ shift], slopes])


RATES = {"logistic": 3.0, "linear": 0.5, "poisson": 0.1}


class TestWithoutNoise:
    @pytest.mark.parametrize("l2", [0.0, 20.0])
    @pytest.mark.parametrize("kind", KINDS)
    def test_many_rounds_reach_the_references_optimum(self, kind: Any, l2: float) -> None:
        table = pooled(TABLES[kind])
        x, shift, width = scaled(table, "standard")
        found = fit(kind, TABLES[kind], l2=l2, rounds=900, learning_rate=RATES[kind], momentum=0.8)
        assert found.coefficients == pytest.approx(raw(reference(kind, x, table.target, l2), shift, width), rel=1e-5)
        assert (found.patients, found.rounds, found.names) == (500, 900, ("(intercept)", "age", "crp", "sex[m]"))

    def test_the_penalty_applies_on_the_studys_scale(self) -> None:
        table = pooled(TABLES["logistic"])
        x, shift, width = scaled(table, "range")
        found = fit("logistic", TABLES["logistic"], scale="range", l2=3.0, rounds=2500, learning_rate=4.0, momentum=0.9)
        expected = raw(reference("logistic", x, table.target, 3.0), shift, width)
        assert found.coefficients == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_clip_that_nothing_reaches_changes_nothing(self, kind: Any) -> None:
        some = {"rounds": 7, "learning_rate": RATES[kind], "momentum": 0.3, "l2": 2.0}
        apart = fit(kind, TABLES[kind], **some)
        assert fit(kind, TABLES[kind], clip=80.0, **some).coefficients == pytest.approx(apart.coefficients, rel=1e-5)

    @settings(max_examples=15, deadline=None)
    @given(st.sampled_from(KINDS), st.sampled_from([None, 0.4, 2.0]), st.integers(0, 10**6), st.integers(1, 6))
    def test_any_split_gives_the_pooled_fit(self, kind: Any, clip: Any, seed: int, sites: int) -> None:
        table = visits(kind, 200, 80, 5)
        assert table.patient is not None
        # a patient's records are all at one hospital
        site = np.random.default_rng(seed).integers(0, sites, table.patients)[table.patient]
        tables = [table.take(site == index) for index in np.unique(site)]
        some = {"rounds": 6, "learning_rate": RATES[kind], "clip": clip}
        apart, together = fit(kind, tables, **some), fit(kind, [table], **some)
        assert apart.coefficients == pytest.approx(together.coefficients, rel=1e-9, abs=1e-12)
        assert apart.patients == together.patients == (200 if clip is None else 80 - (80 - table.patients))

    def test_rows_beyond_the_clip_are_weighted_and_nobody_is_biased(self) -> None:
        """A logistic fit with a clip is the weighted regression, to the last digit: no gradient is scaled down."""
        table = pooled(TABLES["logistic"])
        x, shift, width = scaled(table, "standard")
        weights = np.minimum(1, 1.2 / np.sqrt(1 + (x**2).sum(axis=1)))
        assert (weights < 1).mean() > 0.5
        found = fit("logistic", TABLES["logistic"], clip=1.2, rounds=900, learning_rate=4.0, momentum=0.8)
        expected = raw(reference("logistic", x, table.target, 0.0, weights), shift, width)
        assert found.coefficients == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("unit", ["patient", "record", "site"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_step_against_each_patient_one_by_one(self, kind: Any, unit: Any) -> None:
        table = visits(kind, 60, 15, 3)
        assert table.patient is not None
        assert table.target is not None
        x, shift, width = scaled(table, "standard")
        z = np.column_stack([np.ones(60), x])
        y = (table.target - 30) / 50 if kind == "linear" else table.target
        residual = {"logistic": 0.5 - y, "linear": -y, "poisson": 1 - y}[kind]
        owners = {"patient": table.patient, "record": np.arange(60), "site": np.zeros(60, dtype=int)}[unit]
        clip, total = 0.8, np.zeros(4)
        for owner in set(owners.tolist()):
            rows = np.flatnonzero(owners == owner)
            weighted = [residual[row] * z[row] * min(1, clip / np.linalg.norm(z[row])) for row in rows]
            mine = np.mean(weighted, axis=0) if unit == "site" else np.sum(weighted, axis=0)
            total += mine * min(1, clip / max(1e-9, np.linalg.norm(mine)))
        beta = -0.3 * total / len(set(owners.tolist()))
        expected = raw(beta, shift, width) * (50 if kind == "linear" else 1) + np.array([30, 0, 0, 0]) * (
            kind == "linear"
        )
        found = fit(kind, [table], unit=unit, rounds=1, learning_rate=0.3, clip=clip)
        assert np.array(found.coefficients) == pytest.approx(expected, rel=1e-6, abs=1e-8)
        assert found.patients == len(set(owners.tolist()))

    def test_momentum_keeps_a_share_of_the_last_step(self) -> None:
        tables, training = TABLES["logistic"], {"rounds": 3, "learning_rate": 0.7, "momentum": 0.4, "l2": 5.0}
        x, shift, width = scaled(pooled(tables), "standard")
        z, y = np.column_stack([np.ones(500), x]), pooled(tables).target
        betas = [np.zeros(4), np.zeros(4)]
        for _ in range(3):
            gradient = z.T @ (1 / (1 + np.exp(-z @ betas[-1])) - y) / 500
            moved = betas[-1] + 0.4 * (betas[-1] - betas[-2]) - 0.7 * gradient
            betas.append(moved / (1 + 0.7 * np.array([0, 5, 5, 5]) / 500))
        assert fit("logistic", tables, **training).coefficients == pytest.approx(raw(betas[-1], shift, width), rel=1e-9)

    def test_no_penalty_is_too_large(self) -> None:
        table = pooled(TABLES["linear"])
        found = fit("linear", TABLES["linear"], l2=1e9, rounds=300, learning_rate=0.5)
        assert np.abs(found.coefficients[1:]).max() < 1e-4
        assert found.coefficients[0] == pytest.approx(table.target.mean(), rel=1e-4)

    def test_a_loss_that_rises_is_an_error(self) -> None:
        with pytest.raises(ConvergenceError, match=r"lower training\.learning_rate"):
            fit("linear", TABLES["linear"], rounds=30, learning_rate=50.0)

    def test_the_loss_is_the_mean_of_minus_the_log_likelihood(self) -> None:
        first = fit("logistic", TABLES["logistic"], rounds=1)
        assert first.loss == pytest.approx(np.log(2), rel=1e-9)
        table = pooled(TABLES["linear"])
        assert fit("linear", TABLES["linear"], rounds=1).loss == pytest.approx(((table.target - 30) ** 2).mean() / 2)

    def test_scales_convert_both_ways(self) -> None:
        encoder = Encoder(FEATURES, fitted(TABLES["logistic"]))
        table = TABLES["logistic"][0]
        rows = {
            scale: np.column_stack([np.ones(table.rows), encoder.design(table, scale)])  # type: ignore[arg-type]
            for scale in ("standard", "range", "none")
        }
        for old, before in rows.items():
            for new, after in rows.items():
                assert before @ between(encoder, old, new).T == pytest.approx(after, rel=1e-9, abs=1e-9)  # type: ignore[arg-type]


class TestWithNoise:
    def test_a_clip_is_needed(self) -> None:
        with pytest.raises(StudyError, match=r"training\.clip is missing"):
            regress(fitted(TABLES["logistic"]), "logistic", multiplier=1.0)

    def test_nothing_but_the_noisy_gradient_leaves(self) -> None:
        algorithm = regress(fitted(TABLES["logistic"], 500.0), "logistic", multiplier=3.0, clip=0.9, rate=0.25)
        broadcast = algorithm.broadcast(algorithm.init())
        (block,) = algorithm.layout(broadcast)
        assert (block.name, block.shape) == ("gradient", (4,))
        assert block.noise is not None
        assert (block.noise.norm, block.noise.multiplier, block.noise.rate) == (0.9, 3.0, 0.25)
        assert list(algorithm.local(broadcast, TABLES["logistic"][0], {}, ROOT)[0]) == ["gradient"]

    def test_the_result_is_the_mean_over_the_second_half(self) -> None:
        tables, some = TABLES["logistic"], {"learning_rate": 0.7, "clip": 1.0}
        each = [np.array(fit("logistic", tables, rounds=rounds, **some).coefficients) for rounds in range(1, 6)]
        private = fit("logistic", tables, rounds=5, multiplier=1e-9, patients=500.0, **some)
        assert private.coefficients == pytest.approx(np.mean(each[2:], axis=0), rel=1e-6)
        assert (private.patients, private.loss) == (500, None)

    def test_the_noise_of_a_step(self) -> None:
        """Of one step from zero: learning rate, multiplier and clip, divided by the noisy number of patients."""
        table = TABLES["logistic"][0]
        algorithm = regress(
            fitted([table], 120.0), "logistic", multiplier=3.0, clip=0.5, learning_rate=2.0, rounds=1, scale="none"
        )
        found = [in_the_clear(algorithm, [table], Randomness.of_seed(i), 1.0).coefficients for i in range(500)]
        assert np.std(found, axis=0) == pytest.approx(np.full(4, 2.0 * 3.0 * 0.5 / 120), rel=0.15)

    def test_the_divisor_is_the_noisy_number_of_patients(self) -> None:
        table, some = TABLES["logistic"][0], {"rounds": 1, "clip": 1.0, "scale": "none", "multiplier": 1.0}
        one, two = (np.array(fit("logistic", [table], patients=n, **some).coefficients) for n in (100.0, 200.0))
        assert one == pytest.approx(2 * two, rel=1e-12)

    def test_a_private_fit_is_near_the_optimum(self) -> None:
        tables = [cohort("logistic", 4000, seed) for seed in range(3)]
        exact = np.array(fit("logistic", tables, rounds=300, learning_rate=2.0, momentum=0.5).coefficients)
        algorithm = Then(
            PrivatePreprocess(FEATURES, 5000, "standard", "patient", 22.0),
            Fitted,
            lambda found: regress(
                found, "logistic", rounds=40, learning_rate=2.0, momentum=0.5, clip=2.0, multiplier=47.0
            ),
            40,
        )
        _, private = in_the_clear(algorithm, tables, ROOT, 1.0)
        design = np.column_stack([tables[0].columns[name] for name in FEATURES])
        gap = private.predict_mean(design) - CoefficientFit("logistic", private.names, tuple(exact), 0, 0).predict_mean(
            design
        )
        assert np.abs(gap).mean() < 0.03

    @settings(max_examples=30, deadline=None)
    @given(st.sampled_from(KINDS), st.sampled_from(["standard", "range", "none"]), st.integers(0, 10**6))
    def test_no_noise_is_too_large(self, kind: Any, scale: Any, seed: int) -> None:
        tables = TABLES[kind][:1]
        algorithm = regress(
            fitted(tables, 1.0), kind, scale=scale, multiplier=1e9, clip=1.0, rounds=4, learning_rate=5.0
        )
        found = in_the_clear(algorithm, tables, Randomness.of_seed(seed), 1.0)
        assert np.isfinite(found.coefficients).all()
        design = np.column_stack([tables[0].columns[name] for name in FEATURES])
        assert np.isfinite(found.predict_mean(design)).all()


class TestOnePatient:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_hundred_records_move_the_sum_no_more_than_the_clip(self, kind: Any) -> None:
        table = cohort(kind, 160, 2)
        assert table.target is not None
        table.columns["crp"][60:] = 100.0
        table.target[60:] = TARGETS[kind].maximum if kind == "poisson" else table.target.max()
        everybody = replace(table, patient=np.minimum(np.arange(160), 60))
        without = everybody.take(np.arange(60))
        algorithm = regress(fitted([table], 61.0), kind, multiplier=1.0, clip=0.6)
        for beta in (np.zeros(4), np.array([3.0, -2.0, 5.0, 1.0]), np.full(4, -40.0)):
            broadcast = DescentBroadcast(0, beta)
            sums = [algorithm.local(broadcast, rows, {}, ROOT)[0]["gradient"] for rows in (everybody, without)]
            moved = np.linalg.norm(sums[0] - sums[1])
            assert moved <= 0.6
            assert moved > 0.3 or beta.any()

    def test_clipping_records_instead_would_break_that(self) -> None:
        """The same patient's records as if each were another patient's: what the test above would notice."""
        table = cohort("logistic", 160, 2)
        assert table.target is not None
        table.columns["crp"][60:], table.target[60:] = 100.0, 1.0
        algorithm = regress(fitted([table], 61.0), "logistic", multiplier=1.0, clip=0.6, unit="record")
        broadcast = DescentBroadcast(0, np.zeros(4))
        sums = [
            algorithm.local(broadcast, rows, {}, ROOT)[0]["gradient"] for rows in (table, table.take(np.arange(60)))
        ]
        assert np.linalg.norm(sums[0] - sums[1]) > 10


class TestSampling:
    def algorithm(self, rate: float, rounds: int = 3, **other: Any) -> GradientDescent:
        some = {"multiplier": 1.0, "clip": 1.0, "rate": rate, "rounds": rounds}
        return regress(fitted(TABLES["logistic"], 500.0), "logistic", **{**some, **other})

    def gradient(
        self, algorithm: GradientDescent, round: int, table: Table, randomness: Randomness = ROOT
    ) -> np.ndarray:
        broadcast = DescentBroadcast(round, np.zeros(4))
        return np.asarray(algorithm.local(broadcast, table, {}, randomness)[0]["gradient"])

    def test_each_round_and_each_site_draws_anew(self) -> None:
        algorithm, table = self.algorithm(0.5), TABLES["logistic"][2]
        first = self.gradient(algorithm, 0, table)
        assert first.tolist() == self.gradient(algorithm, 0, table).tolist()
        assert first.tolist() != self.gradient(algorithm, 1, table).tolist()
        assert first.tolist() != self.gradient(algorithm, 0, table, Randomness.of_seed(5)).tolist()

    def test_a_draw_has_the_rate_asked_for(self) -> None:
        table = cohort("logistic", 400, 1)
        algorithm = self.algorithm(0.3, multiplier=None)
        numbers = [
            float(algorithm.local(DescentBroadcast(0, np.zeros(4)), table, {}, Randomness.of_seed(i))[0]["patients"])
            for i in range(200)
        ]
        assert np.mean(numbers) == pytest.approx(120, abs=4 * (400 * 0.3 * 0.7 / 200) ** 0.5)
        assert np.var(numbers) == pytest.approx(400 * 0.3 * 0.7, rel=0.4)

    def test_all_of_a_patients_records_are_drawn_or_none(self) -> None:
        table = visits("logistic", 300, 20, 1)
        assert table.patient is not None
        drawn = table.drawn("patient", 0.5, ROOT)
        ages = set(drawn.columns["age"].tolist())
        for patient in range(table.patients):
            mine = set(table.columns["age"][table.patient == patient].tolist())
            assert mine <= ages or not mine & ages
        assert 0 < drawn.patients < table.patients

    def test_the_divisor_is_fixed(self) -> None:
        """On average over draws, a step is that of all patients."""
        table = TABLES["logistic"][2]
        whole = fit("logistic", [table], rounds=1, clip=1.0, multiplier=1e-9, patients=260.0, scale="none").coefficients
        algorithm = regress(
            fitted([table], 260.0), "logistic", rounds=1, clip=1.0, multiplier=1e-9, rate=0.5, scale="none"
        )
        some = [in_the_clear(algorithm, [table], Randomness.of_seed(i)).coefficients for i in range(400)]
        assert np.mean(some, axis=0) == pytest.approx(np.array(whole), abs=5 * np.std(some, axis=0).max() / 20)

    def test_nobody_drawn_is_no_error(self) -> None:
        table = TABLES["logistic"][0].take(np.arange(2))
        algorithm = self.algorithm(1e-9)
        assert self.gradient(algorithm, 0, table).tolist() == [0.0] * 4
        several = replace(table, patient=np.zeros(2, dtype=np.intp))
        assert self.gradient(algorithm, 0, several).tolist() == [0.0] * 4
        assert np.isfinite(fit("logistic", [table], rate=1e-9, rounds=2).coefficients).all()


class TestAdmission:
    def test_only_the_next_round(self) -> None:
        algorithm = regress(fitted(TABLES["logistic"]), "logistic", rounds=3)
        zero = np.zeros(4)
        first, second = DescentBroadcast(0, zero), DescentBroadcast(1, zero + 0.5)
        algorithm.admit(first, None)
        algorithm.admit(second, first)
        for late, before in ((second, None), (first, first), (first, second), (DescentBroadcast(2, zero), first)):
            with pytest.raises(ProtocolError, match="out of order"):
                algorithm.admit(late, before)
        with pytest.raises(ProtocolError, match="out of order"):
            algorithm.admit(DescentBroadcast(3, zero), DescentBroadcast(2, zero))

    @pytest.mark.parametrize(
        "beta",
        [
            np.zeros(3),
            np.zeros((4, 1)),
            np.zeros(4, np.float32),
            np.full(4, np.nan),
            np.array([0, np.inf, 0, 0]),
            np.array([0, 0, 1.1e4, 0]),
        ],
    )
    def test_impossible_coefficients(self, beta: np.ndarray) -> None:
        algorithm = regress(fitted(TABLES["logistic"]), "logistic")
        with pytest.raises(ProtocolError, match="wrong shape or are out of bounds"):
            algorithm.admit(DescentBroadcast(1, beta), DescentBroadcast(0, np.zeros(4)))

    def test_a_start_elsewhere_than_at_zero(self) -> None:
        with pytest.raises(ProtocolError, match="starts with all coefficients at zero"):
            regress(fitted(TABLES["logistic"]), "logistic").admit(DescentBroadcast(0, np.full(4, 0.1)), None)


def study(kind: Any, **training: Any) -> Study:
    return Study(
        name="ward",
        purpose=Purpose(summary="tests"),
        sites=Sites(include=("a", "b", "c")),
        cohort=Cohort(dataset="d", patient="id", features=FEATURES, target=TARGETS[kind]),
        model=Regression(kind=kind),
        training=Descent(**training),
        preprocessing=Preprocessing(scale="standard"),
        privacy=Privacy(unit="patient"),
    )


class TestGlobalModel:
    @pytest.mark.parametrize("kind", KINDS)
    def test_predicts_and_survives_a_file(self, kind: Any) -> None:
        tables = TABLES[kind]
        found = fit(kind, tables, rounds=5, learning_rate=RATES[kind])
        model = GlobalModel(study(kind), fitted(tables, 497.3), found)
        again = from_bytes(model.to_bytes())
        assert again == model
        assert isinstance(again.fit, CoefficientFit)
        assert again.coef_.tolist() == list(found.coefficients[1:])
        assert again.intercept_ == found.coefficients[0]
        table = tables[0]
        eta = found.coefficients[0] + sum(
            slope * table.columns[name] for slope, name in zip(found.coefficients[1:], FEATURES, strict=True)
        )
        mean = {"logistic": 1 / (1 + np.exp(-eta)), "linear": eta, "poisson": np.exp(eta)}[kind]
        assert again.expect(table) == pytest.approx(mean, rel=1e-12)

    def test_a_file_without_the_number_of_patients_is_read(self) -> None:
        model = GlobalModel(study("linear"), fitted(TABLES["linear"]), fit("linear", TABLES["linear"], rounds=1))
        content = json.loads(model.to_bytes())
        del content["preprocessing"]["patients"]
        assert from_bytes(json.dumps(content).encode()) == model

    @pytest.mark.parametrize("change", ["kind", "names", "coefficients", "section"])
    def test_a_changed_file_is_refused(self, change: str) -> None:
        model = GlobalModel(
            study("logistic"), fitted(TABLES["logistic"]), fit("logistic", TABLES["logistic"], rounds=1)
        )
        content = json.loads(model.to_bytes())
        section = content["coefficients"]
        if change == "section":
            content["glm"] = content.pop("coefficients")
        elif change == "kind":
            section["kind"] = "linear"
        else:
            section[change] = section[change][:-1]
        with pytest.raises(StudyError):
            from_bytes(json.dumps(content).encode())

    def test_a_fit_travels(self) -> None:
        found = fit("poisson", TABLES["poisson"], rounds=2, learning_rate=0.1)
        assert codec.decode(codec.encode(found), CoefficientFit) == found
