"""What a run leaves behind."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cohortium.core.document import document
from cohortium.core.study import Study
from cohortium.guarantees import Promise
from cohortium.learning.descriptive import Summary
from cohortium.learning.evaluation import Comparison, mean_auc
from cohortium.learning.model import GlobalModel
from cohortium.learning.network import NetworkFit


@dataclass(frozen=True)
class RoundRecord:
    """One round as it went.

    Attributes:
        survivors: the sites in the sum.
        values: numbers that each site sent.
        bytes_up, bytes_down: bytes of all sites' messages to the coordinator, and of its messages to them.
        seconds: wall time.
        objective: the algorithm's objective, if it has one.
        selected: the sites that were asked; empty where all were.
    """

    number: int
    survivors: tuple[str, ...]
    values: int
    bytes_up: int
    bytes_down: int
    seconds: float
    objective: float | None
    selected: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One hospital's vector in one round, before and after masking. Only a simulation can see both.

    Attributes:
        site: the hospital.
        round: number of the round, from 1.
        bits: sums are taken modulo 2 to this power.
        names: the statistic that each entry belongs to.
        plain: the quantised statistics, as residues or as signed integers.
        masked: the residues that left the hospital.
    """

    site: str
    round: int
    bits: int
    names: tuple[str, ...]
    plain: tuple[int, ...]
    masked: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.plain) == len(self.masked) > 0:
            raise ValueError("a wire sample needs a name, a plain and a masked integer for each entry, at least one")


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What only a simulation knows: everything was in one process.

    Attributes:
        patients: how many each site brought.
        sample: one site's vector before and after masking, if it was asked for: it shows that site's own sums.
    """

    seed: int
    patients: Mapping[str, int]
    sample: Sample | None = None


@dataclass(frozen=True)
class Result:
    """A finished run: its outcome and how it came about.

    Attributes:
        run: the run's name.
        outcome: a model that predicts, or a summary for descriptive statistics.
        rounds: one record a round.
        bytes_setup: bytes of all messages before the first round and after the last.
        privacy: the differential privacy that was promised and accounted for; None without it.
        simulated: present if the run was simulated.
    """

    study: Study
    study_id: str
    run: str
    outcome: GlobalModel | Summary
    rounds: tuple[RoundRecord, ...]
    bytes_setup: int
    privacy: Promise | None = None
    simulated: Simulated | None = None

    @property
    def model(self) -> GlobalModel:
        """The fitted model.

        Raises:
            AttributeError: the study was descriptive; its outcome is a `Summary`.
        """
        if isinstance(self.outcome, Summary):
            raise AttributeError("a descriptive study has a summary and no model: see result.outcome")
        return self.outcome


def losses(result: Result) -> tuple[str, ...]:
    """Returns a sentence, without its full stop, for each round that lost a site."""
    told = []
    for record in result.rounds:
        lost = sorted(set(record.selected or result.study.sites.include) - set(record.survivors))
        if lost:
            told.append(f"Round {record.number} is the sum without {', '.join(lost)}")
    return tuple(told)


def headline(result: Result, comparison: tuple[Comparison, ...]) -> str:
    """Returns in one sentence what a run achieved."""
    who = f"{len(result.study.sites.include)} hospitals"
    if result.simulated:
        who += f" with {sum(result.simulated.patients.values()):,} patients"
    if isinstance(result.outcome, Summary):
        return f"{who} described their cohort together, and no record left its hospital."
    together, alone = mean_auc(comparison, "federated"), mean_auc(comparison, "alone")
    if together is None or alone is None:
        return f"{who} fitted one model together, and no record left its hospital."
    versus = "against" if together > alone else "and not better than"
    return (
        f"{who} fitted one model together, and no record left its hospital: on held-out patients its mean AUC is "
        f"{together:.3f}, {versus} {alone:.3f} for what each hospital can fit alone."
    )


SEED_TELLS = "whoever knows a simulation's seed can take its noise away, so its result is as secret as its data"


def _record(record: RoundRecord) -> dict[str, Any]:
    content = asdict(record)
    if not record.selected:
        del content["selected"]
    return content


def _privacy(result: Result) -> dict[str, Any] | None:
    if result.privacy is None:
        return None
    simulated = {"holds": False, "because": SEED_TELLS} if result.simulated else {"holds": True}
    return asdict(result.privacy) | simulated


def as_json(result: Result, comparison: Sequence[Comparison] = ()) -> dict[str, Any]:
    """Returns what a program wants to know of a run, as plain JSON values; a network's weights are left out."""
    outcome = result.outcome
    content: dict[str, Any] = {
        "study_id": result.study_id,
        "run": result.run,
        "study": document(result.study),
        "rounds": [_record(record) for record in result.rounds],
        "bytes_setup": result.bytes_setup,
        "privacy": _privacy(result),
    }
    if isinstance(outcome, Summary):
        content["summary"] = asdict(outcome)
    else:
        fit = outcome.fit
        content["fit"] = {"kind": "network", "loss": fit.loss} if isinstance(fit, NetworkFit) else asdict(fit)
    if result.simulated:
        content["seed"] = result.simulated.seed
        content["patients"] = dict(result.simulated.patients)
        content["sample"] = asdict(result.simulated.sample) if result.simulated.sample else None
    if comparison:
        content["comparison"] = {
            row.site: {model: asdict(evaluation) for model, evaluation in row.models.items()} for row in comparison
        }
    return content
