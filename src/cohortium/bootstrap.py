"""The only place that chooses adapters, the clock and the source of randomness."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.adapters import bundled, files, home, machine, processes
from cohortium.adapters.home import SiteHome
from cohortium.adapters.ledger import SqliteLedger, in_memory
from cohortium.adapters.ledger_file import Keeper
from cohortium.adapters.sources import FileSource, FrameSource
from cohortium.coordinator.audit import Audit, CanaryTest
from cohortium.coordinator.audit import as_json as audit_json
from cohortium.coordinator.result import Result, Simulated, as_json
from cohortium.core import signature
from cohortium.core.document import study_id
from cohortium.core.errors import (
    CohortError,
    CohortiumError,
    ConvergenceError,
    DataError,
    SiteError,
    StudyError,
    nearest,
)
from cohortium.core.features import BinaryTarget
from cohortium.core.messages import FromSite, MaskedUpdate
from cohortium.core.models import Descriptive
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.engines import audit as auditing
from cohortium.engines import local
from cohortium.engines import membership as attacking
from cohortium.engines import tradeoff as trading
from cohortium.engines.comparison import cross_validate
from cohortium.learning.descriptive import Summary
from cohortium.learning.evaluation import Comparison
from cohortium.learning.model import GlobalModel
from cohortium.learning.tradeoff import Basis, Point, Tradeoff, as_bytes, points_of
from cohortium.plan import Compiler, Plan, compile_study
from cohortium.privacy.calibrate import Budget
from cohortium.secagg.stream import PLAIN, Means
from cohortium.site.agent import Agent
from cohortium.site.budget import Accounts
from cohortium.site.cohort import load
from cohortium.site.policy import PrivacyPolicy
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


def write_file(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    files.write(Path(path), data)


def example_study() -> str:
    """Returns the bundled heart-disease study as commented YAML."""
    return bundled.text("heart-risk.yaml")


def load_example() -> Study:
    """Returns the bundled heart-disease study."""
    return files.parse_study(example_study())


def example_sites() -> dict[str, Path]:
    """Returns the bundled heart-disease records: one CSV file for each of four hospitals."""
    return bundled.sites()


def descriptive(study: Study) -> Study:
    """Returns the study that describes another study's cohort, with the same epsilon where that has one."""
    model = Descriptive() if study.privacy.epsilon is None else Descriptive(refinements=0)
    privacy = replace(study.privacy, sampling=1.0)
    return replace(study, name=f"{study.name}-description"[:63], model=model, training=None, privacy=privacy)


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
    root = _seeded(seed)
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
    root, first = _seeded(seed), plan.sites[0]
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
    _require_sites(plan, sites)
    sources = {name: source_of(sites[name]) for name in plan.sites}

    def federate(training: Mapping[str, DataSource]) -> GlobalModel:
        return simulate(study, training, seed=seed).model

    return cross_validate(plan, sources, federate, folds, _seeded(seed).child("comparison"), progress)


def write_report(result: Result, path: str | Path, comparison: tuple[Comparison, ...] = ()) -> None:
    """Writes a run's report: one HTML page that needs nothing else."""
    write_file(path, _report(result, comparison))


def write_result(result: Result, folder: str | Path, comparison: tuple[Comparison, ...] = ()) -> list[Path]:
    """Writes result.json, report.html and, if there is a model, model.json and its card; returns their paths."""
    # all is made before anything is written, so that a failure leaves no half of it
    contents = {"result.json": json.dumps(as_json(result, comparison), indent=1, allow_nan=False).encode()}
    if not isinstance(result.outcome, Summary):
        contents["model.json"] = result.model.to_bytes()
        contents["model-card.md"] = card(result.model, comparison).encode()
    contents["report.html"] = _report(result, comparison)
    for name, data in contents.items():
        write_file(Path(folder) / name, data)
    return [Path(folder) / name for name in contents]


def card(model: GlobalModel, comparison: tuple[Comparison, ...] = (), audit: str | Path | None = None) -> str:
    """Returns a model's card in Markdown, with the attack results of an audit's audit.md if one is given.

    Raises:
        StudyError: `audit` cannot be read, or is no audit's.
    """
    from cohortium.web.card import card as page

    return page(model, comparison, files.read_text(Path(audit)) if audit else "")


