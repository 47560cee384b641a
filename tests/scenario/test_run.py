"""A whole run over the bundled records: the answer, what the coordinator sees of it, and what either half refuses."""

import csv
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cohortium.adapters.sources import FileSource
from cohortium.bootstrap import coordinator_key, example_sites, load_example, simulate, simulated_agents
from cohortium.coordinator.result import Result
from cohortium.coordinator.rounds import Broadcast, Failed, Finished, RoundClosed, RunState, open_run, step
from cohortium.core import codec
from cohortium.core.document import canonical_bytes, study_id_of
from cohortium.core.errors import (
    CohortError,
    CohortiumError,
    DataError,
    ProtocolError,
    Repeated,
    SiteError,
    StudyError,
)
from cohortium.core.features import Category, Number
from cohortium.core.layout import pack
from cohortium.core.messages import (
    Announcement,
    CloseRun,
    FromSite,
    KeySet,
    MaskedUpdate,
    OpenRound,
    OpenRun,
    Refusal,
    ToSite,
    decode_from_site,
)
from cohortium.core.models import Penalty, Regression
from cohortium.core.protection import Aggregation
from cohortium.core.random import Randomness
from cohortium.core.study import Sites, Study
from cohortium.engines import local
from cohortium.learning.algorithm import PhaseBroadcast
from cohortium.learning.glm import GlmBroadcast
from cohortium.learning.preprocess import Fitted
from cohortium.plan import Plan, compile_study
from cohortium.secagg.keys import announce
from cohortium.site.agent import Agent
from cohortium.site.cohort import load
from cohortium.site.session import Membership, Session, Train
from cohortium.site.session import step as site_step

RUN = "run-1"
NAMES = ("budapest", "cleveland", "long-beach", "zurich")


def heart(bits: Any = 32, l2: float = 1.0, **changes: Any) -> Study:
    model, aggregation = Regression(kind="logistic", penalty=Penalty(l2=l2)), Aggregation(bits=bits)
    return replace(load_example(), model=model, aggregation=aggregation, **changes)


@dataclass
class Tapped:
    """A finished run, with what the coordinator sent and what it received, in order."""

    plan: Plan
    result: Result
    received: list[FromSite]
    sent: list[ToSite]


@dataclass
class Recording:
    """An agent that remembers the coordinator's messages."""

    agent: Agent
    heard: list[bytes] = field(default_factory=list)

    @property
    def failure(self) -> Exception | None:
        return self.agent.failure

    @property
    def membership(self) -> Membership:
        return self.agent.membership

    def receive(self, data: bytes) -> list[bytes]:
        self.heard.append(data)
        return self.agent.receive(data)


@dataclass(frozen=True)
class Kept:
    """A bundled dataset that is read once for all of these tests."""

    name: str
    columns: Mapping[str, Any] = field(repr=False)

    def read(self, names: Sequence[str], as_text: Collection[str] = ()) -> Mapping[str, Any]:
        return {name: self.columns[name] for name in names}

    def fingerprint(self) -> str:
        return self.name


class Unreadable:
    """A dataset that nobody may touch."""

    def read(self, names: Sequence[str], as_text: Collection[str] = ()) -> Mapping[str, Any]:
        raise AssertionError("data were read")

    def fingerprint(self) -> str:
        raise AssertionError("data were looked at")


def kept(name: str, path: Path) -> Kept:
    header = path.read_text(encoding="utf-8").splitlines()[0].split(",")
    return Kept(name, FileSource(path).read(header))


KEPT = {name: kept(name, path) for name, path in example_sites().items()}


def tapped(study: Study, sites: Mapping[str, Any], seed: int) -> Tapped:
    plan, received = compile_study(study), []
    agents: Any = {name: Recording(agent) for name, agent in agents_of(plan, sites, seed).items()}
    result = local.run(plan, agents, RUN, lambda: 0.0, coordinator_key(Randomness.of_seed(seed)), tap=received.append)
    heard = [recording.heard for recording in agents.values()]
    assert all(messages == heard[0] for messages in heard)
    return Tapped(plan, result, received, [codec.decode(data, ToSite) for data in heard[0]])


def agents_of(plan: Plan, sites: Mapping[str, Any] | None = None, seed: int = 1) -> dict[str, Agent]:
    return simulated_agents(plan, sites or KEPT, Randomness.of_seed(seed), runs=99)


# The answer, against statsmodels and scikit-learn on the pooled rows


def pooled_rows() -> tuple[pd.DataFrame, np.ndarray]:
    """Returns the raw design of all four hospitals' adults by pandas alone, NaN where a number is missing."""
    frame = pd.concat([pd.read_csv(path) for path in example_sites().values()], ignore_index=True)
    frame = frame[frame["age"] >= 18]
    columns: dict[str, pd.Series] = {}
    for name, feature in sorted(load_example().cohort.features.items()):
        if isinstance(feature, Category):
            filled = frame[name].fillna(frame[name].mode()[0])
            columns |= {f"{name}[{level}]": (filled == level).astype(float) for level in feature.levels[1:]}
        else:
            columns[name] = frame[name].astype(float)
    return pd.DataFrame(columns), frame["disease"].to_numpy(dtype=float)


@pytest.fixture(scope="module")
def runs() -> dict[tuple[int, float], Tapped]:
    return {(bits, l2): tapped(heart(bits, l2), KEPT, 3) for bits in (32, 64) for l2 in (0.0, 1.0)}


@pytest.fixture(scope="module")
def masked_run(runs: dict[tuple[int, float], Tapped]) -> Tapped:
    return runs[32, 1.0]


