"""What a site's policy admits, and how it says no."""

from dataclasses import replace
from typing import Any

import pytest

from cohortium.bootstrap import load_example
from cohortium.core.errors import PolicyRefused
from cohortium.core.protection import Privacy
from cohortium.core.study import Study
from cohortium.privacy.calibrate import Budget
from cohortium.site.policy import PrivacyPolicy


def study(
    unit: Any = "patient",
    epsilon: float | None = 1.0,
    delta: float | None = 1e-5,
    records: Any = "one",
    patient: str = "patient_id",
    minimum: int = 20,
    **privacy: Any,
) -> Study:
    example = load_example()
    cohort = replace(example.cohort, records=records, patient=patient, minimum=minimum)
    return replace(example, cohort=cohort, privacy=Privacy(unit=unit, epsilon=epsilon, delta=delta, **privacy))


OPEN = study(epsilon=None, delta=None)


@pytest.mark.parametrize(
    ("policy", "asked"),
    [
        (PrivacyPolicy(), OPEN),
        (PrivacyPolicy(), study()),
        (PrivacyPolicy(required=True), study(epsilon=900.0)),
        (PrivacyPolicy(epsilon=1.0, delta=1e-5), study()),
        (PrivacyPolicy(), study(unit="site")),
        (PrivacyPolicy(), study(unit="record")),
        (PrivacyPolicy(units=("patient",)), study(unit="record")),
        (PrivacyPolicy(units=("record",)), study(unit="record", records="several")),
        (PrivacyPolicy(budget=Budget(0.1, 1e-9)), study(epsilon=900.0)),
        (PrivacyPolicy(patient="patient_id"), study()),
        (PrivacyPolicy(patient="patient_id"), study(epsilon=None, delta=None, patient="encounter")),
        (PrivacyPolicy(colluding=2), study(colluding=2)),
        (PrivacyPolicy(colluding=0), study(colluding=1)),
        (PrivacyPolicy(sites_per_patient=2), study(sites_per_patient=3)),
        (PrivacyPolicy(minimum=20), study()),
        (PrivacyPolicy(minimum=20), OPEN),
    ],
)
def test_admitted(policy: PrivacyPolicy, asked: Study) -> None:
    policy.admit(asked)


@pytest.mark.parametrize(
    ("policy", "asked", "reason"),
    [
        (PrivacyPolicy(required=True), OPEN, "it has no differential privacy, and this site's policy requires it"),
        (PrivacyPolicy(epsilon=2.0), OPEN, "it has no differential privacy, and .* allows a study epsilon 2"),
        (PrivacyPolicy(delta=1e-6), OPEN, "it has no differential privacy, and .* allows a study delta 1e-06"),
        (PrivacyPolicy(budget=Budget(3, 1e-5)), OPEN, "gives each patient a budget of epsilon 3 over all studies"),
        (PrivacyPolicy(epsilon=0.5), study(), "it asks for epsilon 1, and this site's policy allows a study 0.5"),
        (PrivacyPolicy(delta=1e-6), study(), "it asks for delta 1e-05, and this site's policy allows a study 1e-06"),
        (PrivacyPolicy(), study(unit="record", records="several"), "unit is 'record', and .* accepts patient or site"),
        (PrivacyPolicy(units=("site",)), study(), "unit is 'patient', and this site's policy accepts site"),
        (PrivacyPolicy(units=("site",)), study(unit="record"), "unit is 'record', and this site's policy accepts site"),
        (
            PrivacyPolicy(units=("patient",)),
            study(unit="site"),
            "unit is 'site', and this site's policy accepts patient",
        ),
        (
            PrivacyPolicy(patient="patient_id"),
            study(patient="encounter"),
            "it names patients by column 'encounter', and this site's policy by 'patient_id'",
        ),
        (
            PrivacyPolicy(patient="patient_id"),
            study(unit="site", patient="row"),
            "by column 'row', and .* 'patient_id'",
        ),
        (PrivacyPolicy(patient="patient_id"), study(unit="record", patient="row"), "by column 'row'"),
        (
            PrivacyPolicy(colluding=2),
            study(),
            r"it allows for 1 colluding hospital \(privacy.colluding\), and this site's policy asks for at least 2",
        ),
        (PrivacyPolicy(colluding=1), study(colluding=0), "it allows for 0 colluding hospitals .* at least 1"),
        (PrivacyPolicy(colluding=1), OPEN, "it has no differential privacy, and .* in spite of 1 colluding hospital;"),
        (
            PrivacyPolicy(sites_per_patient=3),
            study(sites_per_patient=2),
            r"for a patient at 2 hospitals \(privacy.sites_per_patient\), and this site's policy asks for at least 3",
        ),
        (PrivacyPolicy(sites_per_patient=2), study(unit="site"), "for a patient at 1 hospital .* at least 2"),
        (PrivacyPolicy(sites_per_patient=2), OPEN, "it has no differential privacy, and .* for a patient at 2 hospit"),
        (
            PrivacyPolicy(minimum=21),
            study(),
            r"patients at a site \(cohort.minimum\) is 20, and this site's policy asks for at least 21",
        ),
        (PrivacyPolicy(minimum=21), OPEN, r"\(cohort.minimum\) is 20, and this site's policy asks for at least 21"),
    ],
)
def test_refused_in_one_sentence(policy: PrivacyPolicy, asked: Study, reason: str) -> None:
    with pytest.raises(PolicyRefused, match=reason) as caught:
        policy.admit(asked)
    text = str(caught.value)
    assert text.startswith("the study was refused: ")
    assert text.endswith("; only the site's steward can change that (policy.yaml)")
    assert caught.value.exit_code == 3
