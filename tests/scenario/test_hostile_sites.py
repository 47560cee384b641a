"""What one hostile site, or a coordinator with a long memory, can do to a run: little, and to its own name."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cohortium.bootstrap import coordinator_key, simulate, simulated_agents
from cohortium.core import codec
from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.layout import Block
from cohortium.core.messages import (
    Announcement,
    Endorsement,
    FromSite,
    MaskedUpdate,
    OpenRun,
    Refusal,
    Reveal,
    decode_from_site,
)
from cohortium.core.models import Network
from cohortium.core.protection import Aggregation
from cohortium.core.random import Randomness
from cohortium.core.training import Averaging, Local
from cohortium.engines import local
from cohortium.learning.algorithm import PhaseBroadcast
from cohortium.learning.glm import GlmBroadcast
from cohortium.plan import compile_study
from cohortium.secagg.keys import announce
from cohortium.secagg.quantise import fixed_point


def load_module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


staging = load_module("hostile_staging", Path(__file__).with_name("staging.py"))
ROOT = Randomness.of_seed(1)


class Liar:
    """An agent whose answers another hand changes on their way out."""

    def __init__(self, agent: Any, change: Any) -> None:
        self.agent, self.change = agent, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.agent, name)

    def receive(self, data: bytes) -> list[bytes]:
        return [codec.encode(self.change(decode_from_site(answer))) for answer in self.agent.receive(data)]


def with_liar(change: Any, dropouts: int = 1) -> Any:
    """Runs the bundled study with cleveland's answers changed."""
    plan = compile_study(staging.heart(Aggregation(dropouts=dropouts)))
    agents: dict[str, Any] = dict(simulated_agents(plan, staging.KEPT, ROOT))
    agents["cleveland"] = Liar(agents["cleveland"], change)
    return local.run(plan, agents, "run", lambda: 0.0, coordinator_key(ROOT))


def altered(message: Any, **changes: Any) -> Any:
    return type(message)(**{name: getattr(message, name) for name in message.__struct_fields__} | changes)


def forged_key(message: FromSite) -> FromSite:
    if not isinstance(message, Announcement):
        return message
    plan = compile_study(staging.heart(Aggregation(dropouts=1)))
    key = Ed25519PrivateKey.generate()
    return announce(key, X25519PrivateKey.generate(), message.run, plan.study_id, message.site)


def low_order_key(message: FromSite) -> FromSite:
    return altered(message, public_key=bytes(32)) if isinstance(message, Announcement) else message


def false_tags(message: FromSite) -> FromSite:
    return altered(message, tags=(bytes(32),) * len(message.tags)) if isinstance(message, Endorsement) else message


def misshapen_answer(message: FromSite) -> FromSite:
    return altered(message, answer=np.zeros(3)) if isinstance(message, Reveal) else message


def other_length(message: FromSite) -> FromSite:
    return altered(message, values=message.values[:-1]) if isinstance(message, MaskedUpdate) else message


class TestOneHostileSite:
    @pytest.mark.parametrize("change", [forged_key, low_order_key, other_length], ids=lambda change: change.__name__)
    def test_is_left_out_and_the_others_go_on(self, change: Any) -> None:
        result = with_liar(change)
        assert all(record.survivors == ("budapest", "long-beach", "zurich") for record in result.rounds)

    @pytest.mark.parametrize("change", [false_tags, misshapen_answer], ids=lambda change: change.__name__)
    def test_cannot_stop_what_enough_others_open(self, change: Any) -> None:
        result = with_liar(change)
        assert all(len(record.survivors) == 4 for record in result.rounds)
        honest = simulate(staging.heart(Aggregation(dropouts=1)), staging.KEPT, seed=1)
        assert result.model.fit == honest.model.fit

    def test_false_shares_end_the_run_and_no_honest_site_is_blamed(self) -> None:
        """They spoil the round, since the vector is in the sum; the others say what they saw and stay."""
        refusals: list[Refusal] = []

        def spoil(message: FromSite) -> FromSite:
            if not isinstance(message, MaskedUpdate):
                return message
            return altered(message, sealed=tuple(bytes(len(text)) for text in message.sealed))

        plan = compile_study(staging.heart(Aggregation(dropouts=1)))
        agents: dict[str, Any] = dict(simulated_agents(plan, staging.KEPT, ROOT))
        agents["cleveland"] = Liar(agents["cleveland"], spoil)

        def tap(message: FromSite) -> None:
            if isinstance(message, Refusal):
                refusals.append(message)

        with pytest.raises(ProtocolError, match="a share of site 'cleveland' was refused: it was altered"):
            local.run(plan, agents, "run", lambda: 0.0, coordinator_key(ROOT), tap=tap)
        assert {one.site for one in refusals} == {"budapest", "long-beach", "zurich"}
        assert all(one.round == 1 and "site 'cleveland'" in one.reason for one in refusals)


