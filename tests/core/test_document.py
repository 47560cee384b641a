"""One study, one value, one spelling: documents, canonical bytes, refusals and the schema for editors."""

import copy
import hashlib
import json
import math
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

import cohortium
from cohortium.bootstrap import example_study, load_example
from cohortium.core import document
from cohortium.core.document import canonical_bytes, from_canonical, json_schema, parse, study_id
from cohortium.core.errors import StudyError
from cohortium.core.features import BinaryTarget, Category, Number
from cohortium.core.models import Penalty, Regression
from cohortium.core.protection import Privacy
from cohortium.core.study import Cohort, Purpose, Sites, Study
from cohortium.core.training import Newton

VECTOR = json.loads((Path(__file__).parents[1] / "vectors/study_v1.json").read_text(encoding="utf-8"))

YAML_TEXT = """
study: creatinine
purpose: {summary: "Kidney injury after surgery (Ärzte: ≥ 3)"}
sites: {include: [west, north, east]}
cohort:
  dataset: surgery
  patient: id
  where: age >= 18
  features:
    creatinine: {type: number, unit: µmol/L, range: [0.00001, 2500]}
    age: {type: number, unit: a, range: [18.0, 110], missing: impute}
    sex: {type: category, levels: [f, m]}
  target: {type: binary, name: injury}
model: {kind: logistic, penalty: {l2: 1e-8}}
training: {algorithm: newton, tolerance: 0.000001}
privacy: {unit: patient}
"""

PYTHON_STUDY = Study(
    name="creatinine",
    purpose=Purpose(summary="Kidney injury after surgery (Ärzte: ≥ 3)"),
    sites=Sites(include=("north", "east", "west")),
    cohort=Cohort(
        dataset="surgery",
        patient="id",
        where="age >= 18",
        features={
            "sex": Category(levels=("f", "m")),
            "age": Number(unit="a", range=(18, 110), missing="impute"),
            "creatinine": Number(unit="µmol/L", range=(1e-5, 2500)),
        },
        target=BinaryTarget(name="injury"),
    ),
    model=Regression(kind="logistic", penalty=Penalty(l2=1e-8)),
    training=Newton(tolerance=1e-6),
    privacy=Privacy(unit="patient"),
)


def full(model: str, target: str) -> dict[str, Any]:
    """Returns a document in which every key of its sections is written out, absent values apart."""
    targets = {
        "binary": {"type": "binary", "name": "died", "levels": ["no", "yes"], "missing": "exclude"},
        "number": {
            "type": "number",
            "name": "stay",
            "unit": "d",
            "range": [0, 400],
            "missing": "refuse",
            "outside": "clip",
        },
        "count": {"type": "count", "name": "visits", "maximum": 40, "missing": "refuse"},
    }
    newton = {"algorithm": "newton", "rounds": 30, "tolerance": 1e-9}
    server = {"optimiser": "adam", "learning_rate": 0.5, "beta1": 0.8, "beta2": 0.95, "tau": 0.01}
    local = {"steps": 10, "batch_size": 16, "learning_rate": 0.1, "proximal": 0.5, "scaffold": False}
    models: dict[str, dict[str, Any]] = {
        "logistic": {"kind": "logistic", "penalty": {"l2": 0.5}, "confidence": 0.9},
        "linear": {"kind": "linear", "penalty": {"l2": 0.0}, "confidence": 0.95},
        "poisson": {"kind": "poisson", "penalty": {"l2": 2}, "confidence": 0.99},
        "network": {"kind": "network", "hidden": [8, 4], "activation": "tanh"},
        "descriptive": {"kind": "descriptive", "bins": 5, "quantiles": [0.5], "refinements": 1, "small_cells": 3},
    }
    averaging = {"algorithm": "fedavg", "rounds": 7, "local": local, "server": server, "update_bound": 2.5, "clip": 1.5}
    averaging["asynchronous"] = {"buffer": 3, "staleness": 0.25, "latest": 4}
    descent = {"algorithm": "descent", "rounds": 40, "learning_rate": 0.5, "momentum": 0.5, "clip": 2.0}
    oneshot = {"algorithm": "adassp", "clip": 3.0}
    training = {"network": averaging, "descriptive": None, "linear": descent, "poisson": oneshot}.get(model, newton)
    content: dict[str, Any] = {
        "study": "full-1",
        "version": 3,
        "purpose": {"summary": "why", "use": ["NPU"]},
        "sites": {"include": ["a", "b", "c", "d"], "minimum": 4, "per_round": 4, "selection": "adaptive"},
        "cohort": {
            "dataset": "d",
            "patient": "id",
            "features": {
                "age": {"type": "number", "unit": "a", "range": [0, 120], "missing": "impute", "outside": "clip"},
                "sex": {"type": "category", "levels": ["f", "m"], "missing": "exclude", "outside": "missing"},
            },
            "target": targets[target],
            "where": "age >= 18",
            "minimum": 30,
            "maximum": 5000,
            "records": "several",
        },
        "model": models[model],
        "preprocessing": {"scale": "range"},
        "training": training,
        "aggregation": {
            "protocol": "masking",
            "dropouts": 0,
            "bits": 64,
            "compression": {"levels": 6, "rotation": True, "norm": 2.5},
        },
        "privacy": {
            "unit": "patient",
            "epsilon": 1.5,
            "delta": 1e-6,
            "neighbouring": "replace",
            "sites_per_patient": 1,
            "colluding": 2,
            "records_per_patient": 5,
            "preprocessing": 0.25,
            "sampling": 1,
        },
    }
    return {key: value for key, value in content.items() if value is not None}