@pytest.mark.parametrize("bits", [32, 64])
class TestAnswer:
    def test_without_a_penalty_it_is_statsmodels(self, runs: dict[tuple[int, float], Tapped], bits: int) -> None:
        design, y = pooled_rows()
        expected = sm.Logit(y, sm.add_constant(design.fillna(design.mean()))).fit(disp=0, method="newton", maxiter=100)
        fit = runs[bits, 0.0].result.model.fit
        assert fit.names[1:] == tuple(design.columns)  # type: ignore[union-attr]
        assert fit.coefficients == pytest.approx(expected.params.tolist(), abs=1e-4)  # type: ignore[union-attr]
        assert fit.errors == pytest.approx(expected.bse.tolist(), abs=1e-4)  # type: ignore[union-attr]
        assert fit.p_values == pytest.approx(expected.pvalues.tolist(), abs=1e-4)  # type: ignore[union-attr]
        assert fit.loss == pytest.approx(-expected.llf, rel=1e-5)  # type: ignore[union-attr]
        assert fit.patients == len(y)  # type: ignore[union-attr]

    def test_with_a_penalty_it_is_scikit_learns(self, runs: dict[tuple[int, float], Tapped], bits: int) -> None:
        design, y = pooled_rows()
        numbers = [name for name in design if "[" not in name]
        scaler = StandardScaler().fit(design[numbers])
        scaled = design.fillna(design.mean())
        scaled[numbers] = scaler.transform(scaled[numbers])
        ridge = LogisticRegression(C=1.0, tol=1e-12, max_iter=1000, solver="newton-cholesky").fit(scaled, y)
        width, shift = pd.Series(1.0, index=design.columns), pd.Series(0.0, index=design.columns)
        width[numbers], shift[numbers] = scaler.scale_, scaler.mean_
        raw = ridge.coef_[0] / width
        model = runs[bits, 1.0].result.model
        assert model.coef_ == pytest.approx(raw.to_numpy(), abs=1e-4)
        assert model.intercept_ == pytest.approx(ridge.intercept_[0] - float((raw * shift).sum()), abs=1e-4)
        # the sandwich at scikit-learn's estimate
        full = np.column_stack([np.ones(len(y)), scaled])
        chance = ridge.predict_proba(scaled)[:, 1]
        hessian = full.T @ (full * (chance * (1 - chance))[:, None])
        bread = np.linalg.inv(hessian + np.diag([0.0] + [1.0] * design.shape[1]))
        turn = np.diag([1.0, *(1 / width)])
        turn[0, 1:] = -shift / width
        errors = np.sqrt(np.diag(turn @ bread @ hessian @ bread @ turn.T))
        assert model.fit.errors == pytest.approx(errors.tolist(), abs=1e-4)  # type: ignore[union-attr]
        raw_rows = pd.concat([pd.read_csv(path) for path in example_sites().values()], ignore_index=True)
        assert model.predict_proba(raw_rows)[:, 1] == pytest.approx(chance, abs=1e-4)


def test_simulate_gives_the_same_answer_and_its_records(masked_run: Tapped) -> None:
    closed: list[RoundClosed] = []
    result = simulate(heart(), example_sites(), seed=5, progress=closed.append)
    assert result.model.fit == masked_run.result.model.fit
    assert [record.number for record in result.rounds] == [one.number for one in closed]
    assert all(record.survivors == NAMES for record in result.rounds)
    assert closed[-1].left == 0
    assert all(later.left < earlier.left for earlier, later in pairwise(closed))


# What the seed decides


def test_equal_seeds_give_equal_bits_and_others_other_masks(masked_run: Tapped) -> None:
    again, other = tapped(heart(), KEPT, 3), tapped(heart(), KEPT, 4)
    assert [codec.encode(m) for m in again.received] == [codec.encode(m) for m in masked_run.received]
    assert again.result == masked_run.result
    for one, two in zip(masked_run.received, other.received, strict=True):
        assert codec.encode(one) != codec.encode(two)
        if isinstance(one, MaskedUpdate) and isinstance(two, MaskedUpdate):
            assert (one.values != two.values).mean() > 0.99
    # masks are gone from the sum, so the answer does not depend on the seed
    assert other.result.model.fit == masked_run.result.model.fit


# What the coordinator sees


def plain_vectors(run: Tapped) -> list[dict[str, np.ndarray]]:
    """Returns, for each round, each site's encoded vector before masking, by the pure functions alone."""
    tables = {name: load(run.plan, agent.source).table for name, agent in agents_of(run.plan).items()}
    vectors = []
    for message in run.sent:
        if isinstance(message, OpenRound):
            broadcast = codec.decode(message.broadcast, run.plan.algorithm.broadcast_type)
            layout = run.plan.algorithm.layout(broadcast)
            encoded = {}
            for name in NAMES:
                statistics, _ = run.plan.algorithm.local(broadcast, tables[name], {}, Randomness.of_seed(0))
                encoded[name] = run.plan.stages(layout).encode(pack(layout, statistics), Randomness.of_seed(0))
            vectors.append(encoded)
    return vectors


