"""From a study to what both halves of a run do: the algorithm, the stages and the sum.

Coordinator and sites compile the same canonical bytes, so they agree without talking about it. Whatever a study asks
for that this version cannot give is refused here, before any record is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cohortium.core import document
from cohortium.core.errors import StudyError
from cohortium.core.events import DpEvent, Events, Repeated, Slack
from cohortium.core.filter import Filter, compile_filter
from cohortium.core.layout import Layout, Statistics, size
from cohortium.core.messages import MOST_MISSED
from cohortium.core.models import Descriptive
from cohortium.core.random import Randomness
from cohortium.core.stage import Chain, chain
from cohortium.core.study import Study
from cohortium.core.training import Asynchronous, Averaging
from cohortium.learning.algorithm import Algorithm, Then
from cohortium.learning.descriptive import Summary
from cohortium.learning.model import GlobalModel
from cohortium.offered import refuse_what_is_not_offered
from cohortium.promise import NoiseRule, keeps_promise, noise_rule
from cohortium.recipes import recipe_of
from cohortium.secagg.compress import Compressed, compressed
from cohortium.secagg.group import Group, Tolerance, tolerance
from cohortium.secagg.masking import Masking
from cohortium.secagg.quantise import FixedPoint, fixed_point, no_margin
from cohortium.secagg.scheme import Scheme
from cohortium.secagg.stream import PLAIN, Means

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
    """A compiled study. Equal studies give equal plans. `noise` is None without differential privacy."""

    study: Study
    study_id: str
    algorithm: Algorithm[Any, Any, Any]
    phases: tuple[Phase, ...]
    where: Filter | None
    noise: NoiseRule | None = None

    @cached_property
    def document(self) -> bytes:
        """The study's canonical bytes."""
        return document.canonical_bytes(self.study)

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
        """What every one of the study's secure sums withstands: that over the fewest sites."""
        return tolerance(self.study.sites.fewest, self.study.aggregation.dropouts)

    @cached_property
    def threshold(self) -> int:
        """How many sites must agree on keys, and stay to the end of a round that asks all of them."""
        return tolerance(len(self.sites), self.study.aggregation.dropouts).threshold

    @property
    def may_miss(self) -> bool:
        """Whether a run goes on without a site, and the site may come back to it."""
        return bool(self.study.aggregation.dropouts) or self.study.sites.per_round is not None

    def selects(self, number: int) -> bool:
        """Returns whether a round asks some of the sites only: preprocessing is fitted over all."""
        return self.study.sites.per_round is not None and number > self.phases[0].rounds

    @cached_property
    def buffer(self) -> Asynchronous | None:
        """How rounds of training are buffers, if they are."""
        training = self.study.training
        return training.asynchronous if isinstance(training, Averaging) else None

    def buffers(self, number: int) -> bool:
        """Returns whether a round closes once the study's `buffer` of sites has contributed."""
        return self.buffer is not None and number > self.phases[0].rounds

    @property
    def plain(self) -> bool:
        """Whether each round asks all sites, for one contribution each."""
        return self.study.sites.per_round is None and self.buffer is None

    def stale(self, broadcast: Any, statistics: Statistics, late: int) -> Statistics:
        """Returns what is summed of statistics that are so many rounds late, in a round that buffers."""
        assert isinstance(self.algorithm, Then)
        return self.algorithm.stale(broadcast, statistics, late)

    def summing(self, agreed: Group, selected: tuple[str, ...]) -> Group:
        """Returns the sites that sum in a round: those selected, or all that agreed on keys where none are.

        Raises:
            ValueError: they are out of order, or too few.
        """
        return Group(selected, len(selected) - self.study.aggregation.dropouts) if selected else agreed

    def quantiser(self, layout: Layout) -> FixedPoint | Compressed:
        """Returns what turns a site's packed statistics into the integers that are summed.

        Raises:
            StudyError: the range proof fails for this layout.
        """
        return _quantiser(self.study, self.study_id, layout, self.noise)

    def stages(self, layout: Layout) -> Chain:
        """Returns what lies between a site's statistics and the secure sum.

        Raises:
            StudyError: the range proof fails for this layout, or a study with differential privacy would send an exact
                number.
        """
        return _stages(self.quantiser(layout), layout, self.noise)

    @cached_property
    def releases(self) -> Events:
        """What a whole run costs in privacy; nothing where the study asks for no differential privacy."""
        return tuple(
            _repeated(phase.rounds, event) for phase in self.phases for event in self.stages(phase.layout).events()
        )

    def scheme(self, group: Group, layout: Layout, means: Means = PLAIN) -> Scheme:
        """Returns how the sites of a group protect and sum vectors of this layout."""
        quantiser = self.quantiser(layout)
        return self.scheme_of(group, quantiser.length, quantiser.bits, means)

    def scheme_of(self, group: Group, length: int, bits: int, means: Means = PLAIN) -> Scheme:
        """Returns the scheme for vectors of so many residues whose sums are so wide."""
        return _scheme(self.study.aggregation.protocol, group, length, bits, means)

    def traffic(self, layout: Layout) -> Traffic:
        """Returns the most that a site sends in a round of this layout."""
        scheme = self.scheme(Group(self.sites, self.threshold), layout)
        return Traffic(scheme.payload_bytes, *_opening_bytes(scheme))

    @cached_property
    def outbound_limit(self) -> int:
        """More bytes than the coordinator sends a site at once: rounds' broadcasts, or what opening a sum takes."""
        missed = MOST_MISSED if self.may_miss else 0
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
    refuse_what_is_not_offered(study)
    identity = document.study_id(study)
    cohort = study.cohort
    recipe, noise = recipe_of(study, identity), noise_rule(study)
    phases = tuple(
        Phase(name, layout, rounds, _precision(_quantiser(study, identity, layout, noise)))
        for name, layout, rounds in recipe.phases
    )
    where = compile_filter(cohort.where, cohort.features) if cohort.where else None
    plan = Plan(study, identity, recipe.algorithm, phases, where, noise)
    if noise is not None:
        keeps_promise(study, plan.releases)
    return plan