FULL = [
    ("logistic", "binary"),
    ("linear", "number"),
    ("poisson", "count"),
    ("network", "binary"),
    ("descriptive", "count"),
]
SCHEMA = json_schema()
DOCUMENTS = [full(model, target) for model, target in FULL]
WHOLE = 0
"""The document that has every section of a study."""


PRIVACY = {
    "unit": "patient",
    "neighbouring": "add-or-remove",
    "sites_per_patient": 1,
    "colluding": 1,
    "preprocessing": 0.1,
    "records_per_patient": 10,
    "sampling": 1,
}
"""The section as it is written out where a study only names its unit."""


# A canonical form of its own: json.dumps for everything but numbers, and those as ECMAScript writes them.


def ecmascript(number: float) -> str:
    sign, digits, exponent = Decimal(repr(float(number))).normalize().as_tuple()
    text, point = "".join(map(str, digits)), len(digits) + int(exponent)
    if number == 0:
        return "0"
    if 0 < point <= 21:
        text = text.ljust(point, "0")
        text = text[:point] + ("." + text[point:] if text[point:] else "")
    elif -6 < point <= 0:
        text = "0." + "0" * -point + text
    else:
        text = text[0] + ("." + text[1:] if text[1:] else "") + f"e{point - 1:+d}"
    return "-" * sign + text


def canonical(value: Any) -> str:
    if isinstance(value, dict):
        members = (f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value))
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, float | int) and not isinstance(value, bool):
        return ecmascript(value)
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1e-8, "1e-8"),
        (18.0, "18"),
        (0.00001, "0.00001"),
        (1e-6, "0.000001"),
        (1e-7, "1e-7"),
        (1e20, "100000000000000000000"),
        (1e21, "1e+21"),
        (333333333.3333333, "333333333.3333333"),
        (-0.0, "0"),
        (-1.5e-9, "-1.5e-9"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (9007199254740991.0, "9007199254740991"),
    ],
)
def test_the_references_own_numbers(number: float, text: str) -> None:
    assert ecmascript(number) == text


class TestOneValue:
    def test_yaml_json_and_python_agree(self) -> None:
        read = YAML(typ="safe", pure=True).load(YAML_TEXT)
        from_yaml, from_json = parse(read), parse(json.loads(json.dumps(read)))
        assert from_yaml == from_json == PYTHON_STUDY
        assert canonical_bytes(from_yaml) == canonical_bytes(from_json) == canonical_bytes(PYTHON_STUDY)
        assert study_id(from_yaml) == study_id(PYTHON_STUDY) == cohortium.study_id(PYTHON_STUDY)

    def test_whole_floats_and_integers_are_one_number(self) -> None:
        one, other = copy.deepcopy(DOCUMENTS[0]), copy.deepcopy(DOCUMENTS[0])
        one["cohort"]["features"]["age"]["range"] = [0, 120]
        other["cohort"]["features"]["age"]["range"] = [0.0, 120.0]
        assert canonical_bytes(parse(one)) == canonical_bytes(parse(other))

    def test_the_order_of_sites_and_features_is_irrelevant_that_of_levels_is_not(self) -> None:
        one = copy.deepcopy(DOCUMENTS[0])
        other = copy.deepcopy(one)
        other["sites"]["include"].reverse()
        other["cohort"]["features"] = dict(reversed(other["cohort"]["features"].items()))
        assert study_id(parse(one)) == study_id(parse(other))
        other["cohort"]["features"]["sex"]["levels"].reverse()
        assert study_id(parse(one)) != study_id(parse(other))

    def test_values_are_frozen(self) -> None:
        with pytest.raises(AttributeError):
            PYTHON_STUDY.version = 2  # type: ignore[misc]