@pytest.mark.parametrize("bits", [32, 64])
class TestSecrecy:
    def test_no_masked_vector_is_near_its_plain_one(self, runs: dict[tuple[int, float], Tapped], bits: int) -> None:
        run = runs[bits, 1.0]
        updates = [message for message in run.received if isinstance(message, MaskedUpdate)]
        plain = plain_vectors(run)
        assert len(updates) == len(plain) * len(NAMES) > 0
        signed, half = (np.int32, 2**31) if bits == 32 else (np.int64, 2**63)
        gaps = []
        for update in updates:
            expected = plain[update.round - 1][update.site]
            assert update.values.dtype == expected.dtype
            assert update.values.shape == expected.shape
            assert (update.values != expected).all()
            gaps.append(np.abs((update.values - expected).view(signed).astype(float)) / half)
        # a mask's distance from zero is uniform on 0..1
        together = np.concatenate(gaps)
        assert abs(together.mean() - 0.5) < 6 * np.sqrt(1 / 12 / len(together))
        assert (together < 0.01).mean() < 0.02

    def test_the_sums_are_exactly_the_plain_ones(self, runs: dict[tuple[int, float], Tapped], bits: int) -> None:
        run = runs[bits, 1.0]
        for number, encoded in enumerate(plain_vectors(run), start=1):
            updates = [m for m in run.received if isinstance(m, MaskedUpdate) and m.round == number]
            kind = updates[0].values.dtype
            total = np.add.reduce([update.values for update in updates], dtype=kind)
            assert (total == np.add.reduce(list(encoded.values()), dtype=kind)).all()
            for left_out in updates:
                part = total - left_out.values
                others = [vector for name, vector in encoded.items() if name != left_out.site]
                assert (part != np.add.reduce(others, dtype=kind)).all()

    def test_a_site_says_nothing_but_keys_and_masked_vectors(
        self, runs: dict[tuple[int, float], Tapped], bits: int
    ) -> None:
        run = runs[bits, 1.0]
        assert [type(message) for message in run.received[:4]] == [Announcement] * 4
        assert {type(message) for message in run.received[4:]} == {MaskedUpdate}
        assert [type(message) for message in run.sent[:2]] == [OpenRun, KeySet]
        assert [type(message) for message in run.sent[-1:]] == [CloseRun]

    def test_no_two_masked_vectors_are_alike(self, runs: dict[tuple[int, float], Tapped], bits: int) -> None:
        values = [m.values.tobytes() for m in runs[bits, 1.0].received if isinstance(m, MaskedUpdate)]
        assert len(set(values)) == len(values)


# The coordinator and its sites step by step


PLAN = compile_study(heart())


@dataclass
class Stage:
    """A run that stands just before the coordinator hears the answers in `pending`."""

    state: RunState
    agents: dict[str, Agent]
    pending: dict[str, FromSite]
    effects: list[Any]


def start(plan: Plan = PLAN, sites: Mapping[str, Any] | None = None, run: str = RUN) -> Stage:
    agents = agents_of(plan, sites)
    pinned = agents["zurich"].membership.pinned
    state, effects = open_run(plan, run, coordinator_key(Randomness.of_seed(1)), pinned)
    stage = Stage(state, agents, {}, list(effects))
    return ask(stage)


def ask(stage: Stage) -> Stage:
    """Brings the coordinator's messages to every site and gathers the answers."""
    for effect in stage.effects:
        if isinstance(effect, Broadcast):
            for name in effect.sites:
                for answer in stage.agents[name].receive(codec.encode(effect.message)):
                    stage.pending[name] = decode_from_site(answer)
    stage.effects = []
    return stage


def tell(stage: Stage) -> Stage:
    """Brings the pending answers to the coordinator."""
    for name, message in stage.pending.items():
        stage.state, effects = step(stage.state, name, message)
        stage.effects += effects
    stage.pending = {}
    return stage


def at_round(number: int, plan: Plan = PLAN) -> Stage:
    """Returns a run whose sites have answered the given round; the coordinator has not heard them yet."""
    stage = ask(tell(start(plan)))
    for _ in range(number - 1):
        ask(tell(stage))
    return stage


def over(stage: Stage) -> Stage:
    while stage.state.phase != "over":
        ask(tell(stage))
    return stage


FIELDS = tuple(name for name in RunState.__struct_fields__ if name != "tally")


def refused(state: RunState, sender: str, message: FromSite) -> None:
    """The coordinator refuses a message, and whatever it held before is as it was."""
    total = summed(state)
    before = {name: getattr(state, name) for name in FIELDS}
    with pytest.raises(ProtocolError):
        step(state, sender, message)
    assert all(getattr(state, name) is value for name, value in before.items())
    assert (summed(state) is None) == (total is None)
    if total is not None:
        assert (summed(state) == total).all()


def summed(state: RunState) -> np.ndarray | None:
    return None if state.tally is None or state.tally.total is None else state.tally.total.copy()


def update_of(stage: Stage, name: str) -> MaskedUpdate:
    message = stage.pending[name]
    assert isinstance(message, MaskedUpdate)
    return message


def altered(message: Any, **changes: Any) -> Any:
    return type(message)(**{name: getattr(message, name) for name in message.__struct_fields__} | changes)


