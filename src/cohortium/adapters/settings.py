"""Strict settings in YAML files that only their owner may write."""

from pathlib import Path
from typing import TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent

from cohortium.adapters import private_files
from cohortium.core.errors import StudyError

_MOST_BYTES = 1 << 16


class Settings(BaseModel):
    """Settings of a file: nothing unknown, and nothing turned into what it is not."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


def read(path: Path, kind: type[S]) -> S:
    """Returns a file's settings.

    Raises:
        StudyError: it is missing, too long, can be written by others, is no YAML, or says what it must not; the
            message names the file.
    """
    try:
        mode, data = private_files.read(path, _MOST_BYTES)
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror})") from None
    if private_files.is_open(mode, 0o022):
        raise StudyError(f"{path} can be written by others: chmod 600 it, and read it again")
    if len(data) > _MOST_BYTES:
        raise StudyError(f"{path} is longer than {_MOST_BYTES} bytes, and no settings are")
    try:
        text = data.decode()
        if any(isinstance(event, AliasEvent) for event in YAML(typ="safe", pure=True).parse(text)):
            raise StudyError(f"{path} holds a YAML alias (*name): write the value out")
        content = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise StudyError(f"{path} is no valid YAML{line}: {error.problem}") from None
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError):
        # a value that is not what its tag says fails in whatever way its conversion does
        raise StudyError(f"{path} is no valid YAML") from None
    try:
        return kind.model_validate({} if content is None else content)
    except pydantic.ValidationError as error:
        problem = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"][0].lower() + problem["msg"][1:]
        raise StudyError(f"{path} is wrong at '{where}': {message}" if where else f"{path} holds no settings") from None
