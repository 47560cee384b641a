"""The study as a document: parsing, canonical bytes (RFC 8785), its id (SHA-256) and a JSON Schema for editors."""

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
import rfc8785

from cohortium.core.errors import StudyError, nearest
from cohortium.core.study import Study

MAX_DOCUMENT_BYTES = 1 << 20
_DEEPEST = 32
_SHOWN = 100
_adapter = pydantic.TypeAdapter(Study)


def hides(character: str) -> bool:
    """Returns whether a character can hide or disarrange text: control, direction, line separator, half a pair."""
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs")


def parse(document: Mapping[str, Any]) -> Study:
    """Returns the study that a parsed YAML or JSON document describes.

    Raises:
        StudyError: a key is unknown or missing, or a value is not allowed; the first problem in one sentence.
    """
    for place, text in _texts(document):
        # YAML's block texts end their lines, and only the summary is long enough to want one
        line_end = "\n" if tuple(place) == ("purpose", "summary") else ""
        hidden = next((one for one in text if hides(one) and one != line_end), None) if not text.isprintable() else None
        if hidden is not None:
            where = f"'{'.'.join(place)}'" if place else "a key of the study"
            raise StudyError(
                f"{where} holds U+{ord(hidden):04X}, a control or invisible character: write plain text on one line"
            )
    try:
        return _adapter.validate_python(document, by_alias=True, by_name=False)
    except pydantic.ValidationError as error:
        # a misspelt key is often lacking under its right name, too
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != _UNKNOWN)
        raise StudyError(_sentence(problems[0])) from None


def document(study: Study) -> dict[str, Any]:
    """Returns the study as plain JSON values, defaults written out and absent values left out."""
    plain: dict[str, Any] = _adapter.dump_python(study, mode="json", by_alias=True, exclude_none=True, warnings=False)
    return plain


def canonical_bytes(study: Study) -> bytes:
    """Returns the bytes to hash, sign and send.

    A study built in Python is checked here as strictly as one that was read from a file.

    Raises:
        StudyError: a value built in Python has a type that a document cannot hold.
    """
    try:
        data = rfc8785.dumps(document(parse(document(study))))
    except (rfc8785.CanonicalizationError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise StudyError(f"the study cannot be written as canonical JSON: {error}") from None
    if len(data) > MAX_DOCUMENT_BYTES:
        raise StudyError(f"the study takes {len(data)} bytes; {MAX_DOCUMENT_BYTES} is the most")
    return data


def from_canonical(data: bytes) -> Study:
    """Returns the study of canonical bytes, refusing any other spelling of the same document.

    Raises:
        StudyError: the bytes are too long, not a study, or not in canonical form.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise StudyError(f"a study of {len(data)} bytes was refused; {MAX_DOCUMENT_BYTES} is the most")
    try:
        content = json.loads(data)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text, and could not be answered
        study = parse(content)
    except (ValueError, RecursionError):
        raise StudyError("the study's bytes are not JSON") from None
    if canonical_bytes(study) != data:
        raise StudyError("the study's bytes are not in canonical form (RFC 8785, defaults written out)")
    return study


def study_id(study: Study) -> str:
    """Returns "sha256:" and the hexadecimal digest of the study's canonical bytes."""
    return study_id_of(canonical_bytes(study))


def study_id_of(data: bytes) -> str:
    """Returns the id of the study whose canonical bytes `data` are."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def json_schema() -> dict[str, Any]:
    """Returns a JSON Schema (2020-12) for editors that complete and check study files."""
    schema = _adapter.json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


_UNKNOWN = "unexpected_keyword_argument"


def _texts(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields every text of a document with its place, and every key with that of its section."""
    if isinstance(value, str):
        yield place, value
    elif len(place) < _DEEPEST and isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str):
                yield place, key
            yield from _texts(inner, (*place, str(key)))
    elif len(place) < _DEEPEST and isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*place, str(index)))


def _sentence(problem: Any) -> str:
    """Returns one sentence for pydantic's account of a problem: where, what, and the nearest right key."""
    *parents, last = problem["loc"] or ("",)
    kind, where = problem["type"], ".".join(str(part) for part in _visible(problem["loc"]))
    if kind == _UNKNOWN:
        known = _known_keys(parents)
        place = f"in '{'.'.join(str(part) for part in _visible(parents))}'" if parents else "of a study"
        return f"unknown key '{last}' {place}{nearest(str(last), known)} (known: {', '.join(known)})"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"the study lacks '{where}': add it"
    if kind == "union_tag_not_found":
        return f"'{where}' lacks {problem['ctx']['discriminator']}: add one"
    if kind == "union_tag_invalid":
        context = problem["ctx"]
        expected = context["expected_tags"].replace("'", "").split(", ")
        key = context["discriminator"].strip("'")
        return (
            f"'{where}.{key}' is '{context['tag']}'{nearest(str(context['tag']), expected)} "
            f"(allowed: {', '.join(expected)})"
        )
    message = problem["msg"][0].lower() + problem["msg"][1:]
    found = problem.get("input")
    if isinstance(found, str):
        shown = f", not {found!r}" if len(found) <= _SHOWN else ""
    else:
        # an integer may be too large to be written out
        shown = f", not {found!r}" if isinstance(found, int | float) and abs(found) < 1e100 else ""
    return f"'{where}' is wrong: {message}{shown}" if where else f"the study is wrong: {message}{shown}"


def _visible(location: Any) -> list[Any]:
    """Drops the union tags that pydantic puts into a location, which no author wrote."""
    return [part for part, tag in _walk(location)[0] if not tag]


def _known_keys(location: Any) -> list[str]:
    return sorted(_walk(location)[1].get("properties", {}))


def _walk(location: Any) -> tuple[list[tuple[Any, bool]], dict[str, Any]]:
    """Follows a location through the schema: each part with whether it is a union tag, and the node at its end."""
    schema = json_schema()
    node, parts = schema, []
    for part in location:
        tags = node.get("discriminator", {}).get("mapping", {})
        tag = part in tags
        parts.append((part, tag))
        if tag:
            node = {"$ref": tags[part]}
        elif isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
        node = _resolve(node if isinstance(node, dict) else {}, schema)
    return parts, node


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while True:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        elif "anyOf" in node:
            node = next(option for option in node["anyOf"] if option.get("type") != "null")
        else:
            return node
