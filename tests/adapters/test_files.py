"""Study files that were not written in good faith: one sentence, soon."""

import time

import pytest

from cohortium.adapters.files import parse_study
from cohortium.bootstrap import example_study
from cohortium.core.errors import StudyError


@pytest.mark.parametrize(
    "part", ["[", "{", "[\n", "['x',", "[']',", "[ #]\n", "{a: ", "- ", "? "], ids=lambda part: part.strip()
)
def test_deep_nesting_is_refused_at_once(part: str) -> None:
    start = time.perf_counter()
    with pytest.raises(StudyError, match="nests deeper than 32 levels"):
        parse_study(part * 4000)
    assert time.perf_counter() - start < 5


def test_brackets_in_texts_and_remarks_are_no_nesting() -> None:
    summary = "'" + "[{" * 40 + "'"
    text = example_study().replace("Angiographic coronary artery disease from routine findings", summary)
    assert parse_study(text + "# " + "[" * 40).purpose.summary == "[{" * 40


@pytest.mark.parametrize(
    "value",
    [
        "!!bool abc",
        "!!int ''",
        "!!int x",
        "!!int 1e400",
        "!!float ''",
        "!!timestamp x",
        "!!timestamp 2020-99-99",
        "!!binary x",
        "!!omap [1]",
        "!!set [1]",
        "!!map [1]",
        "!!str {a: 1}",
        "!!null x",
        "!!python/object:os.system x",
        "! x",
        "=",
        "0x" + "f" * 10_000,
        "0b2",
        "1" * 5000,
        "2020-01-01",
        "{? [1]: 2}",
        "{? {a: 1}: 2}",
        "{<<: 1}",
        ".inf",
        ".nan",
    ],
)
@pytest.mark.parametrize("key", ["study", "version", "purpose", "cohort", "nonsense"])
def test_no_value_raises_anything_else(key: str, value: str) -> None:
    for text in (f"{key}: {value}", f"{value}: 1", value):
        with pytest.raises(StudyError) as refused:
            parse_study(text)
        assert "\n" not in str(refused.value)