class TestCoordinatorRefuses:
    def test_messages_of_another_run_or_in_anothers_name(self) -> None:
        for stage in (start(), at_round(1), at_round(3)):
            for name, message in stage.pending.items():
                refused(stage.state, name, altered(message, run="run-2"))
                refused(stage.state, "zurich" if name != "zurich" else "budapest", message)
                refused(stage.state, name, altered(message, site="zurich" if name != "zurich" else "budapest"))
                refused(stage.state, "mallory", altered(message, site="mallory"))
                refused(stage.state, "mallory", Refusal(RUN, "mallory", "no"))

    def test_repeated_messages(self) -> None:
        for stage in (start(), at_round(1), at_round(2)):
            state = stage.state
            for name in NAMES[:3]:
                state, effects = step(state, name, stage.pending[name])
                assert effects == []
                refused(state, name, stage.pending[name])
            state, effects = step(state, NAMES[3], stage.pending[NAMES[3]])
            assert effects
            for message in stage.pending.values():
                refused(state, message.site, message)

    def test_messages_in_the_wrong_order(self) -> None:
        early, late = start(), at_round(1)
        for name in NAMES:
            refused(early.state, name, update_of(late, name))
            refused(late.state, name, early.pending[name])

    def test_updates_of_another_round_length_or_type(self) -> None:
        stage = at_round(2)
        first, _ = step(stage.state, "zurich", stage.pending["zurich"])
        for state in (stage.state, first):
            update = update_of(stage, "budapest")
            for number in (0, 1, 3, -2, 2**63):
                refused(state, "budapest", altered(update, round=number))
            for values in (
                update.values[:-1],
                np.append(update.values, np.uint32(0)),
                update.values.astype(np.uint64),
                update.values.astype(np.float64),
                update.values.view(np.uint32).reshape(1, -1),
                np.empty(0, dtype=np.uint32),
                np.array(5, dtype=np.uint32),
            ):
                refused(state, "budapest", altered(update, values=values))

    def test_anything_after_the_end(self) -> None:
        early, late = start(), at_round(1)
        ended = over(at_round(1)).state
        failed, _ = step(early.state, "zurich", Refusal(RUN, "zurich", "no"))
        for state in (ended, failed):
            for name in NAMES:
                for message in (early.pending[name], update_of(late, name), Refusal(RUN, name, "no")):
                    refused(state, name, message)

    def test_a_refused_message_changes_nothing_of_the_outcome(self, masked_run: Tapped) -> None:
        stage, finished = start(), []
        while stage.state.phase != "over":
            for name, message in stage.pending.items():
                for wrong in (altered(message, run="other"), altered(message, site="mallory")):
                    with pytest.raises(ProtocolError):
                        step(stage.state, name, wrong)
                stage.state, effects = step(stage.state, name, message)
                with pytest.raises(ProtocolError):
                    step(stage.state, name, message)
                stage.effects += effects
            finished += [effect for effect in stage.effects if isinstance(effect, Finished)]
            ask(stage)
        assert finished[0].outcome == masked_run.result.outcome

    def test_the_order_in_which_answers_arrive_is_irrelevant(self, masked_run: Tapped) -> None:
        stage, finished = start(), []
        while stage.state.phase != "over":
            stage.pending = dict(reversed(stage.pending.items()))
            tell(stage)
            finished += [effect for effect in stage.effects if isinstance(effect, Finished)]
            ask(stage)
        assert finished[0].outcome == masked_run.result.outcome

    def test_a_finished_run_is_closed_everywhere(self) -> None:
        stage = over(at_round(1))
        assert stage.pending == {}
        for name, agent in stage.agents.items():
            (answer,) = agent.receive(codec.encode(OpenRound(RUN, 99, b"")))
            assert decode_from_site(answer).site == name
            assert isinstance(decode_from_site(answer), Refusal)


# What a site refuses


def answer(agent: Agent, message: ToSite) -> list[FromSite]:
    return [decode_from_site(data) for data in agent.receive(codec.encode(message))]


def opening(plan: Plan = PLAN, run: str = RUN) -> OpenRun:
    return OpenRun(run, canonical_bytes(plan.study))


def key_set(stage: Stage) -> KeySet:
    return KeySet(RUN, tuple(stage.pending[name] for name in NAMES))  # type: ignore[misc]


def first_round(plan: Plan = PLAN, number: int = 1) -> OpenRound:
    return OpenRound(RUN, number, codec.encode(plan.algorithm.broadcast(plan.algorithm.init())))


def refuses_for_good(agent: Agent, message: ToSite, reason: str) -> None:
    """A site refuses a message, and from then on answers nothing of that run but refusals."""
    (said,) = answer(agent, message)
    assert isinstance(said, Refusal)
    assert reason in said.reason
    for later in (first_round(), first_round(number=7), message, KeySet(RUN, ())):
        assert [type(one) for one in answer(agent, later)] == [Refusal]
    assert all(isinstance(one, Refusal) for one in answer(agent, opening()))


def passes_over(agent: Agent, message: ToSite) -> None:
    """A site says nothing to a message that came before, whatever it holds now, and its run goes on."""
    before = dict(agent._sessions)
    assert answer(agent, message) == []
    assert {run: session is before[run] for run, session in agent._sessions.items()} == dict.fromkeys(before, True)


