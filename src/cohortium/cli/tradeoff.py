"""`cohortium study tradeoff`: what a study's epsilon costs."""

import math
from pathlib import Path
from typing import Annotated

import typer

from cohortium import bootstrap
from cohortium.cli.arguments import SiteData, StudyFile, site_files
from cohortium.cli.output import Json, Output, Quiet
from cohortium.core.errors import StudyError
from cohortium.learning.tradeoff import Tradeoff, levels, plain, prices, verdict
from cohortium.learning.tradeoff import as_json as content

_NOT_PRIVATE = (
    "To choose an epsilon by these curves is itself not private: they are computed from the data without protection. "
    "Use public or synthetic data, or accept it knowingly."
)


def tradeoff(
    path: StudyFile,
    site: SiteData,
    epsilon: Annotated[
        str, typer.Option(metavar="LIST", help="Epsilons to compare, parted by commas; inf is the study without noise.")
    ] = "0.25,0.5,1,2,4,8,inf",
    seeds: Annotated[int, typer.Option(metavar="N", help="Random choices of held-out patients and noise.")] = 10,
    seed: Annotated[int, typer.Option(help="The first seed; the others follow it.", min=0)] = 1,
    loss: Annotated[float, typer.Option(help="The loss of utility that is accepted.")] = 0.01,
    holdout: Annotated[float, typer.Option(help="Share of each site's patients on whom results are judged.")] = 0.25,
    delta: Annotated[
        float | None, typer.Option(help="Delta for a study that has none itself.", show_default="1e-5")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes that compute side by side.", min=1, show_default="all cores")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tradeoff.json, tradeoff.png and tradeoff.html.", show_default="STUDY-tradeoff"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a study's epsilon costs in utility, by simulation, and recommend the smallest that costs little.

    Points that the folder holds already are not computed again, so it may be interrupted and taken up.
    """
    epsilons = _epsilons(epsilon)
    study, sites, output = bootstrap.load_study(path), site_files(site), Output(as_json, quiet)
    folder = out or Path(f"{study.name}-tradeoff")
    with output.bar(f"{study.name}: epsilons and seeds") as bar:

        def step(found: Tradeoff) -> None:
            total = len(found.grid) * len(found.seeds)
            done = total - len(found.missing)
            bar.step(done, total, f"{done} of {total}")

        found = bootstrap.tradeoff(
            study,
            sites,
            folder,
            epsilons=epsilons,
            seeds=range(seed, seed + seeds),
            delta=delta,
            holdout=holdout,
            allowed=loss,
            jobs=jobs,
            progress=step,
        )
    written = bootstrap.write_tradeoff(found, folder)
    _show(output, found)
    output.say(f"Wrote {', '.join(str(path) for path in written)}")
    output.result(content(found) | {"files": [str(path) for path in written]})


def _show(output: Output, found: Tradeoff) -> None:
    heights = {(level.epsilon, level.curve): level for level in levels(found)}
    costs = {price.epsilon: price for price in prices(found)}
    rows = []
    for epsilon in found.grid:
        row = ["inf" if epsilon is None else f"{epsilon:g}"]
        for curve in found.curves:
            level = heights[epsilon, curve]
            row.append(f"{plain(level.mean)} ±{plain(level.high - level.mean)}{'*' if level.failed else ''}")
        price = costs.get(epsilon) if epsilon is not None else None
        row += ["", ""] if price is None else [plain(price.loss), plain(price.bound)]
        rows.append(row)
    seeds = len(found.seeds)
    where = "on held-out patients, " if found.utility.higher_is_better else ""
    title = f"{found.study.name}: {found.utility.name} {where}mean of {seeds} seeds ± 95% interval"
    output.table(title, ["epsilon", *found.curves, "loss", "95% bound"], rows)
    if any(level.failed for level in heights.values()):
        output.say("* Some of these fits found no model in the noise; they count as one that knows the mean alone.")
    output.say(verdict(found))
    output.say(_NOT_PRIVATE)


def _epsilons(text: str) -> list[float]:
    """Returns the finite epsilons of a list; 'inf' is there in any case."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if any(math.isnan(number) for number in numbers):
        raise StudyError(f"--epsilon {text}: write numbers parted by commas, as in 0.5,1,2,inf")
    return [number for number in numbers if number != math.inf]
