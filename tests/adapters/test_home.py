"""A site's home: the policy as it is written, the key that nobody else reads, and nothing made anew."""

import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from cohortium import bootstrap
from cohortium.adapters import home
from cohortium.adapters.ledger_file import Keeper
from cohortium.core.errors import SiteError
from cohortium.core.events import Gaussian
from cohortium.core.random import Randomness
from cohortium.privacy.calibrate import Budget
from cohortium.site.policy import PrivacyPolicy

KEY = bytes(range(32))
KEEPER = Keeper(KEY, lambda: datetime(2031, 1, 1, tzinfo=UTC))


def test_a_home_is_made_and_opened(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "site"
    written = home.create(folder, KEEPER)
    assert (
        sorted(path.name for path in written)
        == sorted(os.listdir(folder))
        == sorted(["ledger.key", "ledger.sqlite", "policy.yaml"])
    )
    modes = {path.name: path.stat().st_mode & 0o777 for path in (*written, folder)}
    assert modes == {"ledger.key": 0o600, "ledger.sqlite": 0o600, "policy.yaml": 0o600, "site": 0o700}
    with home.opened(folder, KEEPER.clock) as site:
        assert site.policy == PrivacyPolicy(required=True)
        assert site.ledger.charge("run", "s", 1, np.array(["p"], dtype=object), (Gaussian(9.0),)).all()
    with home.reading(folder, KEEPER.clock) as site:
        assert site.ledger.head()[0] == 1


def write_policy(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.touch(mode=0o600)
    path.write_text(text)
    return path


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o777])
def test_a_homes_files_are_its_owners_alone_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    (tmp_path / "site").mkdir(mode=0o700)
    before = os.umask(mask)
    try:
        written = home.create(tmp_path / "site", KEEPER)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in written if path.name != "ledger.sqlite"} == {
        "policy.yaml": 0o600,
        "ledger.key": 0o600,
    }


def assert_refused(folder: Path, sentence: str) -> None:
    """Neither opening, reading nor showing takes a home for one, and nothing in it changes."""
    before = sorted(os.listdir(folder))
    with pytest.raises(SiteError, match=sentence):
        home.opened(folder, KEEPER.clock)
    with pytest.raises(SiteError, match=sentence), home.reading(folder, KEEPER.clock):
        pass
    with pytest.raises(SiteError, match=sentence):
        home.policy_of(folder)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("dangling", [False, True])
def test_a_home_without_a_policy_is_refused(tmp_path: Path, dangling: bool) -> None:
    home.create(tmp_path, KEEPER)
    (tmp_path / "policy.yaml").unlink()
    if dangling:
        (tmp_path / "policy.yaml").symlink_to(tmp_path / "nowhere")
    missing = "policy.yaml is missing: restore it or write one; an empty `privacy: {}` limits nothing"
    assert_refused(tmp_path, missing)
    if dangling:
        for name in ("ledger.key", "ledger.sqlite"):
            (tmp_path / name).unlink()
        with pytest.raises(SiteError, match=missing):
            home.create(tmp_path, KEEPER)
        assert os.listdir(tmp_path) == ["policy.yaml"]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_policy_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    home.create(tmp_path, KEEPER)
    (tmp_path / "policy.yaml").chmod(mode)
    assert_refused(tmp_path, "policy.yaml can be written by others, who could lift its limits: chmod 600 it")


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_home_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "site"
    home.create(folder, KEEPER)
    folder.chmod(mode)
    assert_refused(folder, "site can be written by others, who could put another policy or ledger there: chmod 700 it")
    for name in ("policy.yaml", "ledger.key", "ledger.sqlite"):
        (folder / name).unlink()
    with pytest.raises(SiteError, match="can be written by others"):
        home.create(folder, KEEPER)
    assert not os.listdir(folder)


@pytest.mark.parametrize("mode", [0o644, 0o444])
def test_others_may_read_a_policy(tmp_path: Path, mode: int) -> None:
    home.create(tmp_path, KEEPER)
    (tmp_path / "policy.yaml").chmod(mode)
    tmp_path.chmod(0o755)
    assert home.policy_of(tmp_path).required


