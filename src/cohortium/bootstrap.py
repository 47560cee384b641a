"""The only place that chooses adapters, the clock and the source of randomness."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.adapters import files
from cohortium.adapters.sources import FileSource, FrameSource
from cohortium.coordinator.result import Result
from cohortium.core.errors import StudyError, nearest
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.engines import local
from cohortium.learning.model import GlobalModel
from cohortium.plan import Plan, compile_study
from cohortium.site.agent import Agent
from cohortium.site.ports import DataSource
from cohortium.site.session import Membership


def load_study(path: str | Path) -> Study:
    """Returns the study of a YAML file.

    Raises:
        StudyError: the file cannot be read or is no study.
    """
    return files.read_study(Path(path))


def load_model(path: str | Path) -> GlobalModel:
    """Returns the model of a file that `save_model` wrote. Loading runs no code."""
    return files.read_model(Path(path))


def save_model(model: GlobalModel, path: str | Path) -> None:
    """Writes a model, with its study and preprocessing, as JSON."""
    files.write(Path(path), model.to_bytes())


def simulate(
    study: Study,
    sites: Mapping[str, Any],
    *,
    seed: int,
    tap: local.Tap | None = None,
    progress: local.Progress | None = None,
) -> Result:
    """Runs a study in this process, through the messages and state machines that a network would carry.

    Every key and every random choice follows from `seed`, so equal seeds give equal bits; the masks are therefore
    no secret from whoever knows the seed.

    Args:
        study: the study, from `load_study` or built in Python.
        sites: for each site of the study a file (CSV, TSV, Parquet, JSON) or a pandas, Polars or Arrow frame.
        seed: a whole number from 0 up.
        tap: sees each message as the coordinator receives it.
        progress: called after each round.

    Raises:
        StudyError: the study cannot be run, or the sites are not those of the study.
        SiteError: a site's data do not fit the study.
        CohortError, ConvergenceError: the data taken together cannot answer the study.
    """
    plan = compile_study(study)
    root = _seeded(seed)
    agents = simulated_agents(plan, sites, root)
    name = f"simulation-{root.child('run name').bytes(8).hex()}"
    return local.run(plan, agents, name, time.perf_counter, seed, tap, progress)


def simulated_agents(plan: Plan, sites: Mapping[str, Any], root: Randomness) -> dict[str, Agent]:
    """Returns one agent for each site of the study, with identities that follow from `root`."""
    for name in sites:
        if name not in plan.sites:
            raise StudyError(f"data were given for '{name}', which is no site of the study{nearest(name, plan.sites)}")
    for name in plan.sites:
        if name not in sites:
            raise StudyError(f"no data were given for site '{name}': the study needs {', '.join(plan.sites)}")
    identities = {
        name: Ed25519PrivateKey.from_private_bytes(root.child("identity", name).bytes(32)) for name in plan.sites
    }
    pinned = {name: key.public_key().public_bytes_raw() for name, key in identities.items()}
    return {
        name: Agent(Membership(name, identity, pinned), source_of(sites[name]), root.child("site", name))
        for name, identity in identities.items()
    }


def source_of(data: Any) -> DataSource:
    """Returns the data source for a path or a data frame."""
    return FileSource(Path(data)) if isinstance(data, str | Path) else FrameSource(data)


def _seeded(seed: int) -> Randomness:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise StudyError(f"the seed is {seed!r}: give a whole number from 0 up")
    return Randomness.of_seed(seed)
