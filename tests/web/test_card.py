"""The model card says what the study promises and what was measured, and nothing that Markdown would take for more."""

from dataclasses import replace

import pytest

from cohortium.bootstrap import card, example_sites, load_example, simulate
from cohortium.core.errors import StudyError
from cohortium.core.protection import Privacy
from cohortium.core.study import Purpose, Study
from cohortium.core.training import Descent
from cohortium.learning.model import GlobalModel


def model(**changes: object) -> GlobalModel:
    study = load_example()
    few = Descent(rounds=2, clip=1.0)
    study = replace(study, training=few, **changes)  # type: ignore[arg-type]
    return simulate(study, example_sites(), seed=1).model


def private() -> GlobalModel:
    return model(privacy=Privacy(unit="patient", epsilon=0.5, delta=1e-5, colluding=2))


def test_says_what_is_promised() -> None:
    text = card(private())
    for row in (
        "| unit | patient |",
        "| epsilon | 0.5 |",
        "| delta | 1e-05 |",
        "| neighbouring data | add-or-remove |",
    ):
        assert row in text
    assert "| hospitals that may be lost, and collude | 0, 2 |" in text
    assert "each hospital adds a share of integers" in text
    assert "Nobody has attacked it in an audit yet." in text


def test_says_that_nothing_is_promised() -> None:
    text = card(model())
    assert "None. What the model and the sums behind it reveal of a single patient is not bounded." in text


def test_takes_in_an_audits_section_and_nothing_else(tmp_path) -> None:  # type: ignore[no-untyped-def]
    section = tmp_path / "audit.md"
    section.write_text("## Attack results\n\n- AUC 0.50\n", encoding="utf-8")
    text = card(private(), audit=section)
    assert text.count("## Attack results") == 1 and "- AUC 0.50" in text
    section.write_text("# Something else\n", encoding="utf-8")
    with pytest.raises(StudyError, match="no section that an audit wrote"):
        card(private(), audit=section)
    with pytest.raises(StudyError, match=r"missing\.md"):
        card(private(), audit=tmp_path / "missing.md")


def test_texts_of_the_study_stay_texts() -> None:
    study: Study = load_example()
    hostile = Purpose(summary="<script>alert(1)</script> [link](http://x) `code` |")
    text = card(replace(private(), study=replace(study, purpose=hostile)))
    assert "<script>" not in text and "[link](" not in text
