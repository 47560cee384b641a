"""What an audit of a study's privacy leaves behind: figures, and what they mean in words."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cohortium.core.study import Study

Verdict = Literal["consistent", "failed"]
"""Whether what was measured can be true of a study that keeps its promise. There is no "proved"."""


@dataclass(frozen=True)
class CanaryTest:
    """What a guesser made of a run of canaries (`cohortium.engines.audit`).

    Attributes:
        epsilon, delta: what the study promises.
        confidence: the probability with which `lower` is no larger than the true epsilon.
        lower: the lower bound on epsilon at `delta`.
        canaries: how many there were.
        guesses, right: of how many the guesser said whether they took part, and of how many rightly.
        rounds: rounds of the run, preprocessing included.
        carriers: hospitals whose noise hid the canaries.
        lost: hospitals whose answers were lost in every round.
        colluding: hospitals that gave their noise away.
        noise, noise_low, noise_high: the deviation of the noise in the sums, relative to what is promised, with an
            interval that misses it once in a million audits.
        included, left_out: the scores of canaries that took part and of those that did not.
    """

    epsilon: float
    delta: float
    confidence: float
    lower: float
    canaries: int
    guesses: int
    right: int
    rounds: int
    carriers: int
    lost: tuple[str, ...]
    colluding: tuple[str, ...]
    noise: float
    noise_low: float
    noise_high: float
    included: tuple[float, ...] = field(repr=False)
    left_out: tuple[float, ...] = field(repr=False)

    @property
    def verdict(self) -> Verdict:
        return "failed" if self.lower > self.epsilon or self.noise_high < 1 else "consistent"


@dataclass(frozen=True)
class Curve:
    """Points of a ROC curve: an attack's false positive and true positive rates, rising."""

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]


@dataclass(frozen=True)
class MembershipTest:
    """What membership inference made of the study's model (`cohortium.engines.membership`).

    Attributes:
        epsilon: what the study promises; None where it promises nothing of single patients.
        delta, confidence, lower: of the lower bound on epsilon that the attack's own guesses give.
        patients, members: how many there were, and of how many the model was trained on.
        shadows: models that the attack was trained with.
        auc, auc_low, auc_high: area under its ROC curve with a 95% interval.
        fpr: the false positive rate at which the next figures are.
        tpr, tpr_low, tpr_high: the true positive rate there, with a 95% interval.
        most: the largest true positive rate that the study's noise admits there; None without a promise.
        roc: the curve at false positive rates that are evenly spread on a logarithmic scale.
        bound: what the noise admits at those rates; None without a promise.
    """

    epsilon: float | None
    delta: float
    confidence: float
    lower: float
    patients: int
    members: int
    shadows: int
    auc: float
    auc_low: float
    auc_high: float
    fpr: float
    tpr: float
    tpr_low: float
    tpr_high: float
    most: float | None
    roc: Curve = field(repr=False)
    bound: Curve | None = field(repr=False)

    @property
    def verdict(self) -> Verdict:
        return "failed" if self.epsilon is not None and self.lower > self.epsilon else "consistent"


@dataclass(frozen=True)
class Audit:
    """An audit of a study.

    Attributes:
        seed: all random choices follow from it.
        canaries, membership: the two tests, as far as they were made.
        passed_over: a sentence for each that was not.
    """

    study: Study
    study_id: str
    seed: int
    canaries: CanaryTest | None
    membership: MembershipTest | None
    passed_over: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """Returns "failed" if any test failed."""
        tests = [test for test in (self.canaries, self.membership) if test is not None]
        return "failed" if any(test.verdict == "failed" for test in tests) else "consistent"


def figures(audit: Audit) -> tuple[tuple[str, str, str, str], ...]:
    """Returns a row for each test: what was tried, what is claimed, what was measured, and the verdict."""
    return tuple(_rows(audit))


def sentences(audit: Audit) -> tuple[str, ...]:
    """Returns what an audit means, for people."""
    return tuple(_sentences(audit))


def as_json(audit: Audit) -> dict[str, Any]:
    """Returns an audit as plain JSON values."""
    tests = {"canaries": audit.canaries, "membership": audit.membership}
    return {
        "study_id": audit.study_id,
        "study": audit.study.name,
        "seed": audit.seed,
        "verdict": audit.verdict,
        **{name: None if test is None else {"verdict": test.verdict, **asdict(test)} for name, test in tests.items()},
        "passed_over": list(audit.passed_over),
        "meaning": list(sentences(audit)),
    }


