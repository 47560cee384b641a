"""The global model: what a study yields, ready to score a patient's row as the sites' databases hold it."""

import base64
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np
from scipy import special

from cohortium.core import codec
from cohortium.core.document import document, parse, study_id
from cohortium.core.errors import CohortiumError, DataError, StudyError
from cohortium.core.features import BinaryTarget, NumberTarget
from cohortium.core.layout import Floats
from cohortium.core.models import Network, Regression
from cohortium.core.study import Study
from cohortium.core.training import Newton
from cohortium.learning.coefficients import CoefficientFit, names
from cohortium.learning.contract import after_missing, conform, raw_columns, typed
from cohortium.learning.glm import GlmFit
from cohortium.learning.network import NetworkFit, forward
from cohortium.learning.preprocess import Encoder, Fitted, middle_and_half
from cohortium.learning.table import Table

_FORMAT = "cohortium model 1"
MAX_MODEL_BYTES = 1 << 30
Fit = GlmFit | CoefficientFit | NetworkFit
"""What training yields: a regression with its errors, one without, or a network."""


@dataclass(frozen=True)
class GlobalModel:
    """A fitted model with its study and preprocessing. It follows scikit-learn's habits and is never refitted.

    Attributes:
        study: the study that was run; its features say which columns `predict` needs.
        preprocessing: what was fitted before the model.
        fit: coefficients or weights.
    """

    study: Study
    preprocessing: Fitted
    fit: Fit = field(repr=False)

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.study.cohort.features, self.preprocessing)

    @property
    def feature_names_in_(self) -> np.ndarray:
        """The columns that a frame must have, `(n_features,)`."""
        return np.array(list(self.study.cohort.features), dtype=object)

    @property
    def classes_(self) -> np.ndarray:
        """The target's two levels; the second is the one predicted."""
        return np.array(self._binary().levels, dtype=object)

    @property
    def coef_(self) -> Floats:
        """A regression's coefficients in the features' own units, `(n_columns,)`, in the order of `columns_`."""
        return np.array(self._regression().coefficients[1:])

    @property
    def intercept_(self) -> float:
        return self._regression().coefficients[0]

    @property
    def columns_(self) -> tuple[str, ...]:
        """Names of the design's columns, such as 'age' or 'sex[male]'."""
        return self.encoder.columns

    def predict_mean(self, frame: Any) -> Floats:
        """Returns the expected target of each row, `(n,)`: a probability, a number in its unit, or a count.

        Args:
            frame: a pandas, Polars or Arrow frame with the study's feature columns.

        Raises:
            DataError: a column is missing or does not keep the study's data contract.
        """
        return self.expect(_table(self.study, frame))

    def expect(self, table: Table) -> Floats:
        """Returns the expected target of each row of a table that already keeps the contract, `(n,)`."""
        if not isinstance(self.fit, NetworkFit):
            return self.fit.predict_mean(self.encoder.design(table, "none"))
        assert isinstance(self.study.model, Network) and self.study.cohort.target is not None
        design = self.encoder.design(table, self.study.preprocessing.scale)
        output = forward(self.fit, design, self.study.model.activation)
        if isinstance(self.study.cohort.target, NumberTarget):
            middle, half = middle_and_half(self.study.cohort.target.range)
            return np.asarray(middle + half * output)
        probability: Floats = special.expit(output)
        return probability

    def predict_proba(self, frame: Any) -> Floats:
        """Returns `(n, 2)` probabilities of the target's two levels."""
        self._binary()
        second = self.predict_mean(frame)
        return np.column_stack([1 - second, second])

    def predict(self, frame: Any) -> np.ndarray:
        """Returns the likelier level of each row, or the expected number or count, `(n,)`."""
        mean = self.predict_mean(frame)
        if isinstance(self.study.cohort.target, BinaryTarget):
            return np.take(self.classes_, (mean > 0.5).astype(int))
        return mean

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        # asked for by scikit-learn alone, so it is there
        from sklearn.utils import ClassifierTags, RegressorTags, Tags, TargetTags

        binary = isinstance(self.study.cohort.target, BinaryTarget)
        return Tags(
            estimator_type="classifier" if binary else "regressor",
            target_tags=TargetTags(required=False),
            classifier_tags=ClassifierTags(multi_class=False) if binary else None,
            regressor_tags=None if binary else RegressorTags(),
            requires_fit=False,
        )

    def to_bytes(self) -> bytes:
        """Returns the model as JSON. It holds no patient's data."""
        fit: dict[str, Any]
        if isinstance(self.fit, NetworkFit):
            fit = {"network": base64.b64encode(codec.encode(self.fit)).decode()}
        else:
            fit = {"glm" if isinstance(self.fit, GlmFit) else "coefficients": asdict(self.fit)}
        content = {
            "format": _FORMAT,
            "study_id": study_id(self.study),
            "study": document(self.study),
            "preprocessing": asdict(self.preprocessing),
            **fit,
        }
        return json.dumps(content, indent=1, allow_nan=False).encode()

    def _regression(self) -> GlmFit | CoefficientFit:
        if isinstance(self.fit, NetworkFit):
            raise AttributeError("a network has no coefficients")
        return self.fit

    def _binary(self) -> BinaryTarget:
        if not isinstance(self.study.cohort.target, BinaryTarget):
            raise AttributeError(f"a {self.study.model.kind} model with a target of this type has no classes")
        return self.study.cohort.target