class TestSiteRefuses:
    def test_a_round_twice(self) -> None:
        stage = ask(tell(start()))
        for name, agent in stage.agents.items():
            assert isinstance(stage.pending[name], MaskedUpdate)
            passes_over(agent, first_round())

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_an_earlier_round(self, number: int) -> None:
        passes_over(at_round(3).agents["zurich"], first_round(number=number))

    @pytest.mark.parametrize("number", [0, -1])
    def test_a_round_that_cannot_be(self, number: int) -> None:
        with pytest.raises(ProtocolError, match="malformed"):
            at_round(3).agents["zurich"].receive(codec.encode(first_round(number=number)))

    def test_another_question_in_a_round_that_was_answered(self) -> None:
        passes_over(at_round(2).agents["cleveland"], hostile(2, beta=np.full(14, 0.5)))

    def test_a_run_twice_under_one_name(self) -> None:
        for stage in (start(), at_round(1)):
            passes_over(stage.agents["budapest"], opening())
        agent = over(at_round(1)).agents["budapest"]
        refuses_for_good(agent, opening(), "its name was used before")
        assert isinstance(answer(agent, opening(run="run-2"))[0], Announcement)

    def test_a_run_twice_gives_no_second_key(self) -> None:
        one, two = start(), start(run="run-2")
        for name in NAMES:
            first, second = one.pending[name], two.pending[name]
            assert isinstance(first, Announcement) and isinstance(second, Announcement)
            assert first.public_key != second.public_key

    @pytest.mark.parametrize(
        ("change", "reason"),
        {
            "swapped": (lambda keys: (forged(keys[0]), *keys[1:]), "not signed by its pinned identity"),
            "swapped own": (lambda keys: (*keys[:3], forged(keys[3])), "not signed by its pinned identity"),
            "names exchanged": (
                lambda keys: (
                    altered(keys[1], site=keys[0].site),
                    altered(keys[0], site=keys[1].site),
                    *keys[2:],
                ),
                "not signed",
            ),
            "missing": (lambda keys: keys[1:], "holds 3 sites, and the study needs 4"),
            "two": (lambda keys: keys[2:], "holds 2 sites, and the study needs 4"),
            "only one's own": (lambda keys: keys[3:], "holds 1 sites, and the study needs 4"),
            "none": (lambda keys: (), "holds 0 sites, and the study needs 4"),
            "doubled": (lambda keys: (*keys, keys[0]), "once each and in order"),
            "out of order": (lambda keys: (keys[1], keys[0], *keys[2:]), "once each and in order"),
            "extra": (lambda keys: (*keys, altered(keys[0], site="zzz")), "must list sites of the study"),
            "repeated": (lambda keys: (altered(keys[1], site=keys[0].site), *keys[1:]), "same key"),
        }.values(),
    )
    def test_a_key_set_that_is_not_everybodys(self, change: Callable[[Any], Any], reason: str) -> None:
        stage = start()
        keys = key_set(stage).announcements
        refuses_for_good(stage.agents["zurich"], KeySet(RUN, change(keys)), reason)

    def test_a_second_key_set(self) -> None:
        stage = start()
        agent, keys = stage.agents["zurich"], key_set(stage)
        assert answer(agent, keys) == []
        passes_over(agent, keys)
        passes_over(agent, KeySet(RUN, (forged(keys.announcements[0]), *keys.announcements[1:])))

    def test_keys_of_another_run_signed_by_the_right_sites(self) -> None:
        stage, other = start(), start(run="run-2")
        keys = tuple(altered(other.pending[name], run=RUN) for name in NAMES[:3])
        mine = stage.pending["zurich"]
        refuses_for_good(stage.agents["zurich"], KeySet(RUN, (*keys, mine)), "not signed")  # type: ignore[arg-type]

    def test_messages_out_of_order(self) -> None:
        stage = start()
        fresh = agents_of(PLAN)
        for message in (key_set(stage), first_round(), first_round(number=2)):
            (said,) = answer(fresh["zurich"], message)
            assert isinstance(said, Refusal)
            assert said.reason == "a message was refused: no such run is open at this site"
        refuses_for_good(stage.agents["zurich"], first_round(), "came twice or out of order")

    def test_messages_of_another_run(self) -> None:
        for stage, message in ((start(), key_set(start())), (at_round(1), first_round(number=2))):
            agent = stage.agents["zurich"]
            before = dict(agent._sessions)
            (said,) = answer(agent, altered(message, run="run-2"))
            assert isinstance(said, Refusal)
            assert (said.run, said.reason) == ("run-2", "a message was refused: no such run is open at this site")
            assert agent._sessions == before

    def test_a_closed_run(self) -> None:
        stage = at_round(1)
        agent = stage.agents["zurich"]
        assert answer(agent, CloseRun(RUN, "finished")) == []
        refuses_for_good(agent, first_round(number=2), "no such run is open")

    def test_closing_what_is_not_open_is_harmless(self) -> None:
        agent = agents_of(PLAN)["zurich"]
        assert answer(agent, CloseRun(RUN, "failed")) == []
        assert isinstance(answer(agent, opening())[0], Announcement)

    @pytest.mark.parametrize(
        ("study", "reason"),
        [
            (b"", "not JSON"),
            (b"{}", "lacks 'study'"),
            (b" " + canonical_bytes(PLAN.study), "not in canonical form"),
            (canonical_bytes(PLAN.study).replace(b'"heart_disease"', b'"\\ud800"'), "not JSON"),
            (canonical_bytes(heart(sites=Sites(include=("budapest", "cleveland", "rome")))), "does not include this"),
            (canonical_bytes(heart()).replace(b'"dropouts":0', b'"dropouts":2'), "at most 1 may be lost"),
            (canonical_bytes(heart()).replace(b"age >= 18", b"open('/x')"), "not offered"),
        ],
    )
    def test_a_study_it_cannot_take_part_in(self, study: bytes, reason: str) -> None:
        agent = agents_of(PLAN)["zurich"]
        agent.approved = {study_id_of(study): 1}
        refuses_for_good(agent, OpenRun(RUN, study), reason)

    def test_a_study_that_its_steward_has_not_approved(self) -> None:
        narrower = heart().cohort
        asked = compile_study(replace(heart(), cohort=replace(narrower, where="age == 50")))
        agent = agents_of(PLAN)["zurich"]
        agent.source = Unreadable()
        refuses_for_good(agent, opening(asked), "has not approved it")

    def test_a_study_with_a_site_that_it_does_not_know(self) -> None:
        plan = compile_study(heart(sites=Sites(include=("cleveland", "rome", "zurich"))))
        agent = agents_of(PLAN)["zurich"]
        agent.approved = {plan.study_id: 1}
        (mine,) = answer(agent, opening(plan))
        assert isinstance(mine, Announcement)
        others = [
            announce(Ed25519PrivateKey.generate(), X25519PrivateKey.generate(), RUN, plan.study_id, name)
            for name in ("cleveland", "rome")
        ]
        refuses_for_good(agent, KeySet(RUN, (*others, mine)), "knows no identity of rome")

    @pytest.mark.parametrize("broadcast", [b"", b"\xc1", b"\x80", codec.encode({"fitted": b"", "inner": b"x"})])
    def test_a_malformed_broadcast(self, broadcast: bytes) -> None:
        stage = start()
        for name in NAMES:
            answer(stage.agents[name], key_set(stage))
        (said,) = answer(stage.agents["zurich"], OpenRound(RUN, 1, broadcast))
        assert isinstance(said, Refusal)

    def test_bytes_that_are_no_message(self) -> None:
        agent = agents_of(PLAN)["zurich"]
        for data in (b"", b"\xc1", b"x" * 99, codec.encode(Refusal(RUN, "zurich", "no"))):
            with pytest.raises(ProtocolError):
                agent.receive(data)
        assert isinstance(answer(agent, opening())[0], Announcement)

    def test_the_sites_that_got_another_broadcast_open_nothing(self) -> None:
        """A coordinator that shows one site another model gets noise, not that site's vector."""
        honest, stage = at_round(1), start()
        for name in NAMES:
            answer(stage.agents[name], key_set(stage))
        usual = first_round()
        # a longer spelling of the same broadcast, so that the vectors themselves are equal
        decoded = codec.decode(usual.broadcast, PLAN.algorithm.broadcast_type)
        assert decoded == PLAN.algorithm.broadcast(PLAN.algorithm.init())
        spelled = usual.broadcast.replace(b"\xc4\x00", b"\xc5\x00\x00")
        assert spelled != usual.broadcast
        assert codec.decode(spelled, PLAN.algorithm.broadcast_type) == decoded
        updates = {}
        for name in NAMES:
            asked = altered(usual, broadcast=spelled) if name == "zurich" else usual
            (updates[name],) = answer(stage.agents[name], asked)
        for name in NAMES[:3]:
            assert codec.encode(updates[name]) == codec.encode(honest.pending[name])
        good = np.add.reduce([update_of(honest, name).values for name in NAMES], dtype=np.uint32)
        bad = np.add.reduce([updates[name].values for name in NAMES], dtype=np.uint32)
        assert (good != bad).all()
        assert np.abs((good - bad).view(np.int32).astype(float)).mean() > 2**28


