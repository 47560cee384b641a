"""What every algorithm and every stage promises, checked for all of them in one way."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.core import codec
from cohortium.core.errors import ProtocolError
from cohortium.core.events import DpEvent, Gaussian
from cohortium.core.features import BinaryTarget, Category, CountTarget, Feature, Number, NumberTarget, Target
from cohortium.core.layout import Block, Layout, entry_names, pack, size, unpack
from cohortium.core.models import Descriptive, Penalty, Regression
from cohortium.core.random import Randomness
from cohortium.core.stage import Chain, Stage, chain
from cohortium.core.training import Averaging, Descent, Local, Newton, OneShot, Server
from cohortium.learning.algorithm import Algorithm, Then
from cohortium.learning.descent import DescentBroadcast, GradientDescent
from cohortium.learning.descriptive import Describe
from cohortium.learning.glm import Glm
from cohortium.learning.oneshot import OneShotRegression
from cohortium.learning.preprocess import Encoder, Fitted, Preprocess
from cohortium.learning.private_descriptive import PrivateDescribe
from cohortium.learning.private_preprocess import PrivatePreprocess
from cohortium.learning.table import Table, Unit, pooled
from cohortium.secagg.quantise import fixed_point

MAXIMUM = 60
FEATURES: dict[str, Feature] = {
    "age": Number(unit="a", range=(0.1, 110.3), missing="impute"),
    "crp": Number(unit="mg/L", range=(-1 / 3, 1e4), missing="impute"),
    "sex": Category(levels=("f", "m"), missing="impute"),
    "stage": Category(levels=("I", "II", "III"), missing="impute"),
}
BINARY, NUMBER, COUNT = (
    BinaryTarget(name="died"),
    NumberTarget(name="stay", unit="d", range=(-0.7, 33.1)),
    CountTarget(name="visits", maximum=12),
)
ROOT = Randomness.of_seed(11)


def table(target: Target, rows: int, seed: int) -> Table:
    rng = np.random.default_rng(seed)
    columns = {
        "age": rng.uniform(0.1, 110.3, rows),
        "crp": np.clip(rng.lognormal(3, 1, rows), -1 / 3, 1e4),
        "sex": np.arange(rows) % 2.0,
        "stage": np.arange(rows) % 3.0,
    }
    for column in columns.values():
        column[rng.random(rows) < 0.1] = np.nan
    eta = np.nan_to_num(columns["age"], nan=50) / 50 - 1
    if isinstance(target, BinaryTarget):
        y = (rng.random(rows) < 1 / (1 + np.exp(-eta))).astype(float)
    elif isinstance(target, NumberTarget):
        y = np.clip(10 + 5 * eta + rng.normal(0, 3, rows), -0.7, 33.1)
    else:
        y = np.minimum(rng.poisson(np.exp(eta)), 12).astype(float)
    return Table(rows, columns, y)


def extremes(target: Target, rows: int = MAXIMUM) -> list[Table]:
    """Returns tables of as many patients as may be, with every value at one end of what the study admits."""
    tables = []
    for low in (True, False):
        columns: dict[str, np.ndarray] = {}
        for name, feature in FEATURES.items():
            ends = feature.range if isinstance(feature, Number) else (0.0, len(feature.levels) - 1.0)
            columns[name] = np.full(rows, ends[0] if low else ends[1])
        for y in {"binary": (0, 1), "number": (-0.7, 33.1), "count": (0, 12)}[target.type]:
            tables.append(Table(rows, columns, np.full(rows, float(y))))
    return [*tables, Table(rows, {name: np.full(rows, np.nan) for name in FEATURES}, tables[-1].target)]


@dataclass(frozen=True)
class Case:
    """An algorithm with what may be asked of it.

    `pools`: the federation's result is that of the pooled rows.
    """

    algorithm: Algorithm[Any, Any, Any]
    target: Target
    pools: bool = True


def fitted() -> Fitted:
    algorithm = Preprocess(FEATURES, 1000)
    statistics, _ = algorithm.local(algorithm.broadcast(algorithm.init()), table(BINARY, 200, 0), {}, ROOT)
    return algorithm.finish(algorithm.update(algorithm.init(), statistics))


def glm(kind: Any, target: Target, l2: float = 0.0, scale: Any = "standard") -> Glm:
    model = Regression(kind=kind, penalty=Penalty(l2=l2))
    return Glm(Encoder(FEATURES, fitted()), target, model, Newton(), scale, MAXIMUM)


def averaging(scaffold: bool = False, clipped: bool = False) -> Any:
    pytest.importorskip("torch", reason="networks need the extra: pip install 'cohortium[torch]'")
    from cohortium.learning.fedavg import FedAvg, loss_for, mlp

    encoder = Encoder(FEATURES, fitted())
    local = Local(steps=4, batch_size=8, learning_rate=0.5 if clipped else 0.05, scaffold=scaffold)
    return FedAvg(
        module=mlp(len(encoder.columns), (3,), "tanh"),
        loss=loss_for(BINARY),
        features=lambda rows: encoder.design(rows, "range"),
        averaging=Averaging(rounds=3, local=local, server=Server(), update_bound=0.01 if clipped else 4.0),
        maximum=MAXIMUM,
        initial=ROOT.child("init"),
    )


def descent(kind: Any, target: Target, multiplier: Any = None, rate: float = 1.0, **other: Any) -> GradientDescent:
    model = Regression(kind=kind, penalty=Penalty(l2=other.pop("l2", 0.0)))
    scale, unit = other.pop("scale", "standard"), other.pop("unit", "patient")
    training = Descent(**{"rounds": 5, "learning_rate": 0.5, **other})
    encoder = Encoder(FEATURES, replace(fitted(), patients=180.0))
    return GradientDescent(encoder, target, model, training, scale, MAXIMUM, unit, multiplier, rate)


def one_shot(kind: Any, target: Target, multiplier: Any = None, **other: Any) -> OneShotRegression:
    model = Regression(kind=kind, penalty=Penalty(l2=other.pop("l2", 0.0)))
    scale, unit = other.pop("scale", "standard"), other.pop("unit", "patient")
    encoder = Encoder(FEATURES, replace(fitted(), patients=180.0))
    return OneShotRegression(encoder, target, model, OneShot(**other), scale, MAXIMUM, unit, multiplier)


def private_preprocess(scale: Any = "standard", multiplier: Any = None, unit: Unit = "patient") -> PrivatePreprocess:
    return PrivatePreprocess(FEATURES, MAXIMUM, scale, unit, multiplier)


def private_describe(target: Target, multiplier: Any = None, unit: Unit = "patient") -> PrivateDescribe:
    return PrivateDescribe(FEATURES, target, Descriptive(bins=6, refinements=0), MAXIMUM, unit, multiplier)


def private_phases() -> Then:
    def second(result: Fitted) -> GradientDescent:
        training, encoder = Descent(rounds=4, clip=1.0), Encoder(FEATURES, result)
        return GradientDescent(
            encoder, BINARY, Regression(kind="logistic"), training, "standard", MAXIMUM, "patient", 1.0
        )

    return Then(private_preprocess(multiplier=1.0), Fitted, second, 4)


def private_averaging(unit: Any, multiplier: float | None = 2.0) -> Any:
    pytest.importorskip("opacus", reason="private networks need the extra: pip install 'cohortium[torch]'")
    from cohortium.learning.fedavg import loss_for, mlp
    from cohortium.learning.private_fedavg import PrivateFedAvg

    encoder = Encoder(FEATURES, fitted())
    return PrivateFedAvg(
        module=mlp(len(encoder.columns), (3,), "tanh"),
        loss=loss_for(BINARY),
        features=lambda rows: encoder.design(rows, "range"),
        averaging=Averaging(rounds=3, clip=0.5, local=Local(steps=4 if unit == "site" else 1, learning_rate=0.5)),
        maximum=MAXIMUM,
        initial=ROOT.child("init"),
        unit=unit,
        multiplier=multiplier,
        patients=186.0,
        sites=4,
    )


def two_phases() -> Then:
    def second(result: Fitted) -> Glm:
        return Glm(Encoder(FEATURES, result), BINARY, Regression(kind="logistic"), Newton(), "standard", MAXIMUM)

    return Then(Preprocess(FEATURES, MAXIMUM), Fitted, second, Newton().rounds)


CASES: dict[str, Any] = {
    "preprocess": lambda: Case(Preprocess(FEATURES, MAXIMUM), BINARY),
    "logistic": lambda: Case(glm("logistic", BINARY), BINARY),
    "logistic ridge": lambda: Case(glm("logistic", BINARY, 2.0, "none"), BINARY),
    "linear": lambda: Case(glm("linear", NUMBER), NUMBER),
    "linear ridge": lambda: Case(glm("linear", NUMBER, 0.5, "range"), NUMBER),
    "poisson": lambda: Case(glm("poisson", COUNT), COUNT),
    "describe": lambda: Case(Describe(FEATURES, COUNT, Descriptive(small_cells=1, bins=5), MAXIMUM), COUNT),
    "describe hiding": lambda: Case(Describe(FEATURES, BINARY, Descriptive(bins=4), MAXIMUM), BINARY, pools=False),
    "fedavg": lambda: Case(averaging(), BINARY, pools=False),
    "fedavg clipped": lambda: Case(averaging(clipped=True), BINARY, pools=False),
    "scaffold": lambda: Case(averaging(scaffold=True), BINARY, pools=False),
    "private network": lambda: Case(private_averaging("patient"), BINARY),
    "private network, no noise": lambda: Case(private_averaging("patient", None), BINARY),
    "private network, sites": lambda: Case(private_averaging("site"), BINARY, pools=False),
    "then": lambda: Case(two_phases(), BINARY),
    "private preprocess": lambda: Case(private_preprocess(), BINARY),
    "private preprocess, range": lambda: Case(private_preprocess("range", 1.0), BINARY),
    "private describe": lambda: Case(private_describe(COUNT), COUNT),
    "private describe, noisy": lambda: Case(private_describe(NUMBER, 1.0), NUMBER),
    "descent": lambda: Case(descent("logistic", BINARY, momentum=0.5), BINARY),
    "descent, linear": lambda: Case(descent("linear", NUMBER, l2=1.0, scale="range"), NUMBER),
    "descent, poisson": lambda: Case(descent("poisson", COUNT, learning_rate=0.1, clip=2.0), COUNT),
    "descent, noisy": lambda: Case(descent("logistic", BINARY, 1.0, clip=1.0), BINARY),
    "descent, sampled": lambda: Case(descent("logistic", BINARY, 1.0, 0.5, clip=1.0), BINARY, pools=False),
    "one shot": lambda: Case(one_shot("logistic", BINARY), BINARY),
    "one shot, linear": lambda: Case(one_shot("linear", NUMBER, clip=2.0, l2=1.0), NUMBER),
    "one shot, noisy": lambda: Case(one_shot("linear", NUMBER, 1.0), NUMBER),
    "private then": lambda: Case(private_phases(), BINARY),
}


def same(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Returns whether two values are equal: bit for bit, or numbers within a relative tolerance."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        one, other = np.asarray(one), np.asarray(other)
        close = np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True) if tolerance else None
        return one.shape == other.shape and one.dtype == other.dtype and (close or one.tobytes() == other.tobytes())
    if is_dataclass(one) and not isinstance(one, type):
        names = [field.name for field in fields(one)]
        return type(one) is type(other) and all(same(getattr(one, n), getattr(other, n), tolerance) for n in names)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair, tolerance) for pair in zip(one, other, strict=True))
    if isinstance(one, float):
        return one == pytest.approx(other, rel=tolerance, abs=tolerance, nan_ok=True)
    return bool(one == other)


def check_statistics(layout: Layout, statistics: Any) -> None:
    """Names, shapes and bounds are those of the layout; a block that clips may exceed its bound."""
    assert list(dict.fromkeys(block.name for block in layout)) == [block.name for block in layout]
    assert set(statistics) == {block.name for block in layout}
    for block in layout:
        array = np.asarray(statistics[block.name])
        assert array.dtype == np.float64, block.name
        assert array.shape == block.shape, block.name
        assert np.isfinite(array).all(), block.name
        if block.excess == "refuse" and array.size:
            assert np.abs(array).max() <= block.bound * (1 + 1e-9), block.name
    assert len(entry_names(layout)) == size(layout)
    fixed_point(layout, 3, 64).encode(pack(layout, statistics), ROOT)


def check_algorithm(algorithm: Algorithm[Any, Any, Any], tables: Sequence[Table], names: Sequence[Any]) -> Any:
    """Runs an algorithm over the sites' tables and checks each step; returns its result.

    `names` tells the sites' randomness apart, so that the order in which they are summed changes none of it.
    """
    state = algorithm.init()
    assert same(state, algorithm.init())
    memories: list[Any] = [{} for _ in tables]
    left, rounds = algorithm.progress(state)[0], 0
    first = left
    before = None
    while not algorithm.done(state):
        broadcast = algorithm.broadcast(state)
        data = codec.encode(broadcast)
        received = codec.decode(data, algorithm.broadcast_type)
        assert same(received, broadcast)
        check_order(algorithm, received, before)
        before = received
        assert codec.encode(received) == data
        layout = algorithm.layout(received)
        assert layout == algorithm.layout(broadcast)
        assert hash(layout) == hash(algorithm.layout(broadcast))
        total: dict[str, Any] = {}
        for index, rows in enumerate(tables):
            randomness = ROOT.child("site", names[index])
            given_rows, given_memory = copy.deepcopy(rows), copy.deepcopy(memories[index])
            statistics, memory = algorithm.local(received, rows, memories[index], randomness)
            assert same(rows, given_rows)
            assert same(memories[index], given_memory)
            again, memory_again = algorithm.local(received, rows, memories[index], randomness)
            assert same(dict(statistics), dict(again))
            assert same(memory, memory_again)
            check_statistics(layout, statistics)
            memories[index] = memory
            total = {name: total.get(name, 0.0) + np.asarray(value) for name, value in statistics.items()}
        given_state, given_total = copy.deepcopy(state), copy.deepcopy(total)
        later = algorithm.update(state, total)
        check_thawed(algorithm, state, total, later)
        assert same(state, given_state)
        assert same(total, given_total)
        assert same(later, algorithm.update(state, total))
        state, rounds = later, rounds + 1
        now, objective = algorithm.progress(state)
        assert now <= left - 1
        assert objective is None or np.isfinite(objective)
        left = now
    assert rounds <= first
    assert left == 0
    result = algorithm.finish(state)
    assert same(result, algorithm.finish(state))
    return result


def check_thawed(algorithm: Algorithm[Any, Any, Any], state: Any, total: Any, later: Any) -> None:
    """Checks that another coordinator goes on from the bytes of a state to the last bit."""
    frozen = algorithm.freeze(state)
    thawed = algorithm.thaw(frozen)
    assert same(thawed, state)
    assert algorithm.freeze(thawed) == frozen == algorithm.freeze(state)
    assert codec.encode(algorithm.broadcast(thawed)) == codec.encode(algorithm.broadcast(state))
    assert algorithm.progress(thawed) == algorithm.progress(state)
    assert same(algorithm.update(thawed, total), later)
    ended = algorithm.thaw(algorithm.freeze(later))
    assert same(ended, later)
    if algorithm.done(later):
        assert same(algorithm.finish(ended), algorithm.finish(later))
    with pytest.raises(ProtocolError):
        algorithm.thaw(frozen[:-1])


def check_order(algorithm: Algorithm[Any, Any, Any], broadcast: Any, before: Any) -> None:
    """Checks that a site admits the honest broadcast in its place, and not at the start where it does not belong."""
    algorithm.admit(broadcast, before)
    if before is not None:
        with pytest.raises(ProtocolError):
            algorithm.admit(broadcast, None)
        with pytest.raises(ProtocolError):
            algorithm.admit(algorithm.broadcast(algorithm.init()), broadcast)


@pytest.mark.parametrize("name", CASES)
class TestAlgorithms:
    def test_keep_their_promises_and_pool(self, name: str) -> None:
        case = CASES[name]()
        tables = [table(case.target, rows, seed) for seed, rows in enumerate((60, 25, 60, 41))]
        found = check_algorithm(case.algorithm, tables, "abcd")
        if case.pools:
            bigger = _with_maximum(case.algorithm, 1000)
            assert same(found, check_algorithm(bigger, [pooled(tables)], "a"), 1e-6)

    def test_the_order_of_sites_is_irrelevant(self, name: str) -> None:
        case = CASES[name]()
        tables = [table(case.target, rows, seed) for seed, rows in enumerate((33, 60, 20, 41))]
        straight = check_algorithm(case.algorithm, tables, "abcd")
        order = [2, 0, 3, 1]
        shuffled = check_algorithm(case.algorithm, [tables[i] for i in order], ["abcd"[i] for i in order])
        assert same(straight, shuffled, 1e-5)

    def test_bounds_hold_at_the_ends_of_every_range(self, name: str) -> None:
        case = CASES[name]()
        tables = [table(case.target, 60, seed) for seed in range(3)]
        state = case.algorithm.init()
        while not case.algorithm.done(state):
            broadcast = case.algorithm.broadcast(state)
            layout = case.algorithm.layout(broadcast)
            for rows in [*extremes(case.target), *extremes(case.target, 1)]:
                statistics, _ = case.algorithm.local(broadcast, rows, {}, ROOT.child("extreme"))
                check_statistics(layout, statistics)
            total: dict[str, Any] = {}
            for index, rows in enumerate(tables):
                statistics, _ = case.algorithm.local(broadcast, rows, {}, ROOT.child(index))
                total = {key: total.get(key, 0.0) + np.asarray(value) for key, value in statistics.items()}
            state = case.algorithm.update(state, total)


@pytest.mark.parametrize("kind", ["logistic", "poisson"])
@pytest.mark.parametrize("size_of_beta", [1.0, 30.0, 1e6])
def test_bounds_hold_wherever_a_regression_is_asked_to_look(kind: Any, size_of_beta: float) -> None:
    """A coordinator may broadcast any coefficients; the range proof must not rest on good ones."""
    target: Target = BINARY if kind == "logistic" else COUNT
    algorithm = glm(kind, target)
    rng = np.random.default_rng(5)
    for _ in range(5):
        broadcast = algorithm.broadcast_type(rng.normal(0, size_of_beta, len(algorithm.encoder.columns) + 1))
        for rows in [*extremes(target), table(target, MAXIMUM, 3)]:
            check_statistics(algorithm.layout(broadcast), algorithm.local(broadcast, rows, {}, ROOT)[0])


UNITS: list[Unit] = ["patient", "record", "site"]
PRIVATE: dict[str, Any] = {
    "preprocess": lambda target, scale, unit: private_preprocess(scale, 1.0, unit),
    "describe": lambda target, scale, unit: private_describe(target, 1.0, unit),
    "descent": lambda target, scale, unit: descent(KINDS[target.type], target, 1.0, scale=scale, unit=unit, clip=0.7),
    "descent, sampled": lambda target, scale, unit: descent(
        KINDS[target.type], target, 1.0, 0.6, scale=scale, unit=unit, clip=3.0
    ),
    "one shot": lambda target, scale, unit: one_shot(KINDS[target.type], target, 1.0, scale=scale, unit=unit),
    "one shot, clipped": lambda target, scale, unit: one_shot(
        KINDS[target.type], target, 1.0, scale=scale, unit=unit, clip=1.5
    ),
}
KINDS = {"binary": "logistic", "number": "linear", "count": "poisson"}


@pytest.mark.parametrize("name", PRIVATE)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_unit_more_or_less_moves_a_sum_by_its_norm_at_most(name: str, data: Any) -> None:
    """Whatever a unit's records say, however many they are, and whatever the coordinator asks for."""
    target = data.draw(st.sampled_from([BINARY, NUMBER] if name.startswith("one shot") else [BINARY, NUMBER, COUNT]))
    unit: Unit = data.draw(st.sampled_from(UNITS))
    algorithm = PRIVATE[name](target, data.draw(st.sampled_from(["standard", "range", "none"])), unit)
    seed, rows, theirs = data.draw(st.integers(0, 10**6)), data.draw(st.integers(0, 30)), data.draw(st.integers(1, 100))
    rng = np.random.default_rng(seed)
    sources = [table(target, 60, seed), *extremes(target)]
    kept, extra = table(target, rows, seed), data.draw(st.sampled_from(sources))
    extra = extra.take(
        rng.integers(0, 1 if data.draw(st.booleans()) else extra.rows, theirs if unit == "patient" else 1)
    )
    both = pooled([kept, extra])
    # those who stay have several records too; who comes or goes has the last number, so that no draw moves to another
    owners = np.sort(rng.integers(0, max(1, rows // 2), rows))
    owners = np.unique(owners, return_inverse=True)[1]
    last = int(owners.max(initial=-1)) + 1
    kept = replace(kept, patient=owners)
    both = replace(both, patient=np.concatenate([owners, np.full(extra.rows, last)]))
    if unit == "site":
        kept = both.take(np.zeros(both.rows, dtype=bool))
    broadcast = algorithm.broadcast(algorithm.init())
    if isinstance(broadcast, DescentBroadcast):
        size_of_beta = data.draw(st.sampled_from([0.0, 1.0, 100.0, 3e3]))
        beta = np.clip(rng.normal(0, size_of_beta, len(algorithm.encoder.columns) + 1), -1e4, 1e4)
        broadcast = DescentBroadcast(data.draw(st.integers(0, 4)), beta)
    before, after = (algorithm.local(broadcast, rows, {}, ROOT)[0] for rows in (kept, both))
    for block in algorithm.layout(broadcast):
        assert block.noise is not None, "a private algorithm releases nothing exact"
        moved = np.linalg.norm(np.ravel(after[block.name] - before[block.name]))
        assert moved <= block.noise.norm * (1 + 1e-12), block.name


@pytest.mark.parametrize("name", PRIVATE)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 10.0, 1e3, 1e6, 1e12]))
def test_no_noise_stops_a_private_algorithm(name: str, seed: int, size_of_noise: float) -> None:
    """What the sums say may be anything, and the next broadcast is one that sites admit all the same."""
    target = [BINARY, NUMBER, COUNT][seed % (2 if name.startswith("one shot") else 3)]
    algorithm, rng = (
        PRIVATE[name](target, ["standard", "range", "none"][seed // 3 % 3], "patient"),
        np.random.default_rng(seed),
    )
    state, before = algorithm.init(), None
    while not algorithm.done(state):
        broadcast = algorithm.broadcast(state)
        algorithm.admit(broadcast, before)
        total = {block.name: rng.normal(0, size_of_noise, block.shape) for block in algorithm.layout(broadcast)}
        state, before = algorithm.update(state, total), broadcast
    result = algorithm.finish(state)
    assert codec.encode(result)
    if isinstance(result, Fitted):
        assert np.isfinite(Encoder(FEATURES, result).design(table(target, 9, seed), "standard")).all()
        assert result.patients >= 1


def _with_maximum(algorithm: Any, maximum: int) -> Any:
    """Returns the algorithm for a single site that may bring everybody's patients."""
    if isinstance(algorithm, Then):
        second = algorithm.second
        return Then(
            _with_maximum(algorithm.first, maximum),
            algorithm.fitted_type,
            lambda result: _with_maximum(second(result), maximum),
            algorithm.rounds,
        )
    return type(algorithm)(
        **{field.name: getattr(algorithm, field.name) for field in fields(algorithm)} | {"maximum": maximum}
    )


# Stages


@dataclass(frozen=True)
class Halved:
    """A stage for these tests: sends half of each entry."""

    def encode(self, vector: np.ndarray, randomness: Randomness) -> np.ndarray:
        return vector / 2

    def decode(self, total: np.ndarray) -> np.ndarray:
        return total * 2

    def events(self) -> tuple[DpEvent, ...]:
        return (Gaussian(1.0),)


@dataclass(frozen=True)
class Turned:
    """A stage for these tests that does not commute with `Halved` padded by it: reverses and prepends a zero."""

    def encode(self, vector: np.ndarray, randomness: Randomness) -> np.ndarray:
        return np.concatenate([[0.0], vector[::-1]])

    def decode(self, total: np.ndarray) -> np.ndarray:
        return total[1:][::-1]

    def events(self) -> tuple[DpEvent, ...]:
        return (Gaussian(2.0),)


DRAWN = Randomness.of_seed(12)
LAYOUT = (Block("a", (2, 2), 10.0), Block("b", (), 3.0), Block("c", (3,), 0.5, "clip"), Block("none", (0,), 1.0))
PADDED = (Block("zero", (1,), 1.0), Block("all", (8,), 10.0))
STAGES: dict[str, tuple[Stage, float]] = {
    "fixed point, 32 bits": (fixed_point(LAYOUT, 7, 32), 1e-6),
    "fixed point, 64 bits": (fixed_point(LAYOUT, 7, 64), 1e-14),
    "empty chain": (chain([]), 1e-15),
    "chain of one": (chain([fixed_point(LAYOUT, 7, 32)]), 1e-6),
    "chain of three": (chain([Halved(), Turned(), fixed_point(PADDED, 7, 64)]), 1e-13),
    "chain of chains": (chain([chain([Halved()]), chain([Turned(), fixed_point(PADDED, 7, 64)])]), 1e-13),
}


def check_stage(stage: Stage, vectors: Sequence[np.ndarray], tolerance: float) -> None:
    """The sum of the encoded vectors decodes to about the sum of the vectors; both halves are pure."""
    given_vectors = [vector.copy() for vector in vectors]
    encoded = [stage.encode(vector, DRAWN) for vector in vectors]
    assert same(list(vectors), given_vectors)
    assert same(encoded, [stage.encode(vector, DRAWN) for vector in vectors])
    total = np.add.reduce(encoded, dtype=encoded[0].dtype)
    kept = total.copy()
    decoded = stage.decode(total)
    assert same(total, kept)
    assert same(decoded, stage.decode(total))
    assert decoded.dtype == np.float64
    assert decoded == pytest.approx(np.sum(vectors, axis=0), abs=tolerance * len(vectors) * 10)
    assert isinstance(stage.events(), tuple)
    assert all(isinstance(event, DpEvent) for event in stage.events())
    assert stage.events() == stage.events()


@pytest.mark.parametrize("name", STAGES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), sites=st.integers(1, 7), scale=st.sampled_from([0.0, 1e-9, 0.3, 1.0]))
def test_stages_keep_their_promises(name: str, seed: int, sites: int, scale: float) -> None:
    bounds = np.array([10.0] * 4 + [3.0] + [0.5] * 3)
    vectors = list(np.random.default_rng(seed).uniform(-scale, scale, (sites, 8)) * bounds)
    check_stage(*(STAGES[name][0], vectors), STAGES[name][1])


def test_a_chain_encodes_left_to_right_and_decodes_right_to_left() -> None:
    both = chain([Halved(), Turned()])
    assert isinstance(both, Chain)
    assert both.encode(np.array([2.0, 4.0]), DRAWN).tolist() == [0.0, 2.0, 1.0]
    assert both.decode(np.array([9.0, 2.0, 1.0])).tolist() == [2.0, 4.0]
    assert [event.multiplier for event in chain([both, Halved()]).events()] == [1.0, 2.0, 1.0]


class TestLayout:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4), st.integers(0, 99))
    def test_unpack_undoes_pack(self, shapes: list[list[int]], seed: int) -> None:
        rng = np.random.default_rng(seed)
        layout = tuple(Block(f"b{index}", tuple(shape), 1.0) for index, shape in enumerate(shapes))
        statistics = {block.name: rng.uniform(-1, 1, block.shape) for block in reversed(layout)}
        vector = pack(layout, statistics)
        assert vector.shape == (size(layout),)
        assert same(dict(sorted(unpack(layout, vector).items())), dict(sorted(statistics.items())))

    def test_entries_have_names(self) -> None:
        layout = (Block("n", (), 1.0), Block("sex", (2,), 1.0, labels=("f", "m")), Block("h", (2, 2), 1.0))
        assert entry_names(layout) == ("n", "sex: f", "sex: m", "h[0]", "h[1]", "h[2]", "h[3]")


