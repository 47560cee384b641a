"""What epsilon costs: a study over a grid of epsilons and seeds, in processes of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cohortium.adapters import machine, processes
from cohortium.bootstrap.documents import source_of, write_file
from cohortium.bootstrap.simulation import require_sites, simulate
from cohortium.core.document import study_id
from cohortium.core.errors import (
    CohortiumError,
    DataError,
    SiteError,
    StudyError,
)
from cohortium.core.study import Study
from cohortium.engines import tradeoff as trading
from cohortium.learning.descriptive import Summary
from cohortium.learning.model import GlobalModel
from cohortium.learning.tradeoff import Basis, Point, Tradeoff, as_bytes, points_of
from cohortium.plan import Plan
from cohortium.site.cohort import load
from cohortium.site.ports import DataSource


def tradeoff(
    study: Study,
    sites: Mapping[str, Any],
    folder: str | Path,
    *,
    epsilons: Sequence[float],
    seeds: Sequence[int],
    delta: float | None = None,
    holdout: float = 0.25,
    allowed: float = 0.01,
    jobs: int | None = None,
    progress: Callable[[Tradeoff], None] | None = None,
) -> Tradeoff:
    """Returns what a study's result is worth at each epsilon, and without noise.

    Runs in processes of its own (see `cohortium.adapters.processes.spread`), so a script that calls this needs the
    guard `if __name__ == "__main__"`. Each point is kept in the folder's tradeoff.json as soon as it is known, and is
    not computed again.

    Args:
        study: the study; its own epsilon does not matter, and it may have none.
        sites: as for `simulate`.
        folder: where tradeoff.json is, or is made.
        epsilons: the epsilons to compare.
        seeds: each deals out other held-out patients and draws other noise; at least two.
        delta: for a study that has none itself.
        holdout: the share of each site's patients on whom results are judged.
        allowed: the loss of utility that is accepted.
        jobs: how many processes; as many as there are cores if not given.
        progress: called with what is known at the start and after each point.

    Raises:
        StudyError: the grid is none, the study takes no noise, or the folder cannot be written; and what `simulate`
            raises.
    """
    epsilons, seeds = tuple(sorted(set(epsilons))), tuple(sorted(set(seeds)))
    trading.refuse_grid(epsilons, seeds, holdout, allowed)
    chosen = trading.delta_of(study, delta)
    plan = trading.plans_of(study, epsilons, chosen)[0]
    require_sites(plan, sites)
    records = {name: trading.records_of(plan, source_of(sites[name])) for name in plan.sites}
    path = Path(folder) / "tradeoff.json"
    basis = Basis(version("cohortium"), study_id(study), trading.digest(records), chosen, holdout)
    found = Tradeoff(
        study=study,
        basis=basis,
        utility=trading.utility_of(study),
        curves=trading.curves_of(study),
        epsilons=epsilons,
        seeds=seeds,
        patients={name: _patients(plan, name, mine) for name, mine in records.items()},
        allowed=allowed,
        points=_points_before(path, basis),
    )
    _keep(found, path)
    if progress:
        progress(found)
    work = partial(_point, trading.Trial(study, chosen, holdout, records))
    for point in processes.spread(work, found.missing, jobs or machine.cores()):
        found = replace(found, points=(*found.points, point))
        write_file(path, as_bytes(found))
        if progress:
            progress(found)
    return found


def write_tradeoff(found: Tradeoff, folder: str | Path) -> list[Path]:
    """Writes tradeoff.json, tradeoff.png and tradeoff.html, and returns their paths."""
    # matplotlib takes a second to import, and only pages need it
    from cohortium.web import tradeoff as page

    contents = {
        "tradeoff.json": as_bytes(found),
        "tradeoff.png": page.picture(found),
        "tradeoff.html": page.page(found),
    }
    for name, data in contents.items():
        write_file(Path(folder) / name, data)
    return [Path(folder) / name for name in contents]


def _point(trial: trading.Trial, task: tuple[float | None, int]) -> Point:
    """Returns one point; runs in a process of its own."""
    epsilon, seed = task

    def federate(study: Study, sources: Mapping[str, DataSource]) -> GlobalModel | Summary:
        return simulate(study, sources, seed=seed).outcome

    try:
        return trading.point(trial, epsilon, seed, federate)
    except DataError as error:
        # its two texts would not both come back from the process
        raise StudyError(str(error)) from None


def _patients(plan: Plan, site: str, records: trading.Records) -> int:
    try:
        return load(plan, records).table.patients
    except DataError as error:
        raise SiteError(f"{site}: {error}", public=error.public) from None


def _points_before(path: Path, basis: Basis) -> tuple[Point, ...]:
    try:
        return points_of(path.read_bytes(), basis)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}") from None


def _keep(found: Tradeoff, path: Path) -> None:
    """Writes what is known before anything is computed, so that a folder that cannot be written costs no time."""
    try:
        write_file(path, as_bytes(found))
    except CohortiumError as error:
        raise StudyError(f"{error}; nothing was computed: choose another folder") from None