def forged(entry: Announcement) -> Announcement:
    """A key of the coordinator's own in a site's name."""
    return announce(Ed25519PrivateKey.generate(), X25519PrivateKey.generate(), RUN, PLAN.study_id, entry.site)


def hostile(number: int, **change: Any) -> OpenRound:
    """A round of the second phase, as Newton would open it but for the change."""
    fitted = change.pop("fitted", None) or PLAN_FITTED
    beta = change.pop("beta", np.zeros(14))
    return OpenRound(RUN, number, codec.encode(PhaseBroadcast(codec.encode(fitted), codec.encode(GlmBroadcast(beta)))))


def plausible() -> Fitted:
    features = heart().cohort.features
    numbers = {name: feature.range for name, feature in features.items() if isinstance(feature, Number)}
    return Fitted(
        {name: (low + high) / 2 for name, (low, high) in numbers.items()},
        {name: (high - low) / 4 for name, (low, high) in numbers.items()},
        {name: 0 for name, feature in features.items() if isinstance(feature, Category)},
    )


PLAN_FITTED = plausible()


def bent(**change: float) -> Fitted:
    """The plausible fit with one number's mean or deviation replaced."""
    part, value = next(iter(change.items()))
    return replace(PLAN_FITTED, **{part: {**getattr(PLAN_FITTED, part), "age": value}})


