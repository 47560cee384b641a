"""From a study to what both halves of a run do: the algorithm, the stages and the sum.

Coordinator and sites compile the same canonical bytes, so they agree without talking about it. Whatever a study asks
for that this version cannot give is refused here, before any record is read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from cohortium.core import document
from cohortium.core.errors import StudyError
from cohortium.core.filter import Filter, compile_filter
from cohortium.core.layout import Block, Layout, size
from cohortium.core.random import Randomness
from cohortium.core.stage import Chain, chain
from cohortium.core.study import Averaging, Category, Descriptive, Feature, Network, Newton, Number, Regression, Study
from cohortium.learning.algorithm import Algorithm, Then
from cohortium.learning.descriptive import Describe, Summary
from cohortium.learning.glm import Glm
from cohortium.learning.model import GlobalModel
from cohortium.learning.preprocess import Encoder, Fitted, Preprocess, middle_and_half
from cohortium.secagg.quantise import fixed_point

MAX_VALUES = 50_000_000
"""Most numbers that a site sends in a round; a hostile study shall not exhaust a site's memory."""


@dataclass(frozen=True)
class Phase:
    """What one phase of a run sends: `values` numbers a round from each site, at most `rounds` rounds.

    `precision` is the largest error that quantisation may leave in an entry of the sum, relative to its bound.
    """

    name: str
    values: int
    rounds: int
    precision: float


@dataclass(frozen=True)
class Plan:
    """A compiled study. Equal studies give equal plans."""

    study: Study
    study_id: str
    algorithm: Algorithm[Any, Any, Any]
    phases: tuple[Phase, ...]
    where: Filter | None

    @cached_property
    def rounds(self) -> int:
        """The most rounds that a run may take."""
        return sum(phase.rounds for phase in self.phases)

    @cached_property
    def broadcast_limit(self) -> int:
        """More bytes than any round's broadcast takes."""
        intervals = len(self.study.model.quantiles) if isinstance(self.study.model, Descriptive) else 1
        return 65_536 + 512 * len(self.study.cohort.features) * intervals + 16 * max(p.values for p in self.phases)

    @property
    def sites(self) -> tuple[str, ...]:
        return self.study.sites.include

    def stages(self, layout: Layout) -> Chain:
        """Returns what lies between a site's statistics and the secure sum.

        Raises:
            StudyError: the range proof fails for this layout.
        """
        return chain([fixed_point(layout, len(self.sites), self.study.aggregation.bits)])

    def outcome(self, state: Any) -> GlobalModel | Summary:
        """Returns what the study yields, from the algorithm's final state."""
        result = self.algorithm.finish(state)
        if isinstance(result, Summary):
            return result
        fitted, fit = result
        return GlobalModel(self.study, fitted, fit)


Compiler = Callable[[Study], Plan]
"""What turns a study into a plan; a site installs it, nobody sends it."""


def compile_study(study: Study) -> Plan:
    """Returns the plan of a study.

    Raises:
        StudyError: the study asks for what cannot be given, or its range proof fails.
    """
    study = document.parse(document.document(study))
    _refuse_what_is_not_offered(study)
    identity = document.study_id(study)
    cohort = study.cohort
    algorithm, second = _algorithm(study, identity)
    phases = tuple(_phases(study, algorithm, second))
    where = compile_filter(cohort.where, cohort.features) if cohort.where else None
    return Plan(study, identity, algorithm, phases, where)


def _algorithm(study: Study, identity: str) -> tuple[Algorithm[Any, Any, Any], Algorithm[Any, Any, Any] | None]:
    """Returns the study's algorithm and, where it has two phases, the second as it would be for a typical cohort."""
    cohort, scale = study.cohort, study.preprocessing.scale
    if isinstance(study.model, Descriptive):
        return Describe(cohort.features, cohort.target, study.model, cohort.maximum), None
    assert cohort.target is not None and study.training is not None
    target, training, model = cohort.target, study.training, study.model

    def second(fitted: Fitted) -> Algorithm[Any, Any, Any]:
        encoder = Encoder(cohort.features, fitted)
        if isinstance(model, Regression):
            assert isinstance(training, Newton)
            return Glm(encoder, target, model, training, scale, cohort.maximum)
        assert isinstance(model, Network) and isinstance(training, Averaging)
        return _averaging(study, identity, encoder)

    first = Preprocess(cohort.features, cohort.maximum)
    return Then(first, Fitted, second, training.rounds), second(_typical(cohort.features))


def _averaging(study: Study, identity: str, encoder: Encoder) -> Algorithm[Any, Any, Any]:
    # PyTorch is an extra, and importing it takes seconds: only a study that needs it pays
    from cohortium.learning.fedavg import FedAvg, loss_for, mlp

    model, training, target = study.model, study.training, study.cohort.target
    assert isinstance(model, Network) and isinstance(training, Averaging) and target is not None
    return FedAvg(
        module=mlp(len(encoder.columns), model.hidden, model.activation),
        loss=loss_for(target),  # type: ignore[arg-type]  # a network's target is binary or a number: the study checked
        features=lambda table: encoder.design(table, study.preprocessing.scale),
        averaging=training,
        maximum=study.cohort.maximum,
        initial=Randomness.of_seed(int(identity.removeprefix("sha256:"), 16)).child("initial weights"),
    )


