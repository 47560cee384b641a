"""How a study protects what leaves a hospital: the secure sum, and differential privacy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from cohortium.core.fields import LARGEST, STRICT, require

_WIDTHS: Mapping[str, tuple[int, ...]] = {
    "masking": (32, 64),
    "rlwe": (25, 50),
    "ckks-single-key": (32,),
    "gather": (32, 64),
}


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Fewer bits for each entry of a model update, rounded at random so that the mean stays right."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    levels: Annotated[int, Field(ge=2, le=16)] = 8
    """Bits of each entry as a site sends it; the sum needs some more, and that is what travels."""
    rotation: bool = True
    """Rotate the update first, so that no entry stands out; needs a norm."""
    norm: Annotated[float, Field(gt=0)] | None = None
    """Largest Euclidean norm of a site's weighted update; a longer one is scaled down to it."""

    def __post_init__(self) -> None:
        require(
            self.norm is not None or not self.rotation,
            "aggregation.compression.norm is missing: a rotated update is coded on a scale that follows from its "
            "largest norm, which must be public; give one, or set rotation: false",
        )


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """How the sites' vectors are summed."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    protocol: Literal["masking", "rlwe", "ckks-single-key", "gather"] = "masking"
    """Masks that cancel; threshold homomorphic encryption, whose cost does not grow with the number of sites; or, for
    compatibility, CKKS under a single key: any hospital can decrypt any update it sees. 'gather', each update in the
    open, is always refused, with the reason."""
    dropouts: Annotated[int, Field(ge=0, le=LARGEST)] = 0
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
        require(
            self.bits in widths,
            f"aggregation.bits is {self.bits}: protocol '{self.protocol}' sums in {' or '.join(map(str, widths))} bits",
        )


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Whom privacy protects and, with epsilon and delta, by how much (Dwork et al. 2006, (epsilon, delta))."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    unit: Literal["patient", "record", "site"]
    """Whose data one change of the dataset may touch; no default, because everybody must have read it."""
    epsilon: Annotated[float, Field(gt=0, le=1000)] | None = None
    """The most that one unit changes the result's log-likelihood, but for delta; left out: no differential privacy."""
    delta: Annotated[float, Field(gt=0, le=1e-3)] | None = None
    """The probability that epsilon does not cover; well below one divided by the number of patients."""
    neighbouring: Literal["add-or-remove", "replace"] = "add-or-remove"
    """What a change is: one unit more or less, or one unit's data exchanged for other data."""
    sites_per_patient: Annotated[int, Field(ge=1, le=1000)] = 1
    """Most hospitals of the study at which one patient may be (k_max); noise grows by this factor."""
    records_per_patient: Annotated[int, Field(ge=1, le=1000)] = 10
    """With unit record: the most records of a patient at a site. Who has more is left out; each pays for so many."""
    colluding: Annotated[int, Field(ge=0, le=999)] = 1
    """Hospitals that may tell others their noise, so that the rest must add enough; any reader of the result counts."""
    preprocessing: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the budget for what is fitted before the model: the patients' number, means, deviations, levels."""
    sampling: Annotated[float, Field(ge=1e-6, le=1)] = 1.0
    """Share of its units that each site draws secretly for a round of training, each one independently."""

    def __post_init__(self) -> None:
        require(
            (self.epsilon is None) == (self.delta is None),
            "privacy.epsilon and privacy.delta belong together: give both, or neither for a study without "
            "differential privacy",
        )
        require(
            self.unit != "site" or (self.sampling == 1.0 and self.sites_per_patient == 1),
            "privacy.unit 'site' protects whole hospitals: leave out privacy.sampling and privacy.sites_per_patient",
        )
        require(
            self.sampling == 1.0 or self.sites_per_patient == 1,
            "privacy.sampling is accounted for where a patient is at one hospital only, because each draws by itself: "
            "leave out sampling, or sites_per_patient",
        )
        require(
            self.sampling == 1.0 or self.neighbouring == "add-or-remove",
            "privacy.sampling is accounted for with 'neighbouring: add-or-remove' only: set it, or leave out sampling",
        )
