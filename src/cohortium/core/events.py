"""What releases cost in privacy, as frozen data: accountants read it, budgets are charged by it, and nobody runs it.

An event says what was done to the privacy unit of the study, under its neighbouring relation; an accountant
(`cohortium.privacy.accountant`) turns events into epsilon and delta, and refuses one that it does not know.
"""

import msgspec


class Gaussian(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A sum with noise that is at least as private as a normal distribution of `multiplier` times its sensitivity."""

    multiplier: float


class Sampled(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """`event` on a secret sample, in which each unit is with probability `rate`, independently (Poisson sampling)."""

    rate: float
    event: Gaussian


class Repeated(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """`event`, `times` in a row; each may depend on what came out before."""

    times: int
    event: Gaussian | Sampled


class Slack(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A probability `delta` that another event's bound does not hold, because of rounding or a sampler's precision."""

    delta: float


DpEvent = Gaussian | Sampled | Repeated | Slack
Events = tuple[DpEvent, ...]
"""What was released, in any order: each may depend on those before it (adaptive composition)."""


def encode(events: Events) -> bytes:
    """Returns events as JSON, equal events as equal bytes."""
    return msgspec.json.encode(events, order="deterministic")


def decode(data: bytes) -> Events:
    """Returns the events that `encode` wrote.

    Raises:
        msgspec.ValidationError: the bytes are something else, or name an event that this version does not know.
    """
    return msgspec.json.decode(data, type=Events)
