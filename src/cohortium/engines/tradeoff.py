"""One point of a trade-off: what a study is worth at one epsilon, for one choice of held-out patients.

The study itself runs through every protection; what it is compared with runs in the clear, with noise of the size that
each way of adding it would need for the same promise. A description of a cohort predicts nobody, so no patient is held
out for it: it is judged by how far its shares are from those without noise.
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from cohortium.core.errors import CohortError, ConvergenceError, DataError, StudyError
from cohortium.core.features import BinaryTarget
from cohortium.core.filter import Column
from cohortium.core.layout import Floats
from cohortium.core.models import Descriptive
from cohortium.core.random import Randomness
from cohortium.core.signature import framed
from cohortium.core.study import Study
from cohortium.engines.comparison import fit_in_the_clear, owners, score_alone, shuffled
from cohortium.learning.algorithm import in_the_clear
from cohortium.learning.descriptive import NumberSummary, Summary
from cohortium.learning.model import GlobalModel
from cohortium.learning.table import Table, pooled
from cohortium.learning.tradeoff import CURVES, Point, Utility, score, total_variation
from cohortium.plan import Plan, compile_study
from cohortium.site.cohort import Subset, assemble, columns_needed
from cohortium.site.ports import DataSource

_LARGEST_EPSILON = 1000
Federate = Callable[[Study, Mapping[str, DataSource]], GlobalModel | Summary]
"""Runs a study over the given sources, with every protection on."""


@dataclass(frozen=True)
class Records:
    """A dataset's columns, read once: so all processes compute on the same, whatever happens to the file meanwhile."""

    columns: Mapping[str, Column] = field(repr=False)

    def read(self, names: Sequence[str], *, as_text: Collection[str] = ()) -> Mapping[str, Column]:
        return {name: self.columns[name] for name in names}

    def fingerprint(self) -> str:
        return "in memory"


@dataclass(frozen=True)
class Trial:
    """What all points have in common: study, delta, data, and the share of each site's patients that is held out."""

    study: Study
    delta: float
    holdout: float
    records: Mapping[str, Records]


def records_of(plan: Plan, source: DataSource) -> Records:
    """Returns the columns that a study reads.

    Raises:
        DataError: they cannot be read, or one is missing.
    """
    return Records(source.read(columns_needed(plan), as_text={plan.study.cohort.patient}))


def digest(records: Mapping[str, Records]) -> str:
    """Returns "sha256:" and a digest of all sites' data, which tells whether two trade-offs rest on the same."""
    whole = hashlib.sha256()
    for site, mine in sorted(records.items()):
        for name, column in sorted(mine.columns.items()):
            values = column.tobytes() if column.dtype.kind == "f" else json.dumps(column.tolist()).encode()
            whole.update(framed(site.encode(), name.encode(), hashlib.sha256(values).digest()))
    return f"sha256:{whole.hexdigest()}"


def with_epsilon(study: Study, epsilon: float | None, delta: float) -> Study:
    """Returns the study with another epsilon; None: the same study, training and clipping without any noise."""
    if epsilon is None:
        privacy = replace(study.privacy, epsilon=None, delta=None, sampling=1.0)
    else:
        privacy = replace(study.privacy, epsilon=epsilon, delta=delta)
    return replace(study, privacy=privacy)


def plans_of(study: Study, epsilons: Sequence[float], delta: float) -> tuple[Plan, ...]:
    """Returns the compiled studies of a grid of epsilons.

    Raises:
        StudyError: one of them cannot be run, because the study's training takes no noise or for another reason.
    """
    # a description is compared with its own noisy sum before the noise, not with a study of another kind
    grid = (*epsilons, *(() if isinstance(study.model, Descriptive) else (None,)))
    plans: list[Plan] = []
    refused: dict[float, StudyError] = {}
    for epsilon in grid:
        try:
            plans.append(compile_study(with_epsilon(study, epsilon, delta)))
        except StudyError as error:
            if epsilon is None:
                raise
            refused[epsilon] = error
    for epsilon, reason in refused.items():
        # what holds for all of them is the study's fault and no epsilon's
        raise reason if len(refused) == len(epsilons) else StudyError(f"epsilon {epsilon:g}: {reason}")
    return tuple(plans)


