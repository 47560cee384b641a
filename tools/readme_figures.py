"""Writes the figures in README.md from benchmarks/results, with the machine that they were measured on.

    python tools/readme_figures.py

`make bench` renews the results; run this after it.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "README.md"
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
Federated averaging reproduces FLamby's published results on its Fed-Heart-Disease data (mean accuracy over four
hospitals' test patients, five seeds; {flamby["machine"]["processor"]}). After so few steps initial weights still
show: these are those of FLamby's own seeds, and other seeds move a row by up to .06.

| | Cohortium | published |
|---|---|---|
{rows}

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
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def page(text: str) -> str:
    """Returns README.md's text with its figures renewed."""
    return BETWEEN.sub(lambda found: found[1] + figures() + found[3], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
