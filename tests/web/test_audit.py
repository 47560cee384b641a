"""An audit in words and as a picture."""

from dataclasses import replace
from typing import Any

import pytest

from cohortium import bootstrap
from cohortium.coordinator.audit import Audit, CanaryTest, Curve, MembershipTest, as_json, sentences
from cohortium.web.audit import picture, section

CANARIES = CanaryTest(
    epsilon=1.0,
    delta=1e-5,
    confidence=0.95,
    lower=0.24,
    canaries=6,
    guesses=4,
    right=3,
    rounds=41,
    carriers=9,
    lost=("a",),
    colluding=("b", "c"),
    noise=1.002,
    noise_low=0.98,
    noise_high=1.02,
    included=(0.1, 0.5, 0.9),
    left_out=(-0.2, 0.3, -0.8),
)
MEMBERSHIP = MembershipTest(
    epsilon=1.0,
    delta=1e-5,
    confidence=0.95,
    lower=0.0,
    patients=1000,
    members=480,
    shadows=32,
    auc=0.51,
    auc_low=0.48,
    auc_high=0.54,
    fpr=0.01,
    tpr=0.012,
    tpr_low=0.004,
    tpr_high=0.027,
    most=0.02,
    roc=Curve((0.001, 0.01, 0.1, 1.0), (0.0, 0.012, 0.11, 1.0)),
    bound=Curve((0.001, 0.01, 0.1, 1.0), (0.003, 0.02, 0.16, 1.0)),
)
OPEN = replace(MEMBERSHIP, epsilon=None, most=None, bound=None)


def audit(canaries: CanaryTest | None = CANARIES, membership: MembershipTest | None = MEMBERSHIP) -> Audit:
    return Audit(bootstrap.load_example(), "sha256:0", 7, canaries, membership, ("A *reason*.",))


def test_words_never_say_that_a_promise_is_proved() -> None:
    said = " ".join(sentences(audit()))
    assert "consistent with the promised 1, and proves nothing" in said and "FAILED" not in said
    assert "with a lost in every round and the noise of b, c known to the guesser" in said
    assert audit().verdict == "consistent"


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"lower": 1.01}, "more than the promised 1"), ({"noise": 0.7, "noise_high": 0.72}, "0.700 of what the promise")],
)
def test_either_figure_of_the_canaries_fails_an_audit(changed: dict[str, Any], why: str) -> None:
    failed = audit(replace(CANARIES, **changed))
    assert failed.verdict == "failed" and as_json(failed)["canaries"]["verdict"] == "failed"
    said = " ".join(sentences(failed))
    assert "FAILED" in said and why in said
    assert section(failed).count("| FAILED |") == 1


def test_an_attack_on_the_model_fails_an_audit_only_where_something_is_promised() -> None:
    assert audit(membership=replace(MEMBERSHIP, lower=1.5)).verdict == "failed"
    bare = audit(None, replace(OPEN, lower=9.0))
    assert bare.verdict == "consistent" and "nothing bounds" in " ".join(sentences(bare))


def test_the_cards_section_is_a_table_and_plain_sentences() -> None:
    lines = section(audit()).splitlines()
    assert lines[0] == "## Attack results"
    assert {line.count("|") for line in lines if line.startswith("|")} == {5}
    assert lines[-1] == "- A \\*reason\\*."


@pytest.mark.parametrize("found", [audit(), audit(membership=None), audit(None), audit(None, OPEN)])
def test_equal_audits_give_equal_pictures(found: Audit) -> None:
    drawn = picture(found)
    assert drawn.startswith(b"\x89PNG") and drawn == picture(found)
