"""Runs in one process: agents, engine, clock and seeds put together."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.adapters import home, machine
from cohortium.adapters.home import SiteHome
from cohortium.bootstrap.documents import source_of
from cohortium.bootstrap.homes import create_home, open_home, simulated_ledger
from cohortium.coordinator.result import Result, Simulated
from cohortium.core.errors import (
    StudyError,
    nearest,
)
from cohortium.core.features import BinaryTarget
from cohortium.core.messages import MOST_SEED, FromSite, MaskedUpdate
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.engines import local
from cohortium.engines.comparison import cross_validate
from cohortium.learning.evaluation import Comparison
from cohortium.learning.model import GlobalModel
from cohortium.plan import Compiler, Plan, compile_study
from cohortium.secagg.stream import PLAIN, Means
from cohortium.site.agent import Agent
from cohortium.site.policy import PrivacyPolicy
from cohortium.site.ports import DataSource
from cohortium.site.session import Membership


def simulate(
    study: Study,
    sites: Mapping[str, Any],
    *,
    seed: int,
    keep_sample: bool = False,
    progress: local.Progress | None = None,
    faults: local.Faults | None = None,
    homes: str | Path | None = None,
) -> Result:
    """Runs a study in this process, through the messages and state machines that a network would carry.

    Every key and every random choice follows from `seed`, so equal seeds give equal bits; the masks are therefore
    no secret from whoever knows the seed.

    Args:
        study: the study, from `load_study` or built in Python.
        sites: for each site of the study a file (CSV, TSV, Parquet, JSON) or a pandas, Polars or Arrow frame.
        seed: a whole number from 0 up.
        keep_sample: keep one site's vector before and after masking, to show what masking does. The report then
            shows that site's own sums.
        progress: called after each round.
        faults: called with a site and a message to or from it; says whether it is lost, to see what dropouts do.
        homes: a folder with a home for each site, whose policy then rules and whose ledger is charged; a site that has
            none yet gets one. Without it, nothing limits a site, and its ledger is forgotten.

    Raises:
        StudyError: the study cannot be run, or the sites are not those of the study.
        PolicyRefused: a site's policy refuses the study, or its patients' budget is spent.
        SiteError: a site's data do not fit the study.
        CohortError, ConvergenceError: the data taken together cannot answer the study.
    """
    plan = compile_study(study)
    root = seeded(seed)
    means = _means(plan)
    with ExitStack() as stack:
        kept = {name: stack.enter_context(_home(plan, name, root, homes)) for name in plan.sites}
        agents = simulated_agents(plan, sites, root, means=means[0], homes=kept)
        return _simulated(plan, agents, seed, means[1], keep_sample, progress, faults)


def _simulated(
    plan: Plan,
    agents: Mapping[str, Agent],
    seed: int,
    means: Means,
    keep_sample: bool,
    progress: local.Progress | None,
    faults: local.Faults | None,
) -> Result:
    root, first = seeded(seed), plan.sites[0]
    masked: list[MaskedUpdate] = []

    def keep_one(message: FromSite) -> None:
        if isinstance(message, MaskedUpdate) and message.site == first and not masked:
            masked.append(message)

    tap = keep_one if keep_sample else None
    result = local.run(
        plan,
        agents,
        _run_name(root),
        time.perf_counter,
        coordinator_key(root),
        means,
        tap=tap,
        progress=progress,
        faults=faults,
        pool=machine.threads("sites"),
        # a larger seed than travels decides the sites' own randomness alone
        seed=seed if plan.noise is None and seed <= MOST_SEED else None,
    )
    took_part = {site for record in result.rounds for site in record.survivors}
    patients = {name: agents[name].table.patients for name in plan.sites if name in took_part}
    # with noise there is no vector to show: what a site adds to its own sums is its secret
    sample = local.sample(plan, masked[0], agents[first].table) if masked and not plan.noise else None
    return replace(result, simulated=Simulated(seed=seed, patients=patients, sample=sample))


def compare(
    study: Study,
    sites: Mapping[str, Any],
    *,
    seed: int,
    folds: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Comparison, ...]:
    """Returns what each site's held-out patients say of the federated model, of its own one and of a pooled one.

    Args:
        study: a study with a binary target.
        sites, seed: as for `simulate`.
        folds: parts that each site's patients are dealt into; each is held out once.
        progress: called with the number of folds done.

    Raises:
        StudyError: the target is not binary, or there are fewer than two folds; and what `simulate` raises.
    """
    if folds < 2 or not isinstance(study.cohort.target, BinaryTarget):
        raise StudyError(f"{folds} held-out folds: give 2 or more, and a study with a binary target")
    plan = compile_study(study)
    require_sites(plan, sites)
    sources = {name: source_of(sites[name]) for name in plan.sites}

    def federate(training: Mapping[str, DataSource]) -> GlobalModel:
        return simulate(study, training, seed=seed).model

    return cross_validate(plan, sources, federate, folds, seeded(seed).child("comparison"), progress)


def coordinator_key(root: Randomness) -> Ed25519PrivateKey:
    """Returns the signing key of a simulation's coordinator, which follows from `root`."""
    return Ed25519PrivateKey.from_private_bytes(root.child("coordinator").bytes(32))


