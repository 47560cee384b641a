"""A site's home, a folder of the hospital's own: `policy.yaml`, the ledger, and the key that hides patients in it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cohortium.adapters import ledger, ledger_file, private_files, settings
from cohortium.adapters.ledger import SqliteLedger
from cohortium.adapters.ledger_file import Keeper
from cohortium.adapters.private_files import is_open
from cohortium.adapters.settings import Problem, Settings
from cohortium.core.errors import SiteError, nearest
from cohortium.core.fields import LARGEST
from cohortium.privacy.calibrate import Budget
from cohortium.site.policy import PrivacyPolicy, Unit

POLICY, LEDGER, KEY = "policy.yaml", "ledger.sqlite", "ledger.key"
_KEY_BYTES = 32
_PUBLIC = "this site's home cannot be used"

EXAMPLE = """\
# What this hospital allows studies to ask for. Every line below `privacy:` may be left out; what is left out is not
# limited, and an empty `privacy: {}` limits nothing. Only the file's owner may be able to write it (chmod 600).
privacy:
  required: true            # no study without differential privacy
  # epsilon: 1.0            # the most that one study may ask for
  # delta: 1e-5
  # units: [patient, site]  # privacy units that protect enough
  # patient: patient_id     # the column that names patients; a study that names them by another one is refused
  # budget:                 # what all studies together may learn of one patient; needs `patient`, because it is kept
  #   epsilon: 4.0          # for each patient: a study could count encounters or rows instead
  #   delta: 1e-5
  # colluding: 2            # hospitals that may tell others their noise; a study must allow for at least so many
  # sites_per_patient: 2    # hospitals at which one patient may be; a study must allow for at least so many
  # minimum: 50             # least number of patients that a study must ask of a site; holds for every study
"""


class _Budget(Settings, strict=True):
    epsilon: Annotated[float, Field(gt=0, le=1000)]
    delta: Annotated[float, Field(gt=0, le=1e-3)]


class _Privacy(Settings, strict=True):
    required: bool = False
    epsilon: Annotated[float, Field(gt=0, le=1000)] | None = None
    delta: Annotated[float, Field(gt=0, le=1e-3)] | None = None
    units: list[Unit] = Field(["patient", "site"], min_length=1)
    patient: Annotated[str, Field(min_length=1)] | None = None
    budget: _Budget | None = None
    colluding: Annotated[int, Field(ge=0, le=999)] | None = None
    sites_per_patient: Annotated[int, Field(ge=1, le=1000)] | None = None
    minimum: Annotated[int, Field(ge=1, le=LARGEST)] | None = None


class _Policy(Settings, strict=True):
    privacy: _Privacy


_SECTIONS: dict[tuple[str, ...], type[Settings]] = {
    (): _Policy,
    ("privacy",): _Privacy,
    ("privacy", "budget"): _Budget,
}


@dataclass(frozen=True)
class SiteHome:
    """A site's home while it is open: the policy in force, and the ledger that keeps its budget."""

    policy: PrivacyPolicy
    ledger: SqliteLedger = field(repr=False)

    def __enter__(self) -> "SiteHome":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the ledger."""
        self.ledger.close()


def create(folder: Path, keeper: Keeper) -> list[Path]:
    """Begins a site's home: a folder with an empty ledger under a new key, and a policy to edit if there is none.

    Raises:
        SiteError: there is a ledger or a key already, or the folder cannot be written, or can be by others.
    """
    paths = [folder / name for name in (POLICY, LEDGER, KEY)]
    policy, file, key = paths
    for path in (file, key):
        if path.exists():
            raise _unusable(path, "is there already: a ledger is begun once, and never again")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, f"cannot be made ({error.strerror})") from None
    _require_folder(folder)
    # a link to nothing is no policy, and none is written over it
    if os.path.lexists(policy):
        read_policy(policy)
        paths.remove(policy)
    else:
        _create(policy, EXAMPLE.encode(), "is there already, and a policy is never replaced")
    # a crash in between leaves a key without a ledger, which nothing takes for a home
    create_key(key, keeper.key)
    ledger_file.create(file, keeper)
    return paths


def opened(folder: Path, clock: Callable[[], datetime], sign: Callable[[bytes], bytes] | None = None) -> SiteHome:
    """Opens a site's home. Nothing that is missing is made anew, because that would reset what patients spent.

    Raises:
        SiteError: the policy, the ledger or its key is missing or cannot be relied on.
    """
    key, policy = _key_of(folder), read_policy(folder / POLICY)
    return SiteHome(policy, ledger.connect(folder / LEDGER, Keeper(key, clock, sign), policy.budget))


@contextmanager
def reading(folder: Path, clock: Callable[[], datetime]) -> Iterator[SiteHome]:
    """Yields a site's home whose ledger cannot be charged; nothing in the folder is touched.

    Raises:
        SiteError: as for `opened`.
    """
    key, policy = _key_of(folder), read_policy(folder / POLICY)
    with ledger.reading(folder / LEDGER, Keeper(key, clock), policy.budget) as readable:
        yield SiteHome(policy, readable)


def _key_of(folder: Path) -> bytes:
    """Returns the key of a home's ledger, after a look at what is there at all."""
    _require_folder(folder)
    file, key = folder / LEDGER, folder / KEY
    if not file.exists():
        if key.exists():
            raise _unusable(file, "is gone, and its key is there: restore it, never begin another")
        raise _unusable(folder, f"holds no ledger: begin one with cohortium site init {folder}")
    return read_key(key)


