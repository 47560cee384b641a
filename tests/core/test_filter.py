"""The cohort's filter against pandas, which has Kleene's logic of its own, and everything that it must not read."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cohortium.core.errors import StudyError
from cohortium.core.features import Category, Feature, Number
from cohortium.core.filter import compile_filter

FEATURES: dict[str, Feature] = {
    "age": Number(unit="a", range=(0, 120)),
    "bmi": Number(unit="kg/m2", range=(5, 100)),
    "sex": Category(levels=("female", "male")),
    "pain": Category(levels=("typical", "atypical", "it's none", 'a "b"')),
}
NUMBERS = [name for name, feature in FEATURES.items() if isinstance(feature, Number)]
LEVELS = {name: feature.levels for name, feature in FEATURES.items() if isinstance(feature, Category)}
RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
MIRROR = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}

Expression = tuple[str, Callable[[pd.DataFrame], pd.Series]]
"""A filter's text, and what pandas makes of it: a series of nullable booleans."""

VALUES = st.sampled_from([-1.5, 0, 17, 18, 18.5, 64, 65, 1e2])


def numbers(draw: st.DrawFn) -> Expression:
    name, relation, value = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(list(RELATIONS))), draw(VALUES)
    if draw(st.booleans()):
        return f"{name} {relation} {value!r}", lambda frame: RELATIONS[relation](frame[name], value)
    return f"{value!r} {relation} {name}", lambda frame: RELATIONS[MIRROR[relation]](frame[name], value)


def between(draw: st.DrawFn) -> Expression:
    name, low, high = draw(st.sampled_from(NUMBERS)), draw(VALUES), draw(VALUES)
    first, second = draw(st.sampled_from(["<", "<=", ">", "=="])), draw(st.sampled_from(["<", "<=", "!="]))
    return (
        f"{low!r} {first} {name} {second} {high!r}",
        lambda frame: RELATIONS[MIRROR[first]](frame[name], low) & RELATIONS[second](frame[name], high),
    )


def levels(draw: st.DrawFn) -> Expression:
    name = draw(st.sampled_from(list(LEVELS)))
    relation, level = draw(st.sampled_from(["==", "!="])), draw(st.sampled_from(LEVELS[name]))
    return f"{name} {relation} {level!r}", lambda frame: RELATIONS[relation](frame[name], level)


def membership(draw: st.DrawFn) -> Expression:
    name = draw(st.sampled_from(list(FEATURES)))
    choices = st.sampled_from(LEVELS[name]) if name in LEVELS else VALUES
    values = draw(st.lists(choices, min_size=1, max_size=3))
    negated, (left, right) = draw(st.booleans()), draw(st.sampled_from(["()", "[]", "{}"]))
    listed = ", ".join(map(repr, values)) + ("," if left == "(" else "")

    def evaluate(frame: pd.DataFrame) -> pd.Series:
        inside = frame[name].isin(values).astype("boolean").mask(frame[name].isna())
        return ~inside if negated else inside

    return f"{name} {'not in' if negated else 'in'} {left}{listed}{right}", evaluate


def missing(draw: st.DrawFn) -> Expression:
    name = draw(st.sampled_from(list(FEATURES)))
    if draw(st.booleans()):
        return f"{name} is None", lambda frame: frame[name].isna().astype("boolean")
    return f"{name} is not None", lambda frame: frame[name].notna().astype("boolean")


@st.composite
def leaves(draw: st.DrawFn) -> Expression:
    return draw(st.sampled_from([numbers, between, levels, membership, missing]))(draw)


def joined(parts: list[Expression], word: str) -> Expression:
    def evaluate(frame: pd.DataFrame) -> pd.Series:
        result = parts[0][1](frame)
        for _, part in parts[1:]:
            result = result & part(frame) if word == "and" else result | part(frame)
        return result

    return "(" + f" {word} ".join(text for text, _ in parts) + ")", evaluate


EXPRESSIONS = st.recursive(
    leaves(),
    lambda inner: st.one_of(
        st.tuples(st.lists(inner, min_size=2, max_size=3), st.sampled_from(["and", "or"])).map(lambda p: joined(*p)),
        inner.map(lambda part: (f"not {part[0]}", lambda frame: ~part[1](frame))),
    ),
    max_leaves=6,
)
ROWS = st.lists(
    st.tuples(
        *[st.one_of(st.none(), VALUES.map(float))] * len(NUMBERS),
        *[st.one_of(st.none(), st.sampled_from(LEVELS[name])) for name in LEVELS],
    ),
    min_size=1,
    max_size=12,
)


