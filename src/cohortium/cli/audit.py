"""`cohortium study audit-privacy`: what a study promises, tried by attack."""

from pathlib import Path
from typing import Annotated

import typer

from cohortium import bootstrap
from cohortium.cli.arguments import SiteData, StudyFile, site_files
from cohortium.cli.output import Json, Output, Quiet
from cohortium.coordinator.audit import as_json as content
from cohortium.coordinator.audit import figures, sentences


def audit_privacy(
    path: StudyFile,
    seed: Annotated[int, typer.Option(help="Seed of all keys and random choices; equal seeds give equal bits.", min=0)],
    site: SiteData,
    canaries: Annotated[
        int, typer.Option(help="Made-up patients, of whom half take part and a guesser says which.", max=5000)
    ] = 1000,
    shadows: Annotated[
        int, typer.Option(help="Models that the membership attack is trained with, an even number.", max=1024)
    ] = 32,
    confidence: Annotated[float, typer.Option(help="Confidence of the lower bound on epsilon.")] = 0.95,
    jobs: Annotated[int, typer.Option(help="Processes that train shadow models; 1: this one.", min=1)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder for audit.json, audit.png and audit.md.", show_default="STUDY-audit")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attack a study by simulation: do its sums and its model give away more than it promises?

    Canaries go through the study's own rounds, noise and secure sums; a membership attack is made on its model. Exit
    code 1 means that more was found than the study promises.
    """
    study, sites, output = bootstrap.load_study(path), site_files(site), Output(as_json, quiet)
    with output.bar(f"{study.name}: audit") as bar:
        found = bootstrap.audit_privacy(
            study,
            sites,
            seed=seed,
            canaries=canaries,
            shadows=shadows,
            confidence=confidence,
            jobs=jobs,
            progress=bar.step,
        )
    written = bootstrap.write_audit(found, out or Path(f"{study.name}-audit"))
    if found.canaries or found.membership:
        rows = [list(row) for row in figures(found)]
        output.table(f"{study.name}: what attacks found", ["tried", "promised", "measured", "verdict"], rows)
    for sentence in sentences(found):
        output.say(sentence)
    output.say(f"Wrote {', '.join(str(path) for path in written)}")
    output.result(content(found) | {"files": [str(path) for path in written]})
    if found.verdict == "failed":
        raise typer.Exit(1)
