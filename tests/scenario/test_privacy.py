"""Differential privacy through whole runs: what is refused, what is charged, and how much noise a sum carries."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cohortium.bootstrap import coordinator_key, create_home, open_home, simulate, simulated_agents, simulated_ledger
from cohortium.core import codec
from cohortium.core.document import document, parse
from cohortium.core.errors import (
    BudgetExceeded,
    CohortiumError,
    DataError,
    PolicyRefused,
    ProtocolError,
    SiteError,
    StudyError,
)
from cohortium.core.events import Events, Gaussian, Repeated
from cohortium.core.layout import pack, unpack
from cohortium.core.messages import FromSite, MaskedUpdate, OpenRound, Refusal
from cohortium.core.models import Descriptive, Network, Penalty, Regression
from cohortium.core.protection import Aggregation, Compression, Privacy
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.core.training import Averaging, Descent, Local, Newton, OneShot
from cohortium.engines import local
from cohortium.guarantees import promise, protection
from cohortium.learning.algorithm import in_the_clear
from cohortium.plan import Plan, compile_study
from cohortium.privacy.accountant import epsilon
from cohortium.privacy.calibrate import Budget
from cohortium.site.agent import Agent
from cohortium.site.cohort import load
from cohortium.site.policy import PrivacyPolicy
from cohortium.site.spending import UNSTATED

from .staging import KEPT, NAMES, ROOT, heart

FEW = Descent(rounds=3, learning_rate=0.5, clip=1.0)


def private(
    epsilon: float | None = 1.0,
    training: Any = FEW,
    aggregation: Any = None,
    model: Any = None,
    maximum: int = 1000,
    **privacy: Any,
) -> Study:
    """Returns the bundled study with differential privacy and few rounds."""
    wanted = Privacy(unit=privacy.pop("unit", "patient"), epsilon=epsilon, delta=epsilon and 1e-5, **privacy)
    changes = {"model": model} if model else {}
    study = heart(aggregation or Aggregation(), training=training, privacy=wanted, **changes)
    return replace(study, cohort=replace(study.cohort, maximum=maximum))


@dataclass
class Listening:
    """A ledger that remembers what it was asked, and may fail."""

    order: list[str]
    fails: bool = False
    charged: list[tuple[int, int]] = field(default_factory=list)
    without: int = 0

    def affordable(self, units: Any, events: Events) -> np.ndarray:
        return np.arange(len(units)) >= self.without

    def charge(
        self, run: str, study: str, round: int, units: Any, events: Events, *, again: bool = False
    ) -> np.ndarray:
        if self.fails:
            raise SiteError("the disk is full", public="this site's ledger cannot be written")
        self.order.append("charged")
        self.charged.append((round, len(units)))
        return np.ones(len(units), dtype=bool)


@contextmanager
def kept(plan: Plan, policy: PrivacyPolicy | None = None, runs: int = 1) -> Iterator[dict[str, Agent]]:
    """Yields the sites' agents with ledgers in memory and one policy for all."""
    with ExitStack() as stack:
        agents = simulated_agents(plan, KEPT, ROOT, runs=runs)
        for name, agent in agents.items():
            budget = policy.budget if policy else None
            agent.ledger = stack.enter_context(simulated_ledger(ROOT.child("ledger", name), budget))
            agent.policy = policy or PrivacyPolicy()
        yield agents


def run(plan: Plan, agents: Mapping[str, Agent], name: str = "run-1", **options: Any) -> Any:
    return local.run(plan, agents, name, lambda: 0.0, coordinator_key(ROOT), **options)


