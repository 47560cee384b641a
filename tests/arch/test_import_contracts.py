"""The import contracts hold for the real package, and each of them fails once somebody breaks it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]

LAYERS = "Imports only point down"
ADAPTERS = "Only bootstrap imports adapters"
SECURE_SUM = "Learning never imports the secure sum"
PURE = "The pure rooms do no I/O, read no clock and draw no randomness of their own"
CYCLES = "No cycles among siblings"

BREACHES = [
    ("stray.py", "", {LAYERS}),
    ("core/errors.py", "import cohortium.plan", {LAYERS, CYCLES, SECURE_SUM}),  # learning -> core -> plan -> secagg
    ("secagg/quantise.py", "import cohortium.learning.table", {LAYERS}),
    ("site/agent.py", "import cohortium.coordinator.rounds", {LAYERS}),
    ("coordinator/rounds.py", "import cohortium.site.agent", {LAYERS}),
    ("web/report.py", "import cohortium.engines.local", {LAYERS}),
    ("engines/local.py", "import cohortium.adapters.files", {ADAPTERS}),
    ("web/report.py", "import cohortium.adapters.files", {ADAPTERS}),
    ("learning/table.py", "import cohortium.secagg.quantise", {SECURE_SUM}),
    ("learning/glm.py", "import time", {PURE}),
    ("secagg/masking.py", "import secrets", {PURE}),
    ("core/document.py", "import pathlib", {PURE}),
    ("plan.py", "import os", {PURE}),
    ("coordinator/rounds.py", "import asyncio", {PURE}),
    ("site/session.py", "import duckdb", {PURE}),
    ("learning/table.py", "import cohortium.learning.algorithm", {CYCLES}),
    ("core/stage.py", "import cohortium.core.layout\n\nfrom cohortium.core import filter", set()),
]


def verdicts(root: Path) -> dict[str, str]:
    """Returns KEPT or BROKEN for each contract of the package under `root`, and checks that the exit status agrees."""
    run = subprocess.run(
        [*LINT, "--no-cache", "--config", str(PROJECT / "pyproject.toml")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    found = dict(re.findall(r"^(.+) (KEPT|BROKEN)(?: \(.*\))?$", run.stdout, re.MULTILINE))
    assert (run.returncode == 0) == (set(found.values()) == {"KEPT"}), run.stdout + run.stderr
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(PROJECT / "src/cohortium", tmp_path / "cohortium", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_every_contract_holds() -> None:
    assert verdicts(PROJECT / "src") == dict.fromkeys([LAYERS, ADAPTERS, SECURE_SUM, PURE, CYCLES], "KEPT")


@pytest.mark.parametrize(
    ("module", "line", "broken"), BREACHES, ids=lambda value: value[:40] if isinstance(value, str) else None
)
def test_a_breach_breaks_the_contract_that_forbids_it(copy: Path, module: str, line: str, broken: set[str]) -> None:
    file = copy / "cohortium" / module
    file.write_text((file.read_text() if file.exists() else "") + f"\n{line}\n")
    found = verdicts(copy)
    assert len(found) == 5
    assert {name for name, verdict in found.items() if verdict == "BROKEN"} == broken


def test_every_contract_has_a_breach() -> None:
    assert set().union(*(broken for _, _, broken in BREACHES)) == verdicts(PROJECT / "src").keys()
