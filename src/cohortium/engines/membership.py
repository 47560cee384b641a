"""Membership inference on a study's model: can its predictions tell who was trained on?

The study is run on about half of all patients, each of whom is in it by the toss of a coin. Whoever attacks knows the
study and has all patients' data, and trains shadow models on other halves of them: so it is known how sure such a model
is of a patient whom it saw and of one whom it did not, and the released model is compared with both. That is the
strongest attack of its kind that is known; a stronger one may be found.

Shadow models are fitted without messages, and their sums get noise of the deviation that the study's sums carry: they
follow the law of its real runs.

Source: Carlini et al. 2022, "Membership Inference Attacks From First Principles", algorithm 1 (LiRA, online).

Trust: only a simulation can do this, since it reads every hospital's data. What it prints is about all patients.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, logit, ndtr, ndtri

from cohortium.coordinator.audit import Curve, MembershipTest
from cohortium.core.errors import CohortError, StudyError
from cohortium.core.events import Events
from cohortium.core.features import BinaryTarget
from cohortium.core.layout import Floats
from cohortium.core.models import Descriptive
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.learning.algorithm import in_the_clear
from cohortium.learning.model import GlobalModel
from cohortium.learning.table import Table
from cohortium.plan import Plan, compile_study
from cohortium.privacy.accountant import delta, releases
from cohortium.privacy.attack import attack_auc, found_at, lira, one_run
from cohortium.promise import spread
from cohortium.site.cohort import Subset, assemble
from cohortium.site.ports import DataSource

FPR = 0.01
"""The share of other patients whom the attack may take for members, where its yield is given."""
RATES = np.geomspace(1e-4, 1, 201)
"""Where its curve is given."""
_DELTA = 1e-5
"""For a bound on a study that promises none."""
_EPSILONS = np.geomspace(0.05, 20, 16)
"""Where the curve of sampled releases is worked out, a line for each; between them it is bounded by the nearest."""
Federate = Callable[[Study, Mapping[str, DataSource]], GlobalModel]
Mask = NDArray[np.bool_]
_SURE = 1e-12
"""No prediction counts as surer than this: its log odds stay finite."""


@dataclass(frozen=True)
class Hospital:
    """A hospital's cohort, and which patient each of its records is of, `(n_rows,)` numbers from 0."""

    source: DataSource
    identifiers: NDArray[np.object_] = field(repr=False)
    table: Table
    owners: NDArray[np.intp] = field(repr=False)

    @property
    def patients(self) -> int:
        return int(self.owners.max(initial=-1)) + 1

    def subset(self, column: str, members: Mask) -> Subset:
        """Returns the data of the patients in `members`, `(n_patients,)`; `column` holds their identifiers."""
        return Subset(self.source, column, frozenset(self.identifiers[members[self.owners]].tolist()))


@dataclass(frozen=True)
class Evidence:
    """What the attack knows. All patients of all hospitals stand in one order.

    Attributes:
        members: which patients the released model was trained on, `(n_patients,)`.
        released: the evidence that it gives of each patient, `(n_patients,)`.
        shadow_members: the same of the shadow models, `(shadows, n_patients)`; each patient is in half of them.
        shadows: their evidence, `(shadows, n_patients)`.
    """

    members: Mask
    released: Floats
    shadow_members: NDArray[np.bool_]
    shadows: Floats


@dataclass(frozen=True)
class Shadow:
    """A shadow model to be trained: its number, whom it sees at each hospital, and its randomness."""

    number: int
    members: tuple[Mask, ...] = field(repr=False)
    randomness: Randomness


Spread = Callable[[Callable[[Shadow], tuple[int, Floats]], Sequence[Shadow]], Iterable[tuple[int, Floats]]]
"""Does the work for each shadow model, in any order: here, or spread over processes."""


def refuse(plan: Plan, canaries: int, shadows: int, confidence: float) -> None:
    """Raises a `StudyError` with the first thing that makes no audit."""
    if plan.noise is None and isinstance(plan.study.model, Descriptive):
        raise StudyError("the study promises no differential privacy and has no model: there is nothing to attack")
    if canaries < 10:
        raise StudyError(f"{canaries} canaries: give 10 or more; below some hundreds little can be said")
    if shadows < 4 or shadows % 2:
        raise StudyError(f"{shadows} shadow models: give an even number from 4 on")
    if not 0.5 < confidence < 1:
        raise StudyError(f"confidence {confidence:g}: give a number between 0.5 and 1, such as 0.95")


