"""Federated averaging against hand-computed steps, pooled optima and the properties that its docstrings promise."""

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="networks need the extra: pip install 'cohortium[torch]'")

from cohortium.core import codec, layout  # noqa: E402
from cohortium.core.errors import CohortError, ConvergenceError, ProtocolError, StudyError  # noqa: E402
from cohortium.core.features import BinaryTarget, NumberTarget  # noqa: E402
from cohortium.core.random import Randomness  # noqa: E402
from cohortium.core.training import Averaging, Local, Server  # noqa: E402
from cohortium.learning import server  # noqa: E402
from cohortium.learning.algorithm import Memory, in_the_clear  # noqa: E402
from cohortium.learning.fedavg import FedAvg, FedAvgBroadcast, loss_for, mlp  # noqa: E402
from cohortium.learning.network import NetworkFit, forward  # noqa: E402
from cohortium.learning.table import Table, pooled  # noqa: E402

COLUMNS = ("a", "b", "c")
ROOT = Randomness.of_seed(7)


def features(table: Table) -> np.ndarray:
    return np.stack([table.columns[name] for name in COLUMNS], axis=1)


def site(seed: int, rows: int, shift: float = 0.0) -> Table:
    """A hospital whose patients and whose effects are moved by `shift`."""
    random = np.random.Generator(np.random.PCG64(seed))
    values = random.normal(size=(rows, len(COLUMNS))) + shift
    logits = values @ np.array([1.0 + shift, -1.0, 0.5 - shift]) - shift
    target = (random.random(rows) < 1 / (1 + np.exp(-logits))).astype(float)
    return Table(rows, dict(zip(COLUMNS, values.T, strict=True)), target)


def algorithm(
    *,
    hidden: tuple[int, ...] = (),
    rounds: int = 1,
    update_bound: float = 4.0,
    server: Server | None = None,
    **local: Any,
) -> FedAvg:
    return FedAvg(
        module=mlp(len(COLUMNS), hidden, "tanh"),
        loss=loss_for(BinaryTarget(name="y")),
        features=features,
        averaging=Averaging(rounds=rounds, update_bound=update_bound, local=Local(**local), server=server or Server()),
        maximum=200,
        initial=ROOT.child("init"),
    )


def flat(fit: NetworkFit) -> np.ndarray:
    return np.concatenate([part.ravel() for part in fit.weights]).astype(np.float64)


def gradient(parameters: np.ndarray, table: Table) -> np.ndarray:
    """Gradient of the mean cross-entropy of logistic regression, weights first, then the intercept."""
    design = np.column_stack([features(table), np.ones(table.rows)])
    return design.T @ (1 / (1 + np.exp(-design @ parameters)) - table.target) / table.rows


def optimum(table: Table) -> np.ndarray:
    """Newton's method for pooled logistic regression."""
    design = np.column_stack([features(table), np.ones(table.rows)])
    parameters = np.zeros(design.shape[1])
    for _ in range(50):
        mean = 1 / (1 + np.exp(-design @ parameters))
        hessian = design.T @ (design * (mean * (1 - mean))[:, None]) / table.rows
        parameters = parameters - np.linalg.solve(hessian, gradient(parameters, table))
    return parameters


def one_local(subject: FedAvg, table: Table) -> tuple[dict[str, np.ndarray], Memory]:
    broadcast = subject.broadcast(subject.init())
    statistics, memory = subject.local(broadcast, table, {}, ROOT.child("site"))
    return dict(statistics), memory


def test_one_full_batch_step_is_a_pooled_gradient_step() -> None:
    tables = [site(1, 20), site(2, 35, 0.5), site(3, 60, -0.5)]
    subject = algorithm(steps=1, batch_size=200, learning_rate=0.3)
    before = subject.init().parameters
    after = flat(in_the_clear(subject, tables, ROOT))
    np.testing.assert_allclose(after, before - 0.3 * gradient(before, pooled(tables)), atol=1e-6)


