"""A fleet under fire: a seeded schedule of faults over real processes, and a verdict on what the runs gave.

Three coordinators, five hospitals, PostgreSQL and Valkey on this machine. Runs are under way at all times while
processes are killed and frozen, links held, slowed and cut, disks slow and full, and clocks jump. Afterwards every run
must have finished with exactly what an undisturbed run over the same survivors gives, or have failed for a reason.

Kinds of faults that this machine does not allow (root for disks and namespaces, gcc for clocks) are left out and named.
"""

import argparse
import heapq
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_faults import KINDS, Fault, World, schedule
from chaos_load import AT_ONCE, SEED, Load, Prober, Watcher
from chaos_verdict import Judge, Verdict
from chaos_world import hospitals, studies, world
from cohortium.core.errors import RunFailed
from machine import processor

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "chaos.json"


@dataclass
class Trial:
    """What happened.

    Attributes:
        met: how often each kind of fault was done; `skipped`, how often one had nobody to meet, and why.
    """

    met: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    taken: list[tuple[float, str, str]] = field(default_factory=list)
    answers: list[tuple[str, bool]] = field(default_factory=list)
    surprises: Counter[str] = field(default_factory=Counter)
    verdict: Verdict = field(default_factory=Verdict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def disturb(made: World, faults: Sequence[Fault], prober: Prober, trial: Trial) -> None:
    """Does the faults, each at its time, and heals them."""
    began = time.monotonic()
    for fault in faults:
        prober.during = fault.kind
        at = time.monotonic()
        try:
            whom, heal = KINDS[fault.kind](made, fault)
        except LookupError as error:
            trial.skipped[f"{fault.kind}: {error}"] += 1
            continue
        trial.met[fault.kind] += 1
        print(
            f"{fault.number:4}/{len(faults)} {at - began:6.1f} s  {clock()}  "
            f"{fault.kind} {whom} for {fault.seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
        heapq.heappush(made.heals, (time.monotonic() + fault.seconds, fault.number, heal))
        made.rest(time.monotonic() + fault.pause)
    made.rest(max([time.monotonic(), *(at for at, _, _ in made.heals)]))
    trial.seconds = time.monotonic() - began


def tried(folder: Path, seed: int, count: int, patience: float = 240.0) -> Trial:
    """Returns what a trial of so many faults gave."""
    trial, sites = Trial(), hospitals(folder)
    asked = studies(list(sites))
    with world(folder / "fleet", sites, asked) as made:
        trial.missing = made.missing
        kinds = [kind for kind in KINDS if kind not in made.missing]
        load, prober, watcher = Load(made, asked), Prober(made), Watcher(made)
        for thread in (load, prober, watcher):
            thread.start()
        made.fleet.wait(lambda: load.submitted >= AT_ONCE, 60, "the first runs")
        disturb(made, schedule(seed, count, kinds), prober, trial)
        load.stop()
        prober.during = "after"
        print(f"{clock()} all is healed; waiting for the runs", file=sys.stderr, flush=True)
        with suppress(RunFailed):
            made.fleet.wait(lambda: not _open(made), patience, "the runs' ends")
        for thread in (prober, watcher):
            thread.stop()
        trial.taken, trial.answers = watcher.taken, prober.answers
        trial.surprises = load.surprises + prober.surprises + watcher.surprises
        with made.fleet.connect() as connection:
            trial.verdict = Judge(asked, sites, SEED).verdict(made, connection, folder / "fleet" / "acknowledged")
        _kept_apart(made)
        missed = sum(len(runs) for _, _, runs in made.deaths) - len(watcher.taken)
        trial.verdict.lost += [f"{missed} runs of dead leaders were never taken over"] if missed else []
    return trial


def clock() -> str:
    """Returns the time of day as logs have it."""
    now = time.time_ns()
    return f"{time.strftime('%H:%M:%S', time.gmtime(now // 10**9))}.{now // 10**6 % 1000:03}"


def _kept_apart(made: World) -> None:
    """Copies what lies on file systems in memory: the stores' logs and the runs' events."""
    folder = made.fleet.folder
    for log in (made.fleet.home / "stores").glob("*.log"):
        shutil.copy(log, folder)
    rows = made.asked("SELECT run, seq, kind, at::text, facts::text FROM cohortium.events ORDER BY run, seq")
    (folder / "events.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))


def _open(made: World) -> bool:
    time.sleep(0.3)
    return bool(made.asked("SELECT 1 FROM cohortium.runs WHERE ended IS NULL LIMIT 1"))


def availability(answers: Sequence[tuple[str, bool]]) -> float:
    """Returns the share of probes that were answered."""
    return sum(done for _, done in answers) / max(1, len(answers))


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that so large a share does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def report(trial: Trial, seed: int) -> dict[str, Any]:
    """Returns all figures of a trial."""
    verdict, seconds = trial.verdict, [one for one, _, _ in trial.taken]
    under_fire = [answer for answer in trial.answers if answer[0] != "after"]
    by_kind = {kind: [answer for answer in under_fire if answer[0] == kind] for kind in sorted(trial.met)}
    by_death: dict[str, list[float]] = {}
    for taken, kind, _ in trial.taken:
        by_death.setdefault(kind, []).append(taken)
    return {
        "faults": trial.met.total(),
        "wrong": len(verdict.wrong),
        "lost": len(verdict.lost),
        "takeover_p95_s": percentile(seconds, 0.95),
        "availability": availability(under_fire),
        "takeover_median_s": statistics.median(seconds) if seconds else 0.0,
        "takeover_worst_s": max(seconds, default=0.0),
        "takeovers": len(seconds),
        "takeovers_by_kind": {kind: sorted(round(one, 2) for one in taken) for kind, taken in by_death.items()},
        "availability_by_kind": {kind: availability(answers) for kind, answers in by_kind.items()},
        "probes": len(under_fire),
        "faults_by_kind": dict(sorted(trial.met.items())),
        "skipped": dict(trial.skipped),
        "left_out": trial.missing,
        "runs": dict(verdict.ends),
        "failed_share": verdict.ends["failed"] / max(1, verdict.ends.total()),
        "reasons": dict(verdict.reasons),
        "rounds": verdict.rounds,
        "compared": verdict.checked,
        "compared_with_lost_sites": verdict.partial,
        "acknowledged": verdict.acknowledged,
        "wrong_runs": verdict.wrong,
        "lost_what": verdict.lost,
        "surprises": dict(trial.surprises),
        "seed": seed,
        "seconds": trial.seconds,
        "machine": {"processor": processor(), "cores": os.cpu_count()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the schedule")
    parser.add_argument("--faults", type=int, help="how many; by default 230")
    parser.add_argument("--quick", action="store_true", help="30 faults if not told otherwise; nothing is written")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="an empty folder, which is left with all logs")
    told = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # after disks and namespaces are put back
    with tempfile.TemporaryDirectory(prefix="cohortium-chaos-") as name:
        folder = told.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        found = report(tried(folder, told.seed, told.faults or (30 if told.quick else 230)), told.seed)
    print(json.dumps(found, indent=1))
    if not told.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"chaos: faults={found['faults']} wrong={found['wrong']} lost={found['lost']} "
        f"takeover_p95_s={found['takeover_p95_s']:.2f} availability={found['availability']:.4f}"
    )


if __name__ == "__main__":
    main()
