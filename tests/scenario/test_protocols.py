"""Every protocol and compression gives the study's answer, within what its quantisation leaves."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohortium.adapters import machine
from cohortium.bootstrap import coordinator_key, example_sites, load_example, simulate, simulated_agents, write_report
from cohortium.core import codec
from cohortium.core.errors import PolicyRefused, StudyError
from cohortium.core.messages import FromSite, MaskedUpdate
from cohortium.core.models import Network
from cohortium.core.protection import Aggregation, Compression
from cohortium.core.random import Randomness
from cohortium.core.study import Sites, Study
from cohortium.core.training import Averaging, Local
from cohortium.engines import local
from cohortium.guarantees import protection, security
from cohortium.learning.network import NetworkFit
from cohortium.plan import compile_study


def regression(**aggregation: Any) -> Study:
    return replace(load_example(), aggregation=Aggregation(**aggregation))


def network(hidden: int = 16, rounds: int = 8, scaffold: bool = False, **aggregation: Any) -> Study:
    training = Averaging(rounds=rounds, local=Local(steps=20, batch_size=16, learning_rate=0.1, scaffold=scaffold))
    return replace(regression(**aggregation), model=Network(hidden=(hidden,)), training=training)


def loss(study: Study) -> float:
    fit = simulate(study, example_sites(), seed=1).model.fit
    assert isinstance(fit, NetworkFit)
    return fit.loss


MASKED = simulate(regression(), example_sites(), seed=1).model


@pytest.mark.parametrize(
    ("aggregation", "tolerance"),
    [
        ({"bits": 64}, 1e-5),
        ({"dropouts": 1}, 1e-12),
        ({"protocol": "rlwe", "bits": 50}, 1e-5),
        ({"protocol": "rlwe", "bits": 50, "dropouts": 1}, 1e-5),
        ({"protocol": "ckks-single-key"}, 1e-12),
    ],
    ids=["64 bits", "dropouts", "rlwe", "rlwe dropouts", "ckks"],
)
def test_a_regression_is_the_same_under_every_protocol(aggregation: dict[str, Any], tolerance: float) -> None:
    model = simulate(regression(**aggregation), example_sites(), seed=2).model
    assert model.coef_ == pytest.approx(MASKED.coef_, abs=tolerance)


def test_narrow_encrypted_sums_cost_digits_only() -> None:
    model = simulate(regression(protocol="rlwe"), example_sites(), seed=1).model
    assert model.coef_ == pytest.approx(MASKED.coef_, abs=0.01)


class TestCompression:
    @pytest.mark.parametrize("protocol", ["masking", "rlwe"])
    def test_eight_bits_train_as_well_as_32(self, protocol: str) -> None:
        narrow = loss(network(protocol=protocol, compression=Compression(levels=8, norm=2.0)))
        assert narrow == pytest.approx(loss(network()), abs=0.02)

    def test_it_saves_bytes(self) -> None:
        plain = simulate(network(200, 1), example_sites(), seed=1).rounds[-1].bytes_up
        narrow = network(200, 1, compression=Compression(levels=6, norm=2.0))
        sent = simulate(narrow, example_sites(), seed=1).rounds[-1].bytes_up
        # 4 sites at 6 bits add up in 8 bits instead of 32
        assert sent < 0.35 * plain

    def test_a_lost_site_is_no_matter(self) -> None:
        def faults(site: str, message: Any) -> bool:
            return site == "zurich" and isinstance(message, MaskedUpdate) and message.round == 3

        study = network(dropouts=1, compression=Compression(levels=8, norm=2.0))
        result = simulate(study, example_sites(), seed=1, faults=faults)
        assert [len(record.survivors) for record in result.rounds][:4] == [4, 4, 3, 4]

    def test_scaffold_and_regressions_do_without(self) -> None:
        compression = Compression(levels=8, norm=1.0)
        with pytest.raises(StudyError, match="SCAFFOLD's control variates have another"):
            compile_study(network(scaffold=True, compression=compression))
        with pytest.raises(StudyError, match="'logistic' needs every digit"):
            compile_study(regression(compression=compression))


def test_a_site_without_the_key_refuses_single_key_studies() -> None:
    plan, root = compile_study(regression(protocol="ckks-single-key")), Randomness.of_seed(1)
    agents = simulated_agents(plan, example_sites(), root)
    with pytest.raises(PolicyRefused, match="no CKKS key is installed here"):
        local.run(plan, agents, "run", lambda: 0.0, coordinator_key(root))


def test_long_rounds_on_several_threads_are_the_same_bytes() -> None:
    plan, seen = compile_study(network(4000, 2, dropouts=1)), []
    for pool in (None, ThreadPoolExecutor(3)):
        root, said = Randomness.of_seed(5), []
        agents = simulated_agents(plan, example_sites(), root, means=machine.shared_means())
        taps: list[FromSite] = said
        local.run(plan, agents, "run", lambda: 0.0, coordinator_key(root), tap=taps.append, pool=pool)
        seen.append([codec.encode(message) for message in said])
    assert sum(np.size(message) for message in seen[0]) > 0
    assert seen[0] == seen[1]


def test_a_report_says_which_round_lost_whom(tmp_path: Path) -> None:
    def faults(site: str, message: Any) -> bool:
        return site == "zurich" and isinstance(message, MaskedUpdate) and message.round == 3

    result = simulate(regression(dropouts=1), example_sites(), seed=1, faults=faults)
    write_report(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("is the sum without") == 1
    assert "Round 3 is the sum without zurich." in page


class TestPromises:
    def test_figures(self) -> None:
        sites = tuple(f"site-{number:02d}" for number in range(15))
        study = replace(regression(dropouts=3), sites=Sites(include=sites))
        figures = security(compile_study(study))
        assert (figures.threshold, figures.dropouts, figures.curious, figures.malicious) == (12, 3, 11, 8)
        assert set(figures.bytes_a_round) == {"preprocessing", "logistic"}

    def test_a_round_sends_no_more_than_is_said(self) -> None:
        for aggregation in ({}, {"dropouts": 1}, {"protocol": "rlwe", "dropouts": 1}, {"protocol": "ckks-single-key"}):
            study = regression(**aggregation)
            promised = security(compile_study(study)).bytes_a_round
            first = simulate(study, example_sites(), seed=1).rounds[0]
            each = first.bytes_up / 4
            # the frames of at most three messages come on top
            assert promised["preprocessing"] / 2 < each <= promised["preprocessing"] + 3 * 120, aggregation

    def test_a_single_key_is_called_that(self) -> None:
        plan = compile_study(regression(protocol="ckks-single-key"))
        answers = dict(protection(plan))
        assert "any hospital can decrypt any update it sees" in answers["Who can read it"]
        assert security(plan).curious is None

    def test_more_than_fifty_sites_cannot_encrypt(self) -> None:
        sites = tuple(f"site-{number:02d}" for number in range(51))
        with pytest.raises(StudyError, match="at most 50 sites"):
            compile_study(replace(regression(protocol="rlwe"), sites=Sites(include=sites)))
