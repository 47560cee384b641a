"""The study: everything that will be approved, hashed and signed, as one frozen value.

A YAML file (`cohortium.core.document`) and the classes here build the same value. Each class checks what it can
by itself; what needs the whole (does the range proof hold?) is checked when the study is compiled.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from cohortium.core.errors import StudyError

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}")
_LARGEST = 1_000_000_000
"""No whole number of a study is larger."""

Missing = Literal["refuse", "impute", "exclude"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise StudyError(message)


def _at_most(what: str, things: Sized, most: int) -> None:
    _require(len(things) <= most, f"{what}: {len(things):,} are listed, and {most:,} is the most")


def _names(kind: str, names: Sequence[str] | Mapping[str, object]) -> None:
    for name in names:
        _require(
            isinstance(name, str) and _NAME.fullmatch(name) is not None,
            f"{kind} '{name}' is not a valid name: use 1 to 63 letters, digits, '_', '-' or '.', starting with a "
            "letter or a digit",
        )
    doubles = sorted(name for name, times in Counter(list(names)).items() if times > 1)
    _require(not doubles, f"{kind} '{', '.join(doubles)}' is listed twice: list it once")


def _interval(what: str, bounds: tuple[float, float]) -> None:
    low, high = bounds
    _require(
        math.isfinite(low) and math.isfinite(high) and low < high,
        f"{what}: range [{low:g}, {high:g}] must rise from a lower to a higher finite number",
    )
    _require(math.isfinite(high - low), f"{what}: range [{low:g}, {high:g}] is too wide to compute with: narrow it")


def _within(what: str, value: float, least: float, most: float = math.inf) -> None:
    if not least <= value <= most:
        limit = f"at most {most:,}" if value > most else f"at least {least:g}"
        # an integer may be too large to be written as a float
        shown = f"{value:g}" if abs(value) <= _LARGEST or isinstance(value, float) else "a number of many digits"
        raise StudyError(f"{what} is {shown}: it must be {limit}")


@dataclass(frozen=True, kw_only=True)
class Number:
    """A feature measured as a number, inside a range that is public knowledge (never taken from the data)."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
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
        _interval("a number feature", self.range)


@dataclass(frozen=True, kw_only=True)
class Category:
    """A feature with agreed levels; the first one is the reference in a regression."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    type: Literal["category"] = "category"
    levels: tuple[str, ...]
    """The agreed levels, at least two, as they are written in the data."""
    missing: Missing = "refuse"
    """A missing value: refuse the data, impute the most frequent level of all sites, or exclude the patient."""
    outside: Literal["refuse", "missing"] = "refuse"
    """A value that is not a level: refuse the data, or treat it as missing."""

    def __post_init__(self) -> None:
        _require(len(self.levels) >= 2, "a category feature needs at least two levels")
        _require(len(self.levels) <= 1000, f"a category feature has {len(self.levels)} levels: 1000 is the most")
        _require(len(set(self.levels)) == len(self.levels), f"levels {list(self.levels)} hold one twice")


Feature = Annotated[Number | Category, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True)
class BinaryTarget:
    """What a classifier predicts: whether the second of two levels holds."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    type: Literal["binary"] = "binary"
    name: str
    levels: tuple[str, str] = ("0", "1")
    """The two values in the data; the model predicts the second."""
    missing: Literal["refuse", "exclude"] = "refuse"

    def __post_init__(self) -> None:
        _names("target", [self.name])
        _require(self.levels[0] != self.levels[1], f"target '{self.name}': its two levels must differ")


@dataclass(frozen=True, kw_only=True)
class NumberTarget:
    """What a linear regression predicts."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    type: Literal["number"] = "number"
    name: str
    unit: str
    range: tuple[float, float]
    missing: Literal["refuse", "exclude"] = "refuse"
    outside: Literal["refuse", "clip"] = "refuse"

    def __post_init__(self) -> None:
        _names("target", [self.name])
        _interval(f"target '{self.name}'", self.range)


@dataclass(frozen=True, kw_only=True)
class CountTarget:
    """What a Poisson regression predicts: a whole number of events per patient."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    type: Literal["count"] = "count"
    name: str
    maximum: Annotated[int, Field(ge=1, le=1_000_000)]
    """Largest count that the study admits."""
    missing: Literal["refuse", "exclude"] = "refuse"

    def __post_init__(self) -> None:
        _names("target", [self.name])
        _within(f"target '{self.name}': maximum", self.maximum, 1)


