"""What is read of a patient: features and target, with ranges and levels that are public knowledge."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from cohortium.core.fields import STRICT, interval, names, require, within

Missing = Literal["refuse", "impute", "exclude"]


@dataclass(frozen=True, kw_only=True)
class Number:
    """A feature measured as a number, inside a range that is public knowledge (never taken from the data)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    type: Literal["number"] = "number"
    unit: str
    """Unit of measure (UCUM where one exists); '1' for none."""
    range: tuple[float, float]
    """Lowest and highest value that the study admits."""
    missing: Missing = "refuse"
    """A missing value: refuse the data, impute the mean of all sites, or exclude the patient."""
    outside: Literal["refuse", "clip", "missing"] = "refuse"
    """A value outside the range: refuse the data, clip it, or treat it as missing."""

    def __post_init__(self) -> None:
        interval("a number feature", self.range)


@dataclass(frozen=True, kw_only=True)
class Category:
    """A feature with agreed levels; the first one is the reference in a regression."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    type: Literal["category"] = "category"
    levels: tuple[str, ...]
    """The agreed levels, at least two, as they are written in the data."""
    missing: Missing = "refuse"
    """A missing value: refuse the data, impute the most frequent level of all sites, or exclude the patient."""
    outside: Literal["refuse", "missing"] = "refuse"
    """A value that is not a level: refuse the data, or treat it as missing."""

    def __post_init__(self) -> None:
        require(len(self.levels) >= 2, "a category feature needs at least two levels")
        require(len(self.levels) <= 1000, f"a category feature has {len(self.levels)} levels: 1000 is the most")
        require(len(set(self.levels)) == len(self.levels), f"levels {list(self.levels)} hold one twice")


Feature = Annotated[Number | Category, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True)
class BinaryTarget:
    """What a classifier predicts: whether the second of two levels holds."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    type: Literal["binary"] = "binary"
    name: str
    levels: tuple[str, str] = ("0", "1")
    """The two values in the data; the model predicts the second."""
    missing: Literal["refuse", "exclude"] = "refuse"

    def __post_init__(self) -> None:
        names("target", [self.name])
        require(self.levels[0] != self.levels[1], f"target '{self.name}': its two levels must differ")


@dataclass(frozen=True, kw_only=True)
class NumberTarget:
    """What a linear regression predicts."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    type: Literal["number"] = "number"
    name: str
    unit: str
    range: tuple[float, float]
    missing: Literal["refuse", "exclude"] = "refuse"
    outside: Literal["refuse", "clip"] = "refuse"

    def __post_init__(self) -> None:
        names("target", [self.name])
        interval(f"target '{self.name}'", self.range)


@dataclass(frozen=True, kw_only=True)
class CountTarget:
    """What a Poisson regression predicts: a whole number of events per patient."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    type: Literal["count"] = "count"
    name: str
    maximum: Annotated[int, Field(ge=1, le=1_000_000)]
    """Largest count that the study admits."""
    missing: Literal["refuse", "exclude"] = "refuse"

    def __post_init__(self) -> None:
        names("target", [self.name])
        within(f"target '{self.name}': maximum", self.maximum, 1)


Target = Annotated[BinaryTarget | NumberTarget | CountTarget, Field(discriminator="type")]
