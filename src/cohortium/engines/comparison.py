"""What federation is worth: the federated model against each hospital alone and against all rows in one place.

Only a simulation can make this comparison, since it reads every hospital's data. Patients are held out by stratified
cross-validation inside each hospital, so every patient is scored once by models that never saw that patient.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cohortium.core.errors import CohortiumError
from cohortium.core.features import BinaryTarget
from cohortium.core.layout import Floats
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.learning.algorithm import in_the_clear
from cohortium.learning.alone import narrowed, recoded
from cohortium.learning.evaluation import Comparison, evaluate
from cohortium.learning.model import GlobalModel
from cohortium.learning.table import Table, pooled
from cohortium.plan import Plan, compile_study
from cohortium.site.cohort import Subset, assemble
from cohortium.site.ports import DataSource

Federate = Callable[[Mapping[str, DataSource]], GlobalModel]


@dataclass(frozen=True)
class _Site:
    source: DataSource
    identifiers: np.ndarray
    table: Table
    outcome: Floats
    fold: np.ndarray

    def subset(self, patient: str, rows: np.ndarray) -> Subset:
        return Subset(self.source, patient, frozenset(self.identifiers[rows].tolist()))


def cross_validate(
    plan: Plan,
    sources: Mapping[str, DataSource],
    federate: Federate,
    folds: int,
    randomness: Randomness,
    progress: Callable[[int], None] | None = None,
) -> tuple[Comparison, ...]:
    """Returns each site's held-out evaluation of the models "federated", "alone" and "pooled".

    Args:
        plan: of a study with a binary target.
        federate: runs the study over the given sources, with every protection on.
        folds: parts that each site's patients are dealt into; each part is held out once.
        progress: called with the number of folds done.
    """
    assert isinstance(plan.study.cohort.target, BinaryTarget)
    sites = {
        name: _site(plan, source, folds, randomness.child("folds", name).generator())
        for name, source in sources.items()
    }
    scores = {name: {model: np.full(site.table.rows, np.nan) for model in _MODELS} for name, site in sites.items()}
    patient = plan.study.cohort.patient
    for fold in range(folds):
        training = {name: site.subset(patient, site.fold != fold) for name, site in sites.items()}
        tables = {name: site.table.take(site.fold != fold) for name, site in sites.items()}
        federated = federate(training)
        together = fit_in_the_clear(plan, [pooled(list(tables.values()))], randomness.child("pooled", fold))
        for name, site in sites.items():
            held_out = site.fold == fold
            rows = site.table.take(held_out)
            scores[name]["federated"][held_out] = federated.expect(rows)
            scores[name]["pooled"][held_out] = together.expect(rows)
            mine = randomness.child("alone", name, fold)
            scores[name]["alone"][held_out] = score_alone(plan.study, tables[name], rows, mine)
        if progress:
            progress(fold + 1)
    return tuple(
        Comparison(name, {model: evaluate(site.outcome, score) for model, score in scores[name].items()})
        for name, site in sites.items()
    )


def fit_in_the_clear(plan: Plan, tables: Sequence[Table], randomness: Randomness, noise: float = 0.0) -> GlobalModel:
    """Returns the model that a study's algorithm fits to records that one process may read, without protection.

    `noise` is that of `in_the_clear`.
    """
    fitted, fit = in_the_clear(_asking_all(plan).algorithm, tables, randomness, noise)
    return GlobalModel(plan.study, fitted, fit)


def _asking_all(plan: Plan) -> Plan:
    """Returns a plan whose divisors, fixed where there is noise, are those of sums over all records."""
    if plan.noise is None or plan.study.sites.per_round is None:
        return plan
    return compile_study(replace(plan.study, sites=replace(plan.study.sites, per_round=None, selection=None)))


def score_alone(study: Study, training: Table, rows: Table, randomness: Randomness) -> Floats:
    """Returns what the hospital's own model predicts, or its base rate where its patients support no model."""
    assert training.target is not None
    try:
        narrow = narrowed(study, training)
        wide, features = study.cohort.features, narrow.cohort.features
        model = fit_in_the_clear(compile_study(narrow), [recoded(training, wide, features)], randomness)
        return model.expect(recoded(rows, wide, features))
    except CohortiumError:
        return np.full(rows.rows, training.target.mean())


def owners(table: Table) -> np.ndarray:
    """Returns the number of the patient to whom each row belongs."""
    return np.arange(table.rows) if table.patient is None else table.patient


def shuffled(table: Table, stratified: bool, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields a table's patients in random order: those with each outcome by themselves if `stratified`.

    Whole patients are held out, never some of a patient's records; the first record says which outcome counts.
    """
    outcome = np.zeros(table.patients)
    if stratified:
        assert table.target is not None
        outcome = table.target[np.unique(owners(table), return_index=True)[1]]
    for level in np.unique(outcome):
        yield generator.permutation(np.flatnonzero(outcome == level))


_MODELS = ("federated", "alone", "pooled")


def _site(plan: Plan, source: DataSource, folds: int, generator: np.random.Generator) -> _Site:
    identifiers, table = assemble(plan, source)
    assert table.target is not None
    fold = np.empty(table.patients, dtype=np.int64)
    for mine in shuffled(table, True, generator):
        fold[mine] = (np.arange(len(mine)) + generator.integers(folds)) % folds
    return _Site(source, identifiers, table, table.target, fold[owners(table)])
