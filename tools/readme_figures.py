"""Writes the figures in README.md from benchmarks/results, with the machine that they were measured on.

    python tools/readme_figures.py

`make bench` renews the results; run this after it.
"""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BETWEEN = re.compile(r"(<!-- figures: [^>]*-->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)
NAMES = {
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "scaffold": "SCAFFOLD",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedadagrad": "FedAdagrad",
    "pooled": "pooled rows",
}
PRIVATE = {
    "distributed": "logistic, noise shares under the secure sum",
    "central": "logistic, one trusted party adds the noise",
    "local": "logistic, each hospital adds all of the noise",
    "alone": "logistic, each hospital by itself (mean over hospitals)",
    "adassp": "AdaSSP in one round, noise shares",
    "network": "network of 32, noise shares",
    "network_local": "network of 32, each hospital adds all of the noise",
}
FLEET = {
    "round_15x1k_ms": ("a round of 15 sites with 1,000 values each", "{:.1f} ms"),
    "tolerant_15x1k_ms": ("the same where a site may be lost", "{:.1f} ms"),
    "round_5x10M_s": ("a round of 5 sites with 10M values each", "{:.2f} s"),
    "tolerant_5x10M_s": ("the same where a site may be lost", "{:.2f} s"),
    "overhead_s": ("a run, beside its rounds", "{:.2f} s"),
    "models_per_hour": ("small models an hour", "{:,.0f}"),
    "coordinator_mb": ("memory of the coordinator", "{:,.0f} MB"),
    "agent_mb": ("memory of a site's agent", "{:,.0f} MB"),
}


def figures() -> str:
    """Returns the figures' text."""
    engine, flamby, secagg = result("engine"), result("flamby"), result("secagg")
    rows = "\n".join(
        f"| {name} | {flamby['means'][key]:.3f} | {flamby['published'][key]:.3f} |" for key, name in NAMES.items()
    )
    return f"""
A protected round with 15 sites and 100 numbers a site takes {engine["round_15x100_ms"]:.1f} ms beyond the algorithm's
own arithmetic: messages, quantising, masks and the sum, all sites in one process ({engine["machine"]}).

{secure_sum(secagg)}
{fleet()}\
Federated averaging reproduces FLamby's published results on its Fed-Heart-Disease data (mean accuracy over four
hospitals' test patients, five seeds; {flamby["machine"]["processor"]}). After so few steps initial weights still
show: these are those of FLamby's own seeds, and other seeds move a row by up to .06.

| | Cohortium | published |
|---|---|---|
{rows}

{privacy()}"""


def fleet() -> str:
    """Returns the fleet's figures beside its peers', and what it withstood; nothing as long as none was measured."""
    parts = {"fleet": paces, "chaos": faults}
    return "".join(f"{text(result(name))}\n" for name, text in parts.items() if (RESULTS / f"{name}.json").exists())


def paces(measured: Any) -> str:
    """Returns the table of the fleet's rounds and runs beside its peers."""
    flower, nvflare = measured.get("flower", {}), measured.get("nvflare", {})
    peers = [one for one in (flower, nvflare.get("defaults", {}), nvflare.get("collab", {})) if "peer" in one]
    rows = [["", "Cohortium", *(_named(one, nvflare) for one in peers)]]
    rows.append(["protection", "mutual TLS, secure sums", *(one.get("protection", "") for one in peers)])
    for key, (what, style) in FLEET.items():
        cells = [style.format(one[key]) if one.get(key) is not None else "–" for one in (measured, *peers)]
        rows.append([what, *cells])
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    table = "\n".join([head, "|---" * len(rows[0]) + "|", *body])
    machine = measured["machine"]
    note = "\nA dash: not measured, or not reached within the bench's limits.\n" if "–" in table else ""
    return f"""\
The fleet on one machine, each site and the coordinator a process of its own ({machine["processor"]},
{machine["cores"]} cores for all). Statistics are ready-made, so what is measured is the fleet's own work. As by
default, a round needs all sites; where one may be lost, it takes three exchanges instead of one.

{table}
{note}"""


def faults(measured: Any) -> str:
    """Returns what the fleet withstood."""
    machine, runs = measured["machine"], measured["runs"]
    failed = f"{runs['failed']} failed with a reason" if runs.get("failed") else "none failed"
    text = (
        f"Under {measured['faults']} faults in {measured['seconds'] / 60:.0f} minutes (processes killed and frozen, "
        "links cut and slowed, disks slow and full, clocks that jump) "
        f"{runs.get('finished', 0)} runs finished and {failed}. Of {measured['compared']} results that were compared "
        f"with undisturbed runs over the same survivors, {measured['wrong'] or 'none'} differed; "
        f"{measured['lost'] or 'no'} contributions or runs were lost. Another coordinator went on after "
        f"{measured['takeover_p95_s']:.1f} s (95th percentile), and {100 * measured['availability']:.1f} % of requests "
        f"were answered meanwhile ({machine['processor']}, {machine['cores']} cores)."
    )
    return f"{textwrap.fill(text, 120)}\n"


def _named(peer: Any, nvflare: Any) -> str:
    way = ", collab" if peer is nvflare.get("collab") else ""
    return f"{peer['peer']}{way}"


def privacy() -> str:
    """Returns the table of AUC by epsilon and the speed of noise; nothing as long as they were not measured."""
    if not (RESULTS / "privacy.json").exists():
        return ""
    measured = result("privacy")
    rows = measured["rows"]
    epsilons = sorted({epsilon for row in rows.values() for epsilon in row}, key=float)
    header = ["epsilon", *("none" if epsilon == "inf" else epsilon for epsilon in epsilons)]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for key, name in PRIVATE.items():
        if key in rows:
            cells = [f"{rows[key][epsilon]:.3f}" if epsilon in rows[key] else "" for epsilon in epsilons]
            lines.append(f"| {' | '.join([name, *cells])} |")
    table = "\n".join(lines)
    seeds = f", mean of {measured['seeds']['flchain']} seeds, {measured['seeds']['flchain-network']} for the network"
    return f"""\
What differential privacy for patients costs on FLCHAIN, 7,874 patients dealt over 15 hospitals (AUC on held-out
patients{seeds}; delta 1e-5; up to 3 hospitals lost and 4 colluding; "none" is without noise):

{table}

{noise(measured)}"""


def noise(measured: Any) -> str:
    """Returns how fast noise is drawn, as far as it was measured."""
    drawn, peer = measured.get("draws_per_second"), measured.get("opendp_draws_per_second")
    if not drawn:
        return ""
    slowest, fastest = min(drawn.values()) / 1e6, max(drawn.values()) / 1e6
    beside = f"\nOpenDP's exact sampler, called from Python, draws {peer / 1e6:.2f} million." if peer else ""
    return f"""\
One core draws {slowest:.0f} to {fastest:.0f} million noise values a second, by their deviation
({measured["machine"]}).{beside}

"""


def secure_sum(measured: Any) -> str:
    """Returns the table of the secure sum beside its peers."""
    known, machine, tenseal = measured["figures"], measured["machine"], measured["tenseal"]
    few, many = (
        next(case for case in measured["cases"] if (case["values"], case["sites"]) == size)
        for size in ((1_000_000, 15), (10_000_000, 50))
    )
    ceiling = max(few["mask"]["aes_256_ctr_gbps"], few["mask"]["aes_256_gcm_gbps"])
    flower, other = few["flower"], tenseal["tenseal"]
    name = f"Flower {flower['version']} SecAgg+"
    table = [
        ("masks of 1M values, 15 sites", f"{known['mask_gbps']:.1f} GB/s", f"{name}: {flower['gbps']:.2f} GB/s"),
        ("masks of 10M values, 50 sites", f"{many['mask']['cpu_s']:.2f} s", f"{name}: {many['flower']['cpu_s']:.1f} s"),
        (
            "encryption of 1M values",
            f"threshold RLWE: {1000 * known['rlwe_gbps']:.0f} MB/s",
            f"TenSEAL CKKS, single key: {1000 * other['gbps']:.1f} MB/s",
        ),
        ("bytes a value, masked", f"{known['bytes_per_value']:.1f}", f"{name}: {flower['bytes_per_value']:.1f}"),
        (
            "bytes a value, encrypted",
            f"{tenseal['rlwe']['bytes_per_value']:.1f}",
            f"TenSEAL CKKS: {other['bytes_per_value']:.0f}",
        ),
    ]
    rows = "\n".join(f"| {what} | {ours} | {theirs} |" for what, ours, theirs in table)
    vector_aes = "" if machine["vaes"] else "out"
    return f"""\
The secure sum beside its peers, measured in turns on one core ({machine["processor"]}, with{vector_aes} vector
AES; AES-256 alone gives {ceiling:.1f} GB/s there). Masks count every stream that a site adds, encryption the values.

| | Cohortium | peer |
|---|---|---|
{rows}

A whole round of 15 sites with 1M values each, three of which may be lost, takes {known["round_15x1M_s"]:.2f} s beyond
training, all in one process on {machine["cores"]} cores.
"""


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def page(text: str) -> str:
    """Returns README.md's text with its figures renewed."""
    return BETWEEN.sub(lambda found: found[1] + figures() + found[3], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
