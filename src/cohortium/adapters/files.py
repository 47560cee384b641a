"""Study and model files."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, Event

from cohortium.core.document import MAX_DOCUMENT_BYTES, parse
from cohortium.core.errors import CohortiumError, StudyError
from cohortium.core.study import Study
from cohortium.learning import model
from cohortium.learning.model import MAX_MODEL_BYTES, GlobalModel

_DEEPEST = 32


def read_study(path: Path) -> Study:
    """Returns the study of a YAML 1.2 file (JSON is YAML too).

    Raises:
        StudyError: the file cannot be read, is no YAML, or is no study; the message names the file.
    """
    try:
        return parse_study(_read(path, MAX_DOCUMENT_BYTES))
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None


def parse_study(text: bytes | str) -> Study:
    """Returns the study of YAML text.

    Raises:
        StudyError: it is no YAML, or no study.
    """
    return parse(_mapping(text.encode() if isinstance(text, str) else text))


def read_model(path: Path) -> GlobalModel:
    """Returns the model of a file that `write_model` wrote.

    Raises:
        StudyError: it cannot be read or is no model; the message names the file.
    """
    try:
        return model.from_bytes(_read(path, MAX_MODEL_BYTES))
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None


def read_text(path: Path) -> str:
    """Returns a text file, at most 1 MiB of UTF-8.

    Raises:
        StudyError: it cannot be read or is no such text; the message names the file.
    """
    try:
        return _read(path, MAX_DOCUMENT_BYTES).decode()
    except UnicodeDecodeError:
        raise StudyError(f"{path}: this is no UTF-8 text") from None
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None


def write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        CohortiumError: it cannot be written; the message says why.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise CohortiumError(f"{path} cannot be written: {error.strerror}") from None


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise StudyError(f"the file cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise StudyError(f"the file is longer than {limit} bytes")
    return data


def _mapping(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
        _require_plain(YAML(typ="safe", pure=True).parse(text))
        content = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise StudyError(f"this is no valid YAML{line}: {error.problem}") from None
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError):
        # a value that is not what its tag says fails in whatever way its conversion does
        raise StudyError("this is no valid YAML") from None
    if not isinstance(content, dict):
        raise StudyError("a study is a YAML mapping that starts with 'study: NAME'")
    return content


def _require_plain(events: Iterable[Event]) -> None:
    """Refuses aliases and deep nesting while the text is scanned, which takes long where brackets nest deeply."""
    depth = 0
    for event in events:
        if isinstance(event, AliasEvent):
            raise StudyError("YAML aliases (*name) are not allowed in a study: write the value out")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _DEEPEST:
            raise StudyError(f"this YAML nests deeper than {_DEEPEST} levels, and a study needs a handful")
