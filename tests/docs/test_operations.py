"""What operators are told is so: units start commands that exist, and every metric, log field and setting is listed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cohortium.adapters import credentials, home, journal_file, site_config
from cohortium.adapters.consortium_folder import _Consortium, _Hours, _Listen
from cohortium.adapters.logs import FIELDS
from cohortium.adapters.site_config import _SECTIONS
from cohortium.adapters.telemetry import AgentMeter, CoordinatorMeter
from cohortium.cli.app import app
from cohortium.coordinator.ports import RunEvent

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
OPERATOR = (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")
STEWARD = (ROOT / "docs" / "data-steward.md").read_text(encoding="utf-8")
HARDENED = (
    "NoNewPrivileges=true",
    "ProtectSystem=strict",
    "ProtectHome=true",
    "PrivateTmp=true",
    "ReadWritePaths=/var/lib/cohortium/%i",
    "CapabilityBoundingSet=",
    "SystemCallFilter=@system-service",
    "Restart=always",
    "UMask=0077",
    "User=cohortium",
)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_start_commands_that_exist_and_are_hardened(unit: Path) -> None:
    lines = unit.read_text(encoding="utf-8").splitlines()
    (start,) = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")]
    program, *words, place = start.split()
    assert program == "/opt/cohortium/bin/cohortium" and place == "/var/lib/cohortium/%i"
    told = CliRunner().invoke(app, [*words, "--help"])
    assert told.exit_code == 0, f"{unit.name} starts 'cohortium {' '.join(words)}', which does not exist"
    assert set(HARDENED) <= set(lines)
    for name in ("MemoryMax", "CPUQuota", "TasksMax"):
        assert any(line.startswith(f"{name}=") for line in lines)
    page = OPERATOR if "coordinator" in unit.name else STEWARD
    assert unit.name in page


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_what_systemd_understands(unit: Path, tmp_path: Path) -> None:
    program = shutil.which("true")
    assert program
    copy = tmp_path / unit.name.replace("@", "@example")
    copy.write_text(unit.read_text(encoding="utf-8").replace("/opt/cohortium/bin/cohortium", program))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    told = [line for line in (done.stdout + done.stderr).splitlines() if unit.name.partition("@")[0] in line]
    assert not told


def metrics(text: bytes) -> set[str]:
    return {name for name in re.findall(r"^# TYPE (\w+)", text.decode(), re.MULTILINE) if not name.endswith("_created")}


def test_every_metric_is_listed_and_no_other() -> None:
    coordinator, agent = CoordinatorMeter(list, list), AgentMeter(lambda: True)
    coordinator.observe("a", RunEvent(kind="round", facts={"seconds": 1.0, "bytes_up": 1, "bytes_down": 1}))
    coordinator.observe("a", RunEvent(kind="finished"))
    agent.answered("MaskedUpdate", 1.0, True)
    listed = set(re.findall(r"^\| `(cohortium_\w+)` \| (?:coordinator|agent) \|", OPERATOR, re.MULTILINE))
    assert listed == metrics(coordinator.text()) | metrics(agent.text())


def test_every_log_field_is_listed() -> None:
    (row,) = re.findall(r"^\| fields beside \| (.*) \|$", OPERATOR, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == {*FIELDS, "error", "where"}


def test_every_setting_is_named() -> None:
    for model, prefix in ((_Consortium, ""), (_Listen, "listen."), (_Hours, "hours.")):
        for name in model.model_fields:
            assert f"`{prefix}{name}" in OPERATOR, f"consortium.yaml: {prefix}{name}"
    for section, model in _SECTIONS.items():
        for name in model.model_fields:
            assert f"`{f'{section}.' if section else ''}{name}" in STEWARD, f"site.yaml: {section}.{name}"


def test_every_file_of_a_home_is_named() -> None:
    files = {home.POLICY, home.LEDGER, home.KEY, site_config.CONFIG, journal_file.JOURNAL, f"{journal_file.SPOOL}/"}
    files |= {credentials.IDENTITY, credentials.TLS, credentials.AUTHORITY, credentials.MEMBERSHIP, credentials.PEERS}
    assert {name for name in files if f"| `{name}` |" not in STEWARD} == set()
