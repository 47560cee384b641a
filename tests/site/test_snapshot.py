"""A session that is frozen and thawed behaves as if nothing had been, bit by bit."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.bootstrap import coordinator_key, simulated_agents
from cohortium.core import codec
from cohortium.core.errors import CohortiumError, ProtocolError
from cohortium.core.messages import CloseRun, MaskedUpdate
from cohortium.core.protection import Aggregation
from cohortium.core.random import Randomness
from cohortium.engines import local
from cohortium.plan import Plan, compile_study
from cohortium.secagg.stream import PLAIN
from cohortium.site.agent import Agent
from cohortium.site.ports import Frozen
from cohortium.site.session import Membership, Session, step
from cohortium.site.snapshot import freeze, thaw

from .hospital import DATA, ROOT, STUDIES, agents_of, network, study


@dataclass
class Revived:
    """An agent whose sessions are frozen and thawed after every message, only what changed being frozen anew."""

    agent: Agent
    parts: dict[str, bytes] = field(default_factory=dict)
    last: Session | None = None
    phases: int = 0

    @property
    def failure(self) -> Exception | None:
        return self.agent.failure

    @property
    def membership(self) -> Membership:
        return self.agent.membership

    def receive(self, data: bytes) -> list[bytes]:
        answers = self.agent.receive(data)
        for run, session in self.agent._sessions.items():
            frozen = freeze(session, self.last)
            self.parts.update(frozen.parts)
            self.last = thaw(Frozen(frozen.core, dict(self.parts)), self.agent.membership)
            self.agent._sessions[run] = self.last
            self.phases += 1
        return answers


def played(plan: Plan, agents: Mapping[str, Any], seed: int | None = None, **options: Any) -> tuple[Any, list[bytes]]:
    said: list[bytes] = []
    try:
        result = local.run(
            plan,
            agents,
            "run",
            lambda: 0.0,
            coordinator_key(ROOT),
            tap=lambda message: said.append(codec.encode(message)),
            seed=seed,
            **options,
        )
    finally:
        for agent in agents.values():
            ledger = getattr(agent, "agent", agent).ledger
            if ledger is not None:
                ledger.close()
    return result.outcome, said


@pytest.mark.parametrize("name", STUDIES)
def test_a_run_goes_on_from_every_message_as_if_nothing_had_been(name: str) -> None:
    plan = compile_study(STUDIES[name])
    seed = None if plan.noise else 5
    lose_one = plan.study.aggregation.dropouts > 0

    def faults(site: str, message: Any) -> bool:
        return lose_one and site == "zurich" and isinstance(message, MaskedUpdate) and message.round == 2

    outcome, said = played(plan, agents_of(plan), seed, faults=faults)
    revived = {site: Revived(agent) for site, agent in agents_of(plan).items()}
    again, repeated = played(plan, revived, seed, faults=faults)
    assert repeated == said
    assert again.to_bytes() == outcome.to_bytes()
    assert all(one.phases > 3 for one in revived.values())


def test_single_key_encryption_goes_on() -> None:
    ckks = pytest.importorskip("cohortium.secagg.ckks", reason="TenSEAL is not installed", exc_type=ImportError)
    plan = compile_study(study(aggregation=Aggregation(protocol="ckks-single-key", dropouts=1)))
    secret, public = ckks.make_keys()

    @dataclass
    class WithKey(Revived):
        def receive(self, data: bytes) -> list[bytes]:
            answers = self.agent.receive(data)
            for run, session in self.agent._sessions.items():
                self.agent._sessions[run] = thaw(freeze(session), self.agent.membership, means=self.agent.means)
            return answers

    outcomes = []
    for kind in (WithKey, None):
        agents: Any = simulated_agents(plan, DATA, ROOT, means=replace(PLAIN, ckks=secret))
        wrapped = {site: kind(agent) for site, agent in agents.items()} if kind else agents
        outcomes.append(played(plan, wrapped, means=replace(PLAIN, ckks=public))[0])
    # rounding hides the encryptions' noise
    assert outcomes[0].to_bytes() == outcomes[1].to_bytes()


def some_session() -> tuple[Session, Membership]:
    plan = compile_study(STUDIES["masking with dropouts"])
    agents = simulated_agents(plan, DATA, ROOT)
    kept: list[Session] = []

    @dataclass
    class Looking(Revived):
        def receive(self, data: bytes) -> list[bytes]:
            answers = self.agent.receive(data)
            kept.extend(self.agent._sessions.values())
            return answers

    played(plan, {site: Looking(agent) for site, agent in agents.items()})
    one = next(session for session in reversed(kept) if session.membership.site == "zurich")
    return one, one.membership


SESSION, MEMBERSHIP = some_session()
FROZEN = freeze(SESSION)


def test_frozen_twice_is_the_same_bytes() -> None:
    assert freeze(thaw(FROZEN, MEMBERSHIP)) == FROZEN
    assert freeze(SESSION, SESSION) == Frozen(FROZEN.core, {})


@settings(deadline=None)
@given(st.integers(0, len(FROZEN.core) - 1), st.integers(1, 255), st.booleans())
def test_what_is_damaged_is_refused_or_still_a_session(place: int, change: int, cut: bool) -> None:
    damaged = bytearray(FROZEN.core)
    damaged[place] ^= change
    core = bytes(damaged[:place]) if cut else bytes(damaged)
    with suppress(CohortiumError):
        thaw(Frozen(core, FROZEN.parts), MEMBERSHIP)
        assert not cut


def test_another_sites_and_another_versions_are_refused() -> None:
    stranger = Membership("ulm", Ed25519PrivateKey.generate(), {}, b"")
    with pytest.raises(ProtocolError, match="it is site 'zurich's, and this is 'ulm'"):
        thaw(FROZEN, stranger)
    content = msgspec.msgpack.decode(FROZEN.core)
    later = codec.encode({**content, "version": 2})
    with pytest.raises(ProtocolError, match="version 2"):
        thaw(Frozen(later, FROZEN.parts), MEMBERSHIP)
    with pytest.raises(ProtocolError):
        thaw(Frozen(codec.encode({**content, "more": 1}), FROZEN.parts), MEMBERSHIP)
    with pytest.raises(ProtocolError):
        thaw(Frozen(b"", {}), MEMBERSHIP)


def test_only_what_is_open_is_frozen() -> None:
    ended, _ = step(SESSION, CloseRun("run", "finished"))
    with pytest.raises(ValueError, match="only an open session"):
        freeze(ended)


def test_a_public_seed_decides_training_and_no_key() -> None:
    plan = compile_study(study(**network()))
    results, keys = [], []
    for root, seed in ((ROOT, 5), (Randomness.of_seed(4), 5), (ROOT, 6)):
        agents = simulated_agents(plan, DATA, root)
        said: list[Any] = []
        key = coordinator_key(root)
        outcome = local.run(plan, agents, "run", lambda: 0.0, key, tap=said.append, seed=seed).outcome
        results.append(outcome.to_bytes())
        keys.append(said[0])
    assert results[0] == results[1] != results[2]
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


def test_a_study_with_noise_takes_no_public_seed() -> None:
    plan = compile_study(STUDIES["private"])
    with pytest.raises(ProtocolError, match="takes no public seed"):
        played(plan, agents_of(plan), 5)
