"""Rounds that ask some of the sites: who is chosen, what is summed, and what a coordinator that lies gets."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.coordinator.rounds import Failed, Finished, lost, outstanding, step, took
from cohortium.coordinator.selection import Career, choose
from cohortium.core import codec
from cohortium.core.document import document, parse, study_id
from cohortium.core.errors import ProtocolError, Repeated, StudyError
from cohortium.core.layout import pack, unpack
from cohortium.core.messages import MaskedUpdate, Noted, OpenRound, Refusal, decode_from_site
from cohortium.core.models import Network
from cohortium.core.protection import Aggregation, Privacy
from cohortium.core.random import Randomness
from cohortium.core.study import Sites
from cohortium.core.training import Averaging, Descent, Local
from cohortium.engines.audit import trial
from cohortium.engines.comparison import fit_in_the_clear
from cohortium.guarantees import promise, protection, security
from cohortium.plan import compile_study
from cohortium.site.cohort import load

from . import test_takeover as takeover

staging, NAMES, KEPT = takeover.staging, takeover.NAMES, takeover.KEPT
SOME = tuple(f"site-{letter}" for letter in "abcdefghijkl")


def study(dropouts: int = 0, per_round: int | None = 3, selection: Any = None, rounds: int = 5, **other: Any) -> Any:
    pytest.importorskip("torch")
    training = Averaging(
        rounds=rounds, local=Local(steps=other.pop("steps", 2), batch_size=8), clip=other.pop("clip", None)
    )
    sites = Sites(include=NAMES, per_round=per_round, selection=selection)
    aggregation = other.pop("aggregation", Aggregation(dropouts=dropouts))
    return staging.heart(aggregation, model=Network(hidden=(3,)), training=training, sites=sites, **other)


def careers(number: int, slow: str) -> dict[str, Career]:
    return {site: Career(seconds=10.0 if site == slow else 1.0, asked=number - 1) for site in SOME}


class TestChoice:
    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(3, 11),
        st.lists(st.floats(0.01, 1e4), min_size=12, max_size=12),
        st.sampled_from(["s1", "s2", "s3"]),
    )
    def test_adaptive_asks_everybody_before_long(self, count: int, seconds: list[float], study: str) -> None:
        known = {site: Career() for site in SOME}
        bound = 3 * -(-len(SOME) // count)
        for number in range(2, 62):
            chosen = choose("adaptive", SOME, known, count, study, number)
            assert chosen == tuple(sorted(set(chosen))) and len(chosen) == count
            assert chosen == choose("adaptive", SOME[::-1], dict(reversed(known.items())), count, study, number)
            for site in chosen:
                before = known[site].answered(seconds[SOME.index(site)])
                assert number - known[site].asked <= bound + 1
                known[site] = Career(before.seconds, number, before.times + 1)
        assert all(61 - career.asked <= bound for career in known.values())

    def test_a_slow_site_is_asked_less_and_never_starves(self) -> None:
        known = {site: Career() for site in SOME}
        for number in range(2, 202):
            for site in choose("adaptive", SOME, known, 4, "a study", number):
                career = known[site].answered(30.0 if site == SOME[3] else 1.0)
                known[site] = Career(career.seconds, number, career.times + 1)
        others = [career.times for site, career in known.items() if site != SOME[3]]
        assert 200 / 9 <= known[SOME[3]].times < 0.8 * min(others)
        assert max(others) - min(others) <= 8

    def test_random_is_public_and_fair(self) -> None:
        asked = [choose("random", SOME, {}, 4, "a study", number) for number in range(1, 601)]
        assert asked == [choose("random", SOME[::-1], {SOME[0]: Career(5.0)}, 4, "a study", n) for n in range(1, 601)]
        counts = np.array([sum(site in chosen for chosen in asked) for site in SOME])
        # 200 expected, a deviation of 11.5
        assert np.abs(counts - 200).max() < 60
        assert asked != [choose("random", SOME, {}, 4, "another study", number) for number in range(1, 601)]

    def test_all_where_there_are_not_more(self) -> None:
        assert choose("random", SOME[:3], {}, 4, "a study", 1) == SOME[:3]

    def test_usual_seconds_forget(self) -> None:
        assert Career().answered(4.0).seconds == 4.0
        assert Career(4.0).answered(14.0).seconds == pytest.approx(7.0)


class TestStudy:
    def test_one_that_asks_all_keeps_its_id(self) -> None:
        plain = study(per_round=None)
        assert set(document(plain)["sites"]) == {"include", "minimum"}
        assert document(study())["sites"]["selection"] == "random"
        assert parse(document(study())) == study()
        assert study_id(study()) != study_id(plain)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"per_round": 5}, "sites.per_round is 5: it must be at most 4"),
            ({"per_round": 2}, "sites.per_round is 2: it must be at least 3"),
            ({"per_round": None, "selection": "random"}, "give sites.per_round"),
        ],
    )
    def test_what_no_study_says(self, changes: Any, words: str) -> None:
        with pytest.raises(StudyError, match=words):
            study(**changes)

    def test_what_is_not_offered(self) -> None:
        sites = Sites(include=NAMES, per_round=3)
        for training in (Descent(), None):
            with pytest.raises(StudyError, match=r"sites.per_round asks some of the sites .* 'logistic'"):
                compile_study(staging.heart(Aggregation(), sites=sites, **({"training": training} if training else {})))
        scaffold = Averaging(local=Local(scaffold=True))
        with pytest.raises(StudyError, match=r"sites\.per_round with SCAFFOLD"):
            compile_study(staging.heart(Aggregation(), model=Network(hidden=(3,)), training=scaffold, sites=sites))
        with pytest.raises(StudyError, match="dropouts is 1: of 3 sites at most 0"):
            compile_study(study(dropouts=1))

    def test_guarantees_are_those_of_the_smallest_round(self) -> None:
        plan, whole = compile_study(study()), compile_study(study(per_round=None))
        assert (plan.tolerance.sites, plan.tolerance.threshold, plan.tolerance.curious) == (3, 3, 1)
        assert (whole.tolerance.sites, whole.tolerance.curious) == (4, 2)
        assert (security(plan).sites, security(plan).threshold) == (3, 3)
        rows = dict(protection(plan))
        assert rows["Who is asked"].startswith(
            "preprocessing asks all 4 hospitals, each round of training at least 3, as public randomness draws them."
        )
        assert "up to 1 of the 4 hospitals" in rows["Who can read it"]
        assert "Who is asked" not in dict(protection(whole))

    def test_noise_is_for_the_smallest_round(self) -> None:
        pytest.importorskip("opacus")
        privacy = Privacy(unit="site", epsilon=8.0, delta=1e-5)
        plans = [compile_study(study(per_round=k, privacy=privacy, clip=1.0)) for k in (3, None)]
        assert [plan.noise.honest for plan in plans if plan.noise] == [2, 3]
        shares = [promise(plan).share for plan in plans]  # type: ignore[union-attr]
        assert shares == pytest.approx([2**-0.5, 3**-0.5])


class TestComparisons:
    def test_noise_in_the_clear_is_divided_by_all(self) -> None:
        pytest.importorskip("opacus")
        privacy = Privacy(unit="site", epsilon=8.0, delta=1e-5)
        plans = [compile_study(study(per_round=k, privacy=privacy, clip=1.0)) for k in (3, None)]
        tables = [load(plans[0], KEPT[site]).table for site in NAMES]
        state = plans[0].algorithm.update(plans[0].algorithm.init(), preprocessed(plans[0], tables))
        averaging = plans[0].algorithm.second(state.fitted)
        assert averaging.sites == 3
        models = [fit_in_the_clear(plan, tables, Randomness.of_seed(3)) for plan in plans]
        starts = [plan.algorithm.second(state.fitted).init().parameters for plan in plans]
        # the study's id decides the start, so it is the study that asks all whose model it is
        assert not np.array_equal(starts[0], starts[1])
        for one, other in zip(models[0].fit.weights, models[1].fit.weights, strict=True):
            assert np.array_equal(one, other)

    def test_an_audit_is_refused(self) -> None:
        pytest.importorskip("opacus")
        plan = compile_study(study(privacy=Privacy(unit="patient", epsilon=8.0, delta=1e-5), clip=1.0, steps=1))
        with pytest.raises(StudyError, match=r"audit it without sites\.per_round, over 3 sites"):
            trial(plan, 10, Randomness.of_seed(1))


def preprocessed(plan: Any, tables: Any) -> Any:
    """Returns the sums of the first phase."""
    broadcast = plan.algorithm.broadcast(plan.algorithm.init())
    found = [plan.algorithm.local(broadcast, table, {}, Randomness.of_seed(0))[0] for table in tables]
    return {name: sum(one[name] for one in found) for name in found[0]}


def clear(plan: Any, chosen: dict[int, tuple[str, ...]]) -> Any:
    """Returns what is learned where each round's vectors are summed in the clear."""
    algorithm, state, number = plan.algorithm, plan.algorithm.init(), 0
    agents = takeover.simulated_agents(plan, KEPT, staging.ROOT)
    while not algorithm.done(state):
        number += 1
        broadcast = codec.decode(codec.encode(algorithm.broadcast(state)), algorithm.broadcast_type)
        layout = algorithm.layout(broadcast)
        vectors = []
        for site in chosen[number]:
            training = agents[site].randomness.child("run", "run-1").child("training")
            statistics, _ = algorithm.local(broadcast, load(plan, KEPT[site]).table, {}, training)
            vectors.append(plan.stages(layout).encode(pack(layout, statistics), Randomness.of_seed(0)))
        total = np.add.reduce(vectors, dtype=vectors[0].dtype)
        state = algorithm.update(state, unpack(layout, plan.stages(layout).decode(total)))
    return state


