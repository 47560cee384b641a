"""What epsilon costs on FLCHAIN: 7,874 patients dealt over 15 hospitals, 12 seeds; and how fast noise is drawn.

    python benchmarks/bench_privacy.py [--seeds 12] [--network-seeds 12] [--folder FOLDER]

With a folder, points are kept and not computed again. A point of the network takes a minute on two cores, so a quicker
run gives it fewer seeds; the result says how many.

Data: free light chains and death of 7,874 residents of Olmsted County (Dispenzieri et al. 2012), as scikit-survival
ships them; that package (GPL-3) and OpenDP are needed by this bench alone: pip install 'cohortium[bench]'.

Protocol: each seed holds out a quarter of every hospital's patients and draws other noise; the figure is the mean AUC
on all held-out patients. delta is 1e-5. "distributed" is the study through the whole engine: quantised, with integer
noise shares under masks, tolerating 3 lost and 4 colluding hospitals. "central" adds the noise of one trusted curator
in floating point, "local" the noise that each hospital would need by itself, and "alone" is the mean over hospitals
that each train on their own patients with noise. All of them pay for preprocessing from the same budget.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cohortium.bootstrap import tradeoff
from cohortium.core.features import BinaryTarget, Category, Number
from cohortium.core.models import Network, Regression
from cohortium.core.protection import Aggregation, Privacy
from cohortium.core.random import Randomness
from cohortium.core.study import Cohort, Purpose, Sites, Study
from cohortium.core.training import Averaging, Descent, Local, OneShot
from cohortium.learning.tradeoff import Tradeoff, levels
from cohortium.privacy.gaussian import sample
from machine import processor

RESULTS = Path(__file__).resolve().parent / "results" / "privacy.json"
SITES = tuple(f"hospital-{number:02d}" for number in range(15))
EPSILONS = (0.5, 1.0, 4.0, 8.0)
DELTA = 1e-5
DRAWS = 10_000_000
REPEATS = 7
DEVIATIONS = (16.0, 1e4, 1e6)
"""Of a share, in steps of rounding: a study of 32 bits has some thousands, one of 64 bits far more."""

LOGISTIC = Study(
    name="flchain",
    purpose=Purpose(summary="Death from free light chains and routine findings"),
    sites=Sites(include=SITES),
    cohort=Cohort(
        dataset="flchain",
        patient="id",
        maximum=10_000,
        features={
            "age": Number(unit="a", range=(50, 101)),
            "creatinine": Number(unit="mg/dL", range=(0, 5), missing="impute", outside="clip"),
            "group": Number(unit="1", range=(1, 10)),
            "kappa": Number(unit="mg/dL", range=(0, 10), outside="clip"),
            "lambda": Number(unit="mg/dL", range=(0, 10), outside="clip"),
            "mgus": Category(levels=("no", "yes")),
            "sex": Category(levels=("F", "M")),
            "year": Number(unit="a", range=(1995, 2003)),
        },
        target=BinaryTarget(name="death"),
    ),
    model=Regression(kind="logistic"),
    training=Descent(rounds=40, clip=1.0),
    aggregation=Aggregation(dropouts=3),
    privacy=Privacy(unit="patient", epsilon=1.0, delta=DELTA, colluding=4),
)
ONE_SHOT = replace(LOGISTIC, name="flchain-adassp", training=OneShot(clip=2.5))
NETWORK = replace(
    LOGISTIC,
    name="flchain-network",
    model=Network(hidden=(32,), activation="tanh"),
    training=Averaging(rounds=30, clip=2.0, local=Local(steps=1, learning_rate=3.0)),
)


@dataclass(frozen=True)
class Row:
    """One line of the table: a curve of a study's trade-off, and the design's prototype beside it."""

    name: str
    study: Study
    curve: str
    prototype: tuple[float, ...]


ROWS = {
    "alone": Row("site only, logistic", LOGISTIC, "alone", (0.728, 0.771, 0.818, 0.825, 0.829)),
    "local": Row("noise at each site, logistic", LOGISTIC, "local", (0.828, 0.831, 0.832, 0.832, 0.832)),
    "distributed": Row("distributed, logistic", LOGISTIC, "distributed", (0.836, 0.837, 0.837, 0.837, 0.837)),
    "central": Row("central, logistic", LOGISTIC, "central", (0.835, 0.836, 0.837, 0.837, 0.837)),
    "adassp": Row("distributed, AdaSSP in one round", ONE_SHOT, "distributed", (0.835, 0.837, 0.837, 0.837, 0.837)),
    "network": Row("distributed, network of 32", NETWORK, "distributed", (0.833, 0.836, 0.838, 0.838, 0.839)),
    "network_local": Row("noise at each site, network of 32", NETWORK, "local", (0.796, 0.820, 0.838, 0.839, 0.839)),
}


def hospitals() -> dict[str, pd.DataFrame]:
    """Returns FLCHAIN's patients dealt at random over the hospitals, alike each time."""
    from sksurv.datasets import load_flchain

    found, outcome = load_flchain()
    frame = pd.DataFrame(
        {
            "id": [f"patient-{number}" for number in range(len(found))],
            "age": found["age"].astype(float),
            "creatinine": found["creatinine"].astype(float),
            "group": found["flc.grp"].astype(float),
            "kappa": found["kappa"].astype(float),
            "lambda": found["lambda"].astype(float),
            "mgus": found["mgus"].astype(str),
            "sex": found["sex"].astype(str),
            "year": found["sample.yr"].astype(float),
            "death": outcome["death"].astype(int),
        }
    )
    order = Randomness.of_seed(0).generator().permutation(len(frame))
    parts = np.array_split(order, len(SITES))
    return {site: frame.iloc[part].reset_index(drop=True) for site, part in zip(SITES, parts, strict=True)}


