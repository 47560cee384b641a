"""Membership inference: it finds whom an overfitted model has seen, and what differential privacy lets it find."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from cohortium import bootstrap
from cohortium.core.errors import StudyError
from cohortium.core.events import Gaussian, Repeated, Sampled
from cohortium.core.features import BinaryTarget, Number, NumberTarget, Target
from cohortium.core.models import Descriptive, Penalty, Regression
from cohortium.core.protection import Privacy
from cohortium.core.random import Randomness
from cohortium.core.study import Cohort, Purpose, Sites, Study
from cohortium.core.training import Descent, Newton, Training
from cohortium.engines.membership import RATES, Evidence, gather, judged, most_found
from cohortium.learning.model import GlobalModel
from cohortium.plan import compile_study
from cohortium.privacy.accountant import delta, epsilon

SITES = ("north", "south", "west")
FEATURES = {f"x{number:02d}": Number(unit="1", range=(-5, 5)) for number in range(12)}
NUMBER = NumberTarget(name="y", unit="1", range=(-50, 50))


def frames(rows: int, target: Target, records: int = 1) -> dict[str, Any]:
    generator = np.random.default_rng(5)
    made = {}
    for site in SITES:
        columns = {name: np.clip(generator.normal(size=rows), -5, 5) for name in FEATURES}
        # nothing but noise: whatever a model knows of an outcome, it has seen
        y = generator.normal(scale=3, size=rows)
        outcome = y.clip(-50, 50) if isinstance(target, NumberTarget) else (y > 0).astype(int)
        identifiers = [f"p{row // records}" for row in range(rows)]
        made[site] = pl.DataFrame({"id": identifiers, **columns, "y": outcome})
    return made


def study(target: Target, training: Training, *, records: str = "one", l2: float = 0.0, **privacy: Any) -> Study:
    return Study(
        name="noise",
        purpose=Purpose(summary="nothing to learn"),
        sites=Sites(include=SITES),
        cohort=Cohort(
            dataset="d",
            patient="id",
            features=dict(FEATURES),
            target=target,
            records=records,  # type: ignore[arg-type]
            maximum=1000,
        ),
        model=Regression(kind="linear" if isinstance(target, NumberTarget) else "logistic", penalty=Penalty(l2=l2)),
        training=training,
        privacy=Privacy(unit="patient", **privacy),
    )


def evidence(of: Study, data: Mapping[str, Any], shadows: int = 16) -> Evidence:
    def federate(half: Study, sources: Mapping[str, Any]) -> GlobalModel:
        return bootstrap.simulate(half, sources, seed=2).model

    sources = {name: bootstrap.source_of(frame) for name, frame in data.items()}
    return gather(compile_study(of), sources, federate, shadows, Randomness.of_seed(7))


@pytest.mark.parametrize(
    ("target", "training"),
    [(BinaryTarget(name="y"), Newton()), (NUMBER, Newton())],
    ids=["binary", "number"],
)
def test_an_overfitted_model_gives_its_patients_away(target: Target, training: Training) -> None:
    overfitted = study(target, training, l2=0.1)
    found = judged(compile_study(overfitted), evidence(overfitted, frames(30, target), 64), 0.95)
    assert found.auc > 0.6 and found.auc_low > 0.5
    assert found.epsilon is None and found.most is None and found.bound is None and found.verdict == "consistent"
    assert found.patients == 90 and found.shadows == 64


def test_noise_hides_them() -> None:
    training = Descent(rounds=5, learning_rate=1.0, clip=1.0)
    private = study(BinaryTarget(name="y"), training, epsilon=0.5, delta=1e-5)
    found = judged(compile_study(private), evidence(private, frames(200, BinaryTarget(name="y"))), 0.95)
    # five standard errors of an AUC over 600 patients, whose scores tell next to nothing
    assert abs(found.auc - 0.5) < 5 * (1 / 12 / 300 * 2) ** 0.5
    assert found.verdict == "consistent" and found.lower <= 0.5
    assert found.most is not None and found.bound is not None and found.fpr < found.most < 0.02


def test_shadows_come_in_pairs_that_share_out_the_patients_and_the_target_is_a_coin() -> None:
    training = Descent(rounds=2, learning_rate=1.0, clip=1.0)
    private = study(BinaryTarget(name="y"), training, records="several", epsilon=1.0, delta=1e-5)
    found = evidence(private, frames(120, BinaryTarget(name="y"), records=2), 6)
    assert found.members.shape == (180,) and found.released.shape == (180,) and found.shadows.shape == (6, 180)
    assert np.array_equal(found.shadow_members[::2], ~found.shadow_members[1::2])
    assert (found.shadow_members.sum(axis=0) == 3).all()
    assert stats.binomtest(int(found.members.sum()), 180).pvalue > 1e-6
    assert np.isfinite(found.released).all() and np.isfinite(found.shadows).all()
    assert len({row.tobytes() for row in found.shadows}) == 6


def test_what_a_promise_admits_is_the_gaussians_trade_off_and_within_every_epsilon() -> None:
    plain = (Repeated(4, Gaussian(2.0)),)
    most = most_found(plain, RATES)
    assert (np.diff(most) >= 0).all() and (most >= RATES).all() and most[-1] == 1
    for claimed in (0.1, 1.0, 3.0):
        assert (most <= np.exp(claimed) * RATES + delta(plain, claimed) + 1e-9).all()
    sampled = (Repeated(50, Sampled(0.1, Gaussian(1.0))),)
    most, claimed = most_found(sampled, RATES), epsilon(sampled, 1e-5)
    assert (np.diff(most) >= 0).all() and (most >= RATES).all()
    assert (most <= most_found((Repeated(50, Gaussian(1.0)),), RATES)).all()
    assert most[100] < np.exp(claimed) * RATES[100] + 1e-5


def test_an_audit_that_cannot_be_made_is_refused_before_anything_runs() -> None:
    of, data = study(NUMBER, Newton()), frames(20, NUMBER)
    for settings, reason in (
        ({"shadows": 5}, "even number"),
        ({"shadows": 2}, "even number"),
        ({"canaries": 3}, "canaries"),
        ({"confidence": 1.0}, "confidence"),
    ):
        with pytest.raises(StudyError, match=reason):
            bootstrap.audit_privacy(of, data, seed=1, **settings)  # type: ignore[arg-type]
    nothing = bootstrap.descriptive(of)
    assert isinstance(nothing.model, Descriptive)
    with pytest.raises(StudyError, match="nothing to attack"):
        bootstrap.audit_privacy(nothing, data, seed=1)


def test_each_test_is_passed_over_with_a_sentence_where_it_has_no_use() -> None:
    open_study = study(NUMBER, Newton(), l2=1.0)
    found = bootstrap.audit_privacy(open_study, frames(40, NUMBER), seed=1, shadows=4)
    assert found.canaries is None and found.membership is not None and "no differential privacy" in found.passed_over[0]
    training = Descent(rounds=2, learning_rate=1.0, clip=1.0)
    described = bootstrap.descriptive(study(NUMBER, training, epsilon=1.0, delta=1e-5))
    found = bootstrap.audit_privacy(described, frames(40, NUMBER), seed=1, canaries=100)
    assert found.membership is None and found.canaries is not None and "no model" in found.passed_over[0]


@pytest.mark.slow
def test_processes_find_what_one_finds() -> None:
    training = Descent(rounds=2, learning_rate=1.0, clip=1.0)
    private, data = study(NUMBER, training, epsilon=1.0, delta=1e-5), frames(40, NUMBER)
    steps: list[tuple[int, int, str]] = []
    alone, spread = (
        bootstrap.audit_privacy(
            private, data, seed=1, canaries=20, shadows=4, jobs=jobs, progress=lambda *step: steps.append(step)
        )
        for jobs in (1, 2)
    )
    assert alone == spread
    assert [done for done, _, _ in steps] == 2 * list(range(1, 3 + 1 + 4 + 1)) and steps[-1][0] == steps[-1][1]