def delta_of(study: Study, delta: float | None) -> float:
    """Returns the delta of a trade-off: the study's own; where it has none, the one given, or 1e-5.

    Raises:
        StudyError: the study has one, and another is given.
    """
    own = study.privacy.delta
    if own is not None and delta not in (None, own):
        raise StudyError(f"delta is {delta:g}, and the study's privacy.delta is {own:g}: give one of them only")
    return own or delta or 1e-5


def refuse_grid(epsilons: Sequence[float], seeds: Sequence[int], holdout: float, allowed: float) -> None:
    """Raises a `StudyError` with the first thing that makes no trade-off."""
    if not epsilons:
        raise StudyError("no epsilon was given beside 'inf': give some, as in 0.5,1,2,inf")
    for epsilon in epsilons:
        if not 0 < epsilon <= _LARGEST_EPSILON:
            raise StudyError(f"epsilon {epsilon:g}: give numbers above 0 and up to {_LARGEST_EPSILON}, or inf")
    if len(seeds) < 2:
        raise StudyError(f"{len(seeds)} seed: give 2 or more, since one says nothing of chance; 10 are a good start")
    if not 0 < holdout < 1:
        raise StudyError(f"holdout {holdout:g}: give a share between 0 and 1, such as 0.25")
    if not 0 <= allowed < math.inf:
        raise StudyError(f"loss {allowed:g}: give the loss that you would accept, 0 or more, such as 0.01")


def utility_of(study: Study) -> Utility:
    """Returns what a study's result is judged by."""
    if isinstance(study.model, Descriptive):
        return Utility("mean error of shares", higher_is_better=False, useless=1.0)
    assert study.cohort.target is not None
    kind = study.cohort.target.type
    names = {"binary": "AUC", "number": "R²", "count": "deviance explained"}
    return Utility(names[kind], higher_is_better=True, useless=0.5 if kind == "binary" else 0.0)


def curves_of(study: Study) -> tuple[str, ...]:
    """Returns what a study is compared with.

    One hospital's own patients are another cohort than all of them, and where a hospital is the unit of privacy, noise
    would hide a hospital from itself: no curve for those.
    """
    lonely = isinstance(study.model, Descriptive) or study.privacy.unit == "site"
    return tuple(curve for curve in CURVES if curve != "alone" or not lonely)


def point(trial: Trial, epsilon: float | None, seed: int, federate: Federate) -> Point:
    """Returns the utilities at one epsilon, with the held-out patients and the noise of one seed.

    Raises:
        CohortError: the held-out patients can judge nothing, or even without noise the others support no model.
        StudyError, DataError: what a run of the study raises.
    """
    # whether a site has enough patients was asked of all of them; here some are held out
    study = replace(trial.study, cohort=replace(trial.study.cohort, minimum=1))
    root = Randomness.of_seed(seed).child("trade-off")
    if isinstance(study.model, Descriptive) and epsilon is None:
        return Point(epsilon, seed, dict.fromkeys(curves_of(study), 0.0), {})
    plan = compile_study(with_epsilon(study, epsilon, trial.delta))
    if isinstance(study.model, Descriptive):
        return Point(epsilon, seed, _errors(plan, trial, root, federate), {})
    splits = [_split(plan, trial, name, root.child("held out", name)) for name in plan.sites]
    expected = _expected(plan, splits, root, federate)
    scores, failed = {}, {}
    outcome = pooled([split.held_out for split in splits]).target
    assert outcome is not None and study.cohort.target is not None
    for curve, heard in expected.items():
        try:
            scores[curve] = float(np.mean([score(outcome, one, study.cohort.target.type) for one, _ in heard]))
        except ValueError:
            raise CohortError(
                f"with seed {seed}, '{study.cohort.target.name}' does not vary among the held-out patients: more "
                "patients are needed, or a larger holdout"
            ) from None
        if lost := sum(fell_back for _, fell_back in heard):
            failed[curve] = lost
    return Point(epsilon, seed, scores, failed)


@dataclass(frozen=True)
class _Split:
    """A site's patients, dealt out; `source` yields those that are trained on."""

    site: str
    training: Table
    held_out: Table
    source: DataSource


_Expected = tuple[Floats, bool]
"""Expected targets of the held-out patients, and whether no model was found and they are a mere mean."""


