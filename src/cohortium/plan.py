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
from cohortium.core.features import Category, Feature, Number
from cohortium.core.filter import Filter, compile_filter
from cohortium.core.layout import Block, Layout, size
from cohortium.core.messages import MOST_MISSED
from cohortium.core.models import Descriptive, Network, Regression
from cohortium.core.random import Randomness
from cohortium.core.stage import Chain, chain
from cohortium.core.study import Study
from cohortium.core.training import Averaging, Newton, OneShot
from cohortium.learning.algorithm import Algorithm, Then
from cohortium.learning.descriptive import Describe, Summary
from cohortium.learning.glm import Glm
from cohortium.learning.model import GlobalModel
from cohortium.learning.preprocess import Encoder, Fitted, Preprocess, middle_and_half
from cohortium.secagg.compress import Compressed, compressed
from cohortium.secagg.group import MOST_ENCRYPTING, Group, Tolerance, tolerance
from cohortium.secagg.masking import Masking
from cohortium.secagg.quantise import FixedPoint, fixed_point
from cohortium.secagg.scheme import Scheme
from cohortium.secagg.stream import PLAIN, Means

MAX_VALUES = 50_000_000
"""Most numbers that a site sends in a round; a hostile study shall not exhaust a site's memory."""
_FRAME = 32
"""More than sealing and framing add to a share."""


@dataclass(frozen=True)
class Phase:
    """What one phase of a run sends: a vector of this layout from each site, in at most `rounds` rounds.

    `precision` is the largest error that quantising may leave in an entry of a site's vector, relative to its bound;
    None where updates are compressed.
    """

    name: str
    layout: Layout
    rounds: int
    precision: float | None

    @property
    def values(self) -> int:
        return size(self.layout)


@dataclass(frozen=True)
class Traffic:
    """The most bytes that a site sends in a round, beside the frames of its messages.

    Attributes:
        payload: its protected vector.
        shares: what it deals to the others, so that the sum can be opened without it.
        endorsement: its word on who is in the sum.
        answer: its part in opening the sum.
    """

    payload: int
    shares: int
    endorsement: int
    answer: int

    @property
    def total(self) -> int:
        return self.payload + self.shares + self.endorsement + self.answer


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

    @cached_property
    def tolerance(self) -> Tolerance:
        """What the study's secure sums withstand."""
        return tolerance(len(self.sites), self.study.aggregation.dropouts)

    def quantiser(self, layout: Layout) -> FixedPoint | Compressed:
        """Returns what turns a site's packed statistics into the integers that are summed.

        Raises:
            StudyError: the range proof fails for this layout.
        """
        return _quantiser(self.study, self.study_id, layout)

    def stages(self, layout: Layout) -> Chain:
        """Returns what lies between a site's statistics and the secure sum.

        Raises:
            StudyError: the range proof fails for this layout.
        """
        return chain([self.quantiser(layout)])

    def scheme(self, group: Group, layout: Layout, means: Means = PLAIN) -> Scheme:
        """Returns how the sites of a group protect and sum vectors of this layout."""
        quantiser = self.quantiser(layout)
        return _scheme(self.study.aggregation.protocol, group, quantiser.length, quantiser.bits, means)

    def traffic(self, layout: Layout) -> Traffic:
        """Returns the most that a site sends in a round of this layout."""
        scheme = self.scheme(Group(self.sites, self.tolerance.threshold), layout)
        return Traffic(scheme.payload_bytes, *_opening_bytes(scheme))

    @cached_property
    def outbound_limit(self) -> int:
        """More bytes than the coordinator sends a site at once: rounds' broadcasts, or what opening a sum takes."""
        missed = MOST_MISSED if self.study.aggregation.dropouts else 0
        return (1 + missed) * self.broadcast_limit + max(self.traffic(phase.layout).total for phase in self.phases)

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
    phases = tuple(_phases(study, identity, algorithm, second))
    where = compile_filter(cohort.where, cohort.features) if cohort.where else None
    return Plan(study, identity, algorithm, phases, where)