def score_file(model: GlobalModel, path: str | Path) -> tuple[list[str], list[float]]:
    """Returns the patients' identifiers and their expected targets, in the order of a data file.

    Raises:
        DataError: the file cannot be read, lacks a column, or breaks the study's data contract.
    """
    patient = model.study.cohort.patient
    columns = FileSource(Path(path)).read([patient, *model.study.cohort.features], as_text={patient})
    return [str(value) for value in columns[patient]], model.predict_mean(columns).tolist()


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
    _require_sites(plan, sites)
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


def source_of(data: Any) -> DataSource:
    """Returns the data source for a path or a data frame."""
    if isinstance(data, str | Path):
        return FileSource(Path(data))
    return data if hasattr(data, "fingerprint") else FrameSource(data)


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


def _report(result: Result, comparison: tuple[Comparison, ...]) -> bytes:
    # matplotlib takes a second to import, and only reports need it
    from cohortium.web.assemble import assemble
    from cohortium.web.report import render

    return render(assemble(result, compile_study(result.study), comparison)).encode()


def _require_sites(plan: Plan, sites: Mapping[str, Any]) -> None:
    for name in sites:
        if name not in plan.sites:
            raise StudyError(f"data were given for '{name}', which is no site of the study{nearest(name, plan.sites)}")
    for name in plan.sites:
        if name not in sites:
            raise StudyError(f"no data were given for site '{name}': the study needs {', '.join(plan.sites)}")


def _run_name(root: Randomness) -> str:
    return f"simulation-{root.child('run name').bytes(8).hex()}"


def _seeded(seed: int) -> Randomness:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise StudyError(f"the seed is {seed!r}: give a whole number from 0 up")
    return Randomness.of_seed(seed)


def create_home(path: str | Path) -> list[Path]:
    """Begins a site's home, a folder: an empty privacy ledger, its key, and a policy to edit. Returns what it wrote.

    Raises:
        SiteError: there is a ledger or a key already, or the folder cannot be written.
    """
    key = os.urandom(32)  # noqa: TID251  the ledger's key comes from the operating system, and here it is chosen
    return home.create(Path(path), Keeper(key, _now))


def open_home(path: str | Path, identity: Ed25519PrivateKey | None = None) -> SiteHome:
    """Opens a site's home for an agent; close it, or use it in a `with` statement.

    Args:
        path: the folder that `create_home` made.
        identity: the site's signing key, with which the ledger's entries are signed.

    Raises:
        SiteError: something is missing or cannot be relied on. Nothing is made anew.
    """
    sign = partial(signature.sign, identity, "ledger entry") if identity else None
    return home.opened(Path(path), _now, sign)


def load_policy(path: str | Path) -> PrivacyPolicy:
    """Returns the policy of a site's home; without a file, the one that limits nothing.

    Raises:
        SiteError: the folder is missing, or the file is no policy.
    """
    return home.policy_of(Path(path))


def read_accounts(path: str | Path, *, verify: bool = False) -> tuple[PrivacyPolicy, Accounts]:
    """Returns a site's policy and what its ledger holds. Nothing in the folder is touched.

    Args:
        path: the site's home.
        verify: compute the whole ledger again, to find what was changed.

    Raises:
        SiteError: there is no ledger, or it is not as it was written.
    """
    with home.reading(Path(path), _now) as site:
        if verify:
            site.ledger.verify()
        return site.policy, site.ledger.accounts()


def simulated_ledger(root: Randomness, budget: Budget | None = None) -> SqliteLedger:
    """Returns an empty ledger in memory, for a site of a simulation; close it after the run."""
    return in_memory(Keeper(root.child("ledger").bytes(32), _now), budget)


def _now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251  the clock is chosen here


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
    _require_sites(plan, sites)
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
    _require_sites(plan, sites)
    root, models = _seeded(seed).child("audit"), 0 if isinstance(study.model, Descriptive) else shadows + 1
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