class TestRefusedWhenCompiled:
    @pytest.mark.parametrize(
        ("study", "reason"),
        [
            (lambda: private(training=Newton()), "'newton' needs exact sums"),
            (lambda: private(training=Descent()), "training.clip is missing"),
            (lambda: private(aggregation=Aggregation(protocol="gather")), "'gather' would show the coordinator"),
            (lambda: private(aggregation=Aggregation(protocol="ckks-single-key")), "any hospital read another"),
            (lambda: private(colluding=4), "none might be left whose noise protects the rest"),
            (lambda: private(aggregation=Aggregation(dropouts=1), colluding=3), "only 3 hospitals are sure"),
            (lambda: private(aggregation=Aggregation(dropouts=1), colluding=2), "open one hospital's vector"),
            (lambda: private(training=OneShot(), sampling=0.5), "this study has one round"),
            (lambda: private(None, sampling=0.5), "only loses data"),
            (
                lambda: replace(private(), model=Descriptive(), training=None),
                "model.refinements would cost privacy budget",
            ),
            (
                lambda: private(
                    training=Averaging(clip=1.0, local=Local(steps=1)),
                    model=Network(),
                    aggregation=Aggregation(compression=Compression(norm=1.0)),
                ),
                "not offered together",
            ),
            (
                lambda: private(training=Averaging(clip=1.0, local=Local(scaffold=True)), model=Network()),
                "SCAFFOLD",
            ),
            (
                lambda: private(1e-6, maximum=100_000_000, sites_per_patient=1000),
                "its noise included, could overflow 32 bits",
            ),
            (lambda: private(1000.0), "leaves nothing of delta"),
        ],
        ids=[
            "newton", "no-clip", "gather", "single-key", "all-collude", "too-few-honest", "too-many-for-a-lie",
            "sampled-one-shot",
            "sampling-alone", "refinements", "compression", "scaffold", "overflow", "no-noise-to-speak-of",
        ],
    )  # fmt: skip
    def test_with_the_reason(self, study: Any, reason: str) -> None:
        with pytest.raises(StudyError, match=reason):
            compile_study(study())

    def test_without_a_privacy_unit(self) -> None:
        content = document(private())
        del content["privacy"]["unit"]
        with pytest.raises(StudyError, match=r"lacks 'privacy.unit'"):
            parse(content)

    @pytest.mark.parametrize(
        ("section", "reason"),
        [
            ({"unit": "patient", "epsilon": 1.0}, "belong together"),
            ({"unit": "patient", "delta": 1e-6}, "belong together"),
            ({"unit": "site", "epsilon": 1.0, "delta": 1e-6, "sampling": 0.5}, "protects whole hospitals"),
            (
                {"unit": "patient", "epsilon": 1.0, "delta": 1e-6, "sampling": 0.5, "neighbouring": "replace"},
                "add-or-remove",
            ),
        ],
        ids=["no-delta", "no-epsilon", "sampled-sites", "sampled-replacement"],
    )
    def test_a_section_that_contradicts_itself(self, section: dict[str, Any], reason: str) -> None:
        with pytest.raises(StudyError, match=reason):
            parse(document(private()) | {"privacy": section})


class TestRefusedAtTheSite:
    """Before local training: no masked vector leaves any site."""

    def refused(self, plan: Plan, agents: Mapping[str, Agent], kind: type[CohortiumError], reason: str) -> None:
        sent: list[FromSite] = []
        with pytest.raises(kind, match=reason):
            run(plan, agents, tap=sent.append)
        assert not any(isinstance(message, MaskedUpdate) for message in sent)

    def test_an_epsilon_that_the_policy_forbids(self) -> None:
        plan = compile_study(private(2.0))
        with kept(plan, PrivacyPolicy(epsilon=1.0)) as agents:
            self.refused(plan, agents, PolicyRefused, "it asks for epsilon 2, and this site's policy allows a study 1")

    def test_a_study_without_differential_privacy_where_it_is_required(self) -> None:
        plan = compile_study(private(None))
        with kept(plan, PrivacyPolicy(required=True)) as agents:
            self.refused(plan, agents, PolicyRefused, "it has no differential privacy")

    def test_a_study_at_a_site_without_a_ledger(self) -> None:
        plan = compile_study(private())
        self.refused(plan, simulated_agents(plan, KEPT, ROOT), PolicyRefused, "keeps no ledger")

    def test_a_budget_that_is_too_small_from_the_start(self) -> None:
        plan = compile_study(private(2.0))
        with kept(plan, PrivacyPolicy(budget=Budget(1.0, 1e-5))) as agents:
            self.refused(plan, agents, BudgetExceeded, "0 of .* patients have enough of their privacy budget left")

    def test_a_budget_that_an_earlier_run_spent(self) -> None:
        plan = compile_study(private(1.0))
        with kept(plan, PrivacyPolicy(budget=Budget(1.5, 1e-5)), runs=2) as agents:
            run(plan, agents)
            sent: list[FromSite] = []
            with pytest.raises(BudgetExceeded):
                run(plan, agents, "run-2", tap=sent.append)
            assert not any(isinstance(message, MaskedUpdate) for message in sent)
            # others read what they would read of any data that do not allow the study
            assert {message.reason for message in sent if isinstance(message, Refusal)} == {UNSTATED}

    def test_a_ledger_that_cannot_be_written(self) -> None:
        plan = compile_study(private())
        agents = simulated_agents(plan, KEPT, ROOT)
        for agent in agents.values():
            agent.ledger = Listening([], fails=True)
        self.refused(plan, agents, DataError, "the disk is full")