def _phases(
    study: Study, algorithm: Algorithm[Any, Any, Any], second: Algorithm[Any, Any, Any] | None
) -> Iterator[Phase]:
    if second is not None:
        assert isinstance(algorithm, Then)
        for name, part in (("preprocessing", algorithm.first), (study.model.kind, second)):
            state = part.init()
            yield _phase(study, name, part.layout(part.broadcast(state)), part.progress(state)[0])
        return
    assert isinstance(algorithm, Describe)
    layout = algorithm.layout(algorithm.broadcast(algorithm.init()))
    yield _phase(study, "statistics", layout, 1)
    numbers = sum(isinstance(column, Number) for column in algorithm.columns.values())
    if numbers and algorithm.model.refinements and algorithm.model.quantiles:
        parts = Block("parts", (numbers * len(algorithm.model.quantiles), algorithm.model.bins), layout[0].bound)
        yield _phase(study, "quantiles", (parts,), algorithm.model.refinements)


def _phase(study: Study, name: str, layout: Layout, rounds: int) -> Phase:
    stage = fixed_point(layout, len(study.sites.include), study.aggregation.bits)
    pairs = zip(layout, stage.exponents, strict=True)
    # what quantising leaves, and what floating point does
    precision = max(2.0**-exponent / (2 * block.bound) for block, exponent in pairs) + 2.0**-53
    return Phase(name, size(layout), rounds, precision)


def _typical(features: dict[str, Feature]) -> Fitted:
    """Returns a made-up fit from public ranges alone, to know shapes before any data are read."""
    ranges = {name: middle_and_half(feature.range) for name, feature in features.items() if isinstance(feature, Number)}
    return Fitted(
        means={name: middle for name, (middle, _) in ranges.items()},
        deviations={name: half for name, (_, half) in ranges.items()},
        modes={name: 0 for name, feature in features.items() if isinstance(feature, Category)},
    )


def _values(study: Study) -> int:
    """Returns how many numbers the study's largest vector holds, worked out before anything is allocated."""
    cohort, model = study.cohort, study.model
    columns = sum(1 if isinstance(feature, Number) else len(feature.levels) - 1 for feature in cohort.features.values())
    if isinstance(model, Regression):
        return (columns + 2) * (columns + 3) // 2
    if isinstance(model, Network):
        widths = (columns, *model.hidden, 1)
        return sum((inner + 1) * outer for inner, outer in pairwise(widths))
    return (columns + 2 * len(cohort.features)) * max(1, len(model.quantiles)) * model.bins


def _refuse_what_is_not_offered(study: Study) -> None:
    if _values(study) > MAX_VALUES:
        raise StudyError(
            f"a site would have to send about {_values(study):.2g} numbers a round, and {MAX_VALUES:.2g} is the most: "
            "use fewer features, levels, bins or units"
        )
    if study.privacy.epsilon is not None or study.privacy.delta is not None:
        raise StudyError(
            "privacy.epsilon and privacy.delta ask for differential privacy, which this version cannot give: remove "
            "them only if the sites accept a result without it"
        )
    if study.aggregation.dropouts:
        raise StudyError(
            f"aggregation.dropouts is {study.aggregation.dropouts}: in this version a sum needs every site of the "
            "study, so set it to 0"
        )


def protection(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Returns what a study guarantees and what it does not, as pairs of a question and its answer, for a steward."""
    study, sites = plan.study, len(plan.sites)
    width = study.aggregation.bits // 8
    vectors = "; ".join(
        f"{phase.name}: {'at most ' if phase.name == 'quantiles' else ''}{phase.values:,} integers "
        f"({phase.values * width:,} bytes) a round, at most {phase.rounds} round{'' if phase.rounds == 1 else 's'}"
        for phase in plan.phases
    )
    rows = [
        ("Leaves each hospital", f"one masked vector a round. {vectors[0].upper()}{vectors[1:]}"),
        (
            "Who can read it",
            f"nobody. Of what a run's rounds send, the coordinator together with up to {sites - 2} of the {sites} "
            "hospitals learns only sums over the others, also if it lies to them, given that identity keys are pinned. "
            "What a sum reveals is not limited: a lying coordinator chooses the coefficients that it is taken at. "
            "That a hospital takes part or refuses is not masked",
        ),
        ("If hospitals drop", f"a round needs all {sites}: if one is missing it yields nothing"),
        (
            "Privacy",
            "no differential privacy: the sums and the result are exact, and what they reveal of a patient is not "
            "bounded. Unit: patient",
        ),
        ("Precision", f"quantising changes a sum by at most {max(p.precision for p in plan.phases):.1g} of its bound"),
    ]
    if isinstance(study.model, Descriptive):
        least = study.model.small_cells
        rule = (
            f"a hospital sends no count from 1 to {least - 1}; the mean and spread of a number that takes few values "
            "may still give one away (disclosure control, not differential privacy)"
        )
        rows.append(("Small cells", rule if least > 1 else "counts of any size are sent"))
    cohort = study.cohort
    rows.append(("Takes part", f"a hospital with {cohort.minimum:,} to {cohort.maximum:,} patients in the cohort"))
    return tuple(rows)
