"""Logs as JSON lines. Only what is on a list gets in beside the message, so that no value slips in by an argument."""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TextIO

from cohortium.core.errors import StudyError

LEVELS = ("debug", "info", "warning", "error")
FIELDS = (
    "run",
    "site",
    "round",
    "coordinator",
    "address",
    "reason",
    "principal",
    "serial",
    "kind",
    "status",
    "seconds",
    "bytes",
    "count",
    "code",
    "software",
)
"""What a line may hold beside time, level, part and message. Reasons are the public halves of errors."""
Format = Literal["json", "text"]
_PLACES = 4
"""Frames of an unforeseen error that are told, the innermost first."""


class _Lines(logging.Formatter):
    def __init__(self, style: Format) -> None:
        super().__init__()
        self._kind = style

    def format(self, record: logging.LogRecord) -> str:
        told = {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        # of an unforeseen error its kind and place are told; its text might hold anything
        if record.exc_info and record.exc_info[0]:
            told["error"] = record.exc_info[0].__name__
            places = traceback.extract_tb(record.exc_info[2])
            told["where"] = " < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in places[: -_PLACES - 1 : -1])
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        if self._kind == "json":
            line = {"at": at, "level": record.levelname.lower(), "part": record.name, "message": record.getMessage()}
            return json.dumps(line | told, default=str)
        rest = " ".join(f"{name}={value}" for name, value in told.items())
        return _one_line(f"{at} {record.levelname.lower():7} {record.getMessage()} {rest}".rstrip())


def _one_line(text: str) -> str:
    """Returns text that can neither begin another line nor steer a terminal: others choose some of its words."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


def begin(level: str, style: str, stream: TextIO | None = None) -> None:
    """Sends Cohortium's logs to a stream, standard error if none is given; once a process.

    Raises:
        StudyError: there is no such level or style.
    """
    if level.lower() not in LEVELS or style not in ("json", "text"):
        raise StudyError(f"logs of level '{level}' as '{style}': levels are {', '.join(LEVELS)}; styles json and text")
    logger = logging.getLogger("cohortium")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Lines("json" if style == "json" else "text"))
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