class TestCharges:
    def test_come_before_what_they_are_for_and_once_a_round(self) -> None:
        plan, order = compile_study(private()), list[str]()
        agents = simulated_agents(plan, KEPT, ROOT)
        ledger = Listening(order)
        agents["zurich"].ledger = ledger
        for name in NAMES[:3]:
            agents[name].ledger = Listening([])

        def tap(message: FromSite) -> None:
            if isinstance(message, MaskedUpdate) and message.site == "zurich":
                order.append("sent")

        run(plan, agents, tap=tap)
        assert order == ["charged", "sent"] * plan.rounds
        patients = load(plan, KEPT["zurich"]).table.rows
        assert ledger.charged == [(number, patients) for number in range(1, plan.rounds + 1)]

    def test_a_whole_run_costs_what_the_study_promises(self) -> None:
        plan = compile_study(private(1.0))
        spent: list[Any] = []

        class Collecting(Listening):
            def charge(
                self, run: str, study: str, round: int, units: Any, events: Events, *, again: bool = False
            ) -> np.ndarray:
                spent.extend(events)
                return super().charge(run, study, round, units, events)

        agents = simulated_agents(plan, KEPT, ROOT)
        for name, agent in agents.items():
            agent.ledger = Collecting([]) if name == "zurich" else Listening([])
        run(plan, agents)
        assert epsilon(tuple(spent), 1e-5) == pytest.approx(epsilon(plan.releases, 1e-5), rel=1e-9)
        assert 0.99 < epsilon(tuple(spent), 1e-5) <= 1.0

    def test_a_failed_round_still_counts(self) -> None:
        plan = compile_study(private())
        with kept(plan) as agents:
            # the vector left the site; that it was lost on its way gives nothing back
            lost = lambda site, message: isinstance(message, MaskedUpdate) and message.round == 2  # noqa: E731
            with pytest.raises(CohortiumError):
                run(plan, agents, faults=lost)
            for agent in agents.values():
                assert [study.rounds for study in agent.ledger.accounts().studies] == [2]  # type: ignore[union-attr]

    def test_the_coordinator_cannot_have_a_round_twice_or_take_one_back(self) -> None:
        plan = compile_study(private())
        with kept(plan) as agents:
            zurich = agents["zurich"]
            receive, ledger = zurich.receive, zurich.ledger
            heads: list[tuple[int, bytes]] = []

            def twice(data: bytes) -> list[bytes]:
                answers = receive(data)
                heads.append(ledger.head())  # type: ignore[union-attr]
                # whatever it was, it is not answered again, and nothing is charged again or undone
                assert not any(b"MaskedUpdate" in answer for answer in receive(data))
                assert ledger.head() == heads[-1]  # type: ignore[union-attr]
                return answers

            zurich.receive = twice  # type: ignore[method-assign]
            with suppress(CohortiumError):
                run(plan, agents)
            assert [number for number, _ in heads] == sorted(number for number, _ in heads)
            ledger.verify()  # type: ignore[union-attr]

    def test_two_runs_at_once_never_spend_more_than_there_is(self, tmp_path: Path) -> None:
        first, second = compile_study(private(1.0)), compile_study(replace(private(1.0), name="another"))
        policy = PrivacyPolicy(budget=Budget(1.5, 1e-5))
        homes = {name: tmp_path / name for name in NAMES}
        for home in homes.values():
            create_home(home)
            (home / "policy.yaml").write_text(
                "privacy: {patient: patient_id, budget: {epsilon: 1.5, delta: 1.0e-5}}\n", encoding="utf-8"
            )

        def compete(plan: Plan) -> None:
            with ExitStack() as stack:
                agents = simulated_agents(plan, KEPT, ROOT)
                for name, agent in agents.items():
                    home = stack.enter_context(open_home(homes[name]))
                    agent.ledger, agent.policy = home.ledger, home.policy
                assert agent.policy.budget == policy.budget
                # some sites may have charged one run, and others the other: then neither has enough left
                with suppress(CohortiumError):
                    run(plan, agents, plan.study.name)

        rivals = [threading.Thread(target=compete, args=(plan,)) for plan in (first, second)]
        for rival in rivals:
            rival.start()
        for rival in rivals:
            rival.join()
        for home in homes.values():
            with open_home(home) as opened:
                accounts = opened.ledger.accounts()
                limit = accounts.tariff.limit
                assert limit is not None and accounts.studies
                assert (accounts.patients <= [limit.divergence, limit.slack]).all()
                opened.ledger.verify()