def from_bytes(data: bytes) -> GlobalModel:
    """Returns the model that `to_bytes` wrote. Reading it runs no code.

    Raises:
        StudyError: it is too long, no model file, or was changed so that its study, its id and its fit no longer match.
    """
    try:
        if len(data) > MAX_MODEL_BYTES:
            raise ValueError
        content = json.loads(data, parse_float=_finite, parse_constant=_finite)
        if content["format"] != _FORMAT:
            raise ValueError
        study = parse(content["study"])
        fitted = msgspec.convert(content["preprocessing"], Fitted)
        fit: Fit
        if "glm" in content:
            fit = msgspec.convert(content["glm"], GlmFit)
        elif "coefficients" in content:
            fit = msgspec.convert(content["coefficients"], CoefficientFit)
        else:
            fit = codec.decode(base64.b64decode(content["network"], validate=True), NetworkFit)
            if not (math.isfinite(fit.loss or 0.0) and all(np.isfinite(weight).all() for weight in fit.weights)):
                raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError, msgspec.MsgspecError, CohortiumError):
        raise StudyError("this is not a model file of a version that can be read") from None
    if study_id(study) != content.get("study_id"):
        raise StudyError("the model file was changed: its study does not match its study id")
    model = GlobalModel(study, fitted, fit)
    if not _fits(model):
        raise StudyError("the model file was changed: its fit does not match its study")
    return model


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _fits(model: GlobalModel) -> bool:
    """Returns whether a patient of whom nothing is known can be scored, which takes every part of a model."""
    try:
        if isinstance(model.study.model, Regression):
            # only Newton's method ends where a likelihood's curvature tells errors
            expected_type = GlmFit if isinstance(model.study.training, Newton) else CoefficientFit
            if not isinstance(model.fit, expected_type):
                return False
            if (model.fit.kind, model.fit.names) != (model.study.model.kind, names(model.encoder)):
                return False
        elif not isinstance(model.fit, NetworkFit):
            return False
        with np.errstate(all="ignore"):
            expected = model.expect(Table(1, {name: np.full(1, np.nan) for name in model.study.cohort.features}))
    except (KeyError, IndexError, TypeError, ValueError, CohortiumError):
        return False
    return expected.shape == (1,)


def _table(study: Study, frame: Any) -> Table:
    features = study.cohort.features
    columns = typed(features, raw_columns(frame, list(features)))
    rows = len(next(iter(columns.values())))
    conformed = {}
    for name, feature in features.items():
        conformed[name] = conform(name, feature, columns[name])
        if feature.missing != "impute" and not after_missing(name, "exclude", conformed[name]).all():
            reason = f"column '{name}' has missing values, and the study does not impute it"
            raise DataError(f"{reason}: fill them or leave those rows out", public=reason)
    return Table(rows, conformed)
