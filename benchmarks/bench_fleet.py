"""The fleet on this machine: processes, mutual TLS, secure sums; beside NVFLARE and Flower where they are given.

What is measured: rounds as their coordinator times them, from opening one to opening the next, with ready-made
statistics, so that all of it is the fleet's own work. Masks on, and what a study does not say as it is by default: no
site may be lost in a round. In `tolerant` rounds one may, and they take three exchanges instead of one. Everything runs
on the same cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from bench_engine import empty_study
from cohortium.bootstrap.loopback import Loopback
from cohortium.core.features import Number
from cohortium.core.study import Purpose, Study
from cohortium.engines.fleet.client import RunHandle
from machine import processor

HERE = Path(__file__).parent
DROPOUTS = {"default": 0, "tolerant": 1}
RESULTS = HERE / "results" / "fleet.json"
PROGRAM = HERE / "fleet_process.py"


def study(sites: int, values: int, rounds: int, dropouts: int, number: int = 0) -> Study:
    """Returns a study whose summary tells the bench's processes what to send."""
    names = tuple(f"site-{index:02d}" for index in range(sites))
    empty = empty_study(names, dropouts=dropouts)
    summary = f"values={values} rounds={rounds} number={number}"
    cohort = replace(empty.cohort, dataset="records", features={"x": Number(unit="1", range=(0, 1))})
    return replace(empty, name=f"bench-{number}", purpose=Purpose(summary=summary), cohort=cohort)


@contextmanager
def consortium(sites: int) -> Iterator[Loopback]:
    """Yields a consortium of processes with this many hospitals, each with 50 records."""
    with tempfile.TemporaryDirectory(prefix="cohortium-bench-") as name:
        folder = Path(name)
        records = folder / "records.csv"
        records.write_text("id,x\n" + "".join(f"p{index},{index / 50}\n" for index in range(50)))
        names = {f"site-{index:02d}": records for index in range(sites)}
        with Loopback.begin(folder / "fleet", names, "records", program=PROGRAM) as fleet:
            yield fleet


def megabytes(pid: int) -> float:
    """Returns the resident memory of a process in MB."""
    return psutil.Process(pid).memory_info().rss / 1e6


def seconds_of_rounds(fleet: Loopback, asked: Study) -> list[float]:
    """Returns how long each round of a run took, the first one left out: it also reads data."""
    fleet.approve(asked)
    with fleet.connect() as connection:
        handle = connection.submit(asked)
        return [float(one.facts["seconds"]) for one in rounds_of(handle)][1:]


def rounds_of(handle: RunHandle) -> list[Any]:
    """Returns the events of a run's rounds, once it has finished."""
    events = list(handle.events())
    if events[-1].kind != "finished":
        raise RuntimeError(f"the run {events[-1].kind}: {events[-1].facts}")
    return [event for event in events if event.kind == "round"]


def small_models(fleet: Loopback, sites: int, count: int) -> dict[str, Any]:
    """Returns how many small models an hour one coordinator makes, and what a run takes beside its rounds."""
    asked = [study(sites, 100, 5, 0, number) for number in range(1, count + 1)]
    for one in asked:
        fleet.approve(one)
    overheads = []
    with fleet.connect() as connection:
        for one in asked[:5]:
            began = time.perf_counter()
            rounds = sum(float(event.facts["seconds"]) for event in rounds_of(connection.submit(one)))
            overheads.append(time.perf_counter() - began - rounds)
        began = time.perf_counter()
        handles = [connection.submit(one) for one in asked[5:]]
        for handle in handles:
            rounds_of(handle)
        taken = time.perf_counter() - began
    return {
        "overhead_s": statistics.median(overheads),
        "overheads_s": overheads,
        "models_per_hour": 3600 * (count - 5) / taken,
        "models": count - 5,
    }


def measured(quick: bool) -> dict[str, Any]:
    """Returns all of the fleet's own figures."""
    rounds, large, models = (30, 4, 15) if quick else (200, 8, 65)
    found: dict[str, Any] = {}
    with consortium(15) as fleet:
        time.sleep(2)  # memory of processes that have nothing to do
        idle = [megabytes(agent.pid) for agent in fleet.agents.values()]
        found["agent_mb"] = statistics.median(idle)
        seconds_of_rounds(fleet, study(15, 1000, 50, 0, 999))  # processes that have just begun take longer
        taken = {
            name: seconds_of_rounds(fleet, study(15, 1000, rounds, dropouts, 1000 + dropouts))
            for name, dropouts in DROPOUTS.items()
        }
        found["rounds_15x1k_s"] = taken
        found["round_15x1k_ms"] = 1000 * statistics.median(taken["default"])
        found["round_15x1k_p95_ms"] = 1000 * statistics.quantiles(taken["default"], n=20)[-1]
        found["tolerant_15x1k_ms"] = 1000 * statistics.median(taken["tolerant"])
        found |= small_models(fleet, 15, models)
        found["coordinator_mb"] = megabytes(fleet.coordinators["coordinator-1"].pid)
        found["agent_after_mb"] = statistics.median(megabytes(agent.pid) for agent in fleet.agents.values())
    with consortium(5) as fleet:
        taken = {
            name: seconds_of_rounds(fleet, study(5, 10_000_000, large, dropouts, 2000 + dropouts))
            for name, dropouts in DROPOUTS.items()
        }
        found["rounds_5x10M_s"] = taken
        found["round_5x10M_s"] = statistics.median(taken["default"])
        found["tolerant_5x10M_s"] = statistics.median(taken["tolerant"])
        found["coordinator_5x10M_mb"] = megabytes(fleet.coordinators["coordinator-1"].pid)
    return found


def peer(python: Path | None, script: str, quick: bool) -> Any:
    """Returns what a peer's script measured, or why it did not."""
    if python is None or not python.exists():
        return {"why": "its environment was not given"}
    command = [str(python), str(HERE / script), *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"why": f"it ended with code {done.returncode}"}


KEYS: dict[str, Callable[[float], str]] = {
    "round_15x1k_ms": lambda value: f"{value:.1f}",
    "round_5x10M_s": lambda value: f"{value:.2f}",
    "overhead_s": lambda value: f"{value:.2f}",
    "models_per_hour": lambda value: f"{value:.0f}",
    "coordinator_mb": lambda value: f"{value:.0f}",
    "agent_mb": lambda value: f"{value:.0f}",
    "tolerant_15x1k_ms": lambda value: f"{value:.1f}",
    "tolerant_5x10M_s": lambda value: f"{value:.2f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look; nothing is written")
    parser.add_argument("--flower-python", type=Path, help="the Python of an environment with Flower")
    parser.add_argument("--nvflare-python", type=Path, help="the Python of an environment with NVFLARE")
    told = parser.parse_args()
    found = measured(told.quick)
    found["flower"] = peer(told.flower_python, "flower_fleet.py", told.quick)
    found["nvflare"] = peer(told.nvflare_python, "nvflare_fleet.py", told.quick)
    found["machine"] = {"processor": processor(), "cores": os.cpu_count()}
    for name in ("flower", "nvflare"):
        print(f"{name}: {json.dumps(found[name])}")
    if not told.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print("fleet: " + " ".join(f"{key}={shown(found[key])}" for key, shown in KEYS.items()))


if __name__ == "__main__":
    main()