class TestLeftOutPatients:
    def test_leave_no_sign_outside(self) -> None:
        plan = compile_study(private())
        seen: dict[int, list[tuple[Any, ...]]] = {}
        for without in (0, 7):
            agents = simulated_agents(plan, KEPT, ROOT)
            for name, agent in agents.items():
                agent.ledger = Listening([], without=without if name == "zurich" else 0)
            messages: list[tuple[Any, ...]] = []
            run(plan, agents, tap=lambda message, told=messages: told.append(_outline(message)))
            assert agents["zurich"].table.rows == load(plan, KEPT["zurich"]).table.rows - without
            seen[without] = messages
        assert seen[0] == seen[7]

    def test_below_the_minimum_the_site_refuses(self) -> None:
        plan = compile_study(private())
        agents = simulated_agents(plan, KEPT, ROOT)
        patients = load(plan, KEPT["zurich"]).table.rows
        for name, agent in agents.items():
            agent.ledger = Listening([], without=patients - 5 if name == "zurich" else 0)
        with pytest.raises(BudgetExceeded, match="5 of"):
            run(plan, agents)


def _outline(message: FromSite) -> tuple[Any, ...]:
    """Returns all of a message that does not look random."""
    if isinstance(message, MaskedUpdate):
        return type(message), message.site, message.round, message.values.shape, message.values.dtype
    return type(message), message.site


