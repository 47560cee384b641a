"""Private training of networks: gradients against loops of plain autograd, what a unit adds, and who is drawn."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="networks need the extra: pip install 'cohortium[torch]'")
pytest.importorskip("opacus", reason="private networks need the extra: pip install 'cohortium[torch]'")

from cohortium.core import codec  # noqa: E402
from cohortium.core.errors import ProtocolError, StudyError  # noqa: E402
from cohortium.core.features import BinaryTarget, NumberTarget  # noqa: E402
from cohortium.core.layout import Noise, pack  # noqa: E402
from cohortium.core.random import Randomness  # noqa: E402
from cohortium.core.training import Averaging, Local, Server  # noqa: E402
from cohortium.learning.algorithm import in_the_clear  # noqa: E402
from cohortium.learning.network import NetworkFit  # noqa: E402
from cohortium.learning.private_fedavg import PrivateBroadcast, PrivateFedAvg, drawn  # noqa: E402
from cohortium.learning.table import Table, Unit, pooled  # noqa: E402
from cohortium.learning.torch_training import Trainer, loss_for, mlp  # noqa: E402

COLUMNS = ("a", "b", "c")
ROOT = Randomness.of_seed(7)
NEAR = 1e-6
"""Relative to the clip: units are clipped so much below it, and then rounded to a grid of about 1e-8."""
TARGETS: dict[str, Any] = {
    "binary": BinaryTarget(name="y"),
    "number": NumberTarget(name="y", unit="d", range=(-1.0, 5.0)),
}


def features(table: Table) -> np.ndarray:
    return np.stack([table.columns[name] for name in COLUMNS], axis=1)


def hospital(seed: int, rows: int, patients: int | None = None, spread: float = 1.0) -> Table:
    """Returns a site's records; with `patients`, each of them has at least one and they lie in any order."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, spread, (rows, len(COLUMNS)))
    target = (rng.random(rows) < 1 / (1 + np.exp(-values @ [1.0, -1.0, 0.5]))).astype(float)
    owners = None
    if patients is not None:
        owners = rng.permutation(np.concatenate([np.arange(patients), rng.integers(0, patients, rows - patients)]))
    return Table(rows, dict(zip(COLUMNS, values.T, strict=True)), target, owners)


def algorithm(unit: Unit = "patient", target: str = "binary", **changes: Any) -> PrivateFedAvg:
    local = {"learning_rate": 0.5, "steps": 3 if unit == "site" else 1} | changes.pop("local", {})
    averaging = {"rounds": 3, "clip": 0.7, "local": Local(**local)} | changes.pop("averaging", {})
    return PrivateFedAvg(
        module=mlp(len(COLUMNS), changes.pop("hidden", (4,)), changes.pop("activation", "tanh")),
        loss=loss_for(TARGETS[target]),
        features=features,
        averaging=Averaging(**averaging),
        maximum=500,
        initial=ROOT.child("init"),
        unit=unit,
        multiplier=changes.pop("multiplier", 1.5),
        **changes,
    )


def sent(subject: PrivateFedAvg, table: Table, number: int = 0) -> np.ndarray:
    """Returns the packed vector that a site sends, as double precision."""
    broadcast = replace(subject.broadcast(subject.init()), round=number)
    statistics, memory = subject.local(broadcast, table, {}, ROOT.child("site"))
    assert memory == {}
    return pack(subject.layout(broadcast), statistics)


def flat(fit: NetworkFit) -> np.ndarray:
    return np.concatenate([part.ravel() for part in fit.weights]).astype(np.float64)


def gradients_one_by_one(subject: PrivateFedAvg, table: Table) -> np.ndarray:
    """Returns each record's gradient, `(n_rows, n_parameters)`: one backward pass of plain PyTorch for each."""
    module = subject.module().double()
    torch.nn.utils.vector_to_parameters(torch.tensor(subject.init().parameters), module.parameters())
    inputs, targets = torch.tensor(features(table)), torch.tensor(table.target)
    rows = []
    for row in range(table.rows):
        loss = subject.loss(module(inputs[row : row + 1]), targets[row : row + 1])
        rows.append(
            torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(module.parameters()))]).numpy()
        )
    return np.array(rows)