def test_the_policy_that_is_there_stays(tmp_path: Path) -> None:
    write_policy(tmp_path, "privacy: {epsilon: 1}\n")
    assert [path.name for path in home.create(tmp_path, KEEPER)] == ["ledger.sqlite", "ledger.key"]
    assert home.policy_of(tmp_path) == PrivacyPolicy(epsilon=1.0)


def test_a_home_is_not_made_beside_a_policy_that_is_none(tmp_path: Path) -> None:
    write_policy(tmp_path, "privacy: 5\n")
    with pytest.raises(SiteError, match="is wrong at 'privacy'"):
        home.create(tmp_path, KEEPER)
    assert os.listdir(tmp_path) == ["policy.yaml"]


@pytest.mark.parametrize("left", ["ledger.key", "ledger.sqlite"])
def test_half_a_home_is_completed_by_nobody(tmp_path: Path, left: str) -> None:
    home.create(tmp_path, KEEPER)
    for name in {"ledger.key", "ledger.sqlite"} - {left}:
        (tmp_path / name).unlink()
    with pytest.raises(SiteError, match="is there already: a ledger is begun once"):
        home.create(tmp_path, KEEPER)
    expected = "is gone, and its key is there: restore it" if left == "ledger.key" else r"ledger\.key cannot be read"
    with pytest.raises(SiteError, match=expected):
        home.opened(tmp_path, KEEPER.clock)
    with pytest.raises(SiteError, match=expected), home.reading(tmp_path, KEEPER.clock):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([left, "policy.yaml"])


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    home.create(tmp_path, KEEPER)
    (tmp_path / "ledger.key").chmod(mode)
    with pytest.raises(SiteError, match="can be read by others") as caught:
        home.opened(tmp_path, KEEPER.clock)
    assert KEY.hex() not in str(caught.value) and caught.value.public == "this site's home cannot be used"


@pytest.mark.parametrize("key", [b"", KEY[:31], KEY + b"x", bytes(1000)])
def test_what_is_no_key_is_refused(tmp_path: Path, key: bytes) -> None:
    home.create(tmp_path, KEEPER)
    (tmp_path / "ledger.key").write_bytes(key)
    with pytest.raises(SiteError, match="is no key of 32 bytes"):
        home.opened(tmp_path, KEEPER.clock)


def test_no_key_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "ledger.key"
    home.create_key(path, KEY)
    with pytest.raises(SiteError, match="is there already: a key is never replaced"):
        home.create_key(path, bytes(32))
    assert path.read_bytes() == KEY
    with pytest.raises(SiteError, match="cannot be written"):
        home.create_key(tmp_path / "nowhere" / "ledger.key", KEY)


def test_bootstrap_gives_each_home_a_key_of_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("north", "south")]
    for folder in folders:
        bootstrap.create_home(folder)
        with bootstrap.open_home(folder) as site:
            site.ledger.charge("run", "s", 1, np.array(["p"], dtype=object), (Gaussian(9.0),))
        policy, accounts = bootstrap.read_accounts(folder, verify=True)
        assert policy.required and len(accounts.patients) == 1
    assert len({(folder / "ledger.key").read_bytes() for folder in folders}) == 2


def test_a_simulation_has_a_ledger_in_memory() -> None:
    with bootstrap.simulated_ledger(Randomness.of_seed(1), Budget(1.0, 1e-5)) as book:
        assert book.charge("run", "s", 1, np.array(["p"], dtype=object), (Gaussian(9.0),)).all()


def test_a_policy_is_read(tmp_path: Path) -> None:
    path = write_policy(tmp_path, "privacy: {}\n")
    assert home.read_policy(path) == PrivacyPolicy()
    # a file that was cut off is not one that limits nothing
    for text in ("", "# nothing\n", "{}"):
        with pytest.raises(SiteError, match="lacks 'privacy': add it"):
            home.parse_policy(text.encode(), path)
    text = """\
privacy:
  required: true
  epsilon: 1
  delta: 1e-6
  units: [record]
  patient: pid
  budget: {epsilon: 4.0, delta: 1e-5}
  colluding: 0
  sites_per_patient: 2
  minimum: 30
"""
    assert home.parse_policy(text.encode(), path) == PrivacyPolicy(
        required=True,
        epsilon=1.0,
        delta=1e-6,
        units=("record",),
        patient="pid",
        budget=Budget(4.0, 1e-5),
        colluding=0,
        sites_per_patient=2,
        minimum=30,
    )


