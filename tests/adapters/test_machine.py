"""What a machine brings to a sum changes how fast it is, never what it is."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from cohortium.adapters import machine
from cohortium.secagg.stream import PLAIN, Means, Mode, add_streams


def clock(counter: float, gcm: float) -> Callable[[], float]:
    """A clock on which counter mode and GCM take turns and take these seconds."""

    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            for took in (counter, gcm):
                yield now
                now += took
                yield now

    ticking = ticks()
    return lambda: next(ticking)


@pytest.mark.parametrize(
    ("counter", "gcm", "chosen"),
    [(1.0, 2.0, "ctr"), (2.0, 1.0, "gcm"), (1.0, 1.0, "ctr"), (1.0, 0.95, "ctr"), (1.0, 0.8, "gcm")],
)
def test_the_mode_that_is_clearly_faster_is_chosen(counter: float, gcm: float, chosen: Mode) -> None:
    assert machine.faster_mode(clock(counter, gcm)) == chosen


def test_one_slow_repeat_decides_nothing() -> None:
    times = iter([0.0, 9.0, 9.0, 10.0, *(10.0 + step for step in range(12))])
    assert machine.faster_mode(lambda: next(times)) == "ctr"


def test_a_real_measurement_chooses_one_of_them() -> None:
    assert machine.means().mode in ("ctr", "gcm")
    assert machine.shared_means().mode == machine.means().mode


@pytest.mark.parametrize("means", [machine.means(), machine.shared_means(), Means("gcm")], ids=["all", "shared", "gcm"])
def test_masks_are_the_same_on_all_of_its_threads(means: Means) -> None:
    keys = [bytes([number]) * 32 for number in range(5)]
    vectors = [np.arange(700_001, dtype=np.uint32) for _ in range(2)]
    for vector, chosen in zip(vectors, (means, PLAIN), strict=True):
        add_streams(vector, keys[:2], keys[2:], chosen)
    assert (vectors[0] == vectors[1]).all()


def test_sites_that_share_a_process_train_one_after_the_other() -> None:
    shared = machine.shared_means()
    with shared.training:
        assert not shared.training.acquire(blocking=False)  # type: ignore[attr-defined]
    assert "ckks" not in repr(Means(ckks=b"the consortium's secret"))


def test_a_failing_task_is_not_lost() -> None:
    def fail() -> None:
        raise ValueError("a task failed")

    if machine.cores() > 1:
        with pytest.raises(ValueError, match="a task failed"):
            machine.means().spread([fail, lambda: None])
