"""What epsilon costs: honest curves, hand-computed recommendations, and equal results however they were computed."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import d2_tweedie_score, r2_score, roc_auc_score

import cohortium as co
from cohortium import bootstrap
from cohortium.core.errors import CohortError, SiteError, StudyError
from cohortium.core.random import Randomness
from cohortium.core.training import Descent, OneShot
from cohortium.engines import tradeoff as trading
from cohortium.learning.descriptive import Summary
from cohortium.learning.model import GlobalModel
from cohortium.learning.tradeoff import (
    Basis,
    Point,
    Tradeoff,
    Utility,
    as_bytes,
    as_json,
    levels,
    odds,
    points_of,
    prices,
    recommended,
    score,
    total_variation,
    verdict,
)
from cohortium.plan import compile_study
from cohortium.site.ports import DataSource

SITES = tuple(f"s{index}" for index in range(6))
SLOPES = np.array([1.2, -0.8, 0.6, -0.5, 0.4, 0.3])
FEATURES = {f"x{index}": co.Number(unit="1", range=(-3, 3)) for index in range(len(SLOPES))}
SEEDS = range(1, 13)
AUC = Utility("AUC", higher_is_better=True, useless=0.5)
BASIS = Basis("1", "sha256:0", "sha256:1", 1e-5, 0.25)


def study(**changes: Any) -> co.Study:
    cohort = co.Cohort(
        dataset="d", patient="id", maximum=300, minimum=100, features=dict(FEATURES), target=co.BinaryTarget(name="y")
    )
    start = co.Study(
        name="made",
        purpose=co.Purpose(summary="made-up patients"),
        sites=co.Sites(include=SITES),
        cohort=cohort,
        model=co.Regression(kind="logistic"),
        preprocessing=co.Preprocessing(scale="range"),
        training=OneShot(clip=1.0),
        privacy=co.Privacy(unit="patient", epsilon=1.0, delta=1e-5),
    )
    return replace(start, **changes)


def with_target(made: co.Study, target: Any, kind: str, training: Any) -> co.Study:
    model = co.Regression(kind=kind)  # type: ignore[arg-type]
    return replace(made, cohort=replace(made.cohort, target=target), model=model, training=training)


def patients(rows: int = 150) -> dict[str, pd.DataFrame]:
    random = np.random.default_rng(5)
    frames = {}
    for site in SITES:
        x = np.clip(random.normal(0, 1, (rows, len(SLOPES))), -3, 3)
        frame = pd.DataFrame(x, columns=list(FEATURES))
        eta = x @ SLOPES
        frame["y"] = (random.random(rows) < 1 / (1 + np.exp(-eta))).astype(int)
        frame["length"] = np.clip(eta + random.normal(0, 1, rows), -10, 10)
        frame["events"] = np.minimum(random.poisson(np.exp(0.4 * eta)), 20)
        frame["id"] = [f"{site} {number}" for number in range(rows)]
        frames[site] = frame
    return frames


FRAMES = patients()


def trial(made: co.Study, frames: Mapping[str, pd.DataFrame] = FRAMES, holdout: float = 0.3) -> trading.Trial:
    plan = compile_study(trading.with_epsilon(made, 1.0, 1e-5))
    records = {name: trading.records_of(plan, bootstrap.source_of(frame)) for name, frame in frames.items()}
    return trading.Trial(made, 1e-5, holdout, records)


def points(
    common: trading.Trial, epsilon: float | None, seeds: range, simulated: Any = bootstrap.simulate
) -> list[Point]:
    def point(seed: int) -> Point:
        def federate(made: co.Study, sources: Mapping[str, DataSource]) -> GlobalModel | Summary:
            outcome: GlobalModel | Summary = simulated(made, sources, seed=seed).outcome
            return outcome

        return trading.point(common, epsilon, seed, federate)

    return [point(seed) for seed in seeds]


def means(found: list[Point]) -> dict[str, float]:
    return {curve: float(np.mean([point.scores[curve] for point in found])) for curve in found[0].scores}


# --- the curves


@pytest.fixture(scope="module")
def classified() -> dict[float | None, list[Point]]:
    return {epsilon: points(trial(study()), epsilon, SEEDS) for epsilon in (0.5, 2.0, None)}


def test_more_noise_costs_more(classified: dict[float | None, list[Point]]) -> None:
    tight, loose, free = (means(classified[epsilon]) for epsilon in (0.5, 2.0, None))
    for mean in (tight, loose):
        assert mean["alone"] < mean["local"] < mean["distributed"] < free["distributed"] + 0.002
    for curve in ("distributed", "central", "local", "alone"):
        assert tight[curve] < loose[curve] < free[curve]
    assert tight["local"] - tight["alone"] > 0.05
    assert tight["distributed"] - tight["local"] > 0.02


def test_noise_shares_under_the_secure_sum_cost_about_what_a_trusted_party_needs(
    classified: dict[float | None, list[Point]],
) -> None:
    # one of six may collude, so the sum has sqrt(6 / 5) of the deviation; 12 seeds leave a standard error of 0.01
    assert abs(means(classified[0.5])["distributed"] - means(classified[0.5])["central"]) < 0.03
    assert abs(means(classified[2.0])["distributed"] - means(classified[2.0])["central"]) < 0.01


def test_without_noise_all_that_add_up_are_one(classified: dict[float | None, list[Point]]) -> None:
    for point in classified[None]:
        assert point.scores["central"] == point.scores["local"] == pytest.approx(point.scores["distributed"], abs=1e-4)
        assert point.failed == {}


def test_the_reference_is_a_model_of_the_records_that_are_not_held_out() -> None:
    common, seed = trial(study()), 3
    scored: dict[str, np.ndarray] = {}

    def federate(made: co.Study, sources: Mapping[str, DataSource]) -> GlobalModel:
        assert made.privacy.epsilon is None
        scored.update({name: source.read(["id"], as_text={"id"})["id"] for name, source in sources.items()})
        return bootstrap.simulate(made, sources, seed=seed).model

    point = trading.point(common, None, seed, federate)
    training = pd.concat([frame[frame["id"].isin(scored[name])] for name, frame in FRAMES.items()])
    rest = pd.concat([frame[~frame["id"].isin(scored[name])] for name, frame in FRAMES.items()])
    x = np.column_stack([np.ones(len(training)), training[list(FEATURES)] / 3])
    # AdaSSP's logistic model is a Newton step from zero: least squares of 4 (y - 1/2), records longer than the clip
    # scaled down; its order of patients is all that the AUC sees
    shrunk = x / np.maximum(1, np.linalg.norm(x, axis=1))[:, None]
    weight = 1 / np.maximum(1, np.linalg.norm(x, axis=1))
    beta = np.linalg.lstsq(shrunk, weight * (training["y"] - 0.5) * 4, rcond=None)[0]
    expected = roc_auc_score(rest["y"], np.column_stack([np.ones(len(rest)), rest[list(FEATURES)] / 3]) @ beta)
    assert point.scores["distributed"] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("privacy", "central", "local"),
    [
        ({}, 1.0, math.sqrt(6)),
        ({"neighbouring": "replace"}, 2.0, 2 * math.sqrt(6)),
        ({"sites_per_patient": 3}, 3.0, math.sqrt(18)),
    ],
)
def test_noise_of_each_way(privacy: dict[str, Any], central: float, local: float) -> None:
    made = study(privacy=co.Privacy(unit="patient", epsilon=1.0, delta=1e-5, **privacy))
    assert trading._noises(compile_study(made)) == pytest.approx({"central": central, "local": local})


def test_whole_patients_are_held_out_as_many_of_each_outcome_and_the_same_for_all_epsilons() -> None:
    frames = {site: pd.concat([frame, frame.iloc[::2]]) for site, frame in FRAMES.items()}
    made = study(cohort=replace(study().cohort, records="several"))
    common = trial(made, frames, holdout=0.25)
    dealt = []
    for epsilon in (1.0, None):
        plan = compile_study(trading.with_epsilon(made, epsilon, 1e-5))
        split = trading._split(plan, common, "s1", Randomness.of_seed(4))
        kept = split.source.read(["id"], as_text={"id"})["id"]
        dealt.append(set(kept))
        assert split.training.rows == len(kept)
        assert split.training.patients == len(set(kept))
        assert split.training.patients + split.held_out.patients == 150
        held = frames["s1"][~frames["s1"]["id"].isin(dealt[0])].drop_duplicates("id")
        for outcome, group in FRAMES["s1"].groupby("y"):
            assert abs((held["y"] == outcome).sum() - 0.25 * len(group)) < 1
    assert dealt[0] == dealt[1]


def test_on_average_exactly_the_share_is_held_out() -> None:
    made = with_target(study(), co.NumberTarget(name="length", unit="1", range=(-10, 10)), "linear", OneShot(clip=1.0))
    common, plan = trial(made, holdout=0.33), compile_study(made)
    held = [trading._split(plan, common, "s0", Randomness.of_seed(seed)).held_out.rows for seed in range(40)]
    assert set(held) == {49, 50}
    assert np.mean(held) == pytest.approx(49.5, abs=0.25)


def test_a_fit_that_noise_destroys_counts_as_one_that_knows_the_mean() -> None:
    def simulated(made: co.Study, sources: Any, seed: int) -> Any:
        raise CohortError("nothing but noise")

    (point,) = points(trial(study()), 0.5, range(1, 2), simulated)
    assert point.scores["distributed"] == 0.5
    assert point.failed["distributed"] == 1
    with pytest.raises(CohortError, match="nothing but noise"):
        points(trial(study()), None, range(1, 2), simulated)


def test_targets_that_do_not_vary_judge_nothing() -> None:
    frames = {site: frame.assign(y=0) for site, frame in FRAMES.items()}
    with pytest.raises(CohortError, match="'y' does not vary among the held-out patients"):
        points(trial(study(), frames), 0.5, range(1, 2))


@pytest.mark.parametrize(
    ("target", "kind", "training", "name"),
    [
        (co.NumberTarget(name="length", unit="1", range=(-10, 10)), "linear", OneShot(clip=2.0), "R²"),
        (
            co.CountTarget(name="events", maximum=20),
            "poisson",
            Descent(rounds=6, learning_rate=0.5, clip=2.0),
            "deviance explained",
        ),
    ],
    ids=["number", "count"],
)
def test_numbers_and_counts_are_judged_by_what_is_explained(target: Any, kind: str, training: Any, name: str) -> None:
    made = with_target(study(), target, kind, training)
    assert trading.utility_of(made).name == name
    noisy, free = (means(points(trial(made), epsilon, range(1, 4))) for epsilon in (2.0, None))
    assert noisy["distributed"] < free["distributed"]
    assert free["distributed"] == pytest.approx(free["central"], abs=1e-3)
    assert 0.05 < free["distributed"] < 1


def test_descriptions_are_judged_by_their_shares() -> None:
    made = study(model=co.Descriptive(refinements=0), training=None)
    assert trading.curves_of(made) == ("distributed", "central", "local")
    tight, loose, free = (means(points(trial(made), epsilon, range(1, 5))) for epsilon in (0.5, 2.0, None))
    assert free == {"distributed": 0, "central": 0, "local": 0}
    assert 0 < loose["central"] < tight["central"] < tight["local"] < 1
    assert loose["central"] < loose["distributed"] < loose["local"]


def test_a_hospital_that_is_the_unit_has_no_curve_of_its_own() -> None:
    assert "alone" not in trading.curves_of(study(privacy=co.Privacy(unit="site", epsilon=1.0, delta=1e-5)))


# --- utilities and recommendations


def test_scores_are_those_of_the_textbook() -> None:
    random = np.random.default_rng(1)
    expected, mean = random.normal(size=200), random.uniform(0.1, 3, 200)
    outcome, length = (random.random(200) < 0.4).astype(float), expected + random.normal(size=200)
    count = random.poisson(mean).astype(float)
    assert score(outcome, expected, "binary") == pytest.approx(roc_auc_score(outcome, expected))
    assert score(length, expected, "number") == pytest.approx(r2_score(length, expected))
    assert score(count, mean, "count") == pytest.approx(d2_tweedie_score(count, mean, power=1))
    with pytest.raises(ValueError, match="do not vary"):
        score(np.ones(3), np.ones(3), "binary")


def test_total_variation_by_hand() -> None:
    pairs = [(np.array([1.0, 1, 2]), np.array([2.0, 1, 1])), (np.array([5.0, 5]), np.array([1.0, 1]))]
    assert total_variation(pairs) == pytest.approx((0.25 + 0) / 2)
    assert total_variation([(np.zeros(2), np.array([1.0, 0]))]) == 0.5


def test_odds_by_hand() -> None:
    assert odds(math.log(3), 0.5) == pytest.approx(0.75)
    assert odds(math.log(2), 0.01) == pytest.approx(2 / 101)


def found(utility: Utility = AUC, allowed: float = 0.01, **scores: list[float]) -> Tradeoff:
    """Three seeds; scores by epsilon, written e1 for 1, and `free`."""
    made = tuple(
        Point(None if name == "free" else float(name[1:]), seed, {"distributed": value}, {})
        for name, values in scores.items()
        for seed, value in enumerate(values)
    )
    epsilons = tuple(sorted(point.epsilon for point in made if point.epsilon is not None and point.seed == 0))
    return Tradeoff(
        study=study(),
        basis=BASIS,
        utility=utility,
        curves=("distributed",),
        epsilons=epsilons,
        seeds=(0, 1, 2),
        patients={"s0": 10},
        allowed=allowed,
        points=made,
    )


def test_levels_by_hand() -> None:
    level = levels(found(e1=[0.7, 0.8, 0.9], free=[0.8, 0.8, 0.8]))[0]
    # the deviation is 0.1, and Student's t at 97.5% with two degrees of freedom is 4.30265
    assert (level.mean, level.error) == pytest.approx((0.8, 0.1 / math.sqrt(3)))
    assert (level.low, level.high) == pytest.approx((0.8 - 0.248414, 0.8 + 0.248414), abs=1e-6)


def test_the_smallest_epsilon_whose_bound_is_within_the_allowed_loss_is_recommended() -> None:
    free = [0.80, 0.85, 0.90]
    # paired losses 0, 0.01 and 0.02: mean 0.01, deviation 0.01, t at 95% with two degrees of freedom 2.91999
    chance, sure = [0.80, 0.84, 0.88], [0.796, 0.845, 0.895]
    one, two = prices(found(e1=chance, e2=sure, free=free))
    assert (one.loss, one.bound) == pytest.approx((0.01, 0.01 + 2.919986 * 0.01 / math.sqrt(3)), abs=1e-7)
    assert not one.kept
    # 0.004, 0.005 and 0.005
    assert two.bound == pytest.approx(0.014 / 3 + 2.919986 * 0.000577350 / math.sqrt(3), abs=1e-7)
    assert recommended(found(e1=chance, e2=sure, free=free)) == two
    assert verdict(found(e1=chance, e2=sure, free=free)) == (
        "Epsilon 2: AUC 0.845, 0.005 below the study without noise (95% bound 0.006, allowed 0.010)."
    )
    wider = found(allowed=0.03, e1=chance, e2=sure, free=free)
    assert recommended(wider) == prices(wider)[0]
    assert verdict(wider).endswith("It is the smallest of the list: a smaller one may do.")


def test_a_bound_that_equals_the_allowed_loss_is_within_it() -> None:
    assert recommended(found(allowed=0.25, e1=[0.5] * 3, free=[0.75] * 3)) is not None
    assert recommended(found(allowed=0.249, e1=[0.5] * 3, free=[0.75] * 3)) is None


def test_if_nothing_keeps_within_the_loss_that_is_said_with_the_largest() -> None:
    assert verdict(found(e1=[0.5] * 3, e8=[0.78] * 3, free=[0.8] * 3)) == (
        "No epsilon of the list is sure to cost 0.010 at most: the largest, 8, has AUC 0.780, 0.020 below the study "
        "without noise, and its 95% bound 0.020 misses by 0.010."
    )


def test_an_error_is_better_if_lower() -> None:
    error = Utility("mean error of shares", higher_is_better=False, useless=1.0)
    (price,) = prices(found(error, e1=[0.02, 0.02, 0.02], free=[0.0, 0.0, 0.0]))
    assert price.loss == pytest.approx(0.02)
    assert not price.kept
    assert "0.005 above the study" in verdict(found(error, e2=[0.005] * 3, free=[0.0] * 3))


def test_a_result_that_happens_to_be_better_with_noise_says_so() -> None:
    assert "AUC 0.810, 0.010 above the study" in verdict(found(e2=[0.81] * 3, free=[0.8] * 3))


# --- what is written, and taken up


def test_points_are_taken_up_only_from_the_same_basis() -> None:
    whole = found(e1=[0.7, 0.8, 0.9], free=[0.8, 0.8, 0.8])
    data = as_bytes(whole)
    assert sorted(points_of(data, BASIS), key=repr) == sorted(whole.points, key=repr)
    assert as_bytes(replace(whole, points=points_of(data, BASIS)[::-1])) == data
    for name, value in (("study_id", "x"), ("data", "x"), ("delta", 1e-6), ("holdout", 0.2), ("version", "2")):
        assert points_of(data, replace(BASIS, **{name: value})) == ()
    for broken in (b"", b"{}", data[:-5], b"\xff", b"[1]"):
        assert points_of(broken, BASIS) == ()


def test_before_all_points_are_known_nothing_is_concluded() -> None:
    whole = found(e1=[0.7, 0.8, 0.9], free=[0.8, 0.8, 0.8])
    assert "recommendation" in as_json(whole)
    part = replace(whole, points=whole.points[1:])
    assert part.missing == ((1.0, 0),)
    assert not {"levels", "prices", "recommendation"} & as_json(part).keys()


ASKED: dict[str, Any] = {"epsilons": [2.0, 0.5], "seeds": [3, 4], "holdout": 0.3}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes]]:
    folder = tmp_path_factory.mktemp("whole")
    bootstrap.tradeoff(study(), FRAMES, folder, jobs=1, **ASKED)
    yield folder, (folder / "tradeoff.json").read_bytes()


def test_the_number_of_processes_changes_nothing(computed: tuple[Path, bytes], tmp_path: Path) -> None:
    seen: list[int] = []
    result = bootstrap.tradeoff(
        study(), FRAMES, tmp_path, jobs=2, progress=lambda known: seen.append(len(known.missing)), **ASKED
    )
    assert (tmp_path / "tradeoff.json").read_bytes() == computed[1] == as_bytes(result)
    assert seen == [6, 5, 4, 3, 2, 1, 0]


def test_what_was_computed_is_not_computed_again(computed: tuple[Path, bytes], tmp_path: Path) -> None:
    content = json.loads(computed[1])
    # whatever is taken up comes back as it was, so a forged score shows what was computed
    content["points"] = content["points"][:4]
    content["points"][0]["scores"]["alone"] = 0.123
    (tmp_path / "tradeoff.json").write_text(json.dumps(content))
    counts: list[int] = []
    result = bootstrap.tradeoff(
        study(), FRAMES, tmp_path, jobs=1, progress=lambda known: counts.append(len(known.missing)), **ASKED
    )
    assert counts[0] == 2
    taken = {(point.epsilon, point.seed): point for point in result.points}
    fresh = {(point["epsilon"], point["seed"]): point for point in json.loads(computed[1])["points"]}
    assert taken[0.5, 3].scores["alone"] == 0.123
    for place, point in taken.items():
        if place != (0.5, 3):
            assert point.scores == fresh[place]["scores"]


def test_other_points_stay_and_the_allowed_loss_asks_for_none(
    computed: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trading, "point", None)
    folder, data = computed
    result = bootstrap.tradeoff(study(), FRAMES, folder, **{**ASKED, "epsilons": [2.0]}, allowed=0.5)
    assert result.epsilons == (2.0,)
    assert len(json.loads((folder / "tradeoff.json").read_bytes())["points"]) == 6
    assert bootstrap.tradeoff(study(), FRAMES, folder, **ASKED).allowed == 0.01
    assert (folder / "tradeoff.json").read_bytes() == data


def test_a_changed_cell_is_other_data() -> None:
    made = study()
    before = trading.digest(trial(made).records)
    assert before == trading.digest(trial(made, patients()).records)
    for column, value in (("x0", 0.123), ("id", "s2 a"), ("y", 2)):
        frame = FRAMES["s2"].copy()
        frame.loc[7, column] = value
        assert trading.digest(trial(made, {**FRAMES, "s2": frame}).records) != before


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilons": []}, "no epsilon was given"),
        ({"epsilons": [0.0]}, "epsilon 0: give numbers above 0"),
        ({"epsilons": [1, 2000]}, "epsilon 2000"),
        ({"epsilons": [math.nan]}, "epsilon nan"),
        ({"seeds": [1]}, "1 seed: give 2 or more"),
        ({"seeds": [2, 2]}, "1 seed: give 2 or more"),
        ({"holdout": 1.0}, "holdout 1"),
        ({"allowed": -0.1}, "loss -0.1"),
        ({"delta": 1e-6}, r"delta is 1e-06, and the study's privacy.delta is 1e-05"),
    ],
)
def test_what_makes_no_trade_off_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=message):
        bootstrap.tradeoff(study(), FRAMES, tmp_path / "out", **{**ASKED, **change})
    assert not (tmp_path / "out").exists()


def test_a_study_without_epsilon_gets_one_and_training_that_takes_no_noise_is_refused(tmp_path: Path) -> None:
    bare = study(privacy=co.Privacy(unit="patient"))
    assert trading.delta_of(bare, None) == 1e-5
    assert trading.delta_of(bare, 1e-6) == 1e-6
    assert trading.with_epsilon(bare, 1.0, 1e-5) == study()
    with pytest.raises(StudyError, match="algorithm 'newton' needs exact sums"):
        bootstrap.tradeoff(replace(bare, training=co.Newton()), FRAMES, tmp_path / "out", **ASKED)
    with pytest.raises(StudyError, match=r"^algorithm 'newton'"):
        trading.plans_of(replace(bare, training=co.Newton()), [0.5, 1.0], 1e-5)
    with pytest.raises(StudyError, match=r"^epsilon 1000: "):
        trading.plans_of(bare, [1.0, 1000.0], 1e-5)


def test_data_that_do_not_fit_are_refused_before_anything_runs(tmp_path: Path) -> None:
    small = {**FRAMES, "s3": FRAMES["s3"].iloc[:90]}
    with pytest.raises(SiteError, match="s3: 90 patients pass, fewer patients than the study's minimum of 100"):
        bootstrap.tradeoff(study(), small, tmp_path / "out", **ASKED)
    with pytest.raises(StudyError, match="no data were given for site 's5'"):
        bootstrap.tradeoff(study(), {name: FRAMES[name] for name in SITES[:5]}, tmp_path / "out", **ASKED)


def test_a_folder_that_cannot_be_written_is_found_out_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"cannot be written: .*; nothing was computed"):
        bootstrap.tradeoff(study(), FRAMES, tmp_path / "file", **ASKED)
