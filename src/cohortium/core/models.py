"""What a study fits or describes."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from cohortium.core.fields import STRICT, at_most, within


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """Ridge: adds l2/2 times the squared coefficients (not the intercept) to the summed loss."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    l2: Annotated[float, Field(ge=0)] = 0.0

    def __post_init__(self) -> None:
        within("penalty.l2", self.l2, 0)


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A generalised linear model: logistic (binary), linear (number) or Poisson (count) with its canonical link."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["logistic", "linear", "poisson"]
    penalty: Penalty = field(default_factory=Penalty)
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the confidence intervals."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A feed-forward network for a binary or number target; without hidden layers it is a regression."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["network"] = "network"
    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = (16,)
    """Width of each hidden layer."""
    activation: Literal["relu", "tanh"] = "relu"

    def __post_init__(self) -> None:
        at_most("model.hidden", self.hidden, 64)


@dataclass(frozen=True, kw_only=True)
class Descriptive:
    """Counts, missing rates, means, variances, histograms and quantiles of every feature: a cohort's Table 1."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["descriptive"] = "descriptive"
    bins: Annotated[int, Field(ge=2, le=1000)] = 20
    """Equal bins of each histogram over the public range, and of each refinement."""
    quantiles: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.05, 0.25, 0.5, 0.75, 0.95)
    refinements: Annotated[int, Field(ge=0, le=10)] = 3
    """Rounds that narrow the bin of each quantile; 0 with differential privacy, since each would cost."""
    small_cells: Annotated[int, Field(ge=1, le=1000)] = 5
    """A site sends no count between 1 and this number less one; 1 turns the rule off."""

    def __post_init__(self) -> None:
        at_most("model.quantiles", self.quantiles, 100)


Model = Annotated[Regression | Network | Descriptive, Field(discriminator="kind")]