class TestCanonicalBytes:
    def test_vector(self) -> None:
        study = parse(VECTOR["document"])
        assert canonical_bytes(study).decode() == VECTOR["canonical"]
        assert study_id(study) == "sha256:" + VECTOR["sha256"]
        assert hashlib.sha256(VECTOR["canonical"].encode()).hexdigest() == VECTOR["sha256"]

    def test_the_vector_is_canonical_json(self) -> None:
        assert canonical(json.loads(VECTOR["canonical"])) == VECTOR["canonical"]
        for written in ('"tolerance":1e-8', '"range":[18,110]', '"range":[0.00001,2500]', "µmol/L"):
            assert written in VECTOR["canonical"]

    @pytest.mark.parametrize("content", DOCUMENTS, ids=lambda content: content["model"]["kind"])
    def test_equals_the_reference_when_everything_is_written_out(self, content: dict[str, Any]) -> None:
        assert canonical_bytes(parse(content)).decode() == canonical(content)

    def test_defaults_are_written_out_and_absent_values_are_not(self) -> None:
        plain = json.loads(canonical_bytes(PYTHON_STUDY))
        assert plain["aggregation"] == {"bits": 32, "dropouts": 0, "protocol": "masking"}
        assert plain["training"] == {"algorithm": "newton", "rounds": 25, "tolerance": 1e-6}
        assert plain["privacy"] == PRIVACY

    def test_a_study_built_wrongly_in_python_has_no_canonical_bytes(self) -> None:
        for wrong in (
            Study(**{**vars(PYTHON_STUDY), "purpose": Purpose(summary=7)}),  # type: ignore[arg-type]
            Study(**{**vars(PYTHON_STUDY), "model": Regression(kind="logistic", confidence=2.0)}),
            Study(**{**vars(PYTHON_STUDY), "training": Newton(rounds=0)}),
            Study(**{**vars(PYTHON_STUDY), "training": Newton(tolerance=float("nan"))}),
            Study(**{**vars(PYTHON_STUDY), "purpose": Purpose(summary="a\rb")}),
            Study(**{**vars(PYTHON_STUDY), "purpose": Purpose(summary="\ud800")}),
        ):
            with pytest.raises(StudyError):
                canonical_bytes(wrong)

    def test_oversize(self) -> None:
        with pytest.raises(StudyError, match="bytes"):
            canonical_bytes(Study(**{**vars(PYTHON_STUDY), "purpose": Purpose(summary="x" * (1 << 20))}))


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,8}", fullmatch=True)
TEXT = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
RANGES = (
    st.lists(FINITE, min_size=2, max_size=2, unique_by=lambda x: x or 0.0)
    .map(sorted)
    .filter(lambda bounds: math.isfinite(bounds[1] - bounds[0]))
)
COLUMNS = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("number"), "unit": TEXT, "range": RANGES},
        optional={"missing": st.sampled_from(["refuse", "impute", "exclude"]), "outside": st.just("clip")},
    ),
    st.fixed_dictionaries(
        {"type": st.just("category"), "levels": st.lists(TEXT, min_size=2, max_size=5, unique=True)},
        optional={"missing": st.sampled_from(["refuse", "impute", "exclude"]), "outside": st.just("missing")},
    ),
)
RATE = st.floats(min_value=0, exclude_min=True, max_value=1e300)


