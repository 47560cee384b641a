"""What a study promises, tried: canaries go through its own mechanism, and whoever sees the sums guesses which did.

The canaries (`cohortium.learning.canaries`) are the patients of an ordinary run: agents, ledgers, quantiser, dither,
noise shares, secure sum and survivor sets are those of every run, and the noise is the one that the study's plan asks
for. What is put to the test is the promise for the worst case that the study tolerates:

- as many hospitals as may be lost are lost in every round, so that their noise is missing;
- as many as may collude know their own noise, and the guesser takes it off. How much of it is in a sum the guesser
  works out by least squares: once, in correct code, and more often where noise is not independent from one hospital to
  the next;
- a canary is at as many hospitals as a patient may be, and where a study protects against replacement, a canary that
  does not take part is there with the opposite vector.

Every phase counts, preprocessing too. A canary's score is the logarithm of the likelihood ratio of all its sums, which
by Neyman and Pearson no guesser betters; without sampling it orders canaries as the sum weighted by inverse variance.

Beside the bound stands the deviation of the noise itself, seen where canaries did not take part. It is far surer than
the bound where noise is too small, and says nothing of clipping, of sampling, or of how the noise was computed.

What is not tried: how the study's own model computes a patient's vector before it is clipped.

Trust: a bound from one run is no proof. It says by how much a promise is broken at least, never that it is kept.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv

from cohortium.coordinator.audit import CanaryTest
from cohortium.core.document import study_id
from cohortium.core.errors import StudyError
from cohortium.core.layout import Floats, Layout, Noise, size, unpack
from cohortium.core.messages import FromSite, MaskedUpdate, ToSite
from cohortium.core.models import Descriptive
from cohortium.core.random import Randomness
from cohortium.core.study import Cohort
from cohortium.engines.tradeoff import Records
from cohortium.learning.canaries import Canaries, CanaryState, features, noisy, turned, widened
from cohortium.plan import Plan
from cohortium.privacy.attack import one_run
from cohortium.promise import keeps_promise

_RECORDS = 5
"""Records of a canary where a patient may have several: each alone is as long as may be, and longer."""
_MISSED = 1e-6
"""The probability that the interval for the noise misses: code that is right shall never fail by it."""
_BYSTANDER = "bystander"


@dataclass(frozen=True)
class Trial:
    """A run of canaries, ready to start.

    Attributes:
        plan: the study's plan with canaries for patients.
        included: which of them take part, `(canaries,)`.
        sources: each hospital's data.
        honest: hospitals whose noise is all that hides the canaries, which are at these.
        lost: hospitals whose answers are lost in every round.
        colluding: hospitals that tell the guesser their noise.
    """

    plan: Plan
    included: NDArray[np.bool_] = field(repr=False)
    sources: Mapping[str, Records] = field(repr=False)
    honest: tuple[str, ...]
    lost: tuple[str, ...]
    colluding: tuple[str, ...]

    @property
    def copies(self) -> int:
        """At how many hospitals a canary is."""
        return min(self.plan.study.privacy.sites_per_patient, len(self.honest))

    @property
    def factor(self) -> int:
        """How many of its vectors a canary changes a sum by at each of them: 2 where it is there in any case."""
        return 2 if self.plan.study.privacy.neighbouring == "replace" else 1

    def faults(self, site: str, message: ToSite | FromSite) -> bool:
        """Returns whether a message is lost."""
        return site in self.lost and isinstance(message, MaskedUpdate)


def trial(plan: Plan, canaries: int, randomness: Randomness) -> Trial:
    """Returns a run of canaries through the mechanism of a plan with differential privacy.

    Args:
        canaries: how many; where hospitals are protected, there is one for each that is neither lost nor colluding.
        randomness: of the draw that decides which of them take part.

    Raises:
        StudyError: the study asks some of its sites in a round.
    """
    study = plan.study
    if study.sites.per_round is not None:
        raise StudyError(
            f"a run of canaries asks all sites in every round, and the study asks {study.sites.per_round}: audit it "
            f"without sites.per_round, over {study.sites.per_round} sites, whose sums carry the least noise"
        )
    few = len(plan.sites) - study.aggregation.dropouts - study.privacy.colluding
    honest, rest = plan.sites[:few], plan.sites[few:]
    lost = rest[: study.aggregation.dropouts]
    count = len(honest) if study.privacy.unit == "site" else canaries
    included = randomness.child("included").generator().random(count) < 0.5
    places: dict[str, list[int]] = {site: [] for site in plan.sites}
    for canary in range(count):
        for copy in range(min(study.privacy.sites_per_patient, few)):
            places[honest[(canary + copy) % few]].append(canary)
    sources = {site: _planted(plan, np.array(mine, dtype=np.intp), included) for site, mine in places.items()}
    return Trial(_with_canaries(plan, count), included, sources, honest, lost, rest[len(lost) :])


@dataclass(frozen=True)
class Heard:
    """What the guesser has of one block of a phase: the sums, less what the colluding hospitals added of noise.

    Attributes:
        noise: what the study promises to add.
        sums: `(rounds, canaries)`, all of them turned the same way.
    """

    noise: Noise
    sums: Floats = field(repr=False)


def heard(of: Trial, outcome: Any, known: Mapping[str, Randomness]) -> tuple[Heard, ...]:
    """Returns what the guesser has after a run.

    Args:
        outcome: of the run. A plan takes what its algorithm yields for a model, and here that is the sums.
        known: the randomness of each colluding hospital's part in the run.
    """
    algorithm, state = of.plan.algorithm, outcome.fit
    assert isinstance(algorithm, Canaries) and isinstance(state, CanaryState)
    blocks, first = [], 0
    for layout, rounds in algorithm.phases:
        numbers = range(first, first + rounds)
        shares = [[_share(of.plan, layout, key, number) for number in numbers] for key in known.values()]
        signs = np.array([[turned(number)] for number in numbers])
        for block, noise in noisy(layout):
            sums = np.array([state.sums[number][block.name] for number in numbers])
            told = [np.array([share[block.name] for share in by_round]) for by_round in shares]
            blocks.append(Heard(noise, signs * _without(sums, told)))
        first += rounds
    return tuple(blocks)


def scores(of: Trial, blocks: Sequence[Heard]) -> Floats:
    """Returns how sure a guesser is that each canary took part, `(canaries,)`."""
    ratios: Floats = np.sum([_log_ratios(of, block).sum(axis=0) for block in blocks], axis=0)
    return ratios


def judged(of: Trial, blocks: Sequence[Heard], confidence: float) -> CanaryTest:
    """Returns what a guesser can say who heard `blocks`, beside what the study promises."""
    privacy, score = of.plan.study.privacy, scores(of, blocks)
    assert privacy.epsilon is not None and privacy.delta is not None
    found = one_run(score, of.included, privacy.delta, confidence)
    noise, low, high = _noise(of, blocks)
    return CanaryTest(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        confidence=confidence,
        lower=found.epsilon,
        canaries=len(score),
        guesses=found.guesses,
        right=found.right,
        rounds=of.plan.rounds,
        carriers=len(of.honest),
        lost=of.lost,
        colluding=of.colluding,
        noise=noise,
        noise_low=low,
        noise_high=high,
        included=tuple(score[of.included].tolist()),
        left_out=tuple(score[~of.included].tolist()),
    )


def _with_canaries(plan: Plan, count: int) -> Plan:
    """Returns the plan whose patients are canaries, in everything else that of the study."""
    study = plan.study
    cohort = Cohort(
        dataset="canaries",
        patient="id",
        records=study.cohort.records,
        features=features(count),
        minimum=1,
        maximum=max(study.cohort.maximum, _RECORDS * count + 1),
    )
    tried = replace(study, name=f"{study.name[:57]}-audit", cohort=cohort, model=Descriptive(), training=None)
    phases = tuple(replace(phase, layout=widened(phase.layout, count)) for phase in plan.phases)
    algorithm = Canaries(count, tuple((phase.layout, phase.rounds) for phase in phases), study.privacy.unit)
    made = replace(plan, study=tried, study_id=study_id(tried), algorithm=algorithm, phases=phases, where=None)
    keeps_promise(tried, made.releases)
    return made


def _planted(plan: Plan, mine: NDArray[np.intp], included: NDArray[np.bool_]) -> Records:
    """Returns the data of a hospital with the canaries `mine`."""
    privacy = plan.study.privacy
    if privacy.neighbouring == "replace":
        sign = np.where(included[mine], 1.0, -1.0)
    else:
        mine = mine[included[mine]]
        sign = np.ones(len(mine))
    several = plan.study.cohort.records == "several" and privacy.unit == "patient"
    rows = np.repeat(np.arange(len(mine)), _RECORDS if several else 1)
    identifiers = [_BYSTANDER, *(f"canary {number}" for number in mine[rows])]
    return Records(
        {
            "id": np.array(identifiers, dtype=object),
            "canary": np.array([0.0, *mine[rows]]),
            "sign": np.array([0.0, *sign[rows]]),
        }
    )


def _share(plan: Plan, layout: Layout, key: Randomness, number: int) -> dict[str, Floats]:
    """Returns the noise that a hospital adds to a round, as it computes it: what it makes of a vector of zeros."""
    stages = plan.stages(layout)
    return unpack(layout, stages.decode(stages.encode(np.zeros(size(layout)), key.child("round", number + 1))))


def _without(sums: Floats, told: Sequence[Floats]) -> Floats:
    """Returns the sums `(rounds, canaries)` less what of them the shares in `told`, of the same shape, explain."""
    if not told:
        return sums
    explaining = np.column_stack([np.ones(sums.size), *(share.ravel() for share in told)])
    weights = np.linalg.lstsq(explaining, sums.ravel(), rcond=None)[0]
    left: Floats = sums - (explaining[:, 1:] @ weights[1:]).reshape(sums.shape)
    return left


def _moved(of: Trial, block: Heard) -> Floats:
    """Returns how far each sum is from where it is without the canary, in steps of what one hospital's copy adds."""
    away = of.copies / 2 if of.factor == 2 else 0.0
    moved: Floats = block.sums / (of.factor * block.noise.norm) + away
    return moved


