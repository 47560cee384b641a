"""A site's home: its policy, its privacy ledger and that ledger's key."""

import os
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.adapters import home, journal, site_config
from cohortium.adapters.home import SiteHome
from cohortium.adapters.journal import Approval, Approved, SqliteJournal
from cohortium.adapters.ledger import SqliteLedger, in_memory
from cohortium.adapters.ledger_file import Keeper
from cohortium.adapters.site_config import SiteConfig
from cohortium.core import signature
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.plan import compile_study
from cohortium.privacy.calibrate import Budget
from cohortium.site.budget import Accounts
from cohortium.site.policy import PrivacyPolicy


def create_home(path: str | Path) -> list[Path]:
    """Begins a site's home: an empty privacy ledger, its key, a policy and a setup to edit. Returns what it wrote.

    Raises:
        SiteError: there is a ledger or a key already, or the folder cannot be written, or can be by others.
    """
    key = os.urandom(32)  # noqa: TID251  the ledger's key comes from the operating system, and here it is chosen
    written = home.create(Path(path), Keeper(key, _now))
    setup = site_config.create(Path(path))
    return [*written, setup] if setup else written


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
    """Returns the policy of a site's home.

    Raises:
        SiteError: the folder or the policy is missing, can be written by others than its owner, or is no policy.
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


def load_site_config(path: str | Path) -> SiteConfig:
    """Returns how a site's agent is set up (`site.yaml`).

    Raises:
        SiteError: it can be written by others than its owner, or says what it may not.
    """
    return site_config.read(Path(path))


def open_journal(path: str | Path, site: str, identity: Ed25519PrivateKey) -> SqliteJournal:
    """Opens the journal of a site's home for its agent; close it, or use it in a `with` statement.

    Raises:
        SiteError: it is another site's or identity's, another agent has it, or it cannot be relied on.
    """
    return journal.connect(Path(path), site, identity.public_key().public_bytes_raw())


def open_approvals(path: str | Path) -> Approved:
    """Opens what a site's steward approved, as it stands at each moment; close it, or use it in a `with` statement.

    Raises:
        SiteError: the home's journal cannot be relied on.
    """
    return Approved(Path(path))


def approve(path: str | Path, study: Study, runs: int) -> Approval:
    """Lets a site's agent answer so many more runs of a study, from now on.

    Raises:
        StudyError: the study cannot be run.
        SiteError: the home's journal cannot be relied on.
    """
    plan = compile_study(study)
    with Approved(Path(path)) as approved:
        return approved.approve(plan.study_id, study.name, runs, _now().isoformat(timespec="seconds"))


def simulated_ledger(root: Randomness, budget: Budget | None = None) -> SqliteLedger:
    """Returns an empty ledger in memory, for a site of a simulation; close it after the run."""
    return in_memory(Keeper(root.child("ledger").bytes(32), _now), budget)


def _now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251  the clock is chosen here