@st.composite
def studies(draw: st.DrawFn) -> dict[str, Any]:
    content = copy.deepcopy(draw(st.sampled_from(DOCUMENTS)))
    names = draw(st.lists(NAMES, min_size=3, max_size=8, unique=True))
    content["study"], content["version"] = draw(NAMES), draw(st.integers(1, 10**9))
    content["purpose"] = {"summary": draw(TEXT), "use": draw(st.lists(TEXT, max_size=3))}
    content["sites"] = {"include": draw(st.lists(NAMES, min_size=3, max_size=6, unique=True))}
    features = {name: draw(COLUMNS) for name in names[2:]}
    content["cohort"] |= {"patient": names[0], "features": features, "where": draw(st.one_of(TEXT, st.none()))}
    content["cohort"]["target"] = content["cohort"]["target"] | {"name": names[1]}
    content["privacy"] = {"unit": draw(st.sampled_from(["patient", "record", "site"]))}
    if draw(st.booleans()):
        content["privacy"] |= {"epsilon": draw(st.floats(1e-3, 1e3)), "delta": draw(st.floats(1e-300, 1e-3))}
    for section in ("preprocessing", "aggregation"):
        if draw(st.booleans()):
            del content[section]
    if content["model"]["kind"] in ("logistic", "linear", "poisson"):
        content["model"]["penalty"] = {"l2": draw(st.floats(0, 1e300))}
        if draw(st.booleans()):
            del content["training"]
    elif content["model"]["kind"] == "network":
        content["training"]["update_bound"] = draw(RATE)
    return content


class TestRoundTrip:
    @settings(max_examples=80, deadline=None)
    @given(studies(), st.randoms(use_true_random=False))
    def test_laws(self, content: dict[str, Any], random: Any) -> None:
        study = parse(content)
        data = canonical_bytes(study)
        assert from_canonical(data) == study
        assert canonical_bytes(from_canonical(data)) == data
        plain = document.document(study)
        assert canonical(plain).encode() == data
        assert parse(plain) == study
        assert canonical_bytes(parse(shuffled(content, random))) == data

    @settings(max_examples=100, deadline=None)
    @given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
    def test_noise_is_refused(self, data: bytes) -> None:
        with pytest.raises(StudyError):
            from_canonical(data)

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_a_changed_byte_is_refused_or_another_study(self, data: st.DataObject) -> None:
        original = canonical_bytes(PYTHON_STUDY)
        place = data.draw(st.integers(0, len(original) - 1))
        changed = bytearray(original)
        changed[place] ^= data.draw(st.integers(1, 255))
        try:
            study = from_canonical(bytes(changed))
        except StudyError:
            return
        assert study != PYTHON_STUDY
        assert study_id(study) != study_id(PYTHON_STUDY)


def shuffled(value: Any, random: Any) -> Any:
    """Returns the document with every mapping's keys in another order."""
    if isinstance(value, list):
        return [shuffled(item, random) for item in value]
    if not isinstance(value, dict):
        return value
    keys = list(value)
    random.shuffle(keys)
    return {key: shuffled(value[key], random) for key in keys}


GOOD = canonical_bytes(PYTHON_STUDY)


@pytest.mark.parametrize(
    "data",
    {
        "space": GOOD.replace(b":", b": ", 1),
        "newline": GOOD + b"\n",
        "indented": json.dumps(json.loads(GOOD), indent=1, sort_keys=True).encode(),
        "float": GOOD.replace(b"[18,110]", b"[18.0,110]"),
        "exponent": GOOD.replace(b'"l2":1e-8', b'"l2":1e-08'),
        "escape": GOOD.replace("µ".encode(), b"\\u00b5"),
        "duplicate": GOOD.replace(b'"bits":32', b'"bits":64,"bits":32'),
        "duplicate name": GOOD[:-1] + b',"study":"creatinine"}',
        "default left out": GOOD.replace(b'"bits":32,', b""),
        "null": GOOD.replace(b'"colluding":1,', b'"colluding":1,"epsilon":null,'),
        "order": GOOD.replace(b'"dropouts":0,"protocol":"masking"', b'"protocol":"masking","dropouts":0'),
        "sites' order": GOOD.replace(b'["east","north","west"]', b'["west","north","east"]'),
        "boolean for a number": GOOD.replace(b'"version":1', b'"version":true'),
        "text for a number": GOOD.replace(b'"version":1', b'"version":"1"'),
        "byte order mark": b"\xef\xbb\xbf" + GOOD,
        "utf-16": GOOD.decode().encode("utf-16"),
    }.items(),
    ids=lambda item: item[0],
)
def test_another_spelling_is_refused(data: tuple[str, bytes]) -> None:
    assert data[1] != GOOD
    with pytest.raises(StudyError):
        from_canonical(data[1])


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b" " * ((1 << 20) + 1), "is the most"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"[]", "study is wrong"),
        (b"null", "study is wrong"),
        (b"{}", "lacks 'study'"),
        (GOOD.replace(b"2500", b"1e400"), "range"),
        (GOOD.replace(b"2500", b"NaN"), "range"),
        (GOOD.replace(b'"surgery"', b'"\\ud800"'), "not JSON"),
    ],
)
def test_hostile_bytes_are_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(StudyError, match=sentence):
        from_canonical(data)