def test_every_line_of_the_example_is_a_rule() -> None:
    lines = [line.replace("# ", "", 1) if line.startswith("  #") else line for line in home.EXAMPLE.splitlines()]
    policy = home.parse_policy("\n".join(lines).encode(), Path("policy.yaml"))
    assert policy == PrivacyPolicy(
        required=True,
        epsilon=1.0,
        delta=1e-5,
        patient="patient_id",
        budget=Budget(4.0, 1e-5),
        colluding=2,
        sites_per_patient=2,
        minimum=50,
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "privacy: {epsilom: 1}",
            r"unknown key 'epsilom' in 'privacy'; did you mean 'epsilon'\? \(known: budget, colluding, delta",
        ),
        ("privcy: {}", r"unknown key 'privcy' of a policy; did you mean 'privacy'\?"),
        ("privacy: {budget: {epsilon: 1, delt: 1e-5}}", "lacks 'privacy.budget.delta'|did you mean 'delta'"),
        ("privacy: {budget: {epsilon: 1}}", "lacks 'privacy.budget.delta': add it"),
        ("privacy: {epsilon: '1'}", "is wrong at 'privacy.epsilon': input should be a valid number"),
        ("privacy: {epsilon: 0}", "is wrong at 'privacy.epsilon': input should be greater than 0"),
        ("privacy: {epsilon: .inf}", "is wrong at 'privacy.epsilon'"),
        ("privacy: {delta: 0.5}", "is wrong at 'privacy.delta': input should be less than or equal to 0.001"),
        ("privacy: {required: 1}", "is wrong at 'privacy.required': input should be a valid boolean"),
        (
            "privacy: {budget: {epsilon: 1, delta: 1e-5}}",
            "has 'privacy.budget' and lacks 'privacy.patient': the budget is kept for each patient, so the policy must",
        ),
        ("privacy: {patient: ''}", "is wrong at 'privacy.patient': string should have at least 1 character"),
        ("privacy: {patient: 7}", "is wrong at 'privacy.patient': input should be a valid string"),
        ("privacy: {colluding: -1}", "is wrong at 'privacy.colluding': input should be greater than or equal to 0"),
        ("privacy: {colluding: 1.5}", "is wrong at 'privacy.colluding': input should be a valid integer"),
        ("privacy: {sites_per_patient: 0}", "is wrong at 'privacy.sites_per_patient'"),
        ("privacy: {minimum: 0}", "is wrong at 'privacy.minimum'"),
        ("privacy:", "is wrong at 'privacy'"),
        ("privacy: {units: [ward]}", "is wrong at 'privacy.units.0': input should be 'patient', 'record' or 'site'"),
        ("privacy: {units: []}", "is wrong at 'privacy.units': list should have at least 1 item"),
        ("privacy: yes please", "is wrong at 'privacy'"),
        ("just words", "is no policy: it begins with 'privacy:'"),
        ("privacy: {epsilon: 1, epsilon: 2}", "is no valid YAML"),
        ("privacy: [", "is no valid YAML at line 1"),
        ("privacy: !!python/object:os.system {}", "is no valid YAML"),
        ("privacy: {patient: &name id, units: [*name]}", "holds a YAML alias"),
        ("\0", "is no valid YAML"),
    ],
)
def test_what_is_no_policy_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    path = write_policy(tmp_path, text)
    with pytest.raises(SiteError, match=sentence) as caught:
        home.read_policy(path)
    assert str(caught.value).startswith(f"{path} ") and "\n" not in str(caught.value)


def test_a_policy_of_no_sane_length_or_kind(tmp_path: Path) -> None:
    path = write_policy(tmp_path, "#" * (1 << 17))
    with pytest.raises(SiteError, match="is longer than"):
        home.read_policy(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SiteError, match="is no valid YAML"):
        home.read_policy(path)
    with pytest.raises(SiteError, match="cannot be read"):
        home.read_policy(tmp_path)
    with pytest.raises(SiteError, match="is no folder"):
        home.policy_of(tmp_path / "nowhere")
