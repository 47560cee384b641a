"""How a model trains, and how features reach it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from cohortium.core.fields import STRICT


@dataclass(frozen=True, kw_only=True)
class Newton:
    """Newton's method with step control, for the regressions."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    algorithm: Literal["newton"] = "newton"
    rounds: Annotated[int, Field(ge=1, le=1000)] = 25
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """Ends when half the squared Newton decrement falls below this."""


LEARNING_RATES: Mapping[str, float] = {"logistic": 4.0, "linear": 1.0, "poisson": 0.2}
"""Of descent, by the model's kind, where a study names none."""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Gradient descent on all patients, for the regressions: the form that clips and takes noise well."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    algorithm: Literal["descent"] = "descent"
    rounds: Annotated[int, Field(ge=1, le=10_000)] = 40
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Step along the mean gradient, on the scale that features are fitted on; 4 for a logistic model, 1 for a linear
    and 0.2 for a Poisson one."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the last step that the next one keeps."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest Euclidean norm of what one privacy unit adds to a gradient; a longer one is scaled down to it."""


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """AdaSSP: one noisy sum of second moments, then the solution; for a logistic model one Newton step."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    algorithm: Literal["adassp"] = "adassp"
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest Euclidean norm of a record's features with the intercept's 1; a longer one is scaled down to it."""


@dataclass(frozen=True, kw_only=True)
class Local:
    """What a site does in one round of averaging."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
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

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    optimiser: Literal["sgd", "momentum", "adam", "yogi", "adagrad"] = "sgd"
    """sgd is FedAvg, momentum FedAvgM, then FedAdam, FedYogi and FedAdagrad."""
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """Adaptivity: added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class Asynchronous:
    """Rounds that are buffers (FedBuff, Nguyen et al. 2022): who is first is summed, the others in a later round."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    buffer: Annotated[int, Field(ge=3, le=1000)]
    """Sites whose contributions close a round; whoever is later contributes to the next one."""
    staleness: Annotated[float, Field(ge=0, le=10)] = 0.5
    """Exponent a of the weight (1 + s)^-a of work that began s rounds before the one that it is summed in."""
    latest: Annotated[int, Field(ge=0, le=1000)] = 8
    """Rounds that work may be late; older work is dropped, and the site begins anew."""

    def weight(self, late: int) -> float:
        """Returns what work that is so many rounds late counts, from 1 for none."""
        return float((1 + late) ** -self.staleness)


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """Federated averaging of local gradient descent, for networks."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    algorithm: Literal["fedavg"] = "fedavg"
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 20
    local: Local = field(default_factory=Local)
    server: Server = field(default_factory=Server)
    update_bound: Annotated[float, Field(gt=0)] = 4.0
    """Largest change of one parameter in one round; a larger one is clipped at the site."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest Euclidean norm of what one privacy unit adds: of its gradient, or, with unit site, of a site's update."""
    asynchronous: Asynchronous | None = None
    """Rounds close before all sites have contributed; left out: a round waits for all."""


Training = Annotated[Newton | Descent | OneShot | Averaging, Field(discriminator="algorithm")]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How features reach the model; whatever it needs of the data is fitted by secure sums."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    scale: Literal["standard", "range", "none"] = "standard"
    """Numbers: zero mean and unit variance over all sites, the public range mapped to -1..1, or as they are."""