class TestNoise:
    """Property 1: the noise in a sum is at least what was promised, with the most sites lost and colluding."""

    def shares(self, study: Study, draws: int) -> tuple[Plan, np.ndarray]:
        """Returns a plan and its noise shares in the training phase, `(draws, sites, values)`, in steps."""
        plan = compile_study(study)
        layout = plan.phases[-1].layout
        stages, quantiser = plan.stages(layout), plan.quantiser(layout)
        zeros = pack(layout, {block.name: np.zeros(block.shape) for block in layout})
        found = []
        for draw in range(draws):
            row = []
            for site in plan.sites:
                own = Randomness.of_seed(draw).child(site)
                with_noise = stages.encode(zeros, own).view(np.int32).astype(np.int64)
                row.append(with_noise - quantiser.encode(zeros, own).view(np.int32))
            found.append(row)
        return plan, np.array(found)

    @pytest.mark.parametrize(
        ("dropouts", "colluding", "neighbouring", "copies"),
        [(0, 0, "add-or-remove", 1), (1, 1, "add-or-remove", 1), (1, 1, "replace", 1), (0, 1, "replace", 3)],
    )
    def test_of_the_worst_sum(self, dropouts: int, colluding: int, neighbouring: Any, copies: int) -> None:
        study = private(
            aggregation=Aggregation(dropouts=dropouts), colluding=colluding, neighbouring=neighbouring,
            sites_per_patient=copies,
        )  # fmt: skip
        plan, shares = self.shares(study, 150)
        layout = plan.phases[-1].layout
        block, quantiser = layout[0], plan.quantiser(layout)
        assert block.noise is not None
        # the last site standing after every loss and every betrayal
        honest = len(NAMES) - dropouts - colluding
        worst = shares[:, :honest].sum(axis=1)
        factor = (2 if neighbouring == "replace" else 1) * copies
        step = 2.0 ** -quantiser.exponents[0]  # type: ignore[union-attr]
        wanted = block.noise.multiplier * block.noise.norm * factor / step
        ratio = worst.std() / wanted
        # a deviation from n draws is off by 1 / sqrt(2 n)
        assert ratio > 1 - 4 / np.sqrt(2 * worst.size)
        assert ratio < 1.05 + 4 / np.sqrt(2 * worst.size)

    def test_shares_of_sites_are_independent(self) -> None:
        _, shares = self.shares(private(), 150)
        flat = shares.transpose(1, 0, 2).reshape(len(NAMES), -1)
        correlation = np.corrcoef(flat) - np.eye(len(NAMES))
        assert np.abs(correlation).max() < 4 / np.sqrt(flat.shape[1])

    def test_a_sum_carries_it_through_the_whole_engine(self) -> None:
        """The gradient at zero, released by many runs: its spread is the noise that all sites add together."""
        study = private(4.0, training=replace(FEW, rounds=1), colluding=0)
        plan = compile_study(study)
        exact = compile_study(private(None, training=replace(FEW, rounds=1)))
        assert plan.noise is not None
        coefficients = [
            simulate(study, KEPT, seed=seed).model.fit.coefficients
            for seed in range(24)  # type: ignore[union-attr]
        ]
        tables = [load(exact, KEPT[name]).table for name in NAMES]
        reference = [
            in_the_clear(plan.algorithm, tables, Randomness.of_seed(seed), noise=1.0)[1].coefficients
            for seed in range(24)
        ]
        ours, theirs = np.std(coefficients, axis=0), np.std(reference, axis=0)
        # two deviations of 24 draws each
        assert (np.abs(np.log(ours / theirs)) < 5 * np.sqrt(2 / (2 * 24))).all()

    def test_no_exact_number_leaves_a_private_study(self) -> None:
        for study in (
            private(),
            private(training=OneShot()),
            replace(private(), model=Descriptive(refinements=0), training=None),
            private(training=Averaging(rounds=2, clip=1.0, local=Local(steps=1)), model=Network()),
            private(training=Averaging(rounds=2, clip=1.0), unit="site", model=Network()),
        ):
            for phase in compile_study(study).phases:
                assert all(block.noise is not None for block in phase.layout)


class TestPromise:
    def test_is_kept_by_the_accountant_and_is_nearly_used(self) -> None:
        for study in (private(0.5), private(1.0, training=OneShot()), private(2.0, sampling=0.5)):
            plan = compile_study(study)
            asked = study.privacy.epsilon
            assert asked is not None
            assert 0.98 * asked < epsilon(plan.releases, 1e-5) <= asked

    def test_is_stated_for_people_and_programs(self) -> None:
        plan = compile_study(private(0.5, aggregation=Aggregation(dropouts=1), colluding=1))
        promised, told = promise(plan), dict(protection(plan))
        assert promised is not None
        assert (promised.epsilon, promised.delta, promised.unit) == (0.5, 1e-5, "patient")
        assert promised.share == pytest.approx(0.5**0.5)
        assert promised.excess == pytest.approx(2**0.5)
        assert promised.spent <= 0.5 < promised.spent_rdp
        assert "epsilon 0.5, delta 1e-05" in told["Privacy"]
        assert "1 hospitals lost and 1 colluding" in told["Noise"]
        assert promise(compile_study(private(None))) is None

    def test_replacing_costs_twice_the_noise_and_hospitals_of_one_patient_add_up(self) -> None:
        def deviation(**privacy: Any) -> float:
            plan = compile_study(private(**privacy))
            stage = plan.stages(plan.phases[-1].layout).stages[-1]
            return float(stage.deviations[0]) / 2.0 ** plan.quantiser(plan.phases[-1].layout).exponents[0]  # type: ignore[union-attr, attr-defined]

        once = deviation()
        assert deviation(neighbouring="replace") == pytest.approx(2 * once, rel=0.02)
        assert deviation(sites_per_patient=3) == pytest.approx(3 * once, rel=0.02)


