"""Regressions from sums against statsmodels and scikit-learn on the pooled rows."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge

from cohortium.core.errors import CohortError, ConvergenceError
from cohortium.core.features import BinaryTarget, Category, CountTarget, Feature, Number, NumberTarget, Target
from cohortium.core.models import Penalty, Regression
from cohortium.core.random import Randomness
from cohortium.core.training import Newton
from cohortium.learning.algorithm import Then, in_the_clear
from cohortium.learning.glm import Glm, GlmFit
from cohortium.learning.preprocess import Encoder, Fitted, Preprocess
from cohortium.learning.table import Table, pooled

FEATURES: dict[str, Feature] = {
    "age": Number(unit="a", range=(18, 110), missing="impute"),
    "crp": Number(unit="mg/L", range=(0, 400)),
    "sex": Category(levels=("f", "m")),
    "stage": Category(levels=("I", "II", "III"), missing="impute"),
}
COLUMNS = ["age", "crp", "sex[m]", "stage[II]", "stage[III]"]
TARGETS: dict[str, Target] = {
    "logistic": BinaryTarget(name="died"),
    "linear": NumberTarget(name="stay", unit="d", range=(-20, 80)),
    "poisson": CountTarget(name="visits", maximum=60),
}
KINDS: list[Any] = list(TARGETS)
RANDOMNESS = Randomness.of_seed(0)


def cohort(kind: str, rows: int, seed: int, gaps: float = 0.0) -> Table:
    rng = np.random.default_rng(seed)
    columns = {
        "age": np.clip(rng.normal(60, 15, rows), 18, 110),
        "crp": np.clip(rng.lognormal(2.5, 0.8, rows), 0, 400),
        "sex": rng.integers(0, 2, rows).astype(float),
        "stage": rng.choice(3, rows, p=[0.5, 0.3, 0.2]).astype(float),
    }
    eta = 0.03 * (columns["age"] - 60) + 0.01 * columns["crp"] - 0.5 * columns["sex"] + 0.4 * (columns["stage"] == 2)
    if kind == "logistic":
        target = (rng.random(rows) < 1 / (1 + np.exp(-eta))).astype(float)
    elif kind == "linear":
        target = np.clip(20 + 8 * eta + rng.normal(0, 6, rows), -20, 80)
    else:
        target = np.minimum(rng.poisson(np.exp(0.4 * eta + 0.5)), 60).astype(float)
    for name in ("age", "stage"):
        columns[name][rng.random(rows) < gaps] = np.nan
    return Table(rows, columns, target)


def algorithm(kind: Any, scale: Any = "standard", l2: float = 0.0, confidence: float = 0.95, **other: Any) -> Then:
    features, target = other.pop("features", FEATURES), other.pop("target", TARGETS[kind])
    maximum = other.pop("maximum", 5000)
    model, training = Regression(kind=kind, penalty=Penalty(l2=l2), confidence=confidence), Newton(**other)

    def second(fitted: Fitted) -> Glm:
        return Glm(Encoder(features, fitted), target, model, training, scale, maximum)

    return Then(Preprocess(features, maximum), Fitted, second, training.rounds)


def fit(kind: Any, tables: list[Table], **settings: Any) -> GlmFit:
    return in_the_clear(algorithm(kind, **settings), tables, RANDOMNESS)[1]


def design(table: Table) -> pd.DataFrame:
    """Returns the raw design by pandas: means and modes for what is missing, a column for each level but the first."""
    frame = pd.DataFrame(dict(table.columns))
    frame["age"] = frame["age"].fillna(frame["age"].mean())
    frame["stage"] = frame["stage"].fillna(frame["stage"].mode()[0])
    found = {"age": frame["age"], "crp": frame["crp"], "sex[m]": frame["sex"] == 1}
    found |= {"stage[II]": frame["stage"] == 1, "stage[III]": frame["stage"] == 2}
    return pd.DataFrame(found).astype(float)


def statsmodels_fit(kind: str, table: Table) -> Any:
    x = sm.add_constant(design(table))
    if kind == "logistic":
        return sm.Logit(table.target, x).fit(disp=0, method="newton", maxiter=100)
    if kind == "linear":
        return sm.OLS(table.target, x).fit()
    return sm.GLM(table.target, x, family=sm.families.Poisson()).fit(tol=1e-14, maxiter=200)


TABLES = {
    kind: [cohort(kind, 150, 1, 0.1), cohort(kind, 60, 2, 0.3), cohort(kind, 220, 3), cohort(kind, 9, 4)]
    for kind in KINDS
}


class TestUnpenalised:
    @pytest.mark.parametrize("scale", ["standard", "range", "none"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_inference_equals_statsmodels(self, kind: Any, scale: Any) -> None:
        table = pooled(TABLES[kind])
        found, expected = fit(kind, TABLES[kind], scale=scale, tolerance=1e-12), statsmodels_fit(kind, table)
        assert found.names == ("(intercept)", *COLUMNS)
        assert found.coefficients == pytest.approx(expected.params.tolist(), rel=1e-6)
        assert found.errors == pytest.approx(expected.bse.tolist(), rel=1e-6)
        assert found.statistics == pytest.approx(expected.tvalues.tolist(), rel=1e-6)
        assert found.p_values == pytest.approx(expected.pvalues.tolist(), rel=1e-6, abs=1e-300)
        interval = expected.conf_int(0.05)
        assert found.lower == pytest.approx(interval[0].tolist(), rel=1e-6)
        assert found.upper == pytest.approx(interval[1].tolist(), rel=1e-6)
        assert np.array(found.covariance) == pytest.approx(expected.cov_params().to_numpy(), rel=1e-6)
        assert found.patients == table.rows
        loss = expected.ssr / 2 if kind == "linear" else -expected.llf
        assert found.loss == pytest.approx(loss, rel=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_another_level_of_confidence(self, kind: Any) -> None:
        found = fit(kind, TABLES[kind], confidence=0.8, tolerance=1e-12)
        interval = statsmodels_fit(kind, pooled(TABLES[kind])).conf_int(0.2)
        assert found.lower == pytest.approx(interval[0].tolist(), rel=1e-6)
        assert found.upper == pytest.approx(interval[1].tolist(), rel=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_predictions_equal_statsmodels(self, kind: Any) -> None:
        fresh = cohort(kind, 40, 9)
        found, expected = fit(kind, TABLES[kind], tolerance=1e-12), statsmodels_fit(kind, pooled(TABLES[kind]))
        predicted = expected.predict(sm.add_constant(design(fresh))).tolist()
        assert found.predict_mean(design(fresh).to_numpy()).tolist() == pytest.approx(predicted, rel=1e-6)

    def test_the_usual_tolerance_is_close_enough_for_print(self) -> None:
        for kind in ("logistic", "poisson"):
            expected = statsmodels_fit(kind, pooled(TABLES[kind]))
            found = fit(kind, TABLES[kind])
            gap = np.abs(np.array(found.coefficients) - expected.params.to_numpy()) / expected.bse.to_numpy()
            assert gap.max() < 1e-3

    def test_linear_takes_one_round(self) -> None:
        assert fit("linear", TABLES["linear"], rounds=1).rounds == 1

    def test_a_p_value_far_out_is_small_and_not_lost(self) -> None:
        rng = np.random.default_rng(0)
        x = rng.uniform(0, 1, 4000)
        table = Table(4000, {"x": x}, np.clip(x + rng.normal(0, 0.05, 4000), -1, 2))
        target = NumberTarget(name="y", unit="1", range=(-1, 2))
        found = fit("linear", [table], features={"x": Number(unit="1", range=(0, 1))}, target=target)
        assert 0 <= found.p_values[1] < 1e-250
        assert found.coefficients[1] == pytest.approx(np.polyfit(x, table.target, 1)[0], rel=1e-9)


def scaled(table: Table, scale: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the design on a study's scale, with the shift and the width of each column."""
    raw = design(table).to_numpy()
    shift, width = np.zeros(5), np.ones(5)
    for place, name in enumerate(("age", "crp")):
        low, high = (18.0, 110.0) if name == "age" else (0.0, 400.0)
        if scale == "range":
            shift[place], width[place] = (low + high) / 2, (high - low) / 2
        elif scale == "standard":
            shift[place], width[place] = np.nanmean(table.columns[name]), np.nanstd(table.columns[name])
    return (raw - shift) / width, shift, width


