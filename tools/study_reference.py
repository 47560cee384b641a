"""Writes docs/study-reference.md: every key of a study file, from the JSON Schema that the study's classes give.

    python tools/study_reference.py

A meaning is the key's docstring in `cohortium.core.study`; the few that need none there have theirs below.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cohortium import json_schema

PAGE = Path(__file__).parents[1] / "docs" / "study-reference.md"
TOP = "The file itself"
INTRODUCTION = """\
# Study file reference

<!-- Written by tools/study_reference.py from the classes in cohortium.core.study; do not edit by hand. -->

A study file is YAML 1.2 (JSON is YAML too), at most 1 MiB, without aliases and without repeated keys. What it does
not know it refuses: a misspelt key is an error, never ignored. `cohortium study new` writes a commented example,
`cohortium study check` says what a file would guarantee, and `cohortium study schema` prints the same rules as a JSON
Schema for editors.

Defaults belong to the study: they are written out before its id is computed, so leaving a key out and writing its
default give the same study. The order of sites and features does not matter either; both are sorted. The order of
levels does: the first level is the reference, and a binary target's second one is what a model predicts.

Some keys are recorded, hashed and shown, and this version acts on them no further: `version`, `purpose` and
`cohort.dataset` (a site is given its data file by name). `sites.minimum` only asks that the study names as many sites:
how many a round needs follows from `aggregation.dropouts`, and
from `sites.per_round`. Without `privacy.epsilon`, `privacy.unit` says by whom a
`training.clip` counts, and changes nothing else.

What goes with `privacy.epsilon`, and what is refused beside it, is on the [researcher's page](researcher.md).

## The filter

`cohort.where` is an expression over the study's features: comparisons (`==`, `!=`, `<`, `<=`, `>`, `>=`, chained as in
`18 <= age < 65`), `in (...)`, `not in (...)`, `is None`, `is not None`, joined by `and`, `or`, `not` and
parentheses. A comparison with a missing value is neither true nor false, and only patients for whom the whole
expression is true pass: where `age` is missing, neither `age >= 18` nor `not age >= 18` lets the patient in, before any
rule for missing values applies.
"""
MEANINGS = {
    "Study.study": "The study's name: up to 63 letters, digits, `_`, `-` or `.`. Reports and default folders carry it.",
    "Study.version": "Counts the study's revisions; part of its id.",
    "Study.purpose": "Why the data are used.",
    "Study.sites": "Who takes part.",
    "Study.cohort": "Which patients, and what is read of each.",
    "Study.model": "What is fitted or described.",
    "Study.preprocessing": "How features reach the model.",
    "Study.aggregation": "How the sites' vectors are summed.",
    "Study.privacy": "Whom privacy protects, and by how much. The section must be there, if only as `{unit: patient}`.",
    "Purpose.summary": "One sentence for people. It is shown and hashed, not acted upon.",
    "Cohort.target": "What is predicted. Descriptive statistics need none; if there is one, they describe it too.",
    "Number.type": "A feature measured as a number.",
    "Category.type": "A feature with agreed levels.",
    "BinaryTarget.type": "One of two outcomes.",
    "BinaryTarget.name": "The target's column; no feature may have it.",
    "BinaryTarget.missing": "A missing outcome: refuse the data, or exclude the patient.",
    "NumberTarget.type": "A number.",
    "NumberTarget.name": "The target's column; no feature may have it.",
    "NumberTarget.unit": "Unit of measure; '1' for none.",
    "NumberTarget.range": "Lowest and highest value that the study admits; public, never taken from the data.",
    "NumberTarget.missing": "A missing outcome: refuse the data, or exclude the patient.",
    "NumberTarget.outside": "A value outside the range: refuse the data, or clip it.",
    "CountTarget.type": "A whole number of events.",
    "CountTarget.name": "The target's column; no feature may have it.",
    "CountTarget.missing": "A missing count: refuse the data, or exclude the patient.",
    "Regression.kind": "Logistic for a binary target, linear for a number, Poisson for a count.",
    "Regression.penalty": "Ridge penalty.",
    "Penalty.l2": "Strength, on the scale that `preprocessing.scale` names; 0 for none.",
    "Network.kind": "A feed-forward network. Training it needs PyTorch.",
    "Network.activation": "Between the layers.",
    "Descriptive.kind": "A cohort's Table 1. `cohortium study describe` makes such a study of any other.",
    "Descriptive.quantiles": "Which quantiles to estimate.",
    "Newton.algorithm": "For the regressions, without differential privacy.",
    "Newton.rounds": "Most rounds; using them up is an error. The preprocessing round is not counted.",
    "Descent.algorithm": "For the regressions, with or without differential privacy.",
    "Descent.rounds": "Rounds of training, all of which are run. The preprocessing round is not counted.",
    "OneShot.algorithm": "For linear and logistic regressions, in one round of training.",
    "Averaging.algorithm": "For networks.",
    "Averaging.rounds": "Rounds of training. The preprocessing round is not counted.",
    "Averaging.local": "What a site does in a round.",
    "Averaging.server": "What the coordinator does with the mean update.",
    "Local.batch_size": "Patients in a batch.",
    "Local.learning_rate": "Step size of the sites' gradient descent.",
    "Server.learning_rate": "Step size on the mean update; 1 with `sgd` is plain averaging.",
    "Server.beta1": "Decay of the first moment (all but `sgd`).",
    "Server.beta2": "Decay of the second moment (`adam`, `yogi`).",
}
Node = dict[str, Any]


def page() -> str:
    """Returns the page's text."""
    schema = json_schema()
    parts = [INTRODUCTION]
    for where, heading, title, node in sections(TOP, TOP, "Study", schema, schema["$defs"]):
        keys = node["properties"]
        about = [] if where == TOP else [node["description"]]
        rows = [
            f"| `{key}` | {kind(one, child(where, key))} | {default(key, one, node, heading)} "
            f"| {meaning(title, key, one)} |"
            for key, one in keys.items()
        ]
        table = "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])
        parts.append("\n\n".join([f"## {heading}", *about, table]) + "\n")
    return "\n".join(parts)


