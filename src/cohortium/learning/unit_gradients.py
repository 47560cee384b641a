"""Gradients of each record, added up for each privacy unit and clipped there; the sum over the units.

Opacus computes the records' gradients; its noise, its sampling and its optimiser are not used.

Arithmetic is in double precision, and units are clipped a millionth below the bound: a record's gradient changes by
rounding with the records beside it in a batch, so that a unit that comes or goes moves the others' gradients too, now
and then by a step of the grid that `cohortium.privacy.clip` rounds to. The margin has room for thousands of such steps.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1; Yousefpour et al. 2021, "Opacus:
User-Friendly Differential Privacy Library in PyTorch", section 3 (gradients of each record).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cohortium.core.errors import StudyError
from cohortium.core.layout import Floats
from cohortium.learning.table import Owners
from cohortium.learning.torch_training import Loss, threads_for, trainable
from cohortium.privacy.clip import clipped

_MARGIN = 1e-6
"""How far below the bound units are clipped, relative to it."""
_HELD = 1 << 22
"""Most numbers of gradients that are held at once, 32 MiB: large networks go through fewer records at a time."""


@dataclass(frozen=True)
class Units:
    """Records as a network sees them, each unit's together.

    Attributes:
        inputs: `(n_rows, n_columns)`.
        targets: `(n_rows,)`.
        owners: `(n_rows,)` whose each record is; equal numbers stand side by side.
    """

    inputs: Floats = field(repr=False)
    targets: Floats = field(repr=False)
    owners: Owners = field(repr=False)


def per_record(module: torch.nn.Module) -> Any:
    """Returns the module wrapped so that a backward pass leaves each record's own gradient.

    Raises:
        StudyError: Opacus is missing, or a layer's output for one record depends on other records.
    """
    try:
        from opacus import GradSampleModule
        from opacus.validators import ModuleValidator
    except ImportError as error:
        raise StudyError(
            "private training of networks needs Opacus, which is not installed here: run pip install 'cohortium[torch]'"
        ) from error

    def fails(part: torch.nn.Module) -> bool:
        # Opacus looks at layers with parameters alone, and batch normalisation need not have any
        mixes = isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
        return bool(mixes or ModuleValidator.validate(part) or GradSampleModule.validate(part))

    failing = {name: part for name, part in module.named_modules() if fails(part)}
    blamed = [part for part in failing.values() if not any(child in failing.values() for child in part.children())]
    if blamed:
        kinds = ", ".join(sorted({type(part).__name__ for part in blamed}))
        raise StudyError(
            f"private training clips each record's own gradient, which these layers of the network do not have: "
            f"{kinds}; use others, such as group or layer normalisation instead of batch normalisation"
        )
    return GradSampleModule(module, loss_reduction="mean")


def sum_of_clipped(module: Any, loss: Loss, units: Units, clip: float, microbatch: int) -> Floats:
    """Returns the sum over the units of their gradients, each clipped to the Euclidean norm `clip`, `(n_parameters,)`.

    A unit's gradient is the sum of its records'. One that is not finite counts as zero. No more than `microbatch`
    records' gradients are held at once; a unit whose records do not fit goes on in the next batch.

    Args:
        module: as `per_record` returns it, in double precision.
        loss: mean loss of a batch.
        units: the records.
        clip: the most that a unit adds.
        microbatch: most records at once; at least 1.
    """
    parameters = trainable(module)
    size = sum(parameter.numel() for parameter in parameters)
    total, unfinished, owner, clip = np.zeros(size), np.zeros((1, size)), -1, clip * (1 - _MARGIN)
    at_once = max(1, min(microbatch, _HELD // max(1, size)))
    with threads_for(size * at_once), np.errstate(all="ignore"):
        for first in range(0, len(units.owners), at_once):
            rows = slice(first, first + at_once)
            owners = units.owners[rows]
            starts = np.flatnonzero(np.diff(owners, prepend=-1))
            sums = _gradients(module, parameters, loss, units, rows, at_once)
            if len(starts) < len(owners):
                sums = np.add.reduceat(sums, starts, axis=0)
            if owners[0] == owner:
                sums[0] += unfinished[0]
            else:
                total += clipped(unfinished, clip)[0]
            total += clipped(sums[:-1], clip).sum(axis=0)
            unfinished, owner = sums[-1:], int(owners[-1])
    total += clipped(unfinished, clip)[0]
    return total


def _gradients(
    module: Any, parameters: list[torch.nn.Parameter], loss: Loss, units: Units, rows: slice, at_once: int
) -> Floats:
    """Returns the gradients of the given records' losses, `(n_rows, n_parameters)`.

    They are computed beside as many rows of zeros as make `at_once` rows: products of matrices round a row differently
    when there are fewer, and a record's gradient must not depend on how many other records there are.
    """
    given, count = units.inputs[rows], at_once
    inputs, targets = np.zeros((count, given.shape[1])), np.zeros(count)
    inputs[: len(given)], targets[: len(given)] = given, units.targets[rows]
    module.zero_grad(set_to_none=True)
    # PyTorch warns of hooks behind inputs that need no gradient
    output = module(torch.tensor(inputs, requires_grad=True))
    loss(output, torch.tensor(targets)).backward()  # type: ignore[no-untyped-call]
    # Opacus leaves them beside each parameter; one that the output does not depend on has none
    own = [getattr(parameter, "grad_sample", None) for parameter in parameters]
    parts = [
        torch.zeros(count, parameter.numel(), dtype=torch.float64) if each is None else each.reshape(count, -1)
        for parameter, each in zip(parameters, own, strict=True)
    ]
    gradients: Floats = torch.cat(parts, dim=1).numpy()
    return gradients[: len(given)]