def _opening_bytes(scheme: Scheme) -> tuple[int, int, int]:
    """Returns the bytes of the shares that a site deals, of its endorsement, and of its largest answer."""
    if not scheme.opens:
        return 0, 0, 0
    peers, (rows, columns) = len(scheme.group.sites) - 1, scheme.secret_shape
    dealt = (2 * rows * columns + _FRAME) * peers if rows else 0
    return dealt, (32 + 2) * peers, scheme.answer_bytes


def _quantiser(study: Study, identity: str, layout: Layout, noise: NoiseRule | None) -> FixedPoint | Compressed:
    aggregation, sites = study.aggregation, len(study.sites.include)
    if aggregation.compression is not None:
        wanted = aggregation.compression
        signs = Randomness.of_seed(int(identity.removeprefix("sha256:"), 16)).child("signs").bytes(32)
        return compressed(layout, sites, wanted.levels, wanted.rotation, wanted.norm, signs)
    assert aggregation.bits is not None
    return fixed_point(layout, sites, aggregation.bits, no_margin if noise is None else noise)


def _stages(quantiser: FixedPoint | Compressed, layout: Layout, noise: NoiseRule | None) -> Chain:
    if noise is None:
        return chain([quantiser])
    assert isinstance(quantiser, FixedPoint)
    for block in layout:
        if block.noise is None:
            raise StudyError(
                f"the study asks for differential privacy, and its statistic '{block.name}' carries no noise"
            )
    return chain([quantiser, noise.shares(layout, quantiser.exponents, quantiser.bits)])


def _repeated(times: int, event: DpEvent) -> DpEvent:
    if times == 1 or isinstance(event, Repeated):
        return event
    return Slack(min(1.0, times * event.delta)) if isinstance(event, Slack) else Repeated(times, event)


def _precision(stage: FixedPoint | Compressed) -> float | None:
    return stage.precision if isinstance(stage, FixedPoint) else None


def _scheme(protocol: str, group: Group, length: int, bits: int, means: Means) -> Scheme:
    if protocol == "masking":
        return Masking(group, length, bits, means)
    # numba and TenSEAL are extras: only a study that needs them pays
    if protocol == "rlwe":
        from cohortium.secagg.threshold import Threshold

        return Threshold(group, length, bits)
    from cohortium.secagg.ckks import SingleKey

    return SingleKey(group, length, bits, means.ckks)