def sections(where: str, heading: str, title: str, node: Node, defs: Node) -> Iterator[tuple[str, str, str, Node]]:
    """Yields each section of a study file: its place, its heading, its class and its schema; outer ones first."""
    yield where, heading, title, node
    for key, one in node["properties"].items():
        place = child(where, key)
        for tag, name in options(one).items():
            yield from sections(place, f"`{place}`{tag}", name, defs[name], defs)


def options(node: Node) -> dict[str, str]:
    """Returns the classes that a key's section may be of, by what tells them apart in its heading."""
    if "$ref" in node:
        return {"": name_of(node["$ref"])}
    inner: Node = node.get("additionalProperties") or next(iter(node.get("anyOf", [])), {})
    if "discriminator" in inner:
        node = inner
    elif "anyOf" in node and "$ref" in inner:
        # a section that may be left out
        return {"": name_of(inner["$ref"])}
    if "discriminator" not in node:
        return {}
    key = node["discriminator"]["propertyName"]
    tags: dict[str, list[str]] = {}
    for tag, reference in node["discriminator"]["mapping"].items():
        tags.setdefault(name_of(reference), []).append(tag)
    order = [name_of(option["$ref"]) for option in node["oneOf"]]
    return {f" with `{key}: {' | '.join(tags[name])}`": name for name in order}


def child(where: str, key: str) -> str:
    place = key if where == TOP else f"{where}.{key}"
    return f"{place}.NAME" if place == "cohort.features" else place


def name_of(reference: str) -> str:
    return reference.rsplit("/", 1)[1]


def kind(node: Node, place: str) -> str:
    """Returns what a value may be, in words."""
    if options(node):
        return f"a section for each name: `{place}`" if place.endswith(".NAME") else f"section `{place}`"
    if "anyOf" in node:
        return kind(node["anyOf"][0], place)
    if "const" in node or "enum" in node:
        return " or ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if node["type"] == "array":
        if "prefixItems" in node:
            return f"list of {len(node['prefixItems'])}: {kind(node['prefixItems'][0], place)}"
        return f"list: {kind(node['items'], place)}"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`"}
    signs = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {node[sign]:,}" for sign, word in signs.items() if sign in node]
    return " ".join([words[node["type"]], *limits])


def default(key: str, one: Node, node: Node, heading: str) -> str:
    """Returns a key's default; what tells sections apart must be given."""
    if key in node.get("required", ()) or f"`{key}: " in heading:
        return "required"
    if "default" not in one:
        return "its defaults"
    value = one["default"]
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def meaning(title: str, key: str, one: Node) -> str:
    """Returns a key's meaning: from its class or from here, never from both."""
    written, here = one.get("description"), MEANINGS.get(f"{title}.{key}")
    if (written is None) == (here is None):
        raise SystemExit(f"{title}.{key} needs one meaning: in cohortium.core.study, or in {Path(__file__).name}")
    text: str = " ".join((written or here or "").split()).replace("|", "\\|")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
