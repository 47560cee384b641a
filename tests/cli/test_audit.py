"""An audit that finds more than was promised says so, and its exit code is 1."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cohortium import bootstrap
from cohortium.bootstrap import auditing
from cohortium.cli import app
from cohortium.plan import Plan, compile_study

FILES = Path(__file__).parent / "files"
SITES = ("north", "south", "west")
PRIVATE = (
    "privacy: {unit: patient, epsilon: 1.0, delta: 1.0e-5}\n"
    "training: {algorithm: descent, rounds: 2, learning_rate: 1.0, clip: 1.0}"
)


def promising_too_much(plan: Plan) -> Plan:
    """Returns a plan with the noise of epsilon 50, whatever its study promises."""
    weaker = compile_study(replace(plan.study, privacy=replace(plan.study.privacy, epsilon=50.0)))
    return replace(weaker, study=plan.study)


def test_more_than_was_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    (tmp_path / "study.yaml").write_text(
        (FILES / "study.yaml").read_text().replace("privacy: {unit: patient}", PRIVATE)
    )
    monkeypatch.chdir(tmp_path)
    right = bootstrap.audit_canaries
    monkeypatch.setattr(auditing, "audit_canaries", lambda plan, *rest: right(promising_too_much(plan), *rest))
    # which would refuse such a plan before it runs
    monkeypatch.setattr("cohortium.engines.audit.keeps_promise", lambda study, releases: None)
    given = [word for site in SITES for word in ("--site", f"{site}={site}.csv")]
    chosen = ["--seed", "1", "--canaries", "100", "--shadows", "4", "--json"]
    monkeypatch.setattr("sys.argv", ["cohortium", "study", "audit-privacy", "study.yaml", *given, *chosen])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == printed["canaries"]["verdict"] == "failed"
    assert printed["canaries"]["lower"] > 1 and any("do not run this study" in said for said in printed["meaning"])
    # a figure that failed is written all the same
    assert json.loads((tmp_path / "fever-audit/audit.json").read_text())["verdict"] == "failed"
    assert "| FAILED |" in (tmp_path / "fever-audit/audit.md").read_text()
