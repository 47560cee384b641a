"""`cohortium demo`: four real hospitals learn one model together."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cohortium import bootstrap
from cohortium.cli.output import Json, Output, Quiet
from cohortium.cli.results import show_comparison, show_outcome, show_sample
from cohortium.cli.study import compared
from cohortium.coordinator.result import as_json as result_json
from cohortium.coordinator.result import headline
from cohortium.core.models import Network
from cohortium.core.study import Study
from cohortium.core.training import Averaging, Local, Server
from cohortium.guarantees import protection
from cohortium.learning.evaluation import mean_auc
from cohortium.plan import compile_study


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html, result.json and model.json.")] = Path(
        "cohortium-demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of all keys and random choices.", min=0)] = 7,
    folds: Annotated[int, typer.Option(help="Held-out parts of each hospital's patients.", min=2, max=20)] = 5,
    network: Annotated[bool, typer.Option(help="Also train a small network, where PyTorch is installed.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let four real hospitals learn one heart-disease model without sharing a row, and write a report."""
    output = Output(as_json, quiet)
    study, sites = bootstrap.load_example(), bootstrap.example_sites()
    plan = compile_study(study)
    output.say(f"{study.name} v{study.version}: {study.purpose.summary}")
    output.pairs(protection(plan))
    with output.bar("rounds") as bar:
        result = bootstrap.simulate(study, sites, seed=seed, keep_sample=True, progress=bar.closed)
    comparison = compared(study, sites, seed, folds, output)
    show_outcome(output, result, comparison)
    content = result_json(result, comparison)
    if network and importlib.util.find_spec("torch"):
        small = small_network(study)
        of_network = compared(small, sites, seed, folds, output)
        show_comparison(output, of_network, "small network")
        content["network"] = {model: mean_auc(of_network, model) for model in ("federated", "alone", "pooled")}
    elif network:
        output.say("A small network is trained too where PyTorch is installed: pip install 'cohortium[torch]'")
    if result.simulated and result.simulated.sample:
        show_sample(output, result.simulated.sample)
    output.say(headline(result, comparison))
    written = bootstrap.write_result(result, out, comparison)
    output.say(f"Wrote {', '.join(str(path) for path in written)}")
    output.result(content | {"files": [str(path) for path in written]})


def small_network(study: Study) -> Study:
    """Returns the study with a network of one hidden layer, trained by FedAdam."""
    training = Averaging(
        rounds=15,
        local=Local(steps=20, batch_size=32, learning_rate=0.05),
        server=Server(optimiser="adam", learning_rate=0.03),
    )
    return replace(study, name=f"{study.name}-network", model=Network(hidden=(8,)), training=training)