class TestRounds:
    @pytest.mark.parametrize("selection", ["random", "adaptive"])
    def test_sum_over_those_asked_is_the_one_in_the_clear(self, selection: str) -> None:
        plan = compile_study(study(selection=selection))
        play = takeover.Play(plan).go()
        assert isinstance(play.ending, Finished), play.ending
        assert play.survivors[1] == NAMES
        assert all(len(play.survivors[number]) == 3 for number in range(2, 7))
        assert len(set(play.survivors.values())) > 2
        assert plan.algorithm.freeze(play.state.learned) == plan.algorithm.freeze(clear(plan, play.survivors))
        heard = {number: {s for s, _, at in play.heard if at == number} for number in range(1, 7)}
        # each of them heard every round, asked or not
        assert all(heard[number] >= set(play.survivors[number]) for number in heard)

    @pytest.mark.parametrize(("dropouts", "per_round", "fate"), [(0, 3, "nobody"), (1, 4, "collect"), (1, 4, "each")])
    def test_a_takeover_after_every_message(self, dropouts: int, per_round: int, fate: str) -> None:
        takeover.same_end(study(dropouts, per_round, "adaptive"), takeover.FATES[fate])

    def test_one_that_only_listens_may_be_lost_and_comes_back(self) -> None:
        plan = compile_study(study())
        play = takeover.Play(plan)
        while play.state.number < 2:
            play.turn(next(iter(outstanding(play.state))), outstanding(play.state))
        (idle,) = set(NAMES) - set(play.state.selected)
        play.take(*lost(play.state, idle))
        assert play.state.number == 2
        while play.state.number < 3:
            play.turn(next(iter(outstanding(play.state))), outstanding(play.state))
        opening = outstanding(play.state)[idle][-1]
        assert isinstance(opening, OpenRound) and len(opening.missed) == 1
        assert idle not in play.state.selected
        play.go()
        assert isinstance(play.ending, Finished)

    def test_a_round_does_not_wait_for_those_that_listen(self) -> None:
        play = takeover.Play(compile_study(study()))
        while play.state.number < 2:
            play.turn(next(iter(outstanding(play.state))), outstanding(play.state))
        for site in play.state.selected:
            play.turn(site, outstanding(play.state))
        assert play.state.number == 3

    def test_what_a_listener_says_late_counts(self) -> None:
        play = takeover.Play(compile_study(study(1, 3, rounds=3, aggregation=Aggregation(protocol="rlwe"))))
        while play.state.number < 2:
            play.turn(next(iter(outstanding(play.state))), outstanding(play.state))
        (idle,) = set(NAMES) - set(play.state.selected)
        for site in play.state.selected:
            play.turn(site, outstanding(play.state))
        assert play.state.phase == "endorse" and idle in play.state.missed
        said = Noted("run-1", idle, 2)
        state, effects = step(play.state, idle, said)
        assert idle not in state.missed and not effects
        for wrong in (said, Noted("run-1", idle, 1)):
            with pytest.raises(Repeated):
                step(state, idle, wrong)

    def test_only_those_asked_contribute_and_only_the_others_listen(self) -> None:
        play = takeover.Play(compile_study(study()))
        while play.state.number < 2:
            play.turn(next(iter(outstanding(play.state))), outstanding(play.state))
        (idle,), asked = set(NAMES) - set(play.state.selected), play.state.selected[0]
        with pytest.raises(ProtocolError, match="out of order"):
            step(play.state, asked, Noted("run-1", asked, 2))
        with pytest.raises(ProtocolError, match="another round or run"):
            step(play.state, idle, MaskedUpdate("run-1", idle, 2, np.zeros(3, np.uint32)))

    def test_too_few_to_select(self) -> None:
        play = takeover.Play(compile_study(study(1, 4)), takeover.unlucky(("zurich", "collect", 2)))
        while play.state.number < 3:
            play.turn(next(iter(outstanding(play.state))), outstanding(play.state))
        # whoever was lost is asked again where there are not enough others
        assert play.state.selected == NAMES
        play.take(*takeover.expel(play.state, "zurich", "revoked"))
        play.go()
        assert isinstance(play.ending, Failed)

    def test_seconds_decide(self) -> None:
        play = takeover.Play(compile_study(study(selection="adaptive", rounds=12)))
        while play.state.phase != "over":
            site = next(iter(outstanding(play.state)))
            if play.state.phase == "collect":
                play.state = took(play.state, site, 50.0 if site == "budapest" else 1.0)
            play.turn(site, outstanding(play.state))
        times = {site: sum(site in chosen for chosen in play.survivors.values()) for site in NAMES}
        assert times["budapest"] == min(times.values()) and 2 <= times["budapest"] < 8