def _split(plan: Plan, trial: Trial, site: str, randomness: Randomness) -> _Split:
    identifiers, table = assemble(plan, trial.records[site])
    stratified, generator = isinstance(plan.study.cohort.target, BinaryTarget), randomness.generator()
    held = np.zeros(table.patients, dtype=bool)
    for mine in shuffled(table, stratified, generator):
        # every so many-th, from a random start: as many of each outcome as its share asks for, on average exactly
        passed = np.floor(np.arange(len(mine) + 1) * trial.holdout + generator.random())
        held[mine] = passed[1:] > passed[:-1]
    rows = held[owners(table)]
    if rows.all():
        reason = "too few patients pass the study's filter to hold some out"
        raise DataError(f"{site}: {reason}. Give it more, or lower the holdout.", public=reason)
    keep = frozenset(identifiers[~rows].tolist())
    source = Subset(trial.records[site], plan.study.cohort.patient, keep)
    return _Split(site, table.take(~rows), table.take(rows), source)


def _expected(plan: Plan, splits: Sequence[_Split], root: Randomness, federate: Federate) -> dict[str, list[_Expected]]:
    """Returns what each curve's model, or each of its models, expects of the held-out patients."""
    tables, test = [split.training for split in splits], pooled([split.held_out for split in splits])

    def federated() -> GlobalModel:
        outcome = federate(plan.study, {split.site: split.source for split in splits})
        assert isinstance(outcome, GlobalModel)
        return outcome

    expected = {"distributed": [_heard(federated, plan, tables, test)]}
    for curve, noise in _noises(plan).items():
        fit = partial(fit_in_the_clear, plan, tables, root.child("in the clear"), noise)
        expected[curve] = [_heard(fit, plan, tables, test)]
    if "alone" in curves_of(plan.study):
        expected["alone"] = [_alone(plan, split, test, root.child("alone", split.site)) for split in splits]
    return expected


def _alone(plan: Plan, split: _Split, test: Table, randomness: Randomness) -> _Expected:
    """Returns what a hospital's own model expects. Only without noise may its data say which features that has."""
    if plan.noise is None:
        return score_alone(plan.study, split.training, test, randomness), False
    fit = partial(fit_in_the_clear, plan, [split.training], randomness, plan.noise.factor)
    return _heard(fit, plan, [split.training], test)


def _heard(fit: Callable[[], GlobalModel], plan: Plan, tables: Sequence[Table], test: Table) -> _Expected:
    """Returns what a fit expects of the test patients, or the training patients' mean where noise left no model."""
    try:
        return fit().expect(test), False
    except (CohortError, ConvergenceError):
        if plan.noise is None:
            raise
        return np.full(test.rows, np.mean(pooled(list(tables)).target)), True  # type: ignore[arg-type]


def _noises(plan: Plan) -> dict[str, float]:
    """Returns the deviation of each way's noise in the sum, in units of multiplier times norm.

    A patient at several hospitals moves one sum by several norms; of releases that each hospital makes by itself the
    costs add up, which takes the root of their number. The noise of hospitals adds up like a root, too.
    """
    if plan.noise is None:
        return {"central": 0.0, "local": 0.0}
    factor, copies = plan.noise.factor, plan.noise.copies
    return {"central": float(factor * copies), "local": factor * math.sqrt(copies * len(plan.sites))}


def _errors(plan: Plan, trial: Trial, root: Randomness, federate: Federate) -> dict[str, float]:
    """Returns how far each way's shares of bins and levels are from those without noise, averaged over features."""
    tables = [assemble(plan, trial.records[name])[1] for name in plan.sites]
    exact = in_the_clear(plan.algorithm, tables, root)
    found = {"distributed": federate(plan.study, trial.records)}
    for curve, noise in _noises(plan).items():
        found[curve] = in_the_clear(plan.algorithm, tables, root.child("in the clear"), noise)
    return {curve: total_variation(zip(_cells(one), _cells(exact), strict=True)) for curve, one in found.items()}


def _cells(summary: GlobalModel | Summary) -> list[Floats]:
    assert isinstance(summary, Summary)
    counts = (one.histogram.counts if isinstance(one, NumberSummary) else one.counts for one in summary.features)
    return [np.array(cells, dtype=np.float64) for cells in counts]
