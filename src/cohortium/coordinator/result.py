"""What a run leaves behind."""

from dataclasses import dataclass

from cohortium.core.study import Study
from cohortium.learning.descriptive import Summary
from cohortium.learning.model import GlobalModel


@dataclass(frozen=True)
class RoundRecord:
    """One round as it went.

    Attributes:
        survivors: the sites in the sum.
        values: numbers that each site sent.
        bytes_up, bytes_down: bytes of all sites' messages to the coordinator, and of its messages to them.
        seconds: wall time.
        objective: the algorithm's objective, if it has one.
    """

    number: int
    survivors: tuple[str, ...]
    values: int
    bytes_up: int
    bytes_down: int
    seconds: float
    objective: float | None


@dataclass(frozen=True)
class Result:
    """A finished run: its outcome and how it came about.

    Attributes:
        run: the run's name.
        outcome: a model that predicts, or a summary for descriptive statistics.
        rounds: one record a round.
        bytes_setup: bytes of all messages before the first round and after the last.
        seed: the seed of a simulation.
    """

    study: Study
    study_id: str
    run: str
    outcome: GlobalModel | Summary
    rounds: tuple[RoundRecord, ...]
    bytes_setup: int
    seed: int | None = None

    @property
    def model(self) -> GlobalModel:
        """The fitted model.

        Raises:
            AttributeError: the study was descriptive; its outcome is a `Summary`.
        """
        if isinstance(self.outcome, Summary):
            raise AttributeError("a descriptive study has a summary and no model: see result.outcome")
        return self.outcome
