"""A record's gradient does not depend on how many other records there are, even where rounding decides."""

import numpy as np
import pytest
import torch

from cohortium.core.features import BinaryTarget
from cohortium.learning.torch_training import loss_for, mlp
from cohortium.learning.unit_gradients import Units, per_record, sum_of_clipped


def module(seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mlp(7, (32,), "relu")().double()


def records(seed: int, rows: int) -> Units:
    generator = np.random.default_rng(seed)
    return Units(generator.normal(size=(rows, 7)), generator.integers(2, size=rows).astype(float), np.arange(rows))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 17, 63, 64, 65, 66, 67, 130])
def test_one_record_more_adds_its_own_gradient_exactly(rows: int) -> None:
    network, loss = per_record(module(rows)), loss_for(BinaryTarget(name="y"))
    everybody = records(rows, rows + 1)

    def total(count: int, first: int = 0) -> np.ndarray:
        part = slice(first, first + count)
        units = Units(everybody.inputs[part], everybody.targets[part], np.arange(count))
        return sum_of_clipped(network, loss, units, 1.0, 64)

    # on the grid sums are exact, so this is an equation and no approximation
    assert (total(rows + 1) - total(rows) == total(1, rows)).all()