def test_the_same_for_a_hidden_layer() -> None:
    tables = [site(1, 20), site(2, 35, 0.5), site(3, 60, -0.5)]
    subject = algorithm(hidden=(4,), steps=1, batch_size=200, learning_rate=0.3)
    federated = flat(in_the_clear(subject, tables, ROOT))
    together = flat(in_the_clear(subject, [pooled(tables)], ROOT))
    np.testing.assert_allclose(federated, together, atol=1e-6)


def test_the_loss_is_the_mean_over_patients() -> None:
    tables = [site(1, 20), site(2, 35, 0.5)]
    subject = algorithm(steps=1, batch_size=200)
    start = subject.init().parameters
    everyone = pooled(tables)
    logits = features(everyone) @ start[:-1] + start[-1]
    assert everyone.target is not None
    expected = np.mean(np.logaddexp(0, logits) - everyone.target * logits)
    assert in_the_clear(subject, tables, ROOT).loss == pytest.approx(expected, abs=1e-6)


def test_fedprox_follows_its_definition() -> None:
    table, rate, mu = site(1, 40, 0.5), 0.3, 2.0
    subject = algorithm(steps=3, batch_size=40, learning_rate=rate, proximal=mu)
    start = subject.init().parameters
    parameters = start
    for _ in range(3):
        parameters = parameters - rate * (gradient(parameters, table) + mu * (parameters - start))
    np.testing.assert_allclose(flat(in_the_clear(subject, [table], ROOT)), parameters, atol=1e-6)


def test_fedprox_without_mu_is_fedavg_and_a_large_mu_shrinks_the_update() -> None:
    table = site(1, 40, 0.5)
    sizes = []
    for mu in (0.0, 1e-9, 1.0, 10.0):
        statistics, _ = one_local(algorithm(steps=20, batch_size=8, learning_rate=0.05, proximal=mu), table)
        sizes.append(np.linalg.norm(statistics["update"]))
    plain, _ = one_local(algorithm(steps=20, batch_size=8, learning_rate=0.05), table)
    assert sizes[0] == np.linalg.norm(plain["update"])
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-5)
    assert sizes[3] < sizes[2] / 2 < sizes[0] / 2


UNEQUAL = [site(1, 150, 1.0), site(2, 60, -1.0), site(3, 40, 0.3)]


def test_scaffold_reaches_the_pooled_optimum_where_fedavg_drifts_away() -> None:
    settings_ = {"rounds": 30, "steps": 20, "batch_size": 200, "learning_rate": 0.5, "update_bound": 100.0}
    best = optimum(pooled(UNEQUAL))
    drifted = flat(in_the_clear(algorithm(**settings_), UNEQUAL, ROOT))
    corrected = flat(in_the_clear(algorithm(scaffold=True, **settings_), UNEQUAL, ROOT))
    assert np.linalg.norm(drifted - best) > 0.1
    assert np.linalg.norm(corrected - best) < 1e-3


def test_a_sites_control_is_its_mean_gradient() -> None:
    """Option II after one full-batch step is option I: the gradient at the parameters received."""
    subject = algorithm(steps=1, batch_size=200, learning_rate=0.3, scaffold=True)
    broadcast = replace(subject.broadcast(subject.init()), control=np.array([0.1, -0.2, 0.3, 0.4], np.float32))
    own = {"control": np.array([-0.3, 0.2, 0.0, 0.1])}
    statistics, memory = subject.local(broadcast, UNEQUAL[0], own, ROOT)
    expected = gradient(broadcast.parameters.astype(np.float64), UNEQUAL[0])
    np.testing.assert_allclose(memory["control"], expected, atol=1e-6)
    np.testing.assert_allclose(statistics["control"] / statistics["weight"], expected - own["control"], atol=1e-6)
    step = -0.3 * (expected + broadcast.control - own["control"])
    np.testing.assert_allclose(statistics["update"] / statistics["weight"], step, atol=1e-6)