# The checks themselves fail where they should


class Tampering(Preprocess):
    """Preprocessing whose statistics are changed by `how` before they are sent."""

    def local(self, broadcast: Any, table: Table, memory: Any, randomness: Randomness) -> Any:
        statistics, memory = super().local(broadcast, table, memory, randomness)
        return self.how(dict(statistics), table, memory)


def tampering(how: Any) -> Preprocess:
    algorithm = Tampering(FEATURES, MAXIMUM)
    object.__setattr__(algorithm, "how", how)
    return algorithm


def change_the_table(statistics: dict[str, Any], table: Table, memory: Any) -> Any:
    table.columns["age"][0] = 50.0
    return statistics, memory


def change_the_memory(statistics: dict[str, Any], table: Table, memory: Any) -> Any:
    memory["seen"] = np.zeros(1)
    return statistics, memory


CALLS = iter(range(10**9))


@pytest.mark.parametrize(
    "how",
    [
        change_the_table,
        change_the_memory,
        lambda statistics, table, memory: (statistics | {"age": statistics["age"] + next(CALLS)}, memory),
        lambda statistics, table, memory: (statistics | {"age": statistics["age"] * 1e3}, memory),
        lambda statistics, table, memory: (statistics | {"age": statistics["age"][:2]}, memory),
        lambda statistics, table, memory: (statistics | {"age": statistics["age"] * np.nan}, memory),
        lambda statistics, table, memory: (statistics | {"more": np.zeros(1)}, memory),
        lambda statistics, table, memory: ({"age": statistics["age"]}, memory),
    ],
)
def test_a_misbehaving_algorithm_is_noticed(how: Any) -> None:
    with pytest.raises(AssertionError):
        check_algorithm(tampering(how), [table(BINARY, 30, 1)], "a")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("encode", lambda self, vector, randomness: vector * vector),
        ("encode", lambda self, vector, randomness: np.add(vector, 1.0, out=vector)),
        ("encode", lambda self, vector, randomness: vector / 2 + next(CALLS)),
        ("decode", lambda self, total: total),
        ("decode", lambda self, total: np.multiply(total, 2.0, out=total)),
        ("events", lambda self: []),
    ],
)
def test_a_misbehaving_stage_is_noticed(name: str, wrong: Any) -> None:
    stage = type("Wrong", (Halved,), {name: wrong})()
    vectors = [np.array([1.0, 2.0, 3.0])] * 2
    check_stage(Halved(), vectors, 1e-15)
    with pytest.raises(AssertionError):
        check_stage(stage, vectors, 1e-15)