# Unknown keys


def sections(value: dict[str, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every section of a document. `features` maps names that authors choose."""
    if path != ("cohort", "features"):
        yield path
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from sections(inner, (*path, key))


def at(content: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    for key in path:
        content = content[key]
    return content


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    return SCHEMA["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def schema_sections() -> dict[str, dict[str, Any]]:
    return {"Study": SCHEMA, **SCHEMA["$defs"]}


MISSPELT = [
    (index, path, key)
    for index, content in enumerate(DOCUMENTS)
    for path in sections(content)
    for key in at(content, path)
    if index == WHOLE or path[:1] in (("model",), ("training",)) or path[:2] == ("cohort", "target")
]


@pytest.mark.parametrize(("index", "path", "key"), MISSPELT, ids=lambda value: str(value))
def test_an_unknown_key_is_refused_with_the_nearest_right_one(index: int, path: tuple[Any, ...], key: str) -> None:
    content = copy.deepcopy(DOCUMENTS[index])
    at(content, path)[f"{key}x"] = 1
    with pytest.raises(StudyError) as refused:
        parse(content)
    place = f"in '{'.'.join(path)}'" if path else "of a study"
    assert str(refused.value).startswith(f"unknown key '{key}x' {place}; did you mean '{key}'? (known: ")
    assert set(at(content, path)) - {f"{key}x"} <= set(str(refused.value).split("known: ")[1].rstrip(")").split(", "))


def test_every_section_and_key_of_the_schema_is_among_those() -> None:
    tried = {key for index, path, key in MISSPELT}
    for name, section in schema_sections().items():
        assert section["additionalProperties"] is False, name
        assert set(section["properties"]) <= tried, name
        written = [set(at(content, path)) for content in DOCUMENTS for path in sections(content)]
        assert set(section["properties"]) in written, name


def test_a_key_that_resembles_none_is_refused_too() -> None:
    known = "include, minimum, per_round, selection"
    with pytest.raises(StudyError, match=rf"unknown key 'zzz' in 'sites' \(known: {known}\)"):
        parse(DOCUMENTS[0] | {"sites": {"include": ["a", "b", "c"], "zzz": 1}})


def test_an_unknown_key_is_named_before_the_one_that_is_lacking_for_it() -> None:
    content = full("logistic", "binary")
    content["privcy"] = content.pop("privacy")
    with pytest.raises(StudyError, match=r"^unknown key 'privcy' of a study; did you mean 'privacy'\?"):
        parse(content)
    content = full("logistic", "binary")
    content["cohort"]["datset"] = content["cohort"].pop("dataset")
    content.pop("privacy")
    with pytest.raises(StudyError, match=r"^unknown key 'datset' in 'cohort'"):
        parse(content)


# Characters that hide or disarrange text

HIDDEN = ["\x00", "\t", "\n", "\r", "\x1b", "\x7f", "\x9b", "\u200b", "\u202e", "\u2028", "\u2029", "\u2066", "\ud800"]
TEXTS = [
    "study",
    "purpose.summary",
    "purpose.use.0",
    "sites.include.1",
    "cohort.dataset",
    "cohort.patient",
    "cohort.where",
    "cohort.features.age.unit",
    "cohort.features.sex.levels.1",
    "cohort.target.name",
    "cohort.target.levels.0",
    "model.kind",
]


@pytest.mark.parametrize("path", TEXTS)
@pytest.mark.parametrize("hidden", HIDDEN, ids=ascii)
def test_no_text_holds_a_hidden_character(path: str, hidden: str) -> None:
    if (path, hidden) == ("purpose.summary", "\n"):
        return  # the one text that may have lines: see below
    content: Any = full("logistic", "binary")
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    section = at(content, tuple(parents))
    section[last] = f"a{hidden}b"
    with pytest.raises(StudyError, match=rf"^'{path}' holds U\+{ord(hidden):04X}, a control or invisible character: "):
        parse(content)


def test_no_key_holds_a_hidden_character() -> None:
    content = full("logistic", "binary")
    content["cohort"]["features"]["sex\u202e"] = content["cohort"]["features"]["sex"]
    with pytest.raises(StudyError, match=r"'cohort.features' holds U\+202E"):
        parse(content)
    with pytest.raises(StudyError, match=r"a key of the study holds U\+000A"):
        parse({"study\n": "x"})


# The schema, by a small validator of its own

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def fits(value: Any, node: dict[str, Any]) -> bool:
    """Returns whether a value fits a node of the schema, for the keywords that it uses."""
    node = resolve(node)
    known = {"$schema", "$defs", "title", "description", "default", "discriminator"}
    handled = {"anyOf", "oneOf", "type", "const", "enum", "properties", "required", "additionalProperties", "items"}
    handled |= {"prefixItems", "minItems", "maxItems"}
    handled |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    assert node.keys() <= known | handled, node.keys()
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = node.get("type")
    checks = [
        kind is None or (number if kind == "number" else number and value == int(value))
        if kind in ("number", "integer", None)
        else isinstance(value, TYPES[kind]),
        "const" not in node or value == node["const"],
        "enum" not in node or value in node["enum"],
        not number or value >= node.get("minimum", value),
        not number or value <= node.get("maximum", value),
        not number or "exclusiveMinimum" not in node or value > node["exclusiveMinimum"],
        not number or "exclusiveMaximum" not in node or value < node["exclusiveMaximum"],
        "anyOf" not in node or any(fits(value, option) for option in node["anyOf"]),
        "oneOf" not in node or sum(fits(value, option) for option in node["oneOf"]) == 1,
    ]
    if isinstance(value, dict) and all(checks):
        extra = node.get("additionalProperties", {})
        checks += [key in value for key in node.get("required", [])]
        checks += [fits(inner, known) for key, inner in value.items() if (known := node.get("properties", {}).get(key))]
        rest = [inner for key, inner in value.items() if key not in node.get("properties", {})]
        checks += [extra is not False and fits(inner, extra) for inner in rest]
    if isinstance(value, list) and all(checks):
        checks += [fits(inner, node.get("items", {})) for inner in value]
        checks += [fits(*pair) for pair in zip(value, node.get("prefixItems", []), strict=False)]
        checks += [node.get("minItems", 0) <= len(value) <= node.get("maxItems", len(value))]
    return all(checks)


class TestSchema:
    def test_says_which_draft_it_is(self) -> None:
        assert json_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert json.loads(json.dumps(json_schema())) == json_schema()

    @pytest.mark.parametrize("content", DOCUMENTS, ids=lambda content: content["model"]["kind"])
    def test_accepts_good_studies(self, content: dict[str, Any]) -> None:
        assert fits(content, SCHEMA)

    def test_accepts_the_bundled_study_as_it_is_written(self) -> None:
        assert fits(YAML(typ="safe", pure=True).load(example_study()), SCHEMA)
        assert fits(document.document(load_example()), SCHEMA)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("study", None),
            ("study", 5),
            ("version", 0),
            ("sites.minimum", 2),
            ("cohort.maximum", 10**9),
            ("cohort.features.age.range", [1]),
            ("cohort.features.age.type", "nubmer"),
            ("cohort.features.sex.levels", "f"),
            ("model.kind", "logit"),
            ("model.penalty.l2", -1),
            ("model.confidence", 1),
            ("training.tolerance", 0),
            ("training.algorithm", "lbfgs"),
            ("aggregation.bits", 16),
            ("privacy.unit", "visit"),
            ("privacy.epsilon", 0),
            ("nonsense", 1),
        ],
    )
    def test_refuses_what_the_parser_refuses(self, path: str, value: Any) -> None:
        content = copy.deepcopy(full("logistic", "binary"))
        *parents, last = path.split(".")
        at(content, tuple(parents))[last] = value
        assert not fits(content, SCHEMA)
        with pytest.raises(StudyError):
            parse(content)

    @pytest.mark.parametrize("section", ["study", "purpose", "sites", "cohort", "model", "privacy"])
    def test_requires_what_the_parser_requires(self, section: str) -> None:
        content = full("logistic", "binary")
        del content[section]
        assert not fits(content, SCHEMA)
        with pytest.raises(StudyError, match=f"lacks '{section}'"):
            parse(content)

    def test_every_key_but_those_that_name_themselves_is_explained_to_editors(self) -> None:
        assert all(section.get("description") for section in schema_sections().values())


# What is wrong, in one sentence

AGE = "cohort.features.age"
RULES: list[tuple[str, str, Any, str]] = [
    ("logistic", "study", "", "study '' is not a valid name"),
    ("logistic", "study", "-x", "study '-x' is not a valid name"),
    ("logistic", "study", "x" * 64, "1 to 63"),
    ("logistic", "version", 0, "'version' is wrong"),
    ("logistic", "version", 1.5, "'version' is wrong"),
    ("logistic", "purpose.summary", 3, "'purpose.summary' is wrong"),
    ("logistic", "sites.include", ["a", "b"], "include more"),
    ("logistic", "sites.include", ["a", "b", "a", "c"], "site 'a' is listed twice"),
    ("logistic", "sites.include", ["a", "b", "c", "d e"], "site 'd e' is not a valid name"),
    ("logistic", "sites.minimum", 2, "'sites.minimum' is wrong"),
    ("logistic", "sites.minimum", 5, "names 4 sites and needs 5"),
    ("logistic", f"{AGE}.range", [5, 5], r"range \[5, 5\] must rise"),
    ("logistic", f"{AGE}.range", [9, 1], "must rise"),
    ("logistic", f"{AGE}.range", [0, float("inf")], f"'{AGE}.range.1' is wrong"),
    ("logistic", f"{AGE}.range", [0, float("nan")], f"'{AGE}.range.1' is wrong"),
    ("logistic", f"{AGE}.missing", "drop", f"'{AGE}.missing' is wrong: .*'impute'.*, not 'drop'"),
    ("logistic", f"{AGE}.type", "nubmer", "did you mean 'number'.*allowed: number, category"),
    ("logistic", AGE, {"unit": "a", "range": [0, 1]}, f"'{AGE}' lacks 'type'"),
    ("logistic", AGE, {"type": "number", "range": [0, 1]}, f"lacks '{AGE}.unit'"),
    ("logistic", "cohort.features.sex.levels", ["f"], "at least two levels"),
    ("logistic", "cohort.features.sex.levels", ["f", "f"], "hold one twice"),
    ("logistic", "cohort.features.sex.levels", [str(i) for i in range(1001)], "1000 is the most"),
    ("logistic", "cohort.features.sex.levels", ["f", 1], "levels.1' is wrong: .*string, not 1"),
    ("logistic", "cohort.features", {}, "no features"),
    ("logistic", "cohort.features", {"a b": {"type": "number", "unit": "1", "range": [0, 1]}}, "feature 'a b'"),
    ("logistic", "cohort.patient", "age", "column 'age' is a feature and also"),
    ("logistic", "cohort.patient", "died", "the target is the patient column"),
    ("logistic", "cohort.patient", "a:b", "patient column 'a:b'"),
    ("logistic", "cohort.dataset", "", "dataset ''"),
    ("logistic", "cohort.target.name", "age", "column 'age' is a feature and also"),
    ("logistic", "cohort.target.levels", ["0", "0"], "its two levels must differ"),
    ("logistic", "cohort.target.levels", ["0", "1", "2"], "cohort.target.levels' is wrong"),
    ("logistic", "cohort.minimum", 0, "'cohort.minimum' is wrong"),
    ("logistic", "cohort.maximum", 29, "cohort.maximum is 29: it must be at least 30"),
    ("logistic", "cohort.maximum", 10**9, "'cohort.maximum' is wrong"),
    ("linear", "cohort.target.range", [3, 2], "target 'stay': range"),
    ("poisson", "cohort.target.maximum", 0, "'cohort.target.maximum' is wrong"),
    ("logistic", "model.penalty.l2", -0.1, "'model.penalty.l2' is wrong"),
    ("logistic", "model.confidence", 0.5, "'model.confidence' is wrong"),
    ("logistic", "model.kind", "linear", "needs a target of type number, and cohort.target is binary"),
    ("logistic", "model.kind", "poisson", "needs a target of type count"),
    ("logistic", "model.kind", "logstic", "did you mean 'logistic'"),
    ("logistic", "training", {"algorithm": "fedavg"}, "trains by 'algorithm: newton'"),
    ("network", "training", {"algorithm": "newton"}, "trains by 'algorithm: fedavg'"),
    ("descriptive", "training", {"algorithm": "newton"}, "without a 'training' section"),
    ("network", "model.hidden", [0], "'model.hidden.0' is wrong"),
    ("network", "model.activation", "gelu", "'model.activation' is wrong"),
    ("network", "training.local.learning_rate", 0, "'training.local.learning_rate' is wrong"),
    ("network", "training.server.beta1", 1, "'training.server.beta1' is wrong"),
    ("network", "training.update_bound", 0, "'training.update_bound' is wrong"),
    ("descriptive", "model.quantiles", [0.5, 1.0], "'model.quantiles.1' is wrong"),
    ("descriptive", "model.bins", 1, "'model.bins' is wrong"),
    ("logistic", "training.rounds", 0, "'training.rounds' is wrong"),
    ("logistic", "aggregation.bits", 48, "'aggregation.bits' is wrong"),
    ("logistic", "aggregation.protocol", "trust", "'aggregation.protocol' is wrong"),
    ("logistic", "privacy", {"unit": "patient", "epsilon": -1}, "'privacy.epsilon' is wrong"),
    ("logistic", "privacy.unit", "visit", "'privacy.unit' is wrong"),
    ("logistic", "version", 10**9 + 1, "'version' is wrong"),
    ("logistic", "version", 10**340, "'version' is wrong: .*1000000000$"),
    ("logistic", "sites.minimum", 10**340, "'sites.minimum' is wrong"),
    ("logistic", "cohort.minimum", 10**340, "'cohort.minimum' is wrong"),
    ("logistic", "aggregation.dropouts", 10**340, "'aggregation.dropouts' is wrong"),
    ("logistic", "model.penalty.l2", 10**340, "'model.penalty.l2' is wrong"),
    ("logistic", f"{AGE}.range", [0, 10**340], f"'{AGE}.range.1' is wrong"),
    ("logistic", f"{AGE}.range", [-1.7e308, 1.7e308], "too wide to compute with"),
    ("linear", "cohort.target.range", [-1.7e308, 1.7e308], "target 'stay': .*too wide to compute with"),
    ("logistic", f"{AGE}.missing", "x" * 101, f"'{AGE}.missing' is wrong: .*'exclude'$"),
    ("logistic", "sites.include", [f"s{i}" for i in range(1001)], "sites.include: 1,001 are listed, and 1,000"),
    ("network", "model.hidden", [1] * 65, "model.hidden: 65 are listed, and 64 is the most"),
    ("descriptive", "model.quantiles", [0.5] * 101, "model.quantiles: 101 are listed, and 100 is the most"),
    (
        "logistic",
        "cohort.features",
        {f"x{i}": {"type": "number", "unit": "1", "range": [0, 1]} for i in range(10_001)},
        "cohort.features: 10,001 are listed, and 10,000 is the most",
    ),
]


def test_an_integer_too_long_to_be_written_out() -> None:
    with pytest.raises(StudyError, match=r"'version' is wrong: .*1000000000$"):
        parse(full("logistic", "binary") | {"version": 16**5000})


def test_as_many_features_as_there_may_be_take_no_time() -> None:
    features = {f"x{i}": Number(unit="1", range=(0, 1)) for i in range(10_000)}
    start = time.perf_counter()
    Cohort(dataset="d", patient="id", features=features)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("model", "path", "value", "sentence"), RULES)
def test_each_rule_says_what_is_wrong_and_where(model: str, path: str, value: Any, sentence: str) -> None:
    content = copy.deepcopy(next(content for content in DOCUMENTS if content["model"]["kind"] == model))
    *parents, last = path.split(".")
    at(content, tuple(parents))[last] = value
    with pytest.raises(StudyError, match=sentence) as refused:
        parse(content)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_python_constructors_refuse_by_themselves() -> None:
    for build in (
        lambda: Number(unit="a", range=(2.0, 1.0)),
        lambda: Number(unit="a", range=(0.0, float("nan"))),
        lambda: Category(levels=("x",)),
        lambda: Sites(include=("a", "b")),
        lambda: Sites(include=("a", "b", "c"), minimum=2),
        lambda: Penalty(l2=float("nan")),
        lambda: Study(**{**vars(PYTHON_STUDY), "version": 10**340}),
        lambda: Study(**{**vars(PYTHON_STUDY), "version": -(10**340)}),
        lambda: Number(unit="a", range=(-1.7e308, 1.7e308)),
        lambda: Cohort(dataset="d", patient="id", features=PYTHON_STUDY.cohort.features, minimum=10**340),
    ):
        with pytest.raises(StudyError):
            build()


def test_left_out_training_becomes_newton_for_a_regression() -> None:
    content = full("logistic", "binary")
    del content["training"]
    assert parse(content).training == Newton()


def test_a_summary_may_be_a_block_of_lines() -> None:
    content = copy.deepcopy(DOCUMENTS[0])
    content["purpose"]["summary"] = "Why we ask.\nAnd of whom.\n"
    assert parse(content).purpose.summary.endswith("whom.\n")
    content["cohort"]["dataset"] += "\n"
    with pytest.raises(StudyError, match="U\\+000A"):
        parse(content)