def not_tried(plan: Plan) -> tuple[str, ...]:
    """Returns a sentence for each test that a study has no use for."""
    told = []
    if plan.noise is None:
        told.append("No canaries were sent: the study promises no differential privacy, so there is nothing to test.")
    elif plan.study.privacy.unit == "site":
        told.append("There is one canary for each hospital, since whole hospitals are protected: too few to say much.")
    if isinstance(plan.study.model, Descriptive):
        told.append("No membership attack was made: a description has no model that could be asked for a prediction.")
    return tuple(told)


def gather(
    plan: Plan,
    sources: Mapping[str, DataSource],
    federate: Federate,
    shadows: int,
    randomness: Randomness,
    spread_work: Spread = map,
    progress: Callable[[int], None] | None = None,
) -> Evidence:
    """Returns the evidence for the attack: trains the model that is attacked and its shadows.

    Args:
        plan: of a study with a target.
        federate: runs a study over the given sources, with every protection on.
        shadows: how many shadow models; an even number, so that each patient is in half of them.
        progress: called with the number of models done.

    Raises:
        CohortError, ConvergenceError: halves of the cohort are too few for the study.
    """
    patient = plan.study.cohort.patient
    hospitals = {name: _hospital(plan, source) for name, source in sources.items()}
    # half a hospital may be fewer patients than the study admits
    study = replace(plan.study, cohort=replace(plan.study.cohort, minimum=1))
    members = _coins(hospitals.values(), randomness.child("target"))
    of_each = zip(hospitals.items(), members, strict=True)
    model = federate(study, {name: one.subset(patient, mine) for (name, one), mine in of_each})
    released = np.concatenate([evidence(model, one.table, one.owners) for one in hospitals.values()])
    if progress:
        progress(1)
    tasks = _shadows(hospitals.values(), shadows, randomness)
    found = np.empty((shadows, len(released)))
    work = partial(fit_shadow, study, tuple((one.table, one.owners) for one in hospitals.values()))
    for done, (number, values) in enumerate(spread_work(work, tasks)):
        found[number] = values
        if progress:
            progress(done + 2)
    return Evidence(
        np.concatenate(members), released, np.array([np.concatenate(task.members) for task in tasks]), found
    )


def judged(plan: Plan, found: Evidence, confidence: float) -> MembershipTest:
    """Returns what the attack makes of its evidence, beside what the study's promise admits."""
    members = int(found.members.sum())
    if members in (0, len(found.members)):
        raise CohortError("no patients, or all, were drawn for the model that is attacked: give more data")
    privacy, score = plan.study.privacy, lira(found.released, found.shadows, found.shadow_members)
    area, tpr = attack_auc(score, found.members), found_at(score, found.members, FPR)
    low, high = _interval(round(tpr * members), members)
    admitted = plan.releases if _covers(plan.study) and plan.noise else None
    bound = one_run(score, found.members, privacy.delta or _DELTA, confidence)
    return MembershipTest(
        epsilon=None if admitted is None else privacy.epsilon,
        delta=privacy.delta or _DELTA,
        confidence=confidence,
        lower=bound.epsilon,
        patients=len(score),
        members=members,
        shadows=len(found.shadows),
        auc=area.auc,
        auc_low=area.low,
        auc_high=area.high,
        fpr=FPR,
        tpr=tpr,
        tpr_low=low,
        tpr_high=high,
        most=None if admitted is None else float(most_found(admitted, np.array([FPR]))[0]),
        roc=Curve(tuple(RATES.tolist()), tuple(found_at(score, found.members, rate) for rate in RATES.tolist())),
        bound=None if admitted is None else Curve(tuple(RATES.tolist()), tuple(most_found(admitted, RATES).tolist())),
    )


