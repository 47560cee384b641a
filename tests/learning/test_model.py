"""The global model: scikit-learn's habits, frames of every make, and files that cannot be tampered with unseen."""

import base64
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted

from cohortium.core.errors import DataError, StudyError
from cohortium.core.features import BinaryTarget, Category, CountTarget, Number, NumberTarget
from cohortium.core.models import Network, Regression
from cohortium.core.protection import Privacy
from cohortium.core.study import Cohort, Purpose, Sites, Study
from cohortium.core.training import Averaging, Preprocessing
from cohortium.learning.glm import GlmFit
from cohortium.learning.model import GlobalModel, from_bytes
from cohortium.learning.network import NetworkFit
from cohortium.learning.preprocess import Fitted

COEFFICIENTS = (-3.0, 0.05, 0.8, 0.3, -0.2)
"""Intercept, age, sex[m], stage[II], stage[III]."""
FITTED = Fitted(means={"age": 61.0}, deviations={"age": 12.0}, modes={"sex": 1, "stage": 2})
TARGETS: dict[str, Any] = {
    "logistic": BinaryTarget(name="died", levels=("alive", "dead")),
    "linear": NumberTarget(name="stay", unit="d", range=(0, 40)),
    "poisson": CountTarget(name="visits", maximum=50),
}


def study(kind: str = "logistic", model: Any = None, target: Any = None, **cohort: Any) -> Study:
    return Study(
        name="ward",
        purpose=Purpose(summary="tests"),
        sites=Sites(include=("a", "b", "c")),
        cohort=Cohort(
            dataset="d",
            patient="id",
            features={
                "age": Number(unit="a", range=(18, 110), missing="impute"),
                "sex": Category(levels=("f", "m"), missing="impute", outside="missing"),
                "stage": Category(levels=("I", "II", "III"), missing=cohort.get("stage", "refuse")),
            },
            target=target or TARGETS[kind],
        ),
        model=model or Regression(kind=kind),  # type: ignore[arg-type]
        training=Averaging() if model else None,
        preprocessing=Preprocessing(scale=cohort.get("scale", "standard")),
        privacy=Privacy(unit="patient"),
    )


def regression(kind: str = "logistic") -> GlobalModel:
    names = ("(intercept)", "age", "sex[m]", "stage[II]", "stage[III]")
    ones = (1.0,) * 5
    square = tuple(tuple(float(i == j) for j in range(5)) for i in range(5))
    fit = GlmFit(kind, names, COEFFICIENTS, ones, ones, ones, ones, ones, square, 99, 5, 12.5)
    return GlobalModel(study(kind), FITTED, fit)


ROWS: dict[str, list[Any]] = {
    "stage": ["I", "II", "III", "III"],
    "age": [40.0, None, 75.5, 18.0],
    "sex": ["f", "m", None, "unknown"],
    "other": [1, 2, 3, 4],
}
ETA = np.array([-3 + 0.05 * 40, -3 + 0.05 * 61 + 0.8 + 0.3, -3 + 0.05 * 75.5 + 0.8 - 0.2, -3 + 0.05 * 18 + 0.8 - 0.2])
FRAMES: dict[str, Any] = {
    "pandas": pd.DataFrame(ROWS),
    "pandas nullable": pd.DataFrame(ROWS).convert_dtypes(),
    "pandas indexed": pd.DataFrame(ROWS, index=[9, 3, 9, 1]),
    "pandas categorical": pd.DataFrame(ROWS).astype({"sex": "category", "stage": "category"}),
    "polars": pl.DataFrame(ROWS),
    "polars categorical": pl.DataFrame(ROWS).with_columns(pl.col("sex", "stage").cast(pl.Categorical)),
}


