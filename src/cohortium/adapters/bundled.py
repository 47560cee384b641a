"""Records that ship with the package: heart disease at four hospitals (see ATTRIBUTION.md beside them)."""

from importlib.resources import files
from pathlib import Path

_FOLDER = Path(str(files("cohortium.adapters") / "heart_disease"))
_SITES = ("budapest", "cleveland", "long-beach", "zurich")


def sites() -> dict[str, Path]:
    """Returns each hospital's CSV file."""
    return {name: _FOLDER / f"{name}.csv" for name in _SITES}


def text(name: str) -> str:
    """Returns a bundled text file."""
    return (_FOLDER / name).read_text(encoding="utf-8")