Target = Annotated[BinaryTarget | NumberTarget | CountTarget, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Which patients, and what is read of each. One row is one patient."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    dataset: str
    """Name of the dataset at each site; the site decides which file or database that is."""
    patient: str
    """Column that identifies the patient; it never leaves the site."""
    features: dict[str, Feature]
    """Columns by name; kept in alphabetical order."""
    target: Target | None = None
    where: str | None = None
    """Filter over the features, as in "age >= 18 and sex == 'female'"; unknown values do not pass."""
    minimum: Annotated[int, Field(ge=1, le=_LARGEST)] = 20
    """A site with fewer patients takes no part."""
    maximum: Annotated[int, Field(ge=1, le=100_000_000)] = 100_000
    """Most patients that a site may bring; the range proof rests on it."""

    def __post_init__(self) -> None:
        _at_most("cohort.features", self.features, 10_000)
        object.__setattr__(self, "features", dict(sorted(self.features.items())))
        _names("dataset", [self.dataset])
        _names("patient column", [self.patient])
        _names("feature", self.features)
        _require(bool(self.features), "the cohort has no features: name at least one column")
        taken = {self.patient} | ({self.target.name} if self.target else set())
        for name in taken & self.features.keys():
            raise StudyError(f"column '{name}' is a feature and also the patient column or the target: pick one")
        _require(self.target is None or self.target.name != self.patient, "the target is the patient column")
        _within("cohort.minimum", self.minimum, 1, _LARGEST)
        _within("cohort.maximum", self.maximum, self.minimum)


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """Why the data are used."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    summary: str
    use: tuple[str, ...] = ()
    """GA4GH DUO codes of the intended use."""


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Who takes part."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    include: tuple[str, ...]
    """The sites' names; kept in alphabetical order."""
    minimum: Annotated[int, Field(ge=3, le=_LARGEST)] = 3
    """Fewest sites over which a sum may be opened."""

    def __post_init__(self) -> None:
        _at_most("sites.include", self.include, 1000)
        _names("site", self.include)
        object.__setattr__(self, "include", tuple(sorted(self.include)))
        _require(
            self.minimum >= 3,
            f"sites.minimum is {self.minimum}: at least 3, because in a sum over two each learns the other's value",
        )
        _require(
            len(self.include) >= self.minimum,
            f"the study names {len(self.include)} sites and needs {self.minimum}: include more, at least 3",
        )


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """Ridge: adds l2/2 times the squared coefficients (not the intercept) to the summed loss."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    l2: Annotated[float, Field(ge=0)] = 0.0

    def __post_init__(self) -> None:
        _within("penalty.l2", self.l2, 0)


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A generalised linear model: logistic (binary), linear (number) or Poisson (count) with its canonical link."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    kind: Literal["logistic", "linear", "poisson"]
    penalty: Penalty = field(default_factory=Penalty)
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the confidence intervals."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A feed-forward network for a binary or number target; without hidden layers it is a regression."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    kind: Literal["network"] = "network"
    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = (16,)
    """Width of each hidden layer."""
    activation: Literal["relu", "tanh"] = "relu"

    def __post_init__(self) -> None:
        _at_most("model.hidden", self.hidden, 64)


@dataclass(frozen=True, kw_only=True)
class Descriptive:
    """Counts, missing rates, means, variances, histograms and quantiles of every feature: a cohort's Table 1."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    kind: Literal["descriptive"] = "descriptive"
    bins: Annotated[int, Field(ge=2, le=1000)] = 20
    """Equal bins of each histogram over the public range, and of each refinement."""
    quantiles: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.05, 0.25, 0.5, 0.75, 0.95)
    refinements: Annotated[int, Field(ge=0, le=10)] = 3
    """Rounds that narrow the bin of each quantile."""
    small_cells: Annotated[int, Field(ge=1, le=1000)] = 5
    """A site sends no count between 1 and this number less one; 1 turns the rule off."""

    def __post_init__(self) -> None:
        _at_most("model.quantiles", self.quantiles, 100)