def _rows(audit: Audit) -> Iterator[tuple[str, str, str, str]]:
    if audit.canaries is not None:
        test = audit.canaries
        lower = f"at least {test.lower:.2f}"
        yield f"{test.canaries:,} canaries: epsilon", f"{test.epsilon:g}", lower, _word(test.lower > test.epsilon)
        seen = f"{test.noise:.3f} ({test.noise_low:.3f}–{test.noise_high:.3f})"
        yield "noise in the sums, of what is promised", "1", seen, _word(test.noise_high < 1)
    if audit.membership is not None:
        found = audit.membership
        claimed = "" if found.epsilon is None else f"{found.epsilon:g}"
        word = "nothing promised" if found.epsilon is None else _word(found.verdict == "failed")
        yield "membership attack: epsilon", claimed, f"at least {found.lower:.2f}", word
        area = f"{found.auc:.3f} ({found.auc_low:.3f}–{found.auc_high:.3f})"
        yield "  AUC (a coin: 0.5)", "", area, ""
        most = "" if found.most is None else f"at most {_rate(found.most)}"
        measured = f"{_rate(found.tpr)} ({_rate(found.tpr_low)}–{_rate(found.tpr_high)})"
        yield f"  found at {found.fpr:.0%} false alarms", most, measured, ""


def _sentences(audit: Audit) -> Iterator[str]:
    if audit.canaries is not None:
        yield from _about_canaries(audit.canaries)
    if audit.membership is not None:
        yield from _about_membership(audit.membership)
    yield from audit.passed_over


def _about_canaries(test: CanaryTest) -> Iterator[str]:
    rounds = "round" if test.rounds == 1 else f"{test.rounds} rounds"
    yield (
        f"{test.canaries:,} canaries, of which half took part, went through the study's own {rounds}. Of "
        f"{test.guesses:,} the guesser said which, and was right about {test.right:,}; a coin is about "
        f"{test.guesses // 2:,}. So with {test.confidence:.0%} confidence epsilon is at least {test.lower:.2f} at "
        f"delta {test.delta:g}. {_conditions(test)}"
    )
    if test.lower > test.epsilon:
        yield (
            f"FAILED: that is more than the promised {test.epsilon:g}. Of audits of a study that keeps its promise at "
            f"most {1 - test.confidence:.2g} come out so: do not run this study."
        )
    if test.noise_high < 1:
        yield (
            f"FAILED: the noise in the sums is {test.noise:.3f} of what the promise rests on, at most "
            f"{test.noise_high:.3f}: do not run this study."
        )
    if test.verdict == "consistent":
        yield (
            f"That is consistent with the promised {test.epsilon:g}, and proves nothing: a smaller fault would pass as "
            "well, and how the model computes a patient's vector before clipping is not tried."
        )


def _about_membership(test: MembershipTest) -> Iterator[str]:
    yield (
        f"With {test.shadows} shadow models, a membership attack (LiRA) on the study's model, trained on "
        f"{test.members:,} of {test.patients:,} patients, finds {_rate(test.tpr)} of them at {test.fpr:.0%} false "
        f"alarms; with {test.confidence:.0%} confidence epsilon is at least {test.lower:.2f} at delta {test.delta:g}."
    )
    if test.epsilon is None:
        yield "Nothing is promised of single patients, so nothing bounds what another attack may find."
    elif test.verdict == "failed":
        yield f"FAILED: that is more than the promised {test.epsilon:g}: do not run this study."
    else:
        yield f"That is consistent with the promised {test.epsilon:g}; another attack may find more."


def _conditions(test: CanaryTest) -> str:
    without = [f"{', '.join(test.lost)} lost in every round"] if test.lost else []
    if test.colluding:
        without.append(f"the noise of {', '.join(test.colluding)} known to the guesser")
    hid = f"The noise of {test.carriers} hospitals hid them"
    return f"{hid}, with {' and '.join(without)}: the worst that the study tolerates." if without else f"{hid}."


def _word(failed: bool) -> str:
    return "FAILED" if failed else "consistent with it"


def _rate(share: float) -> str:
    return f"{share:.1%}"
