"""Audits: canaries through a study's own mechanism, and membership inference on its model."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from cohortium.adapters import machine, processes
from cohortium.bootstrap.documents import source_of, write_file
from cohortium.bootstrap.simulation import (
    _home,
    _means,
    _run_name,
    coordinator_key,
    require_sites,
    seeded,
    simulate,
    simulated_agents,
)
from cohortium.coordinator.audit import Audit, CanaryTest
from cohortium.coordinator.audit import as_json as audit_json
from cohortium.core.errors import (
    CohortError,
    ConvergenceError,
)
from cohortium.core.models import Descriptive
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.engines import audit as auditing
from cohortium.engines import local
from cohortium.engines import membership as attacking
from cohortium.learning.model import GlobalModel
from cohortium.plan import Plan, compile_study
from cohortium.site.ports import DataSource


def audit_privacy(
    study: Study,
    sites: Mapping[str, Any],
    *,
    seed: int,
    canaries: int = 1000,
    shadows: int = 32,
    confidence: float = 0.95,
    jobs: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> Audit:
    """Attacks a study by simulation and returns what was found, beside what it promises.

    Args:
        study, sites, seed: as for `simulate`.
        canaries: made-up patients, of whom half go through the study's sums.
        shadows: models that the attack on the study's own model is trained with, an even number.
        confidence: of lower bounds on epsilon.
        jobs: processes that train shadow models; with more than one, a script that calls this needs the guard
            `if __name__ == "__main__"`.
        progress: called with steps done, all steps, and what is being done.

    Raises:
        StudyError: a figure makes no audit, or the study promises nothing and predicts nothing; and what `simulate`
            raises.
    """
    plan = compile_study(study)
    attacking.refuse(plan, canaries, shadows, confidence)
    require_sites(plan, sites)
    root, models = seeded(seed).child("audit"), 0 if isinstance(study.model, Descriptive) else shadows + 1
    rounds, passed_over = plan.rounds if plan.noise else 0, attacking.not_tried(plan)

    def step(before: int, what: str, done: int) -> None:
        if progress:
            progress(before + done, rounds + models, what)

    tested = audit_canaries(plan, canaries, confidence, root, partial(step, 0, "canaries")) if plan.noise else None
    membership = None
    if models:
        try:
            spread = partial(processes.spread, jobs=jobs) if jobs > 1 else map
            sources = {name: source_of(sites[name]) for name in plan.sites}
            federate = partial(_federate, seed)
            known = attacking.gather(plan, sources, federate, shadows, root, spread, partial(step, rounds, "models"))
            membership = attacking.judged(plan, known, confidence)
        except (CohortError, ConvergenceError) as error:
            if tested is None:
                raise
            passed_over = (*passed_over, f"No membership attack was made: half of the patients are too few: {error}.")
    return Audit(study, plan.study_id, seed, tested, membership, passed_over)


def write_audit(found: Audit, folder: str | Path) -> list[Path]:
    """Writes audit.json, audit.png and audit.md, and returns their paths."""
    # matplotlib takes a second to import, and only pictures need it
    from cohortium.web import audit as page

    contents = {
        "audit.json": json.dumps(audit_json(found), indent=1, allow_nan=False).encode(),
        "audit.png": page.picture(found),
        "audit.md": f"{page.section(found)}\n".encode(),
    }
    for name, data in contents.items():
        write_file(Path(folder) / name, data)
    return [Path(folder) / name for name in contents]


def audit_canaries(
    plan: Plan, count: int, confidence: float, root: Randomness, progress: Callable[[int], None] | None = None
) -> CanaryTest:
    """Runs canaries through a plan's mechanism, as `simulate` runs patients, and has them guessed."""
    trial = auditing.trial(plan, count, root)
    means, name = _means(trial.plan), _run_name(root)
    with ExitStack() as stack:
        kept = {site: stack.enter_context(_home(trial.plan, site, root, None)) for site in plan.sites}
        agents = simulated_agents(trial.plan, trial.sources, root, lambda _: trial.plan, means[0], homes=kept)
        # what a hospital that colludes knows of its own noise
        known = {site: agents[site].randomness.child("run", name) for site in trial.colluding}
        result = local.run(
            trial.plan,
            agents,
            name,
            time.perf_counter,
            coordinator_key(root),
            means[1],
            progress=(lambda closed: progress(closed.number)) if progress else None,
            faults=trial.faults,
            pool=machine.threads("sites"),
        )
    return auditing.judged(trial, auditing.heard(trial, result.outcome, known), confidence)


def _federate(seed: int, study: Study, sources: Mapping[str, DataSource]) -> GlobalModel:
    return simulate(study, sources, seed=seed).model