def _opening_bytes(scheme: Scheme) -> tuple[int, int, int]:
    """Returns the bytes of the shares that a site deals, of its endorsement, and of its largest answer."""
    if not scheme.opens:
        return 0, 0, 0
    peers, (rows, columns) = len(scheme.group.sites) - 1, scheme.secret_shape
    dealt = (2 * rows * columns + _FRAME) * peers if rows else 0
    return dealt, (32 + 2) * peers, scheme.answer_bytes


def _quantiser(study: Study, identity: str, layout: Layout) -> FixedPoint | Compressed:
    aggregation, sites = study.aggregation, len(study.sites.include)
    if aggregation.compression is not None:
        wanted = aggregation.compression
        signs = Randomness.of_seed(int(identity.removeprefix("sha256:"), 16)).child("signs").bytes(32)
        return compressed(layout, sites, wanted.levels, wanted.rotation, wanted.norm, signs)
    assert aggregation.bits is not None
    return fixed_point(layout, sites, aggregation.bits)


def _scheme(protocol: str, group: Group, length: int, bits: int, means: Means) -> Scheme:
    if protocol == "masking":
        return Masking(group, length, bits, means)
    # numba and TenSEAL are extras: only a study that needs them pays
    if protocol == "rlwe":
        from cohortium.secagg.threshold import Threshold

        return Threshold(group, length, bits)
    from cohortium.secagg.ckks import SingleKey

    return SingleKey(group, length, bits, means.ckks)


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
    rounds = 1 if isinstance(training, OneShot) else training.rounds
    return Then(first, Fitted, second, rounds), second(_typical(cohort.features))


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
    study: Study, identity: str, algorithm: Algorithm[Any, Any, Any], second: Algorithm[Any, Any, Any] | None
) -> Iterator[Phase]:
    if second is not None:
        assert isinstance(algorithm, Then)
        for name, part in (("preprocessing", algorithm.first), (study.model.kind, second)):
            state = part.init()
            yield _phase(study, identity, name, part.layout(part.broadcast(state)), part.progress(state)[0])
        return
    assert isinstance(algorithm, Describe)
    layout = algorithm.layout(algorithm.broadcast(algorithm.init()))
    yield _phase(study, identity, "statistics", layout, 1)
    numbers = sum(isinstance(column, Number) for column in algorithm.columns.values())
    if numbers and algorithm.model.refinements and algorithm.model.quantiles:
        parts = Block("parts", (numbers * len(algorithm.model.quantiles), algorithm.model.bins), layout[0].bound)
        yield _phase(study, identity, "quantiles", (parts,), algorithm.model.refinements)


def _phase(study: Study, identity: str, name: str, layout: Layout, rounds: int) -> Phase:
    stage = _quantiser(study, identity, layout)
    return Phase(name, layout, rounds, stage.precision if isinstance(stage, FixedPoint) else None)


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
    if study.aggregation.compression is not None and not isinstance(study.model, Network):
        raise StudyError(
            f"aggregation.compression rounds model updates, and model '{study.model.kind}' needs every digit of its "
            "sums: remove it"
        )
    scaffold = isinstance(study.training, Averaging) and study.training.local.scaffold
    if study.aggregation.compression is not None and scaffold:
        raise StudyError(
            "aggregation.compression has one scale, and SCAFFOLD's control variates have another than its updates: set "
            "training.local.scaffold: false, or remove compression"
        )
    if study.aggregation.dropouts and scaffold:
        raise StudyError(
            "aggregation.dropouts with SCAFFOLD would tell a site's control variate from the sums of two rounds, since "
            "sites keep theirs whoever survives: set dropouts: 0, or training.local.scaffold: false"
        )
    if study.aggregation.protocol == "rlwe" and len(study.sites.include) > MOST_ENCRYPTING:
        raise StudyError(
            f"protocol 'rlwe' adds up the encryptions of at most {MOST_ENCRYPTING} sites, and the study names "
            f"{len(study.sites.include)}: set aggregation.protocol: masking"
        )
    tolerance(len(study.sites.include), study.aggregation.dropouts)