def _deviation(of: Trial, noise: Noise) -> float:
    """Returns the deviation that was promised, in the same steps."""
    return noise.multiplier * of.plan.study.privacy.sites_per_patient


def _log_ratios(of: Trial, block: Heard) -> Floats:
    """Returns log P(sum | takes part) - log P(sum | does not) for each entry, with the noise that was promised."""
    rate, copies = block.noise.rate, of.copies
    ratios: Floats = copies * (_moved(of, block) - copies / 2) / _deviation(of, block.noise) ** 2
    # a sampled canary may not have been drawn; it is at one hospital then, where studies sample
    return ratios if rate == 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + ratios)


def _noise(of: Trial, blocks: Sequence[Heard]) -> tuple[float, float, float]:
    """Returns the noise's deviation relative to what was promised, and an interval that all but never misses it.

    Only canaries that do not take part are looked at: what is in their sums is noise.
    """
    parts = [_moved(of, block)[:, ~of.included].ravel() / _deviation(of, block.noise) for block in blocks]
    seen = np.concatenate(parts)
    squares, count = float(seen @ seen), max(1, len(seen))
    low, high = (2 * float(gammaincinv(count / 2, share)) for share in (1 - _MISSED / 2, _MISSED / 2))
    return math.sqrt(squares / count), math.sqrt(squares / low), math.sqrt(squares / high)