class TestPredictions:
    @pytest.mark.parametrize("frame", FRAMES.values(), ids=list(FRAMES))
    def test_logistic(self, frame: Any) -> None:
        model, probability = regression(), 1 / (1 + np.exp(-ETA))
        assert model.predict_mean(frame) == pytest.approx(probability, rel=1e-12)
        both = model.predict_proba(frame)
        assert both.shape == (4, 2)
        assert both[:, 1] == pytest.approx(probability, rel=1e-12)
        assert both.sum(axis=1) == pytest.approx(np.ones(4), rel=1e-15)
        assert model.predict(frame).tolist() == ["dead" if eta > 0 else "alive" for eta in ETA]

    @pytest.mark.parametrize("frame", FRAMES.values(), ids=list(FRAMES))
    def test_linear_and_poisson(self, frame: Any) -> None:
        assert regression("linear").predict(frame) == pytest.approx(ETA, rel=1e-12)
        assert regression("poisson").predict(frame) == pytest.approx(np.exp(ETA), rel=1e-12)

    @pytest.mark.parametrize("scale", ["standard", "range", "none"])
    def test_networks_in_plain_arithmetic(self, scale: Any) -> None:
        rng = np.random.default_rng(0)
        weights = [rng.normal(size=shape).astype(np.float32) for shape in [(3, 4), (3,), (1, 3), (1,)]]
        age = np.array([40.0, 61.0, 75.5, 18.0])
        shift, width = {"standard": (61, 12), "range": (64, 46), "none": (0, 1)}[scale]
        x = np.array([(age - shift) / width, [0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]]).T
        hidden = np.maximum(x @ weights[0].T.astype(float) + weights[1], 0)
        output = (hidden @ weights[2].T.astype(float) + weights[3])[:, 0]
        network, fit = Network(hidden=(3,)), NetworkFit(tuple(weights), 0.5)
        binary = GlobalModel(study(model=network, scale=scale), FITTED, fit)
        assert binary.predict_mean(FRAMES["polars"]) == pytest.approx(1 / (1 + np.exp(-output)), rel=1e-12)
        number = GlobalModel(study(model=network, target=TARGETS["linear"], scale=scale), FITTED, fit)
        assert number.predict(FRAMES["pandas"]) == pytest.approx(20 + 20 * output, rel=1e-12)

    def test_truth_values_as_levels(self) -> None:
        feature = Category(levels=("0", "1"))
        base = study()
        cohort = Cohort(dataset="d", patient="id", features={"flag": feature}, target=base.cohort.target)
        fit = GlmFit(
            "logistic", ("(intercept)", "flag[1]"), (0.0, 2.0), *[(1.0, 1.0)] * 5, ((1.0, 0.0), (0.0, 1.0)), 9, 1, 1
        )
        narrow = Study(**{**vars(base), "cohort": cohort})
        model = GlobalModel(narrow, Fitted({}, {}, {"flag": 0}), fit)
        for column in ([False, True], [0, 1], [0.0, 1.0], ["0", "1"]):
            for make in (pd.DataFrame, pl.DataFrame):
                assert model.predict_mean(make({"flag": column})) == pytest.approx([0.5, 1 / (1 + np.exp(-2))])

    @pytest.mark.parametrize(
        ("column", "value", "sentence"),
        [
            ("age", 17.0, "below the study's range"),
            ("age", float("inf"), "infinite"),
            ("stage", "IV", "not among its levels"),
            ("stage", None, "column 'stage' has missing values, and the study does not impute it"),
        ],
    )
    def test_the_contract_holds_for_patients_to_be_scored(self, column: str, value: Any, sentence: str) -> None:
        rows = {name: list(values) for name, values in ROWS.items()}
        rows[column][1] = value
        with pytest.raises(DataError, match=sentence):
            regression().predict(pd.DataFrame(rows))
        with pytest.raises(DataError, match="column 'sex' is missing"):
            regression().predict(pd.DataFrame(ROWS).drop(columns="sex"))


class TestHabits:
    def test_attributes(self) -> None:
        model = regression()
        assert model.classes_.tolist() == ["alive", "dead"]
        assert model.columns_ == ("age", "sex[m]", "stage[II]", "stage[III]")
        assert model.coef_.tolist() == list(COEFFICIENTS[1:])
        assert model.intercept_ == COEFFICIENTS[0]
        assert model.feature_names_in_.tolist() == ["age", "sex", "stage"]

    def test_what_a_model_has_not(self) -> None:
        for kind in ("linear", "poisson"):
            assert not hasattr(regression(kind), "classes_")
            with pytest.raises(AttributeError, match="has no classes"):
                regression(kind).predict_proba(FRAMES["pandas"])
        weights = tuple(np.ones(shape, dtype=np.float32) for shape in [(1, 4), (1,)])
        network = GlobalModel(study(model=Network(hidden=())), FITTED, NetworkFit(weights, 0.1))
        assert not hasattr(network, "coef_")
        assert network.classes_.tolist() == ["alive", "dead"]

    @pytest.mark.parametrize("frame", [FRAMES["pandas"], FRAMES["polars"]], ids=["pandas", "polars"])
    def test_is_the_last_step_of_a_pipeline(self, frame: Any) -> None:
        def in_years(months: Any) -> Any:
            if isinstance(months, pd.DataFrame):
                return months.assign(age=months["age"] / 12)
            return months.with_columns(age=months["age"] / 12)

        older = frame.assign(age=frame["age"] * 12) if isinstance(frame, pd.DataFrame) else None
        if older is None:
            older = frame.with_columns(age=frame["age"] * 12)
        pipeline = Pipeline([("units", FunctionTransformer(in_years)), ("model", regression())])
        assert pipeline.predict_proba(older)[:, 1] == pytest.approx(1 / (1 + np.exp(-ETA)), rel=1e-12)
        assert pipeline.predict(older).tolist() == regression().predict(frame).tolist()
        assert pipeline.classes_.tolist() == ["alive", "dead"]
        numbers = make_pipeline(FunctionTransformer(in_years), regression("linear"))
        assert numbers.predict(older) == pytest.approx(ETA, rel=1e-12)

    def test_counts_as_fitted_and_says_what_it_is(self) -> None:
        check_is_fitted(regression())
        assert get_tags(regression()).estimator_type == "classifier"
        assert get_tags(regression("poisson")).estimator_type == "regressor"

    def test_importing_the_package_imports_no_scikit_learn(self) -> None:
        code = "import sys, cohortium, cohortium.learning.model; sys.exit('sklearn' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_is_frozen(self) -> None:
        with pytest.raises(AttributeError):
            regression().study = study()  # type: ignore[misc]