def fit_shadow(study: Study, cohorts: Sequence[tuple[Table, NDArray[np.intp]]], shadow: Shadow) -> tuple[int, Floats]:
    """Returns a shadow model's number, and its evidence of every patient, `(n_patients,)`."""
    plan = compile_study(study)
    seen = [table.take(members[owners]) for (table, owners), members in zip(cohorts, shadow.members, strict=True)]
    fitted, fit = in_the_clear(plan.algorithm, seen, shadow.randomness, spread(study) if plan.noise else 0.0)
    model = GlobalModel(plan.study, fitted, fit)
    return shadow.number, np.concatenate([evidence(model, table, owners) for table, owners in cohorts])


def evidence(model: GlobalModel, table: Table, owners: NDArray[np.intp]) -> Floats:
    """Returns how well a model predicts each patient, a mean over a patient's records, `(n_patients,)`.

    For a binary target it is the log odds that the model gives to what happened, for others what it falls short by:
    both are about normal over shadow models.
    """
    assert table.target is not None
    expected = model.expect(table)
    if isinstance(model.study.cohort.target, BinaryTarget):
        right = logit(np.clip(expected, _SURE, 1 - _SURE)) * np.where(table.target == 1, 1.0, -1.0)
    else:
        right = table.target - expected
    mean: Floats = np.bincount(owners, right) / np.bincount(owners)
    return mean


def most_found(events: Events, rates: Floats) -> Floats:
    """Returns the largest true positive rate that any test of a unit's membership can have at false positive rates.

    Without sampling it is the Gaussian's own trade-off curve; with it, the lower envelope of lines, one for each of
    some epsilons.

    Source: Dong, Roth and Su 2022, "Gaussian Differential Privacy", equation 6 and proposition 2.4; Kairouz, Oh and
    Viswanath 2015, "The Composition Theorem for Differential Privacy", theorem 2.1.
    """
    what = releases(events)
    if not what.sampled:
        power: Floats = np.minimum(1.0, ndtr(ndtri(rates) + 1 / what.multiplier) + what.slack)
        return power
    lines = [np.exp(epsilon) * rates + delta(events, float(epsilon)) for epsilon in _EPSILONS]
    # the same lines, with the two hypotheses exchanged
    turned = [1 - np.exp(-epsilon) * (1 - delta(events, float(epsilon)) - rates) for epsilon in _EPSILONS]
    lowest: Floats = np.minimum(1.0, np.min([*lines, *turned], axis=0))
    return lowest


def _covers(study: Study) -> bool:
    """Returns whether what a study promises is about single patients."""
    return study.privacy.unit == "patient" or (study.privacy.unit == "record" and study.cohort.records == "one")


def _interval(hits: int, of: int) -> tuple[float, float]:
    """Returns a 95% interval for a share (Clopper and Pearson 1934)."""
    low = 0.0 if hits == 0 else float(betaincinv(hits, of - hits + 1, 0.025))
    high = 1.0 if hits == of else float(betaincinv(hits + 1, of - hits, 0.975))
    return low, high


def _hospital(plan: Plan, source: DataSource) -> Hospital:
    identifiers, table = assemble(plan, source)
    return Hospital(source, identifiers, table, np.unique(identifiers, return_inverse=True)[1])


def _coins(hospitals: Iterable[Hospital], randomness: Randomness) -> list[Mask]:
    """Returns for each hospital which of its patients are drawn, each of them independently: the bound needs that."""
    generator = randomness.generator()
    return [generator.random(hospital.patients) < 0.5 for hospital in hospitals]


def _halves(hospitals: Iterable[Hospital], randomness: Randomness) -> list[Mask]:
    """Returns a random half of each hospital's patients."""
    generator = randomness.generator()
    return [generator.permutation(hospital.patients) % 2 == 0 for hospital in hospitals]


def _shadows(hospitals: Iterable[Hospital], count: int, randomness: Randomness) -> list[Shadow]:
    """Returns shadow models in pairs, the second on those patients whom the first does not see."""
    tasks, listed = [], list(hospitals)
    for number in range(count):
        members = _halves(listed, randomness.child("shadow members", number // 2))
        seen = tuple(~mine if number % 2 else mine for mine in members)
        tasks.append(Shadow(number, seen, randomness.child("shadow", number)))
    return tasks