class TestLies:
    """What a coordinator gets that tells sites of selections as it likes."""

    def told(self, play: Any, selected: tuple[str, ...], number: int = 2) -> OpenRound:
        said = outstanding(play.state)[next(iter(play.state.selected))][-1]
        assert isinstance(said, OpenRound)
        return OpenRound(said.run, number, said.broadcast, (), selected)

    def ready(self) -> Any:
        play = takeover.Play(compile_study(study()))
        while play.state.number < 2:
            play.turn(next(iter(outstanding(play.state))), outstanding(play.state))
        return play

    @pytest.mark.parametrize(
        "selected",
        [
            (),
            NAMES[:2],
            (NAMES[1], NAMES[0], NAMES[2]),
            (NAMES[0], NAMES[0], NAMES[1]),
            (*NAMES[:2], "zzz"),
        ],
    )
    def test_a_selection_that_the_study_does_not_allow_is_refused(self, selected: tuple[str, ...]) -> None:
        play = self.ready()
        (answer,) = play.agents[NAMES[0]].agent.receive(codec.encode(self.told(play, selected)))
        said = decode_from_site(answer)
        assert isinstance(said, Refusal) and "it must select at least 3 sites of the run" in said.reason

    def test_a_selection_where_all_are_asked_is_refused(self) -> None:
        play = takeover.Play(compile_study(study()))
        while play.state.number < 1:
            play.turn(next(iter(outstanding(play.state))), outstanding(play.state))
        key_set, opening = outstanding(play.state)[NAMES[0]]
        play.agents[NAMES[0]].agent.receive(codec.encode(key_set))
        some = OpenRound(opening.run, 1, opening.broadcast, (), NAMES[:3])
        (answer,) = play.agents[NAMES[0]].agent.receive(codec.encode(some))
        said = decode_from_site(answer)
        assert isinstance(said, Refusal) and "the study asks all sites in it" in said.reason

    def test_whoever_listened_does_not_contribute_to_that_round(self) -> None:
        play = self.ready()
        others = NAMES[1:]
        (answer,) = play.agents[NAMES[0]].agent.receive(codec.encode(self.told(play, others)))
        assert decode_from_site(answer) == Noted("run-1", NAMES[0], 2)
        assert play.agents[NAMES[0]].agent.receive(codec.encode(self.told(play, NAMES[:3]))) == []

    def test_different_selections_do_not_add_up(self) -> None:
        play = self.ready()
        selected, plan = play.state.selected, play.plan
        wider, updates = NAMES, {}
        for site in selected:
            told = self.told(play, wider if site == selected[0] else selected)
            (answer,) = play.agents[site].agent.receive(codec.encode(told))
            updates[site] = decode_from_site(answer)
        tally = play.state.tally
        for site in selected:
            tally = tally.contribute(updates[site])
        with pytest.raises(ProtocolError, match="is beyond what 4 sites can add up to"):
            plan.stages(play.state.layout).decode(tally.opened())