def simulated_agents(
    plan: Plan,
    sites: Mapping[str, Any],
    root: Randomness,
    compiler: Compiler = compile_study,
    means: Means = PLAIN,
    runs: int = 1,
    homes: Mapping[str, SiteHome | None] | None = None,
) -> dict[str, Agent]:
    """Returns one agent for each site of the study, with identities that follow from `root`.

    Each of them serves `runs` runs of the study and nothing else. `homes` holds each site's policy and ledger; without
    them, no study with differential privacy is answered.
    """
    rules = {name: kept for name, kept in (homes or {}).items() if kept is not None}
    require_sites(plan, sites)
    identities = {
        name: Ed25519PrivateKey.from_private_bytes(root.child("identity", name).bytes(32)) for name in plan.sites
    }
    pinned = {name: key.public_key().public_bytes_raw() for name, key in identities.items()}
    approved = {plan.study_id: runs}
    coordinator = coordinator_key(root).public_key().public_bytes_raw()
    return {
        name: Agent(
            Membership(name, identity, pinned, coordinator),
            source_of(sites[name]),
            approved,
            root.child("site", name),
            compiler,
            means,
            rules[name].ledger if name in rules else None,
            rules[name].policy if name in rules else PrivacyPolicy(),
        )
        for name, identity in identities.items()
    }


def _means(plan: Plan) -> tuple[Means, Means]:
    """Returns what this machine brings to a sum, at a site and at the coordinator."""
    site, coordinator = machine.shared_means(), machine.means()
    if plan.study.aggregation.protocol != "ckks-single-key":
        return site, coordinator
    from cohortium.secagg.ckks import make_keys

    secret, public = make_keys()
    return replace(site, ckks=secret), replace(coordinator, ckks=public)


def _home(plan: Plan, name: str, root: Randomness, homes: str | Path | None) -> AbstractContextManager[SiteHome | None]:
    """Returns a simulated site's home: one in the folder `homes`, made if it is not there, or one that is forgotten."""
    if homes is None:
        return SiteHome(PrivacyPolicy(), simulated_ledger(root.child("site", name))) if plan.noise else nullcontext()
    folder = Path(homes) / name
    if not (folder / home.LEDGER).exists():
        create_home(folder)
    return open_home(folder)


def require_sites(plan: Plan, sites: Mapping[str, Any]) -> None:
    for name in sites:
        if name not in plan.sites:
            raise StudyError(f"data were given for '{name}', which is no site of the study{nearest(name, plan.sites)}")
    for name in plan.sites:
        if name not in sites:
            raise StudyError(f"no data were given for site '{name}': the study needs {', '.join(plan.sites)}")


def _run_name(root: Randomness) -> str:
    return f"simulation-{root.child('run name').bytes(8).hex()}"


def seeded(seed: int) -> Randomness:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise StudyError(f"the seed is {seed!r}: give a whole number from 0 up")
    return Randomness.of_seed(seed)