NETWORK = GlobalModel(
    study(model=Network(hidden=(2,))),
    FITTED,
    NetworkFit(tuple(np.random.default_rng(1).normal(size=s).astype("f4") for s in [(2, 4), (2,), (1, 2), (1,)]), 0.25),
)
MODELS = [*(regression(kind) for kind in TARGETS), NETWORK]


class TestFiles:
    @pytest.mark.parametrize("model", MODELS, ids=lambda model: model.study.model.kind)
    def test_round_trip(self, model: GlobalModel) -> None:
        read = from_bytes(model.to_bytes())
        assert read.study == model.study
        assert read.preprocessing == model.preprocessing
        assert type(read.fit) is type(model.fit)
        assert read.to_bytes() == model.to_bytes()
        for frame in (FRAMES["pandas"], FRAMES["polars"]):
            assert read.predict_mean(frame).tolist() == model.predict_mean(frame).tolist()
        if isinstance(model.fit, GlmFit):
            assert read.fit == model.fit

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=5, max_size=5).map(tuple))
    def test_every_bit_of_a_coefficient_survives(self, coefficients: tuple[float, ...]) -> None:
        model = regression()
        fit = GlmFit(**{**vars(model.fit), "coefficients": coefficients})
        read = from_bytes(GlobalModel(model.study, model.preprocessing, fit).to_bytes())
        assert isinstance(read.fit, GlmFit)
        assert [value.hex() for value in read.fit.coefficients] == [value.hex() for value in coefficients]

    def test_is_readable_json_that_names_its_study(self) -> None:
        content = json.loads(regression().to_bytes())
        assert content["format"] == "cohortium model 1"
        assert content["study"]["study"] == "ward"
        assert content["study_id"].startswith("sha256:")
        assert content["glm"]["coefficients"] == list(COEFFICIENTS)

    def test_infinity_is_not_written(self) -> None:
        fit = GlmFit(**{**vars(regression().fit), "loss": float("inf")})
        with pytest.raises(ValueError, match="JSON"):
            GlobalModel(study(), FITTED, fit).to_bytes()

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("study.cohort.features.age.range", [18, 120]),
            ("study.cohort.target.levels", ["dead", "alive"]),
            ("study.version", 2),
            ("study.study", "war"),
            ("study_id", "sha256:" + "0" * 64),
            ("study_id", None),
            ("study_id", ["x"]),
        ],
    )
    def test_a_study_that_was_changed(self, path: str, value: Any) -> None:
        with pytest.raises(StudyError, match="its study does not match its study id"):
            from_bytes(tampered(path, value))

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("format", "cohortium model 2"),
            ("study", None),
            ("study.model.kind", "magic"),
            ("study.surprise", 1),
            ("preprocessing", []),
            ("preprocessing.means", {"age": "old"}),
            ("preprocessing.modes", {"sex": 0.5}),
            ("glm", None),
            ("glm.coefficients", "many"),
            ("glm.coefficients", [None]),
            ("glm.patients", "all"),
        ],
    )
    def test_a_part_that_is_none(self, path: str, value: Any) -> None:
        with pytest.raises(StudyError, match="not a model file"):
            from_bytes(tampered(path, value))

    @pytest.mark.parametrize("part", ["format", "study", "preprocessing", "glm"])
    def test_a_part_that_is_lacking(self, part: str) -> None:
        content = json.loads(regression().to_bytes())
        del content[part]
        with pytest.raises(StudyError, match="not a model file"):
            from_bytes(json.dumps(content).encode())

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b"1",
            b'"cohortium model 1"',
            b"\xff\xfe\x00",
            b"\x80\x04\x95pickle",
            b"[" * 100_000,
            b'{"format":"cohortium model 1","study":' + b"[" * 100_000,
        ],
    )
    def test_hostile_bytes(self, data: bytes) -> None:
        with pytest.raises(StudyError):
            from_bytes(data)

    def test_hostile_weights(self) -> None:
        good = json.loads(NETWORK.to_bytes())
        weights = base64.b64decode(good["network"])
        for bad in ("", "%%%", good["network"][:-8], base64.b64encode(weights[:-1]).decode(), 5, None, [1]):
            with pytest.raises(StudyError):
                from_bytes(json.dumps(good | {"network": bad}).encode())
        for bad_kind in (b"|O8", b"<f9", b"<u1"):
            changed = base64.b64encode(weights.replace(b"<f4", bad_kind)).decode()
            with pytest.raises(StudyError):
                from_bytes(json.dumps(good | {"network": changed}).encode())

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_mutated_bytes_are_a_model_or_refused(self, data: st.DataObject) -> None:
        original = bytearray(data.draw(st.sampled_from(MODELS)).to_bytes())
        place = data.draw(st.integers(0, len(original) - 1))
        original[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        try:
            model = from_bytes(bytes(original))
        except StudyError:
            return
        assert isinstance(model, GlobalModel)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("glm.coefficients", [0.0]),
            ("glm.coefficients", [0.0] * 9),
            ("preprocessing.means", {}),
            ("preprocessing.modes", {"sex": 1}),
        ],
    )
    def test_a_fit_of_another_shape_than_the_study_is_refused(self, path: str, value: Any) -> None:
        with pytest.raises(StudyError, match="its fit does not match its study"):
            from_bytes(tampered(path, value))

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("glm.kind", "linear"),
            ("glm.kind", "x\x1b[2J"),
            ("glm.names", ["(intercept)", "age", "sex[f]", "stage[II]", "stage[III]"]),
            ("glm.names", ["age", "(intercept)", "sex[m]", "stage[II]", "stage[III]"]),
            ("glm.names", ["(intercept)"]),
        ],
    )
    def test_a_regression_of_another_kind_or_with_other_names_is_refused(self, path: str, value: Any) -> None:
        with pytest.raises(StudyError, match="its fit does not match its study"):
            from_bytes(tampered(path, value))

    @pytest.mark.parametrize(
        "path", ["glm.loss", "glm.coefficients.1", "glm.covariance.0.0", "preprocessing.means.age"]
    )
    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
    def test_numbers_that_are_not_finite_are_refused(self, path: str, number: str) -> None:
        data = tampered(path, "here").replace(b'"here"', number.encode())
        with pytest.raises(StudyError, match="not a model file"):
            from_bytes(data)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_weights_that_are_not_finite_are_refused(self, value: float) -> None:
        assert isinstance(NETWORK.fit, NetworkFit)
        first, *rest = NETWORK.fit.weights
        broken = first.copy()
        broken[0, 0] = value
        with pytest.raises(StudyError, match="not a model file"):
            from_bytes(GlobalModel(NETWORK.study, FITTED, NetworkFit((broken, *rest), 0.5)).to_bytes())

    def test_a_fit_of_another_kind_or_network_of_another_shape_is_refused(self) -> None:
        content, network = json.loads(regression().to_bytes()), json.loads(NETWORK.to_bytes())
        with pytest.raises(StudyError, match="its fit does not match its study"):
            from_bytes(
                json.dumps(
                    {key: content[key] for key in content if key != "glm"} | {"network": network["network"]}
                ).encode()
            )
        with pytest.raises(StudyError, match="its fit does not match its study"):
            from_bytes(json.dumps(network | {"glm": content["glm"]}).encode())
        assert isinstance(NETWORK.fit, NetworkFit)
        one, two, three, four = NETWORK.fit.weights
        for weights in ((one,), (one, two), (one.T, two, three, four), (one, two, three), (four, four, four, four), ()):
            misfit = GlobalModel(NETWORK.study, FITTED, NetworkFit(weights, 0.5))
            with pytest.raises(StudyError, match="its fit does not match its study"):
                from_bytes(misfit.to_bytes())


def tampered(path: str, value: Any) -> bytes:
    content = json.loads(regression().to_bytes())
    *parents, last = path.split(".")
    node = content
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    node[int(last) if isinstance(node, list) else last] = value
    return json.dumps(content).encode()
