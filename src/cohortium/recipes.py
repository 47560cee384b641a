"""Which algorithm a study runs, and in which phases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cohortium.core.features import Category, Feature, Number
from cohortium.core.layout import Block, Layout
from cohortium.core.models import Descriptive, Network, Regression
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.core.training import Averaging, Descent, Newton, OneShot
from cohortium.learning.algorithm import Algorithm, Then
from cohortium.learning.descent import GradientDescent
from cohortium.learning.descriptive import Describe
from cohortium.learning.glm import Glm
from cohortium.learning.oneshot import OneShotRegression
from cohortium.learning.preprocess import Encoder, Fitted, Preprocess, middle_and_half
from cohortium.learning.private_descriptive import PrivateDescribe
from cohortium.learning.private_preprocess import PrivatePreprocess
from cohortium.promise import schedule_of, spread

if TYPE_CHECKING:
    from cohortium.privacy.calibrate import Schedule

AnyAlgorithm = Algorithm[Any, Any, Any]
Shape = tuple[str, Layout, int]
"""A phase's name, the layout of its vectors and the most rounds that it takes."""


@dataclass(frozen=True)
class Recipe:
    """A study's algorithm and the phases that it goes through."""

    algorithm: AnyAlgorithm
    phases: tuple[Shape, ...]


def recipe_of(study: Study, identity: str) -> Recipe:
    """Returns what a study runs. `identity` is its id, from which public randomness follows."""
    plan = schedule_of(study)
    if isinstance(study.model, Descriptive):
        return _describe(study, study.model, plan)
    first = _preprocess(study, plan)
    second = partial(_model, study, identity, plan)
    training = study.training
    assert training is not None
    rounds = 1 if isinstance(training, OneShot) else training.rounds
    typical = second(_typical(study.cohort.features))
    phases = (_phase("preprocessing", first), _phase(study.model.kind, typical))
    return Recipe(Then(first, Fitted, second, rounds), phases)


def _describe(study: Study, model: Descriptive, plan: Schedule | None) -> Recipe:
    cohort = study.cohort
    if plan is None:
        algorithm = Describe(cohort.features, cohort.target, model, cohort.maximum)
        return Recipe(algorithm, tuple(_description(algorithm)))
    private = PrivateDescribe(
        cohort.features, cohort.target, model, cohort.maximum, study.privacy.unit, plan.training, spread(study)
    )
    return Recipe(private, (_phase("statistics", private),))


def _description(algorithm: Describe) -> Iterator[Shape]:
    _, layout, _ = _phase("statistics", algorithm)
    yield "statistics", layout, 1
    numbers = sum(isinstance(column, Number) for column in algorithm.columns.values())
    if numbers and algorithm.model.refinements and algorithm.model.quantiles:
        parts = Block("parts", (numbers * len(algorithm.model.quantiles), algorithm.model.bins), layout[0].bound)
        yield "quantiles", (parts,), algorithm.model.refinements


def _preprocess(study: Study, plan: Schedule | None) -> AnyAlgorithm:
    cohort, scale = study.cohort, study.preprocessing.scale
    if plan is None:
        return Preprocess(cohort.features, cohort.maximum)
    return PrivatePreprocess(
        cohort.features, cohort.maximum, scale, study.privacy.unit, plan.preprocessing, spread(study)
    )


def _model(study: Study, identity: str, plan: Schedule | None, fitted: Fitted) -> AnyAlgorithm:
    """Returns the algorithm that trains the study's model once preprocessing is fitted."""
    cohort, model, training, privacy = study.cohort, study.model, study.training, study.privacy
    encoder, scale = Encoder(cohort.features, fitted), study.preprocessing.scale
    assert cohort.target is not None
    noise = None if plan is None else plan.training
    if isinstance(model, Network):
        return _averaging(study, identity, encoder, noise)
    assert isinstance(model, Regression)
    if isinstance(training, Newton):
        return Glm(encoder, cohort.target, model, training, scale, cohort.maximum)
    if isinstance(training, Descent):
        rate = privacy.sampling
        return GradientDescent(
            encoder, cohort.target, model, training, scale, cohort.maximum, privacy.unit, noise, rate
        )
    assert isinstance(training, OneShot)
    most = spread(study)
    return OneShotRegression(encoder, cohort.target, model, training, scale, cohort.maximum, privacy.unit, noise, most)


def _averaging(study: Study, identity: str, encoder: Encoder, noise: float | None) -> AnyAlgorithm:
    # PyTorch is an extra, and importing it takes seconds: only a study that needs it pays
    from cohortium.learning.fedavg import FedAvg, loss_for, mlp

    model, training, target = study.model, study.training, study.cohort.target
    assert isinstance(model, Network) and isinstance(training, Averaging) and target is not None
    module = mlp(len(encoder.columns), model.hidden, model.activation)
    loss = loss_for(target)  # type: ignore[arg-type]  # a network's target is binary or a number: the study checked
    features = partial(encoder.design, scale=study.preprocessing.scale)
    initial = Randomness.of_seed(int(identity.removeprefix("sha256:"), 16)).child("initial weights")
    maximum, privacy = study.cohort.maximum, study.privacy
    if training.clip is None:
        return FedAvg(module, loss, features, training, maximum, initial)
    from cohortium.learning.private_fedavg import PrivateFedAvg

    # a round that asks some of the sites has their share of the patients, on average
    sites = study.sites.fewest
    patients = (encoder.fitted.patients or 1.0) * (sites / len(study.sites.include))
    return PrivateFedAvg(
        module,
        loss,
        features,
        training,
        maximum,
        initial,
        privacy.unit,
        noise,
        privacy.sampling,
        patients,
        sites,
    )


def _phase(name: str, algorithm: AnyAlgorithm) -> Shape:
    state = algorithm.init()
    return name, algorithm.layout(algorithm.broadcast(state)), algorithm.progress(state)[0]


def _typical(features: dict[str, Feature]) -> Fitted:
    """Returns a made-up fit from public ranges alone, to know shapes before any data are read."""
    ranges = {name: middle_and_half(feature.range) for name, feature in features.items() if isinstance(feature, Number)}
    return Fitted(
        means={name: middle for name, (middle, _) in ranges.items()},
        deviations={name: half for name, (_, half) in ranges.items()},
        modes={name: 0 for name, feature in features.items() if isinstance(feature, Category)},
    )