@pytest.mark.parametrize("update_bound", [100.0, 0.01])
def test_the_server_control_is_the_weighted_mean_of_the_sites_controls(update_bound: float) -> None:
    subject = algorithm(rounds=3, steps=10, batch_size=16, learning_rate=0.1, scaffold=True, update_bound=update_bound)
    state, memories = subject.init(), [dict[str, np.ndarray]() for _ in UNEQUAL]
    while not subject.done(state):
        total: dict[str, Any] = {}
        for index, table in enumerate(UNEQUAL):
            statistics, memory = subject.local(
                subject.broadcast(state), table, memories[index], ROOT.child("site", index)
            )
            memories[index] = dict(memory)
            total = {name: total.get(name, 0.0) + value for name, value in statistics.items()}
        state = subject.update(state, total)
    rows = np.array([table.rows for table in UNEQUAL])
    mean = rows @ np.stack([memory["control"] for memory in memories]) / rows.sum()
    np.testing.assert_allclose(state.control, mean, atol=1e-6)
    assert np.abs(mean).max() > 1e-4


def adaptive(v_next: Callable[[float, float], float]) -> Callable[[float, Sequence[float]], float]:
    def run(x: float, deltas: Sequence[float]) -> float:
        m, v = 0.0, 0.05**2
        for delta in deltas:
            m = 0.8 * m + 0.2 * delta
            v = v_next(v, delta)
            x = x + 0.5 * m / (v**0.5 + 0.05)
        return x

    return run


def momentum(x: float, deltas: Sequence[float]) -> float:
    first, second = deltas
    return x + 0.5 * first + 0.5 * (0.8 * first + second)


REFERENCES: dict[str, Callable[[float, Sequence[float]], float]] = {
    "sgd": lambda x, deltas: x + 0.5 * (deltas[0] + deltas[1]),
    "momentum": momentum,
    "adam": adaptive(lambda v, delta: 0.7 * v + 0.3 * delta**2),
    "yogi": adaptive(lambda v, delta: v + 0.3 * delta**2 if v < delta**2 else v - 0.3 * delta**2),
    "adagrad": adaptive(lambda v, delta: v + delta**2),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_server_optimisers_against_two_steps_by_hand(name: Any) -> None:
    settings_ = Server(optimiser=name, learning_rate=0.5, beta1=0.8, beta2=0.7, tau=0.05)
    parameters = np.array([1.0, -2.0, 0.0])
    updates = [np.array([0.1, -0.4, 0.02]), np.array([-0.3, 0.01, 0.03])]
    expected = [
        REFERENCES[name](float(x), [float(update[index]) for update in updates]) for index, x in enumerate(parameters)
    ]
    moments = server.start(settings_, 3)
    for update in updates:
        parameters, moments = server.apply(settings_, parameters, moments, update)
    np.testing.assert_allclose(parameters, expected, rtol=1e-12)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("extra", [{}, {"proximal": 0.1}, {"scaffold": True}, {"proximal": 0.1, "scaffold": True}])
def test_every_combination_learns(name: Any, extra: dict[str, Any]) -> None:
    rate = 1.0 if name == "sgd" else 0.3 if name == "momentum" else 0.1
    subject = algorithm(
        hidden=(4,), rounds=25, steps=10, learning_rate=0.1, server=Server(optimiser=name, learning_rate=rate), **extra
    )
    first = in_the_clear(replace(subject, averaging=replace(subject.averaging, rounds=1)), UNEQUAL, ROOT)
    assert in_the_clear(subject, UNEQUAL, ROOT).loss < first.loss - 0.1


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 23), size=st.integers(1, 9), steps=st.integers(1, 7), rounds=st.integers(1, 5))
def test_batches_are_drawn_on_from_round_to_round(rows: int, size: int, steps: int, rounds: int) -> None:
    batches: list[list[float]] = []

    def recording(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        batches.append(target.tolist())
        return output.sum()

    subject = replace(algorithm(steps=steps, batch_size=size), loss=recording)
    table = replace(site(1, rows), target=np.arange(rows, dtype=np.float64))
    broadcast = subject.broadcast(subject.init())
    for number in range(rounds):
        subject.local(replace(broadcast, round=number), table, {}, ROOT)
    in_epoch = -(-rows // size)
    for start in range(0, len(batches), in_epoch):
        epoch = batches[start : start + in_epoch]
        drawn = [row for batch in epoch for row in batch]
        assert len(set(drawn)) == len(drawn)
        assert [len(batch) for batch in epoch] == [min(size, rows - i * size) for i in range(len(epoch))]
        assert len(epoch) < in_epoch or sorted(drawn) == list(range(rows))


def test_epochs_are_shuffled_afresh() -> None:
    orders: list[float] = []

    def recording(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        orders.extend(target.tolist())
        return output.sum()

    table = replace(site(1, 30), target=np.arange(30, dtype=np.float64))
    one_local(replace(algorithm(steps=6, batch_size=10), loss=recording), table)
    assert orders[:30] != orders[30:] and orders[:30] != sorted(orders[:30])


def dropout_module() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(len(COLUMNS), 5), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(5, 1)
    )


def digest() -> str:
    """Trains a module with dropout, which draws from PyTorch's own generator, and returns its weights' hash."""
    subject = replace(algorithm(rounds=3, steps=7, batch_size=8, learning_rate=0.1), module=dropout_module)
    return hashlib.sha256(codec.encode(in_the_clear(subject, UNEQUAL, ROOT))).hexdigest()


def test_equal_inputs_give_equal_bits_and_global_state_stays() -> None:
    first = digest()
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert digest() == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_equal_inputs_give_equal_bits_in_another_process() -> None:
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('t', sys.argv[1]); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); print(m.digest())"
    )
    other = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()