def columns(rows: list[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    found = dict(zip([*NUMBERS, *LEVELS], zip(*rows, strict=True), strict=True))
    plain = {name: np.array([np.nan if v is None else v for v in found[name]], dtype=np.float64) for name in NUMBERS}
    return plain | {name: np.array(found[name], dtype=object) for name in LEVELS}


def nullable(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    found = dict(zip([*NUMBERS, *LEVELS], zip(*rows, strict=True), strict=True))
    kinds = dict.fromkeys(NUMBERS, "Float64") | dict.fromkeys(LEVELS, "string")
    return pd.DataFrame({name: pd.array(list(found[name]), dtype=kinds[name]) for name in found})


@settings(max_examples=250, deadline=None)
@given(EXPRESSIONS, ROWS)
def test_agrees_with_pandas(expression: Expression, rows: list[tuple[Any, ...]]) -> None:
    text, evaluate = expression
    passes = compile_filter(text, FEATURES)(columns(rows))
    assert passes.dtype == bool
    assert passes.tolist() == evaluate(nullable(rows)).fillna(False).tolist()


TRUE, FALSE, UNKNOWN = "age == 1", "age == 2", "bmi == 1"


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (UNKNOWN, False),
        (f"not {UNKNOWN}", False),
        (f"not not {UNKNOWN}", False),
        (f"{TRUE} or {UNKNOWN}", True),
        (f"{UNKNOWN} or {TRUE}", True),
        (f"{FALSE} or {UNKNOWN}", False),
        (f"not ({FALSE} or {UNKNOWN})", False),
        (f"{TRUE} and {UNKNOWN}", False),
        (f"not ({FALSE} and {UNKNOWN})", True),
        (f"not ({UNKNOWN} and {UNKNOWN})", False),
        (f"{UNKNOWN} or not {UNKNOWN}", False),
        ("bmi in (1, 2)", False),
        ("bmi not in (1, 2)", False),
        ("bmi != 1", False),
        ("bmi is None", True),
        ("bmi is not None", False),
        ("not bmi is None", False),
        ("sex == 'male'", False),
        ("sex != 'male'", False),
        ("sex is None and age is not None", True),
        ("0 < age < 2", True),
        ("0 < bmi < 2", False),
        ("age in (2, 1)", True),
        ("age == -1", False),
        ("age > -1", True),
        ("age<1e999", True),
        ("  age == 1  ", True),
    ],
)
def test_kleene(text: str, passes: bool) -> None:
    row = {"age": np.array([1.0]), "bmi": np.array([np.nan]), "sex": np.array([None], dtype=object)}
    assert compile_filter(text, FEATURES)(row).tolist() == [passes]


def test_no_rows() -> None:
    empty = {"age": np.empty(0), "sex": np.empty(0, dtype=object)}
    assert compile_filter("age > 3 and sex == 'male'", FEATURES)(empty).shape == (0,)


FORBIDDEN = [
    "",
    " ",
    "age",
    "not age",
    "True",
    "None",
    "1",
    "1 < 2",
    "'a' == 'a'",
    "age == age",
    "age < bmi",
    "age > 1 > 2",
    "1 < 2 < age",
    "age()",
    "open('/etc/passwd')",
    "__import__('os').system('true')",
    "age > int('1')",
    "age.real > 1",
    "age.__class__ == 1",
    "().__class__ == 1",
    "(lambda: 1)() == 1",
    "lambda: age > 1",
    "f'{age}' == 'x'",
    "sex == f'male'",
    "sex == 'ma' 'le' + ''",
    "age + 1 > 2",
    "age > 1 + 1",
    "age > 2 ** 99",
    "age > 9 ** 9 ** 9 ** 9",
    "-age > 1",
    "age > +1",
    "age > ~1",
    "age > - - 1",
    "age > not 1",
    "(age := 3) > 2",
    "[age for age in (1, 2)]",
    "age in [x for x in (1, 2)]",
    "age in (x for x in (1, 2))",
    "age in {1: 2}",
    "age in range(3)",
    "age in bmi",
    "age in 1",
    "age in ()",
    "age in (1, *[2])",
    "age in ((1, 2),)",
    "1 in age",
    "'male' in sex",
    "age[0] > 1",
    "sex[0] == 'm'",
    "age > 1 if bmi > 2 else age > 3",
    "(age > 1) == (bmi > 2)",
    "(age > 1) & (bmi > 2)",
    "age > 1; bmi > 2",
    "age > 1\nbmi > 2",
    "import os",
    "age = 1",
    "await age",
    "yield",
    "age > 1,",
    "*age",
    "...",
    "age is 1",
    "age is bmi",
    "None is age",
    "age == None",
    "age > None",
    "age == True",
    "age > False",
    "age == '1'",
    "age == 1j",
    "age == b'1'",
    "age > ...",
    "sex == 1",
    "sex == None",
    "sex == 'Male'",
    "sex == b'male'",
    "sex == -'male'",
    "sex < 'male'",
    "sex >= 'female'",
    "'a' < sex < 'z'",
    "height > 1",
    "patient_id == 1",
    "Age > 1",
    "__builtins__ == 1",
    "nan == 1",
    "age > nan",
    "age > 1 and",
    "(age > 1",
    "age >> 1",
    "age <> 1",
    "age =< 1",
    "age > 1 && bmi > 1",
    "age > 1 -- comment",
    "age > 1; DROP TABLE patients",
    "age > 0x",
    "age > '",
    "age > 1\0",
    "sex == '\\d'",
    "ａｇｅ < 1j",
]


@pytest.mark.parametrize("text", FORBIDDEN)
def test_what_is_not_offered_is_refused(text: str) -> None:
    with pytest.raises(StudyError, match=r"cohort\.where"):
        compile_filter(text, FEATURES)


@pytest.mark.parametrize(
    "text",
    {
        "long": "age > 1 or " * 200 + "age > 1",
        "one over": "age > 1".ljust(2001),
        "parentheses": "(" * 900 + "age > 1" + ")" * 900,
        "open": "(" * 1990,
        "brackets": "age in " + "[" * 900 + "]" * 900,
        "signs": "age > " + "-" * 1900 + "1",
        "attributes": "age" + ".a" * 900 + " > 1",
        "calls": "age" + "()" * 900 + " > 1",
        "digits": "age < 1" + "0" * 1900,
        "negative digits": "age > -1" + "0" * 1900,
        "digits among values": "age in (1, 1" + "0" * 1900 + ")",
        "powers": "age > " + "9**" * 600 + "9",
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_huge_or_deep_is_refused(text: tuple[str, str]) -> None:
    with pytest.raises(StudyError, match=r"cohort\.where"):
        compile_filter(text[1], FEATURES)


def test_what_is_deep_and_allowed_works() -> None:
    row = {"age": np.array([1.0])}
    assert compile_filter("not " * 400 + "age > 0", FEATURES)(row).tolist() == [True]
    assert compile_filter("not " * 401 + "age > 0", FEATURES)(row).tolist() == [False]
    assert compile_filter(" and ".join(["age > 0"] * 160), FEATURES)(row).tolist() == [True]


ALPHABET = ["age", "sex", "bmi", "'male'", "1", "-", "(", ")", "[", "]", ",", "<", "==", "!=", "and", "or", "not", "in"]
ALPHABET += [
    "is",
    "None",
    ".",
    "lambda",
    ":",
    "f''",
    "*",
    "=",
    "\n",
    "#",
    "\\",
    "\0",
    "é",
    "𝐚𝐠𝐞",
    "if",
    "else",
    "9" * 400,
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(ALPHABET), max_size=9).map(" ".join) | st.text(max_size=20))
@example("not in")
def test_any_text_is_a_filter_or_a_study_error(text: str) -> None:
    try:
        passes = compile_filter(text, FEATURES)
    except StudyError:
        return
    row = {"age": np.array([1.0]), "bmi": np.array([2.0])}
    assert passes(row | {name: np.array(["male"], dtype=object) for name in LEVELS}).shape == (1,)


def test_refusals_help() -> None:
    for text, hint in (
        ("agee > 1", "did you mean 'age'"),
        ("sex == 'femal'", "did you mean 'female'"),
        ("sex == 'x'", r"female, male"),
        ("age > 'x'", "'age' is a number"),
        ("sex < 'male'", "'sex' is a category"),
        ("age > 1 +", "write for example"),
        ("max(age) > 1", r"'max\(age\)' is not offered"),
    ):
        with pytest.raises(StudyError, match=hint):
            compile_filter(text, FEATURES)