Model = Annotated[Regression | Network | Descriptive, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class Newton:
    """Newton's method with step control, for the regressions."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    algorithm: Literal["newton"] = "newton"
    rounds: Annotated[int, Field(ge=1, le=1000)] = 25
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """Ends when half the squared Newton decrement falls below this."""


@dataclass(frozen=True, kw_only=True)
class Local:
    """What a site does in one round of averaging."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    """Gradient steps a round; batches are drawn on from one round to the next."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """FedProx's mu: pulls towards the global model; 0 is FedAvg."""
    scaffold: bool = False
    """SCAFFOLD: correct each step by control variates."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """How the coordinator applies the sites' mean update (Reddi et al. 2021)."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    optimiser: Literal["sgd", "momentum", "adam", "yogi", "adagrad"] = "sgd"
    """sgd is FedAvg, momentum FedAvgM, then FedAdam, FedYogi and FedAdagrad."""
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """Adaptivity: added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """Federated averaging of local gradient descent, for networks."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    algorithm: Literal["fedavg"] = "fedavg"
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 20
    local: Local = field(default_factory=Local)
    server: Server = field(default_factory=Server)
    update_bound: Annotated[float, Field(gt=0)] = 4.0
    """Largest change of one parameter in one round; a larger one is clipped at the site."""


Training = Annotated[Newton | Averaging, Field(discriminator="algorithm")]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How features reach the model; whatever it needs of the data is fitted by secure sums."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    scale: Literal["standard", "range", "none"] = "standard"
    """Numbers: zero mean and unit variance over all sites, the public range mapped to -1..1, or as they are."""


_WIDTHS: Mapping[str, tuple[int, ...]] = {"masking": (32, 64), "rlwe": (25, 50), "ckks-single-key": (32,)}


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Fewer bits for each entry of a model update, rounded at random so that the mean stays right."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    levels: Annotated[int, Field(ge=2, le=16)] = 8
    """Bits of each entry as a site sends it; the sum needs some more, and that is what travels."""
    rotation: bool = True
    """Rotate the update first, so that no entry stands out; needs a norm."""
    norm: Annotated[float, Field(gt=0)] | None = None
    """Largest Euclidean norm of a site's weighted update; a longer one is scaled down to it."""

    def __post_init__(self) -> None:
        _require(
            self.norm is not None or not self.rotation,
            "aggregation.compression.norm is missing: a rotated update is coded on a scale that follows from its "
            "largest norm, which must be public; give one, or set rotation: false",
        )


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """How the sites' vectors are summed."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    protocol: Literal["masking", "rlwe", "ckks-single-key"] = "masking"
    """Masks that cancel; threshold homomorphic encryption, whose cost does not grow with the number of sites; or, for
    compatibility, CKKS under a single key: any hospital can decrypt any update it sees."""
    dropouts: Annotated[int, Field(ge=0, le=_LARGEST)] = 0
    """Sites that may be lost in a round; with more than 0, unmasking takes two more messages of each site."""
    bits: Literal[25, 32, 50, 64] | None = None
    """Width of the sums: 32 (default) or 64 with masking, 25 (default) or 50 with rlwe, 32 with ckks-single-key.
    Compression has a width of its own."""
    compression: Compression | None = None
    """How to compress a network's updates; other studies need every digit."""

    def __post_init__(self) -> None:
        widths = _WIDTHS[self.protocol]
        if self.bits is None:
            object.__setattr__(self, "bits", widths[0])
        _require(
            self.bits in widths,
            f"aggregation.bits is {self.bits}: protocol '{self.protocol}' sums in {' or '.join(map(str, widths))} bits",
        )


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The privacy unit is mandatory; epsilon and delta ask for differential privacy, which compiling may refuse."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    unit: Literal["patient"]
    """Whose data one change of the dataset may touch; no default, because everybody must have read it."""
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study. Equal studies have equal canonical bytes and one SHA-256 id (`cohortium.core.document`)."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    name: Annotated[str, Field(alias="study")]
    version: Annotated[int, Field(ge=1, le=_LARGEST)] = 1
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
        _names("study", [self.name])
        _within("version", self.version, 1, _LARGEST)
        if self.training is None and isinstance(self.model, Regression):
            object.__setattr__(self, "training", Newton())
        needed = _NEEDED_TRAINING[type(self.model)]
        _require(
            isinstance(self.training, needed),
            f"model '{self.model.kind}' trains by {_TRAINING_WORDS[needed]}: change 'training' accordingly",
        )
        targets = _NEEDED_TARGET[self.model.kind]
        found = self.cohort.target.type if self.cohort.target else "none"
        _require(
            found in targets,
            f"model '{self.model.kind}' needs a target of type {' or '.join(targets)}, and cohort.target is {found}",
        )


_NEEDED_TRAINING: Mapping[type, type] = {Regression: Newton, Network: Averaging, Descriptive: type(None)}
_TRAINING_WORDS: Mapping[type, str] = {
    Newton: "'algorithm: newton'",
    Averaging: "'algorithm: fedavg'",
    type(None): "itself, without a 'training' section",
}
_NEEDED_TARGET: Mapping[str, tuple[str, ...]] = {
    "logistic": ("binary",),
    "linear": ("number",),
    "poisson": ("count",),
    "network": ("binary", "number"),
    "descriptive": ("none", "binary", "number", "count"),
}