def policy_of(folder: Path) -> PrivacyPolicy:
    """Returns a home's policy.

    Raises:
        SiteError: the folder or the policy is missing, or cannot be relied on.
    """
    _require_folder(folder)
    return read_policy(folder / POLICY)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise _unusable(folder, "is no folder: name a site's home")
    if is_open(folder.stat().st_mode, 0o022):
        raise _unusable(
            folder, "can be written by others, who could put another policy or ledger there: chmod 700 it, and look"
        )


def read_policy(path: Path) -> PrivacyPolicy:
    """Returns the policy of a YAML file. Without the file there is none, because it may have been lost.

    Raises:
        SiteError: the file is missing, cannot be read, can be written by others than its owner, is no YAML, or says
            what no policy says; the message names the file.
    """
    try:
        data = settings.contents(path, _unusable, harm=", who could lift its limits", long=", and no policy is")
    except FileNotFoundError:
        raise _unusable(path, "is missing: restore it or write one; an empty `privacy: {}` limits nothing") from None
    return parse_policy(data, path)


def parse_policy(data: bytes, path: Path) -> PrivacyPolicy:
    """Returns the policy of YAML text.

    Raises:
        SiteError: it is no YAML, or no policy; the message names `path`.
    """
    told = settings.parse(data, path, _Policy, _unusable, _sentence).privacy
    if told.budget and told.patient is None:
        raise _unusable(
            path,
            "has 'privacy.budget' and lacks 'privacy.patient': the budget is kept for each patient, so the policy must "
            "say which column names them",
        )
    return PrivacyPolicy(
        required=told.required,
        epsilon=told.epsilon,
        delta=told.delta,
        units=tuple(told.units),
        patient=told.patient,
        budget=Budget(told.budget.epsilon, told.budget.delta) if told.budget else None,
        colluding=told.colluding,
        sites_per_patient=told.sites_per_patient,
        minimum=told.minimum,
    )


def create_key(path: Path, key: bytes) -> None:
    """Writes a new key that only its owner can read.

    Raises:
        SiteError: there is a key already, or it cannot be written.
    """
    _create(path, key, "is there already: a key is never replaced, because its patients would be new")


def _create(path: Path, data: bytes, taken: str) -> None:
    """Writes a new file of its owner's alone, whole or not at all: half a policy would limit less."""
    try:
        private_files.create(path, data)
    except FileExistsError:
        raise _unusable(path, taken) from None
    except OSError as error:
        raise _unusable(path, f"cannot be written ({error.strerror})") from None


def read_key(path: Path) -> bytes:
    """Returns the ledger's key.

    Raises:
        SiteError: it is missing, is no key, or can be read by others than its owner.
    """
    try:
        mode, key = private_files.read(path, _KEY_BYTES)
    except OSError as error:
        raise _unusable(
            path, f"cannot be read ({error.strerror}); without it nobody can be found in the ledger: restore it"
        ) from None
    if is_open(mode, 0o077):
        raise _unusable(path, "can be read by others, who could then look for patients in the ledger: chmod 600 it")
    if len(key) != _KEY_BYTES:
        raise _unusable(path, f"is no key of {_KEY_BYTES} bytes: restore it")
    return key


def _unusable(path: Path, reason: str) -> SiteError:
    return SiteError(f"{path} {reason}", public=_PUBLIC)


def _sentence(problem: Problem) -> str:
    *parents, last = map(str, problem["loc"] or ("",))
    if problem["type"] == "extra_forbidden":
        known = sorted(_SECTIONS[tuple(parents)].model_fields)
        place = f"in '{'.'.join(parents)}'" if parents else "of a policy"
        return f"has an unknown key '{last}' {place}{nearest(last, known)} (known: {', '.join(known)})"
    if problem["type"] == "missing":
        return f"lacks '{'.'.join([*parents, last])}': add it"
    return settings.sentence(problem, "is no policy: it begins with 'privacy:'")
