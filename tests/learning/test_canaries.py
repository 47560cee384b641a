"""Canaries: what each adds to a sum, in its own coordinate and no further than the clip."""

import numpy as np
import pytest

from cohortium.core.errors import ProtocolError
from cohortium.core.layout import Block, Noise
from cohortium.core.random import Randomness
from cohortium.learning.algorithm import in_the_clear
from cohortium.learning.canaries import Canaries, CanaryBroadcast, features, turned, widened
from cohortium.learning.table import Table, Unit, pooled

KEY = Randomness.of_seed(3)
FIRST = Block("sums", (3,), 100.0, labels=("a", "b", "c"), noise=Noise(2.0, 5.0))
THEN = Block("gradient", (2,), 50.0, "clip", noise=Noise(0.5, 7.0))


def algorithm(unit: Unit = "patient", rate: float = 1.0, count: int = 4, rounds: int = 3) -> Canaries:
    gradient = Block("gradient", (2,), 50.0, "clip", noise=Noise(0.5, 7.0, rate))
    return Canaries(count, ((widened((FIRST,), count), 1), (widened((gradient,), count), rounds)), unit)


def table(canaries: list[int], signs: list[int], patients: list[int] | None = None) -> Table:
    columns = {"canary": np.array(canaries, float), "sign": np.array(signs, float)}
    return Table(len(canaries), columns, None, None if patients is None else np.array(patients))


def summed(tables: list[Table], **settings: object) -> list[dict[str, np.ndarray]]:
    _, state = in_the_clear(algorithm(**settings), tables, KEY)  # type: ignore[arg-type]
    return [dict(sums) for sums in state.sums]


def test_each_canary_adds_its_clip_to_its_own_coordinate_and_turns_from_round_to_round() -> None:
    rounds = summed([table([0, 1], [0, 1]), table([0, 3], [0, -1])])
    assert [list(sums) for sums in rounds] == [["sums"], ["gradient"], ["gradient"], ["gradient"]]
    for number, sums in enumerate(rounds):
        norm = 2.0 if number == 0 else 0.5
        np.testing.assert_allclose(
            next(iter(sums.values())), turned(number) * norm * np.array([0, 1, 0, -1]), rtol=1e-6
        )
    assert [turned(number) for number in range(4)] == [1, -1, 1, -1]


def test_all_records_of_a_patient_are_clipped_together_and_those_of_a_site() -> None:
    records = table([1, 1, 1, 2], [1, 1, 1, 1], [0, 0, 0, 1])
    by_patient = summed([records])[0]["sums"]
    np.testing.assert_allclose(by_patient, [0, 2, 2, 0], rtol=1e-6)
    by_record = summed([records], unit="record")[0]["sums"]
    np.testing.assert_allclose(by_record, [0, 6, 2, 0], rtol=1e-6)
    assert np.linalg.norm(summed([records], unit="site")[0]["sums"]) == pytest.approx(2)


def test_pooled_equals_federated() -> None:
    tables = [table([0, 1], [1, 1]), table([2, 3, 0], [1, -1, 0])]
    for apart, together in zip(summed(tables), summed([pooled(tables)]), strict=True):
        assert all(np.array_equal(apart[name], together[name]) for name in apart)


def test_a_sampled_round_draws_each_patient_with_all_records_or_not_at_all() -> None:
    count, rounds = 200, 20
    everybody = table([*range(count)] * 2, [1] * 2 * count, [*range(count)] * 2)
    sampled = summed([everybody], rate=0.3, count=count, rounds=rounds)
    assert (sampled[0]["sums"] > 1.99).all(), "preprocessing takes everybody"
    drawn = np.array([np.abs(sums["gradient"]) for sums in sampled[1:]])
    assert np.isclose(drawn, 0.5, rtol=1e-6)[drawn > 0].all()
    # 4,000 draws: five standard errors
    assert (drawn > 0).mean() == pytest.approx(0.3, abs=5 * (0.21 / 4000) ** 0.5)
    assert len({tuple(row > 0) for row in drawn}) == rounds


def test_layouts_keep_the_studys_bounds_and_noise() -> None:
    audited = algorithm()
    layouts = [audited.layout(CanaryBroadcast(number)) for number in range(4)]
    assert [layout[0].name for layout in layouts] == ["sums", "gradient", "gradient", "gradient"]
    assert layouts[0] == (Block("sums", (4,), 100.0, noise=FIRST.noise),)
    assert layouts[3] == (Block("gradient", (4,), 50.0, "clip", noise=THEN.noise),)
    assert set(features(4)) == {"canary", "sign"}


@pytest.mark.parametrize(("number", "before"), [(1, None), (2, 0), (0, 0), (4, 3), (-1, None)])
def test_rounds_out_of_order_are_refused(number: int, before: int | None) -> None:
    audited = algorithm()
    with pytest.raises(ProtocolError, match="out of order"):
        audited.admit(CanaryBroadcast(number), None if before is None else CanaryBroadcast(before))
    audited.admit(CanaryBroadcast(0), None)
    audited.admit(CanaryBroadcast(3), CanaryBroadcast(2))