def test_initial_weights_depend_on_their_randomness_alone() -> None:
    subject = algorithm(hidden=(4,))
    torch.manual_seed(1)
    one = subject.init().parameters
    torch.manual_seed(2)
    np.testing.assert_array_equal(subject.init().parameters, one)
    assert not np.array_equal(replace(subject, initial=ROOT.child("other")).init().parameters, one)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("hidden", [(), (5,), (8, 4)])
def test_numpy_forward_is_torchs(hidden: tuple[int, ...], activation: Any) -> None:
    module = mlp(len(COLUMNS), hidden, activation)()
    design = features(site(4, 50))
    fit = NetworkFit(tuple(parameter.detach().numpy() for parameter in module.parameters()), 0.5)
    expected = module(torch.tensor(design, dtype=torch.float32)).detach().numpy()[:, 0]
    scores = forward(fit, design, activation)
    assert scores.shape == (50,)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_updates_are_clipped_entry_by_entry() -> None:
    free, _ = one_local(algorithm(steps=10, batch_size=8, learning_rate=1.0, update_bound=1e3), UNEQUAL[0])
    bound = float(np.median(np.abs(free["update"]))) / float(free["weight"])
    subject = algorithm(steps=10, batch_size=8, learning_rate=1.0, update_bound=bound, scaffold=True)
    clipped, _ = one_local(subject, UNEQUAL[0])
    limit = bound * float(free["weight"])
    np.testing.assert_allclose(clipped["update"], np.clip(free["update"], -limit, limit), rtol=1e-12)
    blocks = subject.layout(subject.broadcast(subject.init()))
    layout.pack(blocks, clipped)
    for block in blocks:
        assert np.abs(clipped[block.name]).max() <= block.bound


def test_what_travels_survives_the_codec() -> None:
    subject = algorithm(hidden=(4,), steps=3, scaffold=True)
    broadcast = subject.broadcast(subject.init())
    received = codec.decode(codec.encode(broadcast), subject.broadcast_type)
    mine, _ = subject.local(broadcast, UNEQUAL[0], {}, ROOT)
    theirs, _ = subject.local(received, UNEQUAL[0], {}, ROOT)
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    fit = in_the_clear(subject, UNEQUAL, ROOT)
    again = codec.decode(codec.encode(fit), NetworkFit)
    assert [part.shape for part in again.weights] == [(4, 3), (4,), (1, 4), (1,)]
    np.testing.assert_array_equal(flat(again), flat(fit))


def test_frozen_parameters_neither_travel_nor_change() -> None:
    def module() -> torch.nn.Module:
        built = mlp(len(COLUMNS), (4,), "relu")()
        next(built.parameters()).requires_grad_(False)
        return built

    subject = replace(algorithm(rounds=2, steps=3), module=module)
    assert [part.shape for part in in_the_clear(subject, UNEQUAL, ROOT).weights] == [(4,), (1, 4), (1,)]