def sklearn_fit(kind: str, x: np.ndarray, y: np.ndarray, l2: float) -> tuple[float, np.ndarray]:
    models: dict[str, Any] = {
        "logistic": lambda: LogisticRegression(C=1 / l2, tol=1e-12, max_iter=1000, solver="newton-cholesky"),
        "linear": lambda: Ridge(alpha=l2, tol=1e-14),
        "poisson": lambda: PoissonRegressor(alpha=l2 / len(y), tol=1e-12, max_iter=1000, solver="newton-cholesky"),
    }
    model = models[kind]().fit(x, y)
    return float(np.ravel(model.intercept_)[0]), np.ravel(model.coef_)


class TestRidge:
    @pytest.mark.parametrize("l2", [0.01, 1.0, 300.0])
    @pytest.mark.parametrize("scale", ["standard", "range", "none"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_coefficients_equal_scikit_learns(self, kind: Any, scale: Any, l2: float) -> None:
        table = pooled(TABLES[kind])
        x, shift, width = scaled(table, scale)
        intercept, slopes = sklearn_fit(kind, x, table.target, l2)
        raw = slopes / width
        found = fit(kind, TABLES[kind], scale=scale, l2=l2, tolerance=1e-13)
        assert found.coefficients[1:] == pytest.approx(raw.tolist(), rel=1e-6, abs=1e-9)
        assert found.coefficients[0] == pytest.approx(intercept - float(raw @ shift), rel=1e-6, abs=1e-9)

    @pytest.mark.parametrize("scale", ["standard", "none"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_errors_are_those_of_the_sandwich(self, kind: Any, scale: Any) -> None:
        """(H + L)^-1 H (H + L)^-1 at scikit-learn's own estimate, turned into the features' units."""
        l2, table = 5.0, pooled(TABLES[kind])
        x, shift, width = scaled(table, scale)
        intercept, slopes = sklearn_fit(kind, x, table.target, l2)
        full = np.column_stack([np.ones(table.rows), x])
        eta = intercept + x @ slopes
        weights = {
            "logistic": np.exp(-eta) / (1 + np.exp(-eta)) ** 2,
            "linear": np.ones(table.rows),
            "poisson": np.exp(eta),
        }
        hessian = full.T @ (full * weights[kind][:, None])
        bread = np.linalg.inv(hessian + np.diag([0.0] + [l2] * 5))
        covariance = bread @ hessian @ bread
        if kind == "linear":
            covariance *= ((table.target - eta) ** 2).sum() / (table.rows - 6)
        to_raw = np.diag([1.0, *(1 / width)])
        to_raw[0, 1:] = -shift / width
        expected = np.sqrt(np.diag(to_raw @ covariance @ to_raw.T))
        found = fit(kind, TABLES[kind], scale=scale, l2=l2, tolerance=1e-13)
        assert found.errors == pytest.approx(expected.tolist(), rel=1e-6)

    def test_the_intercept_is_free(self) -> None:
        table = pooled(TABLES["linear"])
        found = fit("linear", TABLES["linear"], l2=1e9)
        assert np.abs(found.coefficients[1:]).max() < 1e-4
        assert found.predict_mean(design(table).to_numpy()).mean() == pytest.approx(table.target.mean(), rel=1e-9)


@st.composite
def splits(draw: st.DrawFn, rows: int) -> np.ndarray:
    """Returns which of one to six sites each row belongs to."""
    sites = draw(st.integers(1, 6))
    return np.random.default_rng(draw(st.integers(0, 10**6))).integers(0, sites, rows)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(KINDS), st.sampled_from([0.0, 2.0]), st.booleans())
def test_any_split_of_the_rows_gives_the_pooled_fit(data: Any, kind: Any, l2: float, by_outcome: bool) -> None:
    table = pooled(TABLES[kind][:3])
    if by_outcome:
        # the least alike that sites can be: each knows one end of the outcomes
        assert table.target is not None
        site = (np.argsort(np.argsort(table.target)) * 3 // table.rows).astype(int)
    else:
        site = data.draw(splits(table.rows))
    tables = [table.take(site == index) for index in np.unique(site)]
    apart, together = fit(kind, tables, l2=l2), fit(kind, [table], l2=l2)
    assert apart.coefficients == pytest.approx(together.coefficients, rel=1e-7, abs=1e-9)
    assert apart.errors == pytest.approx(together.errors, rel=1e-7)
    assert apart.loss == pytest.approx(together.loss, rel=1e-9)
    assert (apart.patients, apart.rounds) == (together.patients, together.rounds)


ONE: dict[str, Feature] = {"x": Number(unit="1", range=(0, 1))}


def single(x: Any, y: Any) -> Table:
    return Table(len(x), {"x": np.asarray(x, dtype=float)}, np.asarray(y, dtype=float))


class TestWhatCannotBeFitted:
    def test_perfect_separation(self) -> None:
        x = np.linspace(0, 1, 60)
        with pytest.raises(ConvergenceError, match=r"separate.*model\.penalty\.l2"):
            fit("logistic", [single(x, x > 0.5)], features=ONE, rounds=200)
        with pytest.raises(ConvergenceError, match=r"separate.*model\.penalty\.l2"):
            fit("logistic", [single(x[:30], x[:30] > 0.5), single(x[30:], x[30:] > 0.5)], features=ONE)

    def test_a_penalty_helps_against_separation(self) -> None:
        x = np.linspace(0, 1, 60)
        found = fit("logistic", [single(x, x > 0.5)], features=ONE, l2=0.1, scale="range")
        expected = LogisticRegression(C=10, tol=1e-12, max_iter=1000).fit((2 * x - 1)[:, None], x > 0.5)
        assert found.coefficients[1] / 2 == pytest.approx(expected.coef_[0, 0], rel=1e-3)

    def test_a_level_that_decides_the_outcome_is_refused_or_never_significant(self) -> None:
        table = cohort("logistic", 300, 5)
        assert table.target is not None
        table.target[table.columns["stage"] == 2] = 1.0
        try:
            found = fit("logistic", [table], rounds=100)
        except ConvergenceError as error:
            assert "separate" in str(error)
            return
        assert found.p_values[found.names.index("stage[III]")] > 0.9
        assert max(found.p_values[1:3]) < 0.2

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_feature_that_repeats_another(self, kind: Any) -> None:
        table = cohort(kind, 200, 5)
        doubled = replace(table, columns={**table.columns, "twin": table.columns["age"] / 2})
        features = FEATURES | {"twin": Number(unit="a/2", range=(9, 55))}
        with pytest.raises(CohortError, match=r"repeat others.*ridge"):
            fit(kind, [doubled], features=features)
        found = fit(kind, [doubled], features=features, l2=1.0)
        # on the standard scale both are one column, so the penalty shares the effect out equally
        by_name = dict(zip(found.names, found.coefficients, strict=True))
        assert by_name["twin"] == pytest.approx(2 * by_name["age"], rel=1e-4)

    @pytest.mark.parametrize("outcome", [0.0, 1.0])
    def test_one_class(self, outcome: float) -> None:
        tables = [replace(table, target=np.full(table.rows, outcome)) for table in TABLES["logistic"]]
        with pytest.raises(CohortError, match="target 'died' is the same for every patient"):
            fit("logistic", tables)

    def test_no_event_at_all(self) -> None:
        tables = [replace(table, target=np.zeros(table.rows)) for table in TABLES["poisson"]]
        with pytest.raises(CohortError, match="target 'visits' is the same for every patient"):
            fit("poisson", tables)

    def test_one_class_at_each_site_is_no_obstacle(self) -> None:
        table = pooled(TABLES["logistic"])
        apart = fit("logistic", [table.take(table.target == 0), table.take(table.target == 1)])
        assert apart.coefficients == pytest.approx(fit("logistic", [table]).coefficients, rel=1e-7)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_constant_feature(self, kind: Any) -> None:
        table = cohort(kind, 100, 5)
        table.columns["crp"][:] = 7.0
        with pytest.raises(CohortError, match="feature 'crp' is constant over all sites"):
            fit(kind, [table])

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_level_nobody_has(self, kind: Any) -> None:
        table = cohort(kind, 100, 5)
        kept = table.take(table.columns["stage"] != 2)
        with pytest.raises(CohortError, match="level 'III' of feature 'stage' occurs at no site"):
            fit(kind, [kept])

    @pytest.mark.parametrize("kind", ["logistic", "poisson"])
    def test_too_few_rounds(self, kind: Any) -> None:
        needed = fit(kind, TABLES[kind]).rounds
        assert 3 <= needed <= 12
        assert fit(kind, TABLES[kind], rounds=needed).rounds == needed
        with pytest.raises(ConvergenceError, match=rf"no convergence in {needed - 1} rounds.*training\.rounds"):
            fit(kind, TABLES[kind], rounds=needed - 1)

    def test_fewer_patients_than_coefficients(self) -> None:
        table = cohort("linear", 6, 3)
        table.columns["stage"][:] = [0, 1, 2, 0, 1, 2]
        table.columns["sex"][:] = [0, 1, 0, 1, 1, 0]
        with pytest.raises(CohortError, match="cannot support 6 coefficients"):
            fit("linear", [table])


class TestStepControl:
    """Where Newton's full step from zero leads astray, the sums still lead to the optimum."""

    def reference(self, x: Any, y: Any, family: Any) -> Any:
        return sm.GLM(np.asarray(y), sm.add_constant(np.asarray(x)), family=family).fit(tol=1e-13, maxiter=500)

    @pytest.mark.parametrize("cases", [4, 12])
    def test_rare_events(self, cases: int) -> None:
        rng = np.random.default_rng(cases)
        x = rng.uniform(0, 1, 5000)
        y = np.zeros(5000)
        y[np.argsort(x + rng.normal(0, 0.5, 5000))[-cases:]] = 1
        found = fit("logistic", [single(x, y)], features=ONE, tolerance=1e-12)
        expected = self.reference(x, y, sm.families.Binomial())
        assert found.coefficients == pytest.approx(expected.params.tolist(), rel=1e-6)
        assert found.errors == pytest.approx(expected.bse.tolist(), rel=1e-6)

    @pytest.mark.parametrize("mean", [0.01, 1.0, 40.0, 900.0])
    def test_small_and_large_counts(self, mean: float) -> None:
        rng = np.random.default_rng(4)
        x = rng.uniform(0, 1, 3000)
        y = rng.poisson(mean * np.exp(0.7 * x)).astype(float)
        target = CountTarget(name="n", maximum=3000)
        found = fit("poisson", [single(x, y)], features=ONE, target=target, tolerance=1e-12)
        expected = self.reference(x, y, sm.families.Poisson())
        assert found.coefficients == pytest.approx(expected.params.tolist(), rel=1e-6)
        assert found.errors == pytest.approx(expected.bse.tolist(), rel=1e-6)

    def test_a_few_huge_counts_among_zeros(self) -> None:
        x = np.repeat([0.0, 0.5, 1.0], 200)
        y = np.zeros(600)
        y[[10, 250, 400, 401, 402]] = [1, 2, 800, 1000, 900]
        target = CountTarget(name="n", maximum=1000)
        found = fit("poisson", [single(x, y)], features=ONE, target=target, tolerance=1e-12, rounds=60)
        expected = self.reference(x, y, sm.families.Poisson())
        assert found.coefficients == pytest.approx(expected.params.tolist(), rel=1e-5)

    def test_a_full_step_that_overshoots_is_halved(self) -> None:
        """Newton's full steps, taken blindly, oscillate away from the optimum of these six patients."""
        x = np.array([0.0, 0.05, 0.1, 0.9, 0.95, 1.0] * 40)
        y = np.array([0.0, 0.0, 0.0, 30.0, 0.0, 0.0] * 40)
        target = CountTarget(name="n", maximum=30)
        found = fit("poisson", [single(x, y)], features=ONE, target=target, tolerance=1e-12, rounds=60)
        expected = self.reference(x, y, sm.families.Poisson())
        assert found.coefficients == pytest.approx(expected.params.tolist(), rel=1e-5)

    def test_objectives_never_rise_between_accepted_rounds(self) -> None:
        glm = algorithm("poisson", features=ONE, target=CountTarget(name="n", maximum=3000))
        rng = np.random.default_rng(1)
        x = rng.uniform(0, 1, 500)
        table = single(x, rng.poisson(500 * np.exp(x)))
        state, losses = glm.init(), []
        while not glm.done(state):
            statistics, _ = glm.local(glm.broadcast(state), table, {}, RANDOMNESS)
            state = glm.update(state, statistics)
            losses.append(glm.progress(state)[1])
        known = [loss for loss in losses if loss is not None]
        assert len(known) >= 3
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(known))
