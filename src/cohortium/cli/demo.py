"""`cohortium demo`: the records of four real hospitals, each with an agent of its own, and one model."""

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cohortium import bootstrap
from cohortium.cli.output import Json, Output, Quiet
from cohortium.cli.results import show_comparison, show_outcome, show_sample
from cohortium.cli.run import fetched
from cohortium.cli.study import compared
from cohortium.coordinator.ports import Terms
from cohortium.coordinator.result import Result, headline
from cohortium.coordinator.result import as_json as result_json
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
    """Let four hospitals' agents learn one heart-disease model together, over a network on this machine.

    A coordinator, its database, and an agent for each hospital run as processes of their own and speak over mutual TLS.
    They end with the demo.
    """
    output = Output(as_json, quiet)
    study, sites = bootstrap.load_example(), bootstrap.example_sites()
    plan = compile_study(study)
    output.say(f"{study.name} v{study.version}: {study.purpose.summary}")
    output.pairs(protection(plan))
    result = _over_a_network(study, sites, seed, output)
    simulated = bootstrap.simulate(study, sites, seed=seed, keep_sample=True)
    same = simulated.model.to_bytes() == result.model.to_bytes()
    comparison = compared(study, sites, seed, folds, output)
    show_outcome(output, result, comparison)
    content = result_json(result, comparison) | {"same_as_simulated": same}
    if network and importlib.util.find_spec("torch"):
        small = small_network(study)
        of_network = compared(small, sites, seed, folds, output)
        show_comparison(output, of_network, "small network")
        content["network"] = {model: mean_auc(of_network, model) for model in ("federated", "alone", "pooled")}
    elif network:
        output.say("A small network is trained too where PyTorch is installed: pip install 'cohortium[torch]'")
    if simulated.simulated and simulated.simulated.sample:
        show_sample(output, simulated.simulated.sample)
    output.say(f"A simulation with the same seed gives {'the same bits' if same else 'other bits, and should not'}.")
    output.say(headline(result, comparison))
    written = bootstrap.write_result(result, out, comparison)
    output.say(f"Wrote {', '.join(str(path) for path in written)}")
    output.result(content | {"files": [str(path) for path in written]})


def _over_a_network(study: Study, sites: Mapping[str, Path], seed: int, output: Output) -> Result:
    """Runs a study over a consortium of processes that are started for it."""
    with tempfile.TemporaryDirectory(prefix="cohortium-demo-") as folder:
        with output.bar("starting a coordinator and four agents") as bar:
            fleet = bootstrap.begin_loopback(Path(folder) / "fleet", sites, study.cohort.dataset, bar.step)
        with fleet, fleet.connect() as connection:
            who = ", ".join(f"{name} (process {agent.pid})" for name, agent in fleet.agents.items())
            output.say(f"A coordinator at {fleet.addresses[0]}, and agents over mutual TLS: {who}")
            fleet.approve(study)
            handle = connection.submit(study, seed=seed, terms=Terms(patience=120))
            return fetched(handle, output)


def small_network(study: Study) -> Study:
    """Returns the study with a network of one hidden layer, trained by FedAdam."""
    training = Averaging(
        rounds=15,
        local=Local(steps=20, batch_size=32, learning_rate=0.05),
        server=Server(optimiser="adam", learning_rate=0.03),
    )
    return replace(study, name=f"{study.name}-network", model=Network(hidden=(8,)), training=training)
