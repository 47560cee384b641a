"""One hospital's side of small studies over the bundled records, for tests of what outlasts a crash."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cohortium.adapters.sources import FileSource
from cohortium.bootstrap import example_sites, load_example, simulated_agents, simulated_ledger
from cohortium.core.models import Network, Penalty, Regression
from cohortium.core.protection import Aggregation, Compression, Privacy
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.core.training import Averaging, Descent, Local
from cohortium.plan import Plan
from cohortium.site.agent import Agent

ROOT = Randomness.of_seed(3)


@dataclass(frozen=True)
class Kept:
    """A bundled dataset that is read once."""

    name: str
    columns: Mapping[str, Any] = field(repr=False)

    def read(self, names: Any, as_text: Any = ()) -> Mapping[str, Any]:
        return {name: self.columns[name] for name in names}

    def fingerprint(self) -> str:
        return self.name


def _kept(name: str, path: Any) -> Kept:
    header = path.read_text(encoding="utf-8").splitlines()[0].split(",")
    return Kept(name, FileSource(path).read(header))


DATA = {name: _kept(name, path) for name, path in example_sites().items()}


def study(**changes: Any) -> Study:
    model = changes.pop("model", Regression(kind="logistic", penalty=Penalty(l2=1.0)))
    return replace(load_example(), model=model, **changes)


def network(hidden: int = 4, **local_: Any) -> dict[str, Any]:
    """Returns a small network's model and training."""
    training = Averaging(rounds=3, local=Local(steps=5, batch_size=16, learning_rate=0.1, **local_))
    return {"model": Network(hidden=(hidden,)), "training": training}


STUDIES = {
    "masking": study(),
    "masking with dropouts": study(aggregation=Aggregation(dropouts=1)),
    "rlwe": study(aggregation=Aggregation(protocol="rlwe")),
    "rlwe with dropouts": study(aggregation=Aggregation(protocol="rlwe", dropouts=1)),
    "scaffold": study(**network(scaffold=True)),
    "compressed": study(aggregation=Aggregation(dropouts=1, compression=Compression(levels=8, norm=2.0)), **network()),
    "private": study(
        privacy=Privacy(unit="patient", epsilon=1.0, delta=1e-5),
        training=Descent(rounds=3, learning_rate=0.5, clip=1.0),
        aggregation=Aggregation(dropouts=1),
    ),
}


def agents_of(plan: Plan) -> dict[str, Agent]:
    agents = simulated_agents(plan, DATA, ROOT)
    for name, agent in agents.items():
        agent.ledger = simulated_ledger(ROOT.child(name)) if plan.noise else None
    return agents