class TestHistory:
    """What sites were told before counts as much as what they are told now."""

    def test_sites_that_were_told_apart_never_add_up_again(self) -> None:
        cast = staging.Consortium.of(staging.heart(Aggregation())).agree()
        cast.ask(1)
        fitted = codec.decode(self.second(cast).broadcast, PhaseBroadcast).fitted

        def broadcast(value: float) -> bytes:
            return codec.encode(PhaseBroadcast(fitted, codec.encode(GlmBroadcast(np.full(14, value)))))

        cast.broadcasts[2] = broadcast(0.0)
        cast.ask(2)
        honest, apart = broadcast(0.1), broadcast(0.2)
        for site in staging.NAMES:
            cast.broadcasts[3] = apart if site == "zurich" else honest
            cast.ask(3, [site])
        cast.broadcasts[4] = broadcast(0.3)
        cast.ask(4)
        for number, adds_up in ((2, True), (3, False), (4, False)):
            total = np.add.reduce([cast.updates[number, site].values for site in staging.NAMES], dtype=np.uint32)
            plain = [staging.plain_vector(cast.plan, cast.broadcasts[number], site) for site in staging.NAMES]
            assert (total == np.add.reduce(plain, dtype=np.uint32)).all() == adds_up

    @staticmethod
    def second(cast: Any) -> Any:
        """An honest opening of the second phase."""
        run = staging.Consortium.of(staging.heart()).agree()
        run.serve(1)
        return run.round(2)

    def test_scaffold_with_dropouts_is_refused(self) -> None:
        """Its sites remember, so sums over different survivors would tell one's control variate."""
        study = replace(
            staging.heart(Aggregation(dropouts=1)),
            model=Network(hidden=(4,)),
            training=Averaging(rounds=2, local=Local(scaffold=True)),
        )
        with pytest.raises(StudyError, match="dropouts with SCAFFOLD would tell a site's control variate"):
            compile_study(study)


class TestApprovals:
    def test_one_approval_is_for_one_run(self) -> None:
        """Two runs over different survivors would differ by one site's vector."""
        plan = compile_study(staging.heart(Aggregation(dropouts=1)))
        agent = simulated_agents(plan, staging.KEPT, ROOT)["zurich"]
        study = staging.canonical_bytes(plan.study)
        (first,) = agent.receive(codec.encode(OpenRun("run-1", study)))
        assert isinstance(decode_from_site(first), Announcement)
        for name in ("run-2", "run-3"):
            (second,) = agent.receive(codec.encode(OpenRun(name, study)))
            said = decode_from_site(second)
            assert isinstance(said, Refusal)
            assert "it has had all the runs that this site's steward approved" in said.reason


def test_noise_is_no_result() -> None:
    stage = fixed_point((Block("x", (200,), 1.0),), 5, 32)
    noise = np.random.default_rng(0).integers(0, 2**32, 200, dtype=np.uint32)
    with pytest.raises(ProtocolError, match="'x' is beyond what 5 sites can add up to"):
        stage.decode(noise)
    most = np.full(200, 5, np.uint32) * stage.encode(np.ones(200))
    assert stage.decode(most) == pytest.approx(np.full(200, 5.0))
