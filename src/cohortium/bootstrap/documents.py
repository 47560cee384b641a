"""Studies, models and reports as files, and data sources from paths and frames."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cohortium.adapters import bundled, files
from cohortium.adapters.sources import FileSource, FrameSource
from cohortium.coordinator.result import Result, as_json
from cohortium.core.models import Descriptive
from cohortium.core.study import Study
from cohortium.learning.descriptive import Summary
from cohortium.learning.evaluation import Comparison
from cohortium.learning.model import GlobalModel
from cohortium.plan import compile_study
from cohortium.site.ports import DataSource


def load_study(path: str | Path) -> Study:
    """Returns the study of a YAML file.

    Raises:
        StudyError: the file cannot be read or is no study.
    """
    return files.read_study(Path(path))


def load_model(path: str | Path) -> GlobalModel:
    """Returns the model of a file that `save_model` wrote. Loading runs no code."""
    return files.read_model(Path(path))


def save_model(model: GlobalModel, path: str | Path) -> None:
    """Writes a model, with its study and preprocessing, as JSON."""
    files.write(Path(path), model.to_bytes())


def write_file(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    files.write(Path(path), data)


def example_study() -> str:
    """Returns the bundled heart-disease study as commented YAML."""
    return bundled.text("heart-risk.yaml")


def load_example() -> Study:
    """Returns the bundled heart-disease study."""
    return files.parse_study(example_study())


def example_sites() -> dict[str, Path]:
    """Returns the bundled heart-disease records: one CSV file for each of four hospitals."""
    return bundled.sites()


def descriptive(study: Study) -> Study:
    """Returns the study that describes another study's cohort, with the same epsilon where that has one."""
    model = Descriptive() if study.privacy.epsilon is None else Descriptive(refinements=0)
    privacy = replace(study.privacy, sampling=1.0)
    return replace(study, name=f"{study.name}-description"[:63], model=model, training=None, privacy=privacy)


def write_report(result: Result, path: str | Path, comparison: tuple[Comparison, ...] = ()) -> None:
    """Writes a run's report: one HTML page that needs nothing else."""
    write_file(path, _report(result, comparison))


def write_result(result: Result, folder: str | Path, comparison: tuple[Comparison, ...] = ()) -> list[Path]:
    """Writes result.json, report.html and, if there is a model, model.json and its card; returns their paths."""
    # all is made before anything is written, so that a failure leaves no half of it
    contents = {"result.json": json.dumps(as_json(result, comparison), indent=1, allow_nan=False).encode()}
    if not isinstance(result.outcome, Summary):
        contents["model.json"] = result.model.to_bytes()
        contents["model-card.md"] = card(result.model, comparison).encode()
    contents["report.html"] = _report(result, comparison)
    for name, data in contents.items():
        write_file(Path(folder) / name, data)
    return [Path(folder) / name for name in contents]


def card(model: GlobalModel, comparison: tuple[Comparison, ...] = (), audit: str | Path | None = None) -> str:
    """Returns a model's card in Markdown, with the attack results of an audit's audit.md if one is given.

    Raises:
        StudyError: `audit` cannot be read, or is no audit's.
    """
    from cohortium.web.card import card as page

    return page(model, comparison, files.read_text(Path(audit)) if audit else "")


def score_file(model: GlobalModel, path: str | Path) -> tuple[list[str], list[float]]:
    """Returns the patients' identifiers and their expected targets, in the order of a data file.

    Raises:
        DataError: the file cannot be read, lacks a column, or breaks the study's data contract.
    """
    patient = model.study.cohort.patient
    columns = FileSource(Path(path)).read([patient, *model.study.cohort.features], as_text={patient})
    return [str(value) for value in columns[patient]], model.predict_mean(columns).tolist()


def source_of(data: Any) -> DataSource:
    """Returns the data source for a path or a data frame."""
    if isinstance(data, str | Path):
        return FileSource(Path(data))
    return data if hasattr(data, "fingerprint") else FrameSource(data)


def _report(result: Result, comparison: tuple[Comparison, ...]) -> bytes:
    # matplotlib takes a second to import, and only reports need it
    from cohortium.web.assemble import assemble
    from cohortium.web.report import render

    return render(assemble(result, compile_study(result.study), comparison)).encode()