class TestAnswers:
    def test_without_noise_the_federated_fit_is_the_pooled_one(self) -> None:
        """Property 5, against scikit-learn: descent that goes on long enough, in 64 bits and without noise."""
        study = private(None, Descent(rounds=400, learning_rate=1.0, momentum=0.9), Aggregation(bits=64))
        study = replace(study, model=Regression(kind="logistic", penalty=Penalty(l2=1.0)))
        result = simulate(study, KEPT, seed=1)
        plan = compile_study(study)
        tables = [load(plan, KEPT[name]).table for name in NAMES]
        design = np.concatenate([result.model.encoder.design(table, "standard") for table in tables])
        target = np.concatenate([table.target for table in tables])  # type: ignore[misc]
        reference = LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000).fit(design, target)
        expected = reference.predict_proba(design)[:, 1]
        ours = np.concatenate([result.model.expect(table) for table in tables])
        assert np.abs(ours - expected).max() < 1e-6

    def test_protocols_and_lost_sites_give_a_model(self) -> None:
        for aggregation in (Aggregation(protocol="rlwe", bits=50), Aggregation(dropouts=1, bits=64)):
            study = private(8.0, aggregation=aggregation)
            lost = lambda site, message: site == "zurich" and isinstance(message, OpenRound)  # noqa: E731
            result = simulate(study, KEPT, seed=3, faults=lost if aggregation.dropouts else None)
            assert result.privacy is not None and result.privacy.epsilon == 8.0
            survivors = set(NAMES) - ({"zurich"} if aggregation.dropouts else set())
            assert all(set(record.survivors) == survivors for record in result.rounds)

    def test_equal_seeds_give_equal_bits(self) -> None:
        fits = [simulate(private(), KEPT, seed=seed).model.to_bytes() for seed in (5, 5, 6)]
        assert fits[0] == fits[1] != fits[2]

    def test_releases_are_one_event_a_phase(self) -> None:
        releases = compile_study(private()).releases
        kinds = [type(event.event if isinstance(event, Repeated) else event) for event in releases]
        assert kinds.count(Gaussian) == 2


def test_a_block_without_noise_is_refused_whatever_the_algorithm_says() -> None:
    plan = compile_study(private())
    bare = tuple(replace(block, noise=None) for block in plan.phases[-1].layout)
    with pytest.raises(StudyError, match="carries no noise"):
        plan.stages(bare)


def test_noise_survives_the_way_through_the_stages() -> None:
    plan = compile_study(private())
    layout = plan.phases[-1].layout
    stages = plan.stages(layout)
    vector = pack(layout, {block.name: np.zeros(block.shape) for block in layout})
    total = sum(stages.encode(vector, Randomness.of_seed(seed)).astype(np.uint64) for seed in range(4))
    decoded = unpack(layout, stages.decode(np.asarray(total).astype(np.uint32)))
    assert all(np.abs(value).max() > 0 for value in decoded.values())


def test_a_forged_broadcast_is_refused_before_a_charge() -> None:
    plan = compile_study(private())
    agents = simulated_agents(plan, KEPT, ROOT)
    ledgers = {name: Listening([]) for name in agents}
    for name, agent in agents.items():
        agent.ledger = ledgers[name]
    with pytest.raises(ProtocolError, match="it skips the first phase"):
        run(replace(plan, algorithm=_Forging(plan.algorithm)), agents)
    assert all(not ledger.charged for ledger in ledgers.values())


@dataclass(frozen=True)
class _Forging:
    """The coordinator's algorithm, whose broadcasts no honest coordinator would send."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def broadcast(self, state: Any) -> Any:
        broadcast = self.inner.broadcast(state)
        return replace(broadcast, fitted=codec.encode(_plausible(self.inner.first)))

    def layout(self, broadcast: Any) -> Any:
        return self.inner.layout(self.inner.broadcast(self.inner.init()))


def _plausible(preprocess: Any) -> Any:
    entries = preprocess.layout(preprocess.broadcast(preprocess.init()))[0].size
    return preprocess.finish(preprocess.update(preprocess.init(), {"sums": np.full(entries, 50.0)}))