def test_a_number_target_is_learned_on_its_unit_scale() -> None:
    target = NumberTarget(name="y", unit="mmol/L", range=(0.0, 20.0))
    tables = [replace(table, target=features(table) @ [1.0, -2.0, 0.5] + 12.0) for table in UNEQUAL]
    subject = replace(algorithm(rounds=40, steps=20, batch_size=32, learning_rate=0.1), loss=loss_for(target))
    fit = in_the_clear(subject, tables, ROOT)
    expected = (tables[0].target - 10.0) / 10.0
    np.testing.assert_allclose(forward(fit, features(tables[0]), "tanh"), expected, atol=1e-3)


def test_progress_counts_down_and_reports_the_loss() -> None:
    subject = algorithm(rounds=2, steps=1)
    state = subject.init()
    assert subject.progress(state) == (2, None) and not subject.done(state)
    statistics, _ = one_local(subject, UNEQUAL[0])
    state = subject.update(state, statistics)
    left, loss = subject.progress(state)
    assert left == 1 and loss == pytest.approx(float(statistics["loss"] / statistics["weight"]))
    assert subject.done(subject.update(state, statistics))


def test_impossible_studies_and_data_are_refused() -> None:
    with pytest.raises(StudyError, match="must be SGD"):
        replace(algorithm(scaffold=True), optimiser=torch.optim.Adam)
    with pytest.raises(StudyError, match="group or layer normalisation"):
        replace(algorithm(), module=lambda: torch.nn.BatchNorm1d(3)).init()
    subject = algorithm(steps=1)
    state = subject.init()
    with pytest.raises(CohortError, match="no patients"):
        subject.update(state, {name: np.zeros(4) * 0 for name in ("update",)} | {"weight": np.zeros(())})
    short = FedAvgBroadcast(0, np.zeros(3, np.float32), np.zeros(0, np.float32))
    with pytest.raises(ProtocolError, match="network of 4 parameters"):
        subject.local(short, UNEQUAL[0], {}, ROOT)


def test_a_diverging_site_sends_nothing() -> None:
    table = replace(UNEQUAL[0], columns={name: column * 1e30 for name, column in UNEQUAL[0].columns.items()})
    with pytest.raises(ConvergenceError, match="learning_rate"):
        one_local(algorithm(steps=5, learning_rate=1e10), table)


class TestAdmitted:
    """What a site lets a coordinator ask."""

    def test_the_honest_sequence(self) -> None:
        subject = algorithm(rounds=3, scaffold=True)
        first = subject.broadcast(subject.init())
        subject.admit(first, None)
        moved = replace(first, round=1, parameters=first.parameters + np.float32(0.5))
        subject.admit(moved, first)
        with pytest.raises(ProtocolError, match="out of order"):
            subject.admit(replace(moved, round=3), replace(moved, round=2))

    @pytest.mark.parametrize(
        "change",
        [
            {"parameters": np.full(4, np.nan, np.float32)},
            {"parameters": np.full(4, 1e5, np.float32)},
            {"parameters": np.zeros(5, np.float32)},
            {"parameters": np.zeros((4, 1), np.float32)},
            {"parameters": np.zeros(4)},
            {"control": np.zeros((4, 4), np.float32)},
            {"control": np.full(4, np.inf, np.float32)},
            {"round": 0},
            {"round": 2},
        ],
    )
    def test_anything_else(self, change: dict[str, Any]) -> None:
        subject = algorithm(rounds=3, scaffold=True)
        first = subject.broadcast(subject.init())
        honest = replace(first, round=1)
        with pytest.raises(ProtocolError):
            subject.admit(replace(honest, **change), first)

    def test_another_start(self) -> None:
        subject = algorithm(rounds=3)
        first = subject.broadcast(subject.init())
        with pytest.raises(ProtocolError, match="the study's own initial weights"):
            subject.admit(replace(first, parameters=first.parameters + np.float32(1e-3)), None)
