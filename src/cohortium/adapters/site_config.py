"""`site.yaml` in a site's home: which file is which dataset, and what the agent may use of its machine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cohortium.adapters import private_files, settings
from cohortium.adapters.settings import Problem, Settings
from cohortium.adapters.sources import FileSource
from cohortium.core.errors import SiteError, nearest

CONFIG = "site.yaml"
_PUBLIC = "this site's home cannot be used"

EXAMPLE = """\
# What this hospital's agent serves and uses. Only the file's owner may be able to write it (chmod 600).
#
# Datasets by the names that studies call them by (cohort.dataset), each a CSV, TSV, Parquet or JSON file. A path that
# is not absolute begins at this folder. A dataset that is not listed is offered to nobody.
datasets: {}
#  heart_disease: records.csv
#
# limits:                     # what the agent may use of this machine; what is left out is not limited
#   memory_mb: 8192           # a round that needs more is refused
#   cpus: 2
#   nice: 10                  # from 0 to 19: the higher, the more others come first
# health:
#   listen: 127.0.0.1:9100    # where a monitor may ask whether the agent is well
# log:
#   level: info               # debug, info, warning or error
#   format: json              # json or text
"""


@dataclass(frozen=True)
class Limits:
    """What an agent may use of its machine; None: not limited."""

    memory_mb: int | None = None
    cpus: int | None = None
    nice: int | None = None


@dataclass(frozen=True)
class SiteConfig:
    """How a site's agent is set up.

    Attributes:
        datasets: the file of each dataset that the site offers.
        health: the host and port at which its health is told, or None.
        level, format: how it logs.
    """

    datasets: dict[str, Path] = field(default_factory=dict)
    limits: Limits = Limits()
    health: tuple[str, int] | None = None
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"

    def sources(self) -> dict[str, FileSource]:
        """Returns the datasets that the site offers."""
        return {name: FileSource(path) for name, path in self.datasets.items()}


_Word = Annotated[str, Field(min_length=1)]


class _Limits(Settings, strict=True):
    memory_mb: Annotated[int, Field(ge=256, le=1 << 30)] | None = None
    cpus: Annotated[int, Field(ge=1, le=4096)] | None = None
    nice: Annotated[int, Field(ge=0, le=19)] | None = None


class _Health(Settings, strict=True):
    listen: Annotated[str, Field(pattern=r"^[^:\s]+:[0-9]{1,5}$")]


class _Log(Settings, strict=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"


class _Site(Settings, strict=True):
    datasets: dict[_Word, _Word] = Field(default_factory=dict)
    limits: _Limits = _Limits()
    health: _Health | None = None
    log: _Log = _Log()


_SECTIONS: dict[str, type[Settings]] = {"": _Site, "limits": _Limits, "health": _Health, "log": _Log}


def read(folder: Path) -> SiteConfig:
    """Returns what a home's `site.yaml` says. Without the file nothing is offered, and nothing limited.

    Raises:
        SiteError: it cannot be read, can be written by others than its owner, is no YAML, or says what it may not.
    """
    path = folder / CONFIG
    try:
        data = settings.contents(path, _unusable, harm=", who could offer other data")
    except FileNotFoundError:
        return SiteConfig()
    return parse(data, path)


def parse(data: bytes, path: Path) -> SiteConfig:
    """Returns what YAML text says; `path` is where it was read, and where paths of data begin.

    Raises:
        SiteError: it is no YAML, or says what it may not.
    """
    told = settings.parse(data, path, _Site, _unusable, _sentence)
    return SiteConfig(
        datasets={name: path.parent / file for name, file in told.datasets.items()},
        limits=Limits(told.limits.memory_mb, told.limits.cpus, told.limits.nice),
        health=_address(told.health.listen, path) if told.health else None,
        level=told.log.level,
        format=told.log.format,
    )


def create(folder: Path) -> Path | None:
    """Writes a commented example into a home, unless there is a `site.yaml`; returns its path if it did.

    Raises:
        SiteError: it cannot be written.
    """
    path = folder / CONFIG
    try:
        private_files.create(path, EXAMPLE.encode())
    except FileExistsError:
        return None
    except OSError as error:
        raise _unusable(path, f"cannot be written ({error.strerror})") from None
    return path


def _address(text: str, path: Path) -> tuple[str, int]:
    host, port = text.rsplit(":", 1)
    if not 0 < int(port) < 1 << 16:
        raise _unusable(path, f"is wrong at 'health.listen': {port} is no port; give 1 to 65535")
    return host, int(port)


def _sentence(problem: Problem) -> str:
    *parents, last = map(str, problem["loc"] or ("",))
    where = ".".join([*parents, last])
    if problem["type"] == "extra_forbidden":
        known = sorted(_SECTIONS[".".join(parents)].model_fields)
        return f"has an unknown key '{where}'{nearest(last, known)} (known: {', '.join(known)})"
    if problem["type"] == "missing":
        return f"lacks '{where}': add it"
    return settings.sentence(problem, "is no site.yaml: see cohortium site init")


def _unusable(path: Path, reason: str) -> SiteError:
    return SiteError(f"{path} {reason}", public=_PUBLIC)
