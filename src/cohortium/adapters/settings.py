"""Strict settings in YAML files that only their owner may write: one reader for all of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent

from cohortium.adapters import private_files
from cohortium.core.errors import CohortiumError, StudyError

_MOST_BYTES = 1 << 16

Unusable = Callable[[Path, str], CohortiumError]
"""Makes an error from a file's path and what is wrong with the file, as in 'is no valid YAML'."""
Problem = Mapping[str, Any]
"""Pydantic's account of a problem."""


class Settings(BaseModel):
    """Settings of a file: nothing unknown, and nothing turned into what it is not."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


def read(path: Path, kind: type[S]) -> S:
    """Returns the settings of a file of a consortium, a site's place in one, or a person.

    Raises:
        StudyError: it is missing, too long, can be written by others, is no YAML, or says what it must not; the
            message names the file.
    """
    try:
        data = contents(path, _unusable, long=", and no settings are")
    except FileNotFoundError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from None
    return parse(data, path, kind, _unusable, lambda problem: sentence(problem, "holds no settings"))


def contents(path: Path, unusable: Unusable, *, harm: str = "", long: str = "") -> bytes:
    """Returns the bytes of a settings file.

    Args:
        unusable: makes the error.
        harm: ends the sentence on others who may write it, with what they could do.
        long: ends the sentence on a file that is too long.

    Raises:
        FileNotFoundError: there is no such file.
        CohortiumError: it cannot be read, can be written by others than its owner, or is too long.
    """
    try:
        mode, data = private_files.read(path, _MOST_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unusable(path, f"cannot be read ({error.strerror})") from None
    if private_files.is_open(mode, 0o022):
        raise unusable(path, f"can be written by others{harm}: chmod 600 it, and read it again")
    if len(data) > _MOST_BYTES:
        raise unusable(path, f"is longer than {_MOST_BYTES} bytes{long}")
    return data


def parse(data: bytes, path: Path, kind: type[S], unusable: Unusable, wrong: Callable[[Problem], str]) -> S:
    """Returns what YAML text says.

    Args:
        path: where it was read; for errors.
        kind: what it may say.
        unusable: makes the error.
        wrong: says what is wrong where the text does not fit `kind`.

    Raises:
        CohortiumError: it is no YAML, or says what it must not; the message names `path`.
    """
    try:
        text = data.decode()
        if any(isinstance(event, AliasEvent) for event in YAML(typ="safe", pure=True).parse(text)):
            raise unusable(path, "holds a YAML alias (*name): write the value out")
        content = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise unusable(path, f"is no valid YAML{line}: {error.problem}") from None
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError):
        # a value that is not what its tag says fails in whatever way its conversion does
        raise unusable(path, "is no valid YAML") from None
    try:
        return kind.model_validate({} if content is None else content)
    except pydantic.ValidationError as error:
        # a key that is missing may be there under a wrong name
        problem = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
        raise unusable(path, wrong(problem)) from None


def sentence(problem: Problem, nothing: str) -> str:
    """Returns one sentence for a problem; `nothing` is the one for a text that holds no keys at all."""
    where = ".".join(map(str, problem["loc"]))
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"is wrong at '{where}': {message}" if where else nothing


def _unusable(path: Path, reason: str) -> CohortiumError:
    return StudyError(f"{path} {reason}")
