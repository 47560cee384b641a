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

    Any figure here but `minimum` makes differential privacy necessary: without it epsilon is infinite, and above every
    figure.

    Attributes:
        required: whether a study must have differential privacy.
        epsilon, delta: the most that one study may ask for.
        units: the privacy units that protect enough. A record is not among them unless listed: where a patient has
            several, the others give him away. With one record for each patient it is as good as a patient.
        patient: the column that names patients. A study with differential privacy that names them by another one is
            refused: each encounter or insurance number would have a budget of its own.
        budget: what all studies together may learn of one patient; None: the ledger counts, and refuses nobody.
        colluding: for how many hospitals that tell others their noise a study must allow at least.
        sites_per_patient: for how many hospitals at which one patient may be a study must allow at least.
        minimum: the least number of patients that a study must ask of a site, at least. That a site has fewer is told
            exactly, whatever epsilon is, so this holds for studies without differential privacy too.
    """

    required: bool = False
    epsilon: float | None = None
    delta: float | None = None
    units: tuple[Unit, ...] = ("patient", "site")
    patient: str | None = None
    budget: Budget | None = None
    colluding: int | None = None
    sites_per_patient: int | None = None
    minimum: int | None = None

    @property
    def needs_privacy(self) -> bool:
        """Whether a study without differential privacy is refused."""
        figures = (self.epsilon, self.delta, self.budget, self.colluding, self.sites_per_patient)
        return self.required or any(figure is not None for figure in figures)

    def admit(self, study: Study) -> None:
        """Checks what a study asks for. Whether its patients can pay for it is for the ledger to say.

        Raises:
            PolicyRefused: it asks for more than the policy allows; the sentence may be sent to others.
        """
        asked, least = study.privacy, study.cohort.minimum
        if self.needs_privacy and (asked.epsilon is None or asked.delta is None):
            raise _refused(f"it has no differential privacy, and this site's policy {self._demand()}")
        if self.minimum is not None and least < self.minimum:
            raise _refused(
                f"its least number of patients at a site (cohort.minimum) is {least}, and this site's policy asks "
                f"for at least {self.minimum}"
            )
        if asked.epsilon is not None and asked.delta is not None:
            self._admit_private(study, asked.epsilon, asked.delta)

    def _admit_private(self, study: Study, epsilon: float, delta: float) -> None:
        asked = study.privacy
        single = asked.unit == "record" and study.cohort.records == "one"
        if asked.unit not in self.units and not (single and "patient" in self.units):
            raise _refused(
                f"its privacy unit is '{asked.unit}', and this site's policy accepts {' or '.join(self.units)}"
            )
        if self.epsilon is not None and epsilon > self.epsilon:
            raise _refused(f"it asks for epsilon {epsilon:g}, and this site's policy allows a study {self.epsilon:g}")
        if self.delta is not None and delta > self.delta:
            raise _refused(f"it asks for delta {delta:g}, and this site's policy allows a study {self.delta:g}")
        if self.patient is not None and study.cohort.patient != self.patient:
            raise _refused(
                f"it names patients by column '{study.cohort.patient}', and this site's policy by '{self.patient}'"
            )
        if self.colluding is not None and asked.colluding < self.colluding:
            raise _refused(
                f"it allows for {asked.colluding} colluding {_hospitals(asked.colluding)} (privacy.colluding), and "
                f"this site's policy asks for at least {self.colluding}"
            )
        if self.sites_per_patient is not None and asked.sites_per_patient < self.sites_per_patient:
            raise _refused(
                f"it allows for a patient at {asked.sites_per_patient} {_hospitals(asked.sites_per_patient)} "
                f"(privacy.sites_per_patient), and this site's policy asks for at least {self.sites_per_patient}"
            )

    def _demand(self) -> str:
        if self.epsilon is not None:
            return f"allows a study epsilon {self.epsilon:g}"
        if self.delta is not None:
            return f"allows a study delta {self.delta:g}"
        if self.budget is not None:
            return f"gives each patient a budget of epsilon {self.budget.epsilon:g} over all studies"
        if self.colluding is not None:
            return f"asks for noise in spite of {self.colluding} colluding {_hospitals(self.colluding)}"
        if self.sites_per_patient is not None:
            return f"asks for noise for a patient at {self.sites_per_patient} {_hospitals(self.sites_per_patient)}"
        return "requires it"


def _hospitals(number: int) -> str:
    return "hospital" if number == 1 else "hospitals"


def _refused(reason: str) -> PolicyRefused:
    return PolicyRefused(f"the study was refused: {reason}; only the site's steward can change that (policy.yaml)")
