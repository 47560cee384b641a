"""The study: everything that will be approved, hashed and signed, as one frozen value.

A YAML file (`cohortium.core.document`) and the classes here build the same value. Each class checks what it can
by itself; what needs the whole (does the range proof hold?) is checked when the study is compiled. The sections are in
`features`, `models`, `training` and `protection`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from cohortium.core.errors import StudyError
from cohortium.core.features import Feature, Target
from cohortium.core.fields import LARGEST, STRICT, at_most, names, require, within
from cohortium.core.models import Descriptive, Model, Network, Regression
from cohortium.core.protection import Aggregation, Privacy
from cohortium.core.training import LEARNING_RATES, Averaging, Descent, Newton, OneShot, Preprocessing, Training


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Which patients, and what is read of each."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    dataset: str
    """Name of the dataset at each site; the site decides which file or database that is."""
    patient: str
    """Column that identifies the patient; it never leaves the site."""
    records: Literal["one", "several"] = "one"
    """Rows of a patient: exactly one, or any number."""
    features: dict[str, Feature]
    """Columns by name; kept in alphabetical order."""
    target: Target | None = None
    where: str | None = None
    """Filter over the features, as in "age >= 18 and sex == 'female'"; unknown values do not pass."""
    minimum: Annotated[int, Field(ge=1, le=LARGEST)] = 20
    """A site with fewer patients takes no part."""
    maximum: Annotated[int, Field(ge=1, le=100_000_000)] = 100_000
    """Most records that a site may bring; the range proof rests on it."""

    def __post_init__(self) -> None:
        at_most("cohort.features", self.features, 10_000)
        object.__setattr__(self, "features", dict(sorted(self.features.items())))
        names("dataset", [self.dataset])
        names("patient column", [self.patient])
        names("feature", self.features)
        require(bool(self.features), "the cohort has no features: name at least one column")
        taken = {self.patient} | ({self.target.name} if self.target else set())
        for name in taken & self.features.keys():
            raise StudyError(f"column '{name}' is a feature and also the patient column or the target: pick one")
        require(self.target is None or self.target.name != self.patient, "the target is the patient column")
        within("cohort.minimum", self.minimum, 1, LARGEST)
        within("cohort.maximum", self.maximum, self.minimum)


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """Why the data are used."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    summary: str
    use: tuple[str, ...] = ()
    """GA4GH DUO codes of the intended use."""


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Who takes part."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    include: tuple[str, ...]
    """The sites' names; kept in alphabetical order."""
    minimum: Annotated[int, Field(ge=3, le=LARGEST)] = 3
    """Fewest sites over which a sum may be opened."""
    per_round: Annotated[int, Field(ge=3, le=LARGEST)] | None = None
    """Sites that contribute to each round of a network's training; left out: all of them."""
    selection: Literal["random", "adaptive"] | None = None
    """Who they are: drawn by public randomness (default), or those that answer fast and have waited long."""

    def __post_init__(self) -> None:
        at_most("sites.include", self.include, 1000)
        names("site", self.include)
        object.__setattr__(self, "include", tuple(sorted(self.include)))
        require(
            self.minimum >= 3,
            f"sites.minimum is {self.minimum}: at least 3, because in a sum over two each learns the other's value",
        )
        require(
            len(self.include) >= self.minimum,
            f"the study names {len(self.include)} sites and needs {self.minimum}: include more, at least 3",
        )
        if self.per_round is None:
            require(self.selection is None, "sites.selection chooses sites of a round: give sites.per_round, or none")
            return
        within("sites.per_round", self.per_round, self.minimum, len(self.include))
        if self.selection is None:
            object.__setattr__(self, "selection", "random")

    @property
    def fewest(self) -> int:
        """The fewest sites that a round may ask for a contribution."""
        return self.per_round or len(self.include)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study. Equal studies have equal canonical bytes and one SHA-256 id (`cohortium.core.document`)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: Annotated[str, Field(alias="study")]
    version: Annotated[int, Field(ge=1, le=LARGEST)] = 1
    purpose: Purpose
    sites: Sites
    cohort: Cohort
    model: Model
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    training: Training | None = None
    """Left out: Newton's method for a regression. Descriptive statistics take none."""
    aggregation: Aggregation = field(default_factory=Aggregation)
    privacy: Privacy

    def __post_init__(self) -> None:
        names("study", [self.name])
        within("version", self.version, 1, LARGEST)
        if self.training is None and isinstance(self.model, Regression):
            object.__setattr__(self, "training", Newton())
        if isinstance(self.training, Descent) and self.training.learning_rate is None:
            rate = LEARNING_RATES.get(self.model.kind)
            object.__setattr__(self, "training", replace(self.training, learning_rate=rate))
        needed = _NEEDED_TRAINING[type(self.model)]
        require(
            isinstance(self.training, needed),
            f"model '{self.model.kind}' trains by {_TRAINING_WORDS[type(self.model)]}: change 'training' accordingly",
        )
        targets = _NEEDED_TARGET[self.model.kind]
        found = self.cohort.target.type if self.cohort.target else "none"
        require(
            found in targets,
            f"model '{self.model.kind}' needs a target of type {' or '.join(targets)}, and cohort.target is {found}",
        )


_NEEDED_TRAINING: Mapping[type, tuple[type, ...]] = {
    Regression: (Newton, Descent, OneShot),
    Network: (Averaging,),
    Descriptive: (type(None),),
}
_TRAINING_WORDS: Mapping[type, str] = {
    Regression: "'algorithm: newton', 'descent' or 'adassp'",
    Network: "'algorithm: fedavg'",
    Descriptive: "itself, without a 'training' section",
}
_NEEDED_TARGET: Mapping[str, tuple[str, ...]] = {
    "logistic": ("binary",),
    "linear": ("number",),
    "poisson": ("count",),
    "network": ("binary", "number"),
    "descriptive": ("none", "binary", "number", "count"),
}
