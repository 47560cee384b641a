"""`cohortium model` and `cohortium predict`: look at a model file and score patients with it."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cohortium import bootstrap
from cohortium.cli.output import Json, Output, Quiet, visible
from cohortium.cli.results import show_model

app = typer.Typer(help="Look at a model file and score patients with it.", no_args_is_help=True)

ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="A model file (model.json).", show_default=False)]


@app.command()
def show(path: ModelFile, as_json: Json = False, quiet: Quiet = False) -> None:
    """Show a model's study and coefficients."""
    model = bootstrap.load_model(path)
    output = Output(as_json, quiet)
    output.say(f"{model.study.name} v{model.study.version}: {model.study.purpose.summary}")
    show_model(output, model)
    output.result(json.loads(model.to_bytes()))


@app.command()
def card(
    path: ModelFile,
    out: Annotated[Path | None, typer.Option(help="Write a Markdown file instead of printing.")] = None,
    audit: Annotated[
        Path | None, typer.Option(help="Take in the attack results of an audit: the audit.md that it wrote.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a model's card: what it is, what it was made of, what it promises."""
    text = bootstrap.card(bootstrap.load_model(path), audit=audit)
    output = Output(as_json, quiet)
    if out:
        bootstrap.write_file(out, text.encode())
        output.say(f"Wrote {out}")
    elif not (as_json or quiet):
        print(text, end="")
    output.result({"card": text})


@app.command()
def predict(
    path: ModelFile,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Patients to score: CSV, TSV, Parquet or JSON.")],
    out: Annotated[Path | None, typer.Option(help="Write a CSV file instead of printing.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score patients: one line each, in the order of the data."""
    model = bootstrap.load_model(path)
    identifiers, scores = bootstrap.score_file(model, data)
    patient = model.study.cohort.patient
    column = f"expected_{model.study.cohort.target.name}" if model.study.cohort.target else "score"
    output = Output(as_json, quiet)
    rows = list(zip(identifiers, scores, strict=True))
    if out:
        bootstrap.write_file(out, _csv(patient, column, rows).encode())
        output.say(f"Wrote {len(scores):,} scores to {out}")
    elif not (as_json or quiet):
        if sys.stdout.isatty():
            rows = [(visible(identifier), score) for identifier, score in rows]
        print(_csv(patient, column, rows), end="")
    output.result({"column": column, "patients": identifiers, "scores": scores})


def _csv(patient: str, column: str, rows: list[tuple[str, float]]) -> str:
    lines = io.StringIO(newline="")
    table = csv.writer(lines)
    table.writerow((patient, column))
    table.writerows(rows)
    return lines.getvalue()