def trade(study: Study, sites: dict[str, pd.DataFrame], seeds: int, progress: Progress, folder: Path) -> Tradeoff:
    """Returns a study's curves, under a progress bar."""
    task = progress.add_task(study.name, total=(len(EPSILONS) + 1) * seeds)
    return tradeoff(
        study,
        sites,
        folder / study.name,
        epsilons=EPSILONS,
        seeds=range(seeds),
        progress=lambda found: progress.update(task, completed=len(found.points)),
    )


def seconds(work: Callable[[], object]) -> float:
    """Returns the median wall time of some repeats, after one that warms up."""
    work()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def draws_a_second() -> dict[str, float]:
    """Returns how many noise shares one core draws a second, by their deviation."""
    key = Randomness.of_seed(1)
    return {f"{d:g}": DRAWS / seconds(lambda d=d: sample(d, DRAWS, key)) for d in DEVIATIONS}  # type: ignore[misc]


def opendp_draws_a_second(deviation: float, count: int = 100_000) -> float | None:
    """Returns how many exact discrete Gaussians OpenDP draws a second through Python, None where it is missing."""
    try:
        import opendp.prelude as dp
    except ImportError:
        return None
    dp.enable_features("contrib")
    domain, metric = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
    mechanism, zeros = dp.m.make_gaussian(domain, metric, scale=deviation), [0] * count
    return count / seconds(lambda: mechanism(zeros))


def table_of(found: dict[str, Tradeoff]) -> dict[str, dict[str, float]]:
    """Returns the mean AUC of each row at each epsilon."""
    rows: dict[str, dict[str, float]] = {}
    for key, row in ROWS.items():
        mine = [level for level in levels(found[row.study.name]) if level.curve == row.curve]
        rows[key] = {"inf" if level.epsilon is None else f"{level.epsilon:g}": level.mean for level in mine}
    return rows


def show(rows: dict[str, dict[str, float]], found: dict[str, Tradeoff]) -> None:
    grid = Table(title="Mean AUC on held-out patients (in brackets: the design's prototype)", title_justify="left")
    columns = [*(f"{epsilon:g}" for epsilon in EPSILONS), "inf"]
    for column in ("", *columns):
        grid.add_column(column, justify="right" if column else "left")
    for key, row in ROWS.items():
        cells = zip(columns, row.prototype, strict=True)
        grid.add_row(row.name, *(f"{rows[key][column]:.3f} ({before:.3f})" for column, before in cells))
    Console(width=120).print(grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--network-seeds", type=int, default=12)
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    seeds = {study.name: chosen.seeds for study in (LOGISTIC, ONE_SHOT)} | {NETWORK.name: chosen.network_seeds}
    try:
        sites = hospitals()
    except ImportError:
        sys.exit("this bench needs scikit-survival for its data: pip install 'cohortium[bench]'")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as unkept, Progress(*columns, console=Console(stderr=True)) as progress:
        folder = chosen.folder or Path(unkept)
        studies = (LOGISTIC, ONE_SHOT, NETWORK)
        found = {study.name: trade(study, sites, seeds[study.name], progress, folder) for study in studies}
    rows = table_of(found)
    show(rows, found)
    drawn, peer = draws_a_second(), opendp_draws_a_second(1e4)
    gaps = [abs(rows["distributed"][epsilon] - rows["central"][epsilon]) for epsilon in rows["central"]]
    figures = {
        "dist_eps0.5": rows["distributed"]["0.5"],
        "central_eps0.5": rows["central"]["0.5"],
        "site_eps0.5": rows["alone"]["0.5"],
        "local_eps0.5": rows["local"]["0.5"],
        "mlp_eps0.5": rows["network"]["0.5"],
        "max_gap": max(gaps),
        "sampler_mps": min(drawn.values()) / 1e6,
    }
    assert all(math.isfinite(value) for value in figures.values())
    RESULTS.write_text(json.dumps(_result(seeds, rows, drawn, peer, figures), indent=1) + "\n", encoding="utf-8")
    print("privacy:", " ".join(f"{name}={value:.4g}" for name, value in figures.items()))


def _result(
    seeds: dict[str, int], rows: Any, drawn: dict[str, float], peer: float | None, figures: dict[str, float]
) -> dict[str, Any]:
    return {
        "machine": processor(),
        "versions": {name: version(name) for name in ("cohortium", "numpy", "numba", "dp-accounting", "torch")},
        "seeds": seeds,
        "rows": rows,
        "prototype": {key: row.prototype for key, row in ROWS.items()},
        "draws_per_second": drawn,
        "opendp_draws_per_second": peer,
        "figures": figures,
    }


if __name__ == "__main__":
    main()