class TestLyingCoordinator:
    """Every question but the next honest one is refused, before it touches a patient."""

    def second_phase(self) -> Agent:
        agent = at_round(1).agents["zurich"]
        assert isinstance(answer(agent, hostile(2))[0], MaskedUpdate)
        return agent

    def test_the_honest_way_is_open(self) -> None:
        agent = self.second_phase()
        assert isinstance(answer(agent, hostile(3, beta=np.full(14, 0.5)))[0], MaskedUpdate)

    @pytest.mark.parametrize("number", [3, 27, 10**9])
    def test_a_round_ahead(self, number: int) -> None:
        refuses_for_good(at_round(1).agents["zurich"], hostile(number), "out of order or beyond")

    def test_more_rounds_than_the_study_has(self) -> None:
        agent = self.second_phase()
        for number in range(3, 27):
            assert isinstance(answer(agent, hostile(number, beta=np.full(14, number / 99)))[0], MaskedUpdate)
        refuses_for_good(agent, hostile(27, beta=np.full(14, 0.1)), "beyond the study's rounds")

    def test_skipping_the_first_phase(self) -> None:
        stage = start()
        agent = stage.agents["zurich"]
        answer(agent, key_set(stage))
        refuses_for_good(agent, hostile(1), "skips the first phase")

    def test_going_back_to_the_first_phase(self) -> None:
        refuses_for_good(self.second_phase(), first_round(number=3), "has changed")

    def test_the_first_phase_twice(self) -> None:
        refuses_for_good(at_round(1).agents["zurich"], first_round(number=2), "takes one round")

    def test_the_same_coefficients_again(self) -> None:
        agent = self.second_phase()
        assert isinstance(answer(agent, hostile(3, beta=np.full(14, 0.5)))[0], MaskedUpdate)
        refuses_for_good(agent, hostile(4, beta=np.full(14, 0.5)), "its coefficients were asked for before")

    def test_a_start_elsewhere_than_at_zero(self) -> None:
        asked = hostile(2, beta=np.eye(14)[3])
        refuses_for_good(at_round(1).agents["zurich"], asked, "starts with all coefficients at zero")

    @pytest.mark.parametrize(
        "beta",
        [
            np.full(14, np.nan),
            np.array([0.0, np.inf, *[0.0] * 12]),
            np.full(14, 1e9),
            np.zeros(13),
            np.zeros((14, 3)),
            np.zeros(14, np.float32),
        ],
    )
    def test_coefficients_that_single_out(self, beta: np.ndarray) -> None:
        refuses_for_good(self.second_phase(), hostile(3, beta=beta), "wrong shape or are out of bounds")

    @pytest.mark.parametrize(
        "fitted",
        [bent(means=1e9), bent(means=float("nan")), bent(deviations=0.0), bent(deviations=-1.0), bent(deviations=1e9)],
    )
    def test_preprocessing_that_singles_out(self, fitted: Fitted) -> None:
        refuses_for_good(at_round(1).agents["zurich"], hostile(2, fitted=fitted), "cannot have been fitted")

    def test_preprocessing_that_changes(self) -> None:
        refuses_for_good(self.second_phase(), hostile(3, fitted=bent(means=50.0)), "has changed")

    def test_what_is_kept_after_a_run_cannot_open_it(self) -> None:
        agent = agents_of(PLAN)["zurich"]
        before = agent.randomness
        answer(agent, opening())
        session = agent._sessions[RUN]
        assert agent.randomness == before.child("next")
        assert session.randomness == before.child("run", RUN)
        over, _ = site_step(session, CloseRun(RUN, "finished"))
        assert {over.randomness.key, over.training.key if over.training else b""} == {bytes(32)}
        assert over.member is None and over.private is None and not over.memory
        answer(agent, CloseRun(RUN, "finished"))
        assert not agent._sessions and not agent._cohorts


def test_a_site_masks_a_round_once_even_if_its_session_is_asked_directly() -> None:
    stage = start()
    agent = stage.agents["zurich"]
    answer(agent, key_set(stage))
    session, table = agent._sessions[RUN], agent.table
    assert isinstance(session, Session)
    session, _ = site_step(session, first_round())
    session, (train,) = site_step(session, table)
    assert isinstance(train, Train)
    trained = train.done()
    later, _ = site_step(session, trained)
    with pytest.raises(Repeated, match="round 1 is already protected"):
        site_step(later, first_round())
    for again in (table, trained):
        with pytest.raises(ProtocolError, match="nobody asked"):
            site_step(later, again)


def test_secrets_are_not_in_a_sessions_repr() -> None:
    stage = start()
    agent = stage.agents["zurich"]
    answer(agent, key_set(stage))
    session = agent._sessions[RUN]
    assert session.member is not None
    secrets = [*session.member.pairs.keys, agent.randomness.key, agent.membership.identity.private_bytes_raw()]
    for secret in secrets:
        assert repr(secret)[2:12] not in repr(agent)
        assert secret.hex() not in repr(agent)


# Refusals and failures


def frames() -> dict[str, pd.DataFrame]:
    return {name: pd.read_csv(path) for name, path in example_sites().items()}


def with_cell(column: str, value: Any, rows: int) -> pd.DataFrame:
    frame = frames()["zurich"].astype({column: object if isinstance(value, str) else float})
    frame.loc[: rows - 1, column] = value
    return frame


BROKEN: dict[str, tuple[Callable[[], pd.DataFrame], str, str]] = {
    "outside": (lambda: with_cell("age", 117.5, 37), "37 values above", "outside the study's range 18..100"),
    "infinite": (lambda: with_cell("age", np.inf, 37), "infinite", "infinite"),
    "level": (lambda: with_cell("sex", "intersex-77", 37), "37 patients", "not among its levels female, male"),
    "text": (lambda: with_cell("chol", "77 mg", 37), "holds text", "holds text"),
    "target": (lambda: with_cell("disease", 7.0, 37), "37 patients", "not among its levels 0, 1"),
    "no target": (lambda: with_cell("disease", np.nan, 37), "37 missing", "has missing values"),
    "no column": (lambda: frames()["zurich"].drop(columns="exang"), "'exang' is missing", "'exang' is missing"),
    "few": (lambda: frames()["zurich"].head(17), "17 patients pass", "fewer patients than the study's minimum of 20"),
    "none": (lambda: with_cell("age", 17.0, 123), "no patients pass", "no patients pass"),
    "repeated": (lambda: with_cell("patient_id", "zur-037", 37), "36 repeated", "more than once"),
    "anonymous": (lambda: with_cell("patient_id", np.nan, 37), "37 rows", "lacks the identifier"),
}
PUBLIC_DIGITS = {"18", "100", "0", "1", "20"}


def broken(kind: str) -> tuple[pd.DataFrame, str, str]:
    make, full, public = BROKEN[kind]
    if kind == "anonymous":
        frame = frames()["zurich"]
        frame.loc[:36, "patient_id"] = None
        return frame, full, public
    return make(), full, public


@pytest.mark.parametrize("kind", BROKEN)
class TestBrokenData:
    def test_the_coordinator_learns_the_rule_and_no_count_or_value(self, kind: str) -> None:
        frame, _, public = broken(kind)
        stage = start(sites={**KEPT, "zurich": frame})
        said = stage.pending["zurich"]
        assert isinstance(said, Refusal)
        assert public in said.reason
        digits = "".join(character if character.isdigit() else " " for character in said.reason).split()
        assert set(digits) <= PUBLIC_DIGITS
        assert not any(word in said.reason for word in ("zur-", "intersex", 'mg"', "117"))

    def test_the_run_fails_with_the_sites_own_reason(self, kind: str) -> None:
        frame, full, public = broken(kind)
        with pytest.raises(SiteError, match=f"^zurich: .*{full}") as failed:
            simulate(heart(), {**KEPT, "zurich": frame}, seed=1)
        assert public in failed.value.public


