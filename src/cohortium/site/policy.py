"""What a site's steward allows a study to ask for in privacy, before any data are read for it."""

from dataclasses import dataclass
from typing import Literal

from cohortium.core.errors import PolicyRefused
from cohortium.core.study import Study
from cohortium.privacy.calibrate import Budget

Unit = Literal["patient", "record", "site"]


@dataclass(frozen=True, kw_only=True)
class PrivacyPolicy:
    """A site's rules for studies, and the budget of its patients. The empty policy limits nothing.

    Any figure here makes differential privacy necessary: without it epsilon is infinite, and above every figure.

    Attributes:
        required: whether a study must have differential privacy.
        epsilon, delta: the most that one study may ask for.
        units: the privacy units that protect enough. A record is not among them unless listed: where a patient has
            several, the others give him away. With one record for each patient it is as good as a patient.
        budget: what all studies together may learn of one patient; None: the ledger counts, and refuses nobody.
    """

    required: bool = False
    epsilon: float | None = None
    delta: float | None = None
    units: tuple[Unit, ...] = ("patient", "site")
    budget: Budget | None = None

    @property
    def needs_privacy(self) -> bool:
        """Whether a study without differential privacy is refused."""
        return self.required or (self.epsilon, self.delta, self.budget) != (None, None, None)

    def admit(self, study: Study) -> None:
        """Checks what a study asks for. Whether its patients can pay for it is for the ledger to say.

        Raises:
            PolicyRefused: it asks for more than the policy allows; the sentence may be sent to others.
        """
        asked = study.privacy
        if asked.epsilon is None or asked.delta is None:
            if self.needs_privacy:
                raise _refused(f"it has no differential privacy, and this site's policy {self._demand()}")
            return
        single = asked.unit == "record" and study.cohort.records == "one"
        if asked.unit not in self.units and not (single and "patient" in self.units):
            raise _refused(
                f"its privacy unit is '{asked.unit}', and this site's policy accepts {' or '.join(self.units)}"
            )
        if self.epsilon is not None and asked.epsilon > self.epsilon:
            raise _refused(
                f"it asks for epsilon {asked.epsilon:g}, and this site's policy allows a study {self.epsilon:g}"
            )
        if self.delta is not None and asked.delta > self.delta:
            raise _refused(f"it asks for delta {asked.delta:g}, and this site's policy allows a study {self.delta:g}")

    def _demand(self) -> str:
        if self.epsilon is not None:
            return f"allows a study epsilon {self.epsilon:g}"
        if self.delta is not None:
            return f"allows a study delta {self.delta:g}"
        if self.budget is not None:
            return f"gives each patient a budget of epsilon {self.budget.epsilon:g} over all studies"
        return "requires it"


def _refused(reason: str) -> PolicyRefused:
    return PolicyRefused(f"the study was refused: {reason}; only the site's steward can change that (policy.yaml)")
