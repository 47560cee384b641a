"""What the classes of a study share: strictness, names, ranges and limits, each with its sentence for people."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Sized

from pydantic import ConfigDict

from cohortium.core.errors import StudyError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
LARGEST = 1_000_000_000
"""No whole number of a study is larger."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise StudyError(message)


def at_most(what: str, things: Sized, most: int) -> None:
    require(len(things) <= most, f"{what}: {len(things):,} are listed, and {most:,} is the most")


def names(kind: str, names: Sequence[str] | Mapping[str, object]) -> None:
    for name in names:
        require(
            isinstance(name, str) and _NAME.fullmatch(name) is not None,
            f"{kind} '{name}' is not a valid name: use 1 to 63 letters, digits, '_', '-' or '.', starting with a "
            "letter or a digit",
        )
    doubles = sorted(name for name, times in Counter(list(names)).items() if times > 1)
    require(not doubles, f"{kind} '{', '.join(doubles)}' is listed twice: list it once")


def interval(what: str, bounds: tuple[float, float]) -> None:
    low, high = bounds
    require(
        math.isfinite(low) and math.isfinite(high) and low < high,
        f"{what}: range [{low:g}, {high:g}] must rise from a lower to a higher finite number",
    )
    require(math.isfinite(high - low), f"{what}: range [{low:g}, {high:g}] is too wide to compute with: narrow it")


def within(what: str, value: float, least: float, most: float = math.inf) -> None:
    if not least <= value <= most:
        limit = f"at most {most:,}" if value > most else f"at least {least:g}"
        # an integer may be too large to be written as a float
        shown = f"{value:g}" if abs(value) <= LARGEST or isinstance(value, float) else "a number of many digits"
        raise StudyError(f"{what} is {shown}: it must be {limit}")