def clipped_one_by_one(gradients: np.ndarray, owners: np.ndarray, clip: float) -> np.ndarray:
    total = np.zeros(gradients.shape[1])
    for owner in sorted(set(owners.tolist())):
        own = np.zeros(gradients.shape[1])
        for row in np.flatnonzero(owners == owner):
            own += gradients[row]
        total += own * min(1.0, clip * (1 - NEAR) / np.linalg.norm(own))
    return total


class TestGradients:
    @pytest.mark.parametrize("activation", ["relu", "tanh"])
    @pytest.mark.parametrize("hidden", [(), (5,), (4, 3)])
    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("unit", ["record", "patient"])
    @pytest.mark.parametrize("clip", [0.05, 0.7, 1e3])
    def test_are_those_of_a_loop_of_plain_autograd(
        self, clip: float, unit: Unit, target: str, hidden: tuple[int, ...], activation: str
    ) -> None:
        table = hospital(1, 60, 17)
        changes: Any = {"hidden": hidden, "activation": activation, "averaging": {"clip": clip}}
        subject = algorithm(unit, target, **changes, microbatch=7)
        assert table.patient is not None
        owners = np.arange(60) if unit == "record" else table.patient
        expected = clipped_one_by_one(gradients_one_by_one(subject, table), owners, clip)
        np.testing.assert_allclose(sent(subject, table), expected, rtol=NEAR, atol=NEAR * clip)

    def test_agree_with_those_of_vmap_for_layers_of_one_s_own(self) -> None:
        """Layers that Opacus has no rule for, here with a parameter of the module's own and normalisation."""

        class Scaled(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.GroupNorm(2, 6), torch.nn.ReLU())
                self.last = Offset()

            def forward(self, inputs: Any) -> Any:
                return self.last(self.first(inputs))

        class Offset(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 6))

            def forward(self, inputs: Any) -> Any:
                return (inputs.square() @ self.weight).unsqueeze(-1)

        subject = replace(algorithm("record", averaging={"clip": 0.3}), module=Scaled)
        table = hospital(3, 20)
        module = Trainer(Scaled, subject.loss, features, Local(), subject.initial).build().double()
        own = {name: part.detach() for name, part in module.named_parameters()}

        def loss(parameters: Any, inputs: Any, targets: Any) -> Any:
            return subject.loss(torch.func.functional_call(module, parameters, (inputs[None],)), targets[None])

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
            own, torch.tensor(features(table)), torch.tensor(table.target)
        )
        gradients = torch.cat([each[name].flatten(1) for name in own], dim=1).numpy()
        expected = clipped_one_by_one(gradients, np.arange(20), 0.3)
        np.testing.assert_allclose(sent(subject, table), expected, rtol=NEAR, atol=NEAR * 0.3)

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 99), rows=st.integers(1, 40), microbatch=st.integers(1, 45), few=st.booleans())
    def test_do_not_depend_on_the_microbatch(self, seed: int, rows: int, microbatch: int, few: bool) -> None:
        table = hospital(seed, rows, 1 + (rows - 1) // (12 if few else 2))
        expected = sent(algorithm(), table)
        np.testing.assert_allclose(sent(algorithm(microbatch=microbatch), table), expected, rtol=0, atol=1e-7)

    def test_of_large_networks_are_taken_in_smaller_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        table, seen = hospital(1, 20, 6), []
        subject = algorithm()
        whole = sent(subject, table)

        def recording(output: Any, target: Any) -> Any:
            seen.append(len(output))
            return loss_for(TARGETS["binary"])(output, target)

        monkeypatch.setattr("cohortium.learning.unit_gradients._HELD", 3 * len(whole) + 1)
        np.testing.assert_allclose(sent(replace(subject, loss=recording), table), whole, rtol=0, atol=1e-7)
        # the last step's two records stand beside a row of zeros
        assert seen == [3] * 7

    def test_that_overflow_add_nothing(self) -> None:
        """Neither does one stop the run, which would tell of it, nor is anything sent that is no number."""
        table = hospital(1, 30, 10)
        assert table.patient is not None
        broken = {name: np.where(table.patient == 3, 1e308, column) for name, column in table.columns.items()}
        subject = algorithm(hidden=(), microbatch=4)
        without = sent(subject, table.take(table.patient != 3))
        np.testing.assert_allclose(sent(subject, replace(table, columns=broken)), without, rtol=0, atol=1e-7)

    def test_that_no_output_depends_on_are_zero(self) -> None:
        class Idle(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.idle = torch.nn.Linear(3, 1), torch.nn.Linear(2, 2)

            def forward(self, inputs: Any) -> Any:
                return self.used(inputs)

        vector = sent(replace(algorithm(), module=Idle), hospital(1, 9))
        assert vector.shape == (10,)
        assert vector[:4].all() and not vector[4:].any()


def without(table: Table, owners: np.ndarray, one: int) -> Table:
    return table.take(owners != one)


class TestWhatOneUnitAdds:
    @settings(max_examples=50, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        rows=st.integers(2, 30),
        spread=st.sampled_from([0.1, 1.0, 100.0]),
        clip=st.sampled_from([0.01, 1.0, 50.0]),
        unit=st.sampled_from(["patient", "record"]),
        microbatch=st.sampled_from([1, 3, 256]),
        activation=st.sampled_from(["relu", "tanh"]),
    )
    def test_is_at_most_the_clip(
        self, seed: int, rows: int, spread: float, clip: float, unit: Unit, microbatch: int, activation: str
    ) -> None:
        """Adding or removing any one, with however many records, moves the packed vector by no more."""
        table = hospital(seed, rows, 1 + rows // 7, spread)
        changes: Any = {"averaging": {"clip": clip}, "activation": activation}
        subject = algorithm(unit, **changes, microbatch=microbatch)
        owners = table.owners(unit)
        if owners is None:
            owners = np.arange(rows)
        everybody = sent(subject, table)
        for one in {0, seed % (int(owners.max()) + 1), int(owners.max())}:
            moved = np.linalg.norm(everybody - sent(subject, without(table, owners, one)))
            assert moved <= clip * (1 + 1e-12)

    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        rate=st.sampled_from([0.01, 1.0, 1e3]),
        clip=st.sampled_from([0.01, 1.0, 50.0]),
        bound=st.sampled_from([0.02, 4.0]),
    )
    def test_for_a_site_is_all_that_it_sends(self, seed: int, rate: float, clip: float, bound: float) -> None:
        averaging = {"clip": clip, "update_bound": bound}
        subject = algorithm("site", local={"learning_rate": rate, "batch_size": 5}, averaging=averaging)
        vector = sent(subject, hospital(seed, 20, spread=3.0))
        assert np.linalg.norm(vector) <= clip
        assert np.abs(vector).max() <= subject.layout(subject.broadcast(subject.init()))[0].bound

    def test_is_seen_where_clipping_is_by_record(self) -> None:
        """The check above notices the mistake that it is there for."""
        table = hospital(1, 40, 2, spread=30.0)
        assert table.patient is not None
        subject = algorithm("record", averaging={"clip": 0.5})
        moved = sent(subject, table) - sent(subject, without(table, table.patient, 0))
        assert np.linalg.norm(moved) > 2 * 0.5

    def test_is_announced_with_the_noise(self) -> None:
        for unit in ("patient", "record"):
            subject = algorithm(unit, averaging={"clip": 0.5}, rate=0.25)
            (block,) = subject.layout(subject.broadcast(subject.init()))
            assert (block.name, block.bound, block.noise) == ("update", 250.0, Noise(0.5, 1.5, 0.25))
        subject = algorithm("site", averaging={"clip": 0.5, "update_bound": 0.2})
        (block,) = subject.layout(subject.broadcast(subject.init()))
        assert (block.bound, block.noise) == (0.2, Noise(0.5, 1.5, 1.0))

    @pytest.mark.parametrize("unit", ["patient", "record", "site"])
    def test_is_not_announced_without_noise(self, unit: Unit) -> None:
        free = algorithm(unit, multiplier=None)
        blocks = free.layout(free.broadcast(free.init()))
        assert [block.name for block in blocks] == (["update"] if unit == "site" else ["update", "units"])
        assert not any(block.noise for block in blocks)


def test_without_noise_the_units_drawn_are_counted() -> None:
    table = hospital(1, 60, 20)
    subject = algorithm(multiplier=None, rate=0.5)
    start = subject.init()
    statistics, _ = subject.local(subject.broadcast(start), table, {}, ROOT)
    _, owners = drawn(table.patient, 60, 0.5, ROOT.child("sample", 0))
    assert statistics["units"] == len(set(owners.tolist())) < 20
    moved = subject.update(start, statistics).parameters - start.parameters
    np.testing.assert_allclose(moved, -0.5 * statistics["update"] / statistics["units"], rtol=1e-9, atol=1e-12)


class TestDraws:
    @pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
    def test_are_poisson(self, rate: float) -> None:
        """Every unit on its own with the same probability: mean, spread and joint frequencies are those of coins."""
        units, rounds = 40, 4000
        owners = np.repeat(np.arange(units), 2)
        took = np.zeros((rounds, units))
        for number in range(rounds):
            rows, _ = drawn(owners, 2 * units, rate, ROOT.child("sample", number))
            took[number, owners[rows]] = 1
        error = (rate * (1 - rate) / rounds) ** 0.5
        assert np.abs(took.mean(axis=0) - rate).max() < 4.5 * error
        counts = took.sum(axis=1)
        assert counts.mean() == pytest.approx(units * rate, abs=4.5 * error * units**0.5)
        assert counts.var() == pytest.approx(units * rate * (1 - rate), rel=0.12)
        correlations = np.corrcoef(took.T) - np.eye(units)
        assert np.abs(correlations).max() < 5.5 / rounds**0.5

    @settings(max_examples=60, deadline=None)
    @given(seed=st.integers(0, 999), rows=st.integers(0, 40), rate=st.sampled_from([0.1, 0.5, 1.0]))
    def test_take_all_of_a_unit_or_nothing(self, seed: int, rows: int, rate: float) -> None:
        owners = np.random.default_rng(seed).integers(0, 9, rows)
        taken, whose = drawn(owners, rows, rate, ROOT.child(seed))
        assert (np.diff(whose) >= 0).all() and (owners[taken] == whose).all()
        assert sorted(taken.tolist()) == np.flatnonzero(np.isin(owners, whose)).tolist()
        if rate == 1:
            assert len(taken) == rows

    def test_follow_from_the_sites_randomness_and_the_round_and_no_data(self) -> None:
        one = hospital(1, 50)
        assert one.target is not None
        other = replace(hospital(2, 50), target=1 - one.target)
        # with gradients of 1, whatever the data, the sum is the number drawn
        subject = replace(algorithm("record", hidden=(), rate=0.4, averaging={"clip": 100.0, "rounds": 50}))
        subject = replace(subject, loss=lambda output, target: output.mean())
        counts = [[sent(subject, table, number)[-1] for number in range(30)] for table in (one, other)]
        np.testing.assert_allclose(counts[0], counts[1], atol=1e-4)
        assert len({round(count) for count in counts[0]}) > 4
        broadcast = subject.broadcast(subject.init())
        elsewhere = [
            subject.local(replace(broadcast, round=number), one, {}, ROOT.child("elsewhere"))[0]["update"][-1]
            for number in range(30)
        ]
        assert not np.allclose(elsewhere, counts[0])
        assert np.array_equal(sent(subject, one), sent(subject, one))

    def test_of_nobody_send_zeros(self) -> None:
        subject = algorithm(rate=1e-9)
        vector = sent(subject, hospital(1, 30))
        assert not vector.any()


def test_one_round_is_a_step_along_the_clipped_mean() -> None:
    """The divisor is what the study expects and not what was drawn; a step of one parameter is bounded."""
    table = hospital(1, 80, 30)
    averaging = {"rounds": 1, "update_bound": 0.01}
    subject = algorithm(rate=0.5, patients=33.7, averaging=averaging)
    start = subject.init().parameters
    step = -0.5 * sent(subject, table) / (0.5 * 33.7)
    after = subject.update(subject.init(), {"update": sent(subject, table)})
    np.testing.assert_allclose(after.parameters, start + np.clip(step, -0.01, 0.01), rtol=1e-12)
    assert (np.abs(step) > 0.01).any() and (np.abs(step) < 0.01).any()
    fit = subject.finish(after)
    assert fit.loss is None and subject.progress(after) == (0, None)
    np.testing.assert_allclose(flat(fit), after.parameters, rtol=1e-6)


def test_a_sites_update_is_that_of_averaging() -> None:
    subject = algorithm("site", averaging={"clip": 100.0, "rounds": 1}, local={"steps": 7, "batch_size": 8}, sites=4)
    table = hospital(1, 30)
    trainer = Trainer(subject.module, subject.loss, features, subject.averaging.local, subject.initial)
    broadcast = subject.broadcast(subject.init())
    expected, _ = trainer.train(broadcast.parameters, np.zeros(0), 0, table, ROOT.child("site"))
    np.testing.assert_allclose(sent(subject, table), expected, atol=NEAR)
    half = replace(subject, averaging=replace(subject.averaging, clip=float(np.linalg.norm(expected) / 2)))
    np.testing.assert_allclose(sent(half, table), expected / 2, atol=NEAR)
    start = subject.init()
    after = subject.update(start, {"update": expected})
    np.testing.assert_allclose(after.parameters, start.parameters + expected / 4, rtol=1e-12)


def test_a_site_that_diverges_sends_zeros() -> None:
    table = hospital(1, 30)
    table = replace(table, columns={name: column * 1e30 for name, column in table.columns.items()})
    subject = algorithm("site", hidden=(), local={"learning_rate": 1e30, "steps": 5})
    assert not sent(subject, table).any()


@pytest.mark.parametrize("unit", ["patient", "record"])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam", "yogi", "adagrad"])
def test_federated_is_pooled(unit: Unit, optimiser: Any) -> None:
    tables = [hospital(1, 40, 12), hospital(2, 25), hospital(3, 60, 50, 2.0)]
    server = Server(optimiser=optimiser, learning_rate=0.3, tau=0.05)
    units = sum(table.rows if unit == "record" else table.patients for table in tables)
    # without noise the units are counted, so that their number need not be known
    subject = algorithm(unit, patients=1.0, multiplier=None, averaging={"rounds": 8, "server": server})
    federated = in_the_clear(subject, tables, ROOT)
    together = in_the_clear(subject, [pooled(tables)], ROOT)
    np.testing.assert_allclose(flat(federated), flat(together), rtol=1e-6, atol=1e-6)
    # and noise that is not added changes nothing
    noisy = in_the_clear(replace(subject, multiplier=2.0, patients=float(units)), tables, ROOT)
    assert np.array_equal(flat(noisy), flat(federated))


def test_the_result_is_the_mean_of_the_last_half() -> None:
    for rounds in (1, 2, 5, 6):
        subject = algorithm(averaging={"rounds": rounds}, patients=20.0)
        state, passed = subject.init(), []
        while not subject.done(state):
            state = subject.update(state, {"update": np.random.default_rng(len(passed)).normal(size=21)})
            passed.append(state.parameters)
        np.testing.assert_allclose(flat(subject.finish(state)), np.mean(passed[rounds // 2 :], axis=0), rtol=1e-5)


@pytest.mark.parametrize("unit", ["patient", "site"])
def test_it_learns_through_noise(unit: Unit) -> None:
    tables = [hospital(seed, 200, 100) for seed in range(8)]
    local = {"learning_rate": 2.0 if unit == "patient" else 0.1}
    averaging = {"rounds": 20, "clip": 1.0}
    subject = algorithm(unit, local=local, averaging=averaging, patients=800.0, sites=8, multiplier=1.0)
    test = hospital(99, 2000)
    assert test.target is not None

    def loss(fit: NetworkFit) -> float:
        module = subject.module()
        torch.nn.utils.vector_to_parameters(torch.tensor(flat(fit), dtype=torch.float32), module.parameters())
        with torch.no_grad():
            inputs = torch.tensor(features(test), dtype=torch.float32)
            return float(subject.loss(module(inputs), torch.tensor(test.target, dtype=torch.float32)))

    start = loss(NetworkFit(subject._trainer.shaped(subject.init().parameters), None))
    assert loss(in_the_clear(subject, tables, ROOT, noise=1.0)) < start - 0.1


@pytest.mark.parametrize("unit", ["patient", "site"])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_whatever_the_noise_did_sites_admit_the_next_broadcast(unit: Unit, optimiser: Any) -> None:
    server = Server(optimiser=optimiser, learning_rate=100.0)
    subject = algorithm(unit, averaging={"rounds": 6, "server": server, "update_bound": 1e6})
    state, before = subject.init(), None
    rng = np.random.default_rng(1)
    while not subject.done(state):
        broadcast = codec.decode(codec.encode(subject.broadcast(state)), PrivateBroadcast)
        subject.admit(broadcast, before)
        statistics, _ = subject.local(broadcast, hospital(1, 12), {}, ROOT)
        assert np.isfinite(pack(subject.layout(broadcast), statistics)).all()
        state, before = subject.update(state, {"update": 1e9 * rng.normal(size=21)}), broadcast
    fit = subject.finish(state)
    assert np.isfinite(flat(fit)).all()
    assert codec.decode(codec.encode(fit), NetworkFit).loss is None


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": np.full(21, np.nan, np.float32)},
        {"parameters": np.full(21, 2e4, np.float32)},
        {"parameters": np.zeros(20, np.float32)},
        {"parameters": np.zeros((21, 1), np.float32)},
        {"parameters": np.zeros(21)},
        {"round": 0},
        {"round": 2},
    ],
)
def test_sites_refuse_anything_else(change: dict[str, Any]) -> None:
    subject = algorithm()
    first = subject.broadcast(subject.init())
    with pytest.raises(ProtocolError, match="out of order"):
        subject.admit(replace(first, round=1), None)
    with pytest.raises(ProtocolError):
        subject.admit(replace(replace(first, round=1), **change), first)
    with pytest.raises(ProtocolError, match="the study's own initial weights"):
        subject.admit(replace(first, parameters=first.parameters + np.float32(1e-3)), None)
    with pytest.raises(ProtocolError, match="out of order"):
        subject.admit(replace(first, round=3), replace(first, round=2))


def dropout_module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(5, 1))


def digest() -> str:
    """Trains a module with dropout, which draws from PyTorch's own generator, and returns its weights' hash."""
    subject = replace(algorithm(rate=0.5, patients=60.0), module=dropout_module)
    fit = in_the_clear(subject, [hospital(1, 40, 20), hospital(2, 40)], ROOT, noise=1.0)
    return hashlib.sha256(codec.encode(fit)).hexdigest()


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


MIXING: dict[str, Callable[[], Any]] = {
    "BatchNorm1d": lambda: torch.nn.BatchNorm1d(3, track_running_stats=False),
    "without parameters": lambda: torch.nn.BatchNorm1d(3, affine=False, track_running_stats=False),
    "LSTM": lambda: torch.nn.LSTM(3, 3),
    "MultiheadAttention": lambda: torch.nn.MultiheadAttention(3, 1),
}


class TestRefused:
    @pytest.mark.parametrize("kind", MIXING)
    def test_layers_without_a_gradient_of_one_record(self, kind: str) -> None:
        name = "BatchNorm1d" if kind == "without parameters" else kind
        build = MIXING[kind]
        with pytest.raises(StudyError, match=rf"do not have: {name}; use others"):
            replace(algorithm(), module=lambda: torch.nn.Sequential(build(), torch.nn.Linear(3, 1)))

    def test_running_statistics(self) -> None:
        with pytest.raises(StudyError, match="group or layer normalisation"):
            replace(algorithm(), module=lambda: torch.nn.BatchNorm1d(3))

    @pytest.mark.parametrize(
        ("unit", "changes", "match"),
        [
            ("patient", {"local": {"steps": 2}}, "training.local.steps is 2: .* each patient .* set it to 1"),
            ("record", {"local": {"steps": 50}}, "each record"),
            ("patient", {"local": {"scaffold": True}}, "training.local.scaffold"),
            ("site", {"local": {"scaffold": True}}, "training.local.scaffold"),
            ("patient", {"averaging": {"clip": None}}, "training.clip is missing"),
            ("site", {"rate": 0.5}, "privacy.sampling"),
        ],
    )
    def test_studies(self, unit: Unit, changes: dict[str, Any], match: str) -> None:
        with pytest.raises(StudyError, match=match):
            algorithm(unit, **changes)

    def test_parameters_of_another_network(self) -> None:
        with pytest.raises(ProtocolError, match="network of 21 parameters"):
            algorithm().local(PrivateBroadcast(0, np.zeros(3, np.float32)), hospital(1, 5), {}, ROOT)

    def test_without_opacus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "opacus", None)
        with pytest.raises(StudyError, match=r"needs Opacus, .* run pip install 'cohortium\[torch\]'"):
            algorithm()
        algorithm("site")
