"""What a steward is shown of a ledger that was charged: never whose, and no small count."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cohortium import bootstrap
from cohortium.cli.app import app
from cohortium.core.errors import SiteError
from cohortium.core.events import Events, Gaussian, Repeated
from cohortium.site.budget import SITE

SMALL, LARGE = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
ROUND: Events = (Gaussian(40.0),)
PATIENTS = np.array([f"patient-{number:03d}" for number in range(60)], dtype=object)


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    folder = tmp_path / "hospital"
    bootstrap.create_home(folder)
    (folder / "policy.yaml").write_text("privacy: {patient: id, budget: {epsilon: 2, delta: 1e-5}}\n")
    with bootstrap.open_home(folder) as site:
        limit, price = site.ledger.tariff.limit, site.ledger.tariff.price(ROUND)
        assert limit is not None
        most = limit.divergence // price.divergence
        assert most > 10
        site.ledger.charge("r1", SMALL, 1, PATIENTS[:50], ROUND)
        site.ledger.charge("r2", SMALL, 1, PATIENTS[:50], ROUND)
        # these have nothing left for another round
        site.ledger.charge("r3", LARGE, 1, PATIENTS[40:47], (Repeated(most - 2, ROUND[0]),))
        site.ledger.charge("r3", LARGE, 2, PATIENTS[56:], (Repeated(most // 2, ROUND[0]),))
        site.ledger.charge("r4", LARGE, 1, np.array([SITE], dtype=object), ROUND)
    return folder


def told(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["site", "budget", *arguments], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    return done.output


def facts(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(told(str(folder), "--json"))
    return content


def test_the_spread_hides_small_counts(hospital: Path) -> None:
    content = facts(hospital)
    # 43, 4 and 7 of 54 patients: were the 7 shown, the 4 would be what 54 leaves
    assert content["out_of_budget"] == "hidden"
    assert content["spent"][0] == {"from": 0.0, "to": 0.1, "patients": 43}
    assert [one["patients"] for one in content["spent"][1:]] == ["hidden"] * 9
    assert [(one["study_id"], one["runs"], one["rounds"]) for one in content["studies"]] == [
        (SMALL, 2, 2),
        (LARGE, 2, 3),
    ]
    assert 0 < content["studies"][0]["epsilon"] < content["studies"][1]["epsilon"] <= 2
    assert content["budget"] == {"epsilon": 2.0, "delta": 1e-5} and 0 < content["site_epsilon"] < 2


def test_people_are_shown_the_same(hospital: Path) -> None:
    text = told(str(hospital), "--verify")
    for part in ("epsilon 2 at delta 1e-05, over all studies", "every entry and cohort is as it was written"):
        assert part in text
    lines = {line.split("  ")[1]: line.rstrip() for line in text.splitlines() if line.startswith("  ")}
    assert lines["0 to 10 %"].endswith("█ 43") and lines["out of budget"].split()[-1] == "hidden"
    assert lines["40 to 50 %"].split()[-1] == "hidden" and "█" not in lines["40 to 50 %"]
    assert "Hidden: fewer than 5 patients, or more" in text
    assert "abababababab" in text and SMALL not in text


def test_enough_hidden_together_hide_nothing_else(hospital: Path) -> None:
    with bootstrap.open_home(hospital) as site:
        limit, price = site.ledger.tariff.limit, site.ledger.tariff.price(ROUND)
        assert limit is not None
        most = limit.divergence // price.divergence
        site.ledger.charge("r5", LARGE, 1, PATIENTS[50:53], (Repeated(most // 4, ROUND[0]),))
    content = facts(hospital)
    assert [one["patients"] for one in content["spent"]] == [43, *["hidden"] * 9]
    assert content["out_of_budget"] == 7
    text = told(str(hospital))
    assert "█ 43" in text and "█ 7" in text and text.count("█ ") == 2


def test_nobody_is_named(hospital: Path) -> None:
    key = (hospital / "ledger.key").read_bytes()
    for text in (told(str(hospital)), told(str(hospital), "--json")):
        assert "patient-0" not in text and key.hex() not in text


def test_what_was_changed_is_said(hospital: Path) -> None:
    data = (hospital / "ledger.sqlite").read_bytes()
    assert data.count(b'"multiplier":40.0') == 5
    (hospital / "ledger.sqlite").write_bytes(data.replace(b'"multiplier":40.0', b'"multiplier":90.0', 1))
    with pytest.raises(SiteError, match="is not as it was written"):
        bootstrap.read_accounts(hospital)


def test_an_empty_ledger_and_a_policy_as_json(tmp_path: Path) -> None:
    bootstrap.create_home(tmp_path)
    content = facts(tmp_path)
    assert content.pop("delta") == 1e-5
    assert content == {
        "budget": None,
        "verified": False,
        "studies": [],
        "site_epsilon": 0.0,
        "spent": [],
        "out_of_budget": None,
    }
    assert told(str(tmp_path), "--quiet") == ""
    done = CliRunner().invoke(app, ["site", "policy", str(tmp_path), "--json"])
    assert json.loads(done.output) == {
        "required": True,
        "epsilon": None,
        "delta": None,
        "units": ["patient", "site"],
        "patient": None,
        "budget": None,
        "colluding": None,
        "sites_per_patient": None,
        "minimum": None,
    }