def test_a_refusal_ends_the_run_at_the_coordinator() -> None:
    stage = start(sites={**KEPT, "zurich": frames()["zurich"].head(5)})
    state, effects = step(stage.state, "zurich", stage.pending["zurich"])
    assert state.phase == "over"
    close, failed = effects
    assert close == Broadcast(CloseRun(RUN, "failed"), ("budapest", "cleveland", "long-beach"))
    assert isinstance(failed, Failed)
    assert "site 'zurich' takes no part: fewer patients" in str(failed.error)


def test_what_is_wrong_with_the_data_taken_together_is_said_by_the_coordinator() -> None:
    everybody_ill = {name: frame.assign(disease=1) for name, frame in frames().items()}
    with pytest.raises(CohortError, match="target 'disease' is the same for every patient"):
        simulate(heart(), everybody_ill, seed=1)


def test_an_agents_own_failure_is_not_told() -> None:
    class Falling:
        def read(self, names: Any, as_text: Any = ()) -> Any:
            raise RuntimeError("patient Jane Doe, born 1950")

        def fingerprint(self) -> str:
            return "x"

    stage = start(sites={**KEPT, "zurich": Falling()})
    said = stage.pending["zurich"]
    assert isinstance(said, Refusal)
    assert said.reason == "the site's agent failed; its own staff see why"
    assert "Jane Doe" in str(stage.agents["zurich"].failure)


class TestData:
    def written(self, tmp_path: Path) -> dict[str, Path]:
        paths = {}
        for name, path in example_sites().items():
            paths[name] = tmp_path / f"{name}.csv"
            paths[name].write_bytes(path.read_bytes())
        return paths

    def test_a_file_that_vanishes_between_rounds(self, tmp_path: Path) -> None:
        paths, closed = self.written(tmp_path), []

        def remove(record: RoundClosed) -> None:
            closed.append(record.number)
            if record.number == 3:
                paths["cleveland"].unlink()

        with pytest.raises(SiteError, match=r"^cleveland: .*gone or cannot be opened") as failed:
            simulate(heart(), paths, seed=1, progress=remove)
        assert closed == [1, 2, 3]
        assert str(tmp_path) not in failed.value.public

    def test_a_file_that_changes_between_rounds(self, tmp_path: Path) -> None:
        paths = self.written(tmp_path)

        def spoil(record: RoundClosed) -> None:
            if record.number == 2:
                with paths["zurich"].open(newline="") as file:
                    rows = list(csv.reader(file))
                rows[1][1] = "180"
                with paths["zurich"].open("w", newline="") as file:
                    csv.writer(file).writerows(rows)

        with pytest.raises(SiteError, match=r"^zurich: the data changed during the run"):
            simulate(heart(), paths, seed=1, progress=spoil)

    def test_files_and_frames_give_the_same(self, masked_run: Tapped) -> None:
        assert simulate(heart(), frames(), seed=1).model.fit == masked_run.result.model.fit

    def test_one_admission_during_a_run_ends_it(self, tmp_path: Path) -> None:
        paths = self.written(tmp_path)
        agent = agents_of(PLAN, paths)["zurich"]
        assert isinstance(answer(agent, opening())[0], Announcement)
        stage = start(sites=paths)
        before, agent = stage.agents["zurich"].table, stage.agents["zurich"]
        assert answer(agent, key_set(stage)) == []
        assert isinstance(answer(agent, first_round())[0], MaskedUpdate)
        assert agent.table is before
        paths["zurich"].write_bytes(paths["zurich"].read_bytes() + b"\n")
        (said,) = answer(agent, hostile(2))
        assert isinstance(said, Refusal)
        assert "changed during the run" in said.reason
        # the next run reads it anew
        assert isinstance(answer(agent, opening(run="run-2"))[0], Announcement)


class TestSimulate:
    @pytest.mark.parametrize("seed", [-1, 1.5, "1", None, True])
    def test_the_seed_is_a_whole_number(self, seed: Any) -> None:
        with pytest.raises(StudyError, match="the seed is"):
            simulate(heart(), example_sites(), seed=seed)

    def test_the_sites_are_those_of_the_study(self) -> None:
        sites: dict[str, Any] = dict(example_sites())
        with pytest.raises(StudyError, match="'zurch', which is no site of the study; did you mean 'zurich'"):
            simulate(heart(), {**sites, "zurch": sites["zurich"]}, seed=1)
        del sites["zurich"]
        with pytest.raises(StudyError, match="no data were given for site 'zurich'"):
            simulate(heart(), sites, seed=1)

    def test_errors_share_one_root(self) -> None:
        for kind in (StudyError, SiteError, DataError, CohortError, ProtocolError):
            assert issubclass(kind, CohortiumError)


def test_a_site_of_the_study_that_is_not_in_its_own_membership_refuses() -> None:
    source = agents_of(PLAN)["zurich"]
    stranger = Agent(
        Membership("rome", source.membership.identity, {}, bytes(32)),
        source.source,
        source.approved,
        Randomness.of_seed(0),
    )
    (said,) = answer(stranger, opening())
    assert isinstance(said, Refusal)
    assert (said.site, "does not include this site" in said.reason) == ("rome", True)
