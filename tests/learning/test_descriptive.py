"""A federated Table 1 against pandas and numpy on the pooled rows, and what the small-cell rule promises."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.core import codec
from cohortium.core.errors import CohortError, ProtocolError
from cohortium.core.features import BinaryTarget, Category, CountTarget, Feature, Number, NumberTarget, Target
from cohortium.core.layout import Floats, pack, unpack
from cohortium.core.models import Descriptive
from cohortium.core.random import Randomness
from cohortium.learning.algorithm import in_the_clear
from cohortium.learning.descriptive import (
    CategorySummary,
    Describe,
    DescribeBroadcast,
    DescribeState,
    NumberSummary,
    Summary,
)
from cohortium.learning.disclosure import known_values, suppress
from cohortium.learning.quantile import Bracket, Interval, part_counts, split
from cohortium.learning.table import Table, pooled

BOUNDS = {"age": (0.0, 120.0), "crp": (0.1, 300.0)}
FEATURES: dict[str, Feature] = {
    "age": Number(unit="a", range=BOUNDS["age"], missing="impute"),
    "crp": Number(unit="mg/L", range=BOUNDS["crp"], missing="impute"),
    "sex": Category(levels=("female", "male"), missing="impute"),
    "stage": Category(levels=("I", "II", "III", "IV"), missing="impute"),
}
TARGETS: dict[str, Target] = {
    "binary": BinaryTarget(name="died"),
    "number": NumberTarget(name="stay", unit="d", range=(0.0, 1.0)),
    "count": CountTarget(name="visits", maximum=9),
}
RANDOMNESS = Randomness.of_seed(0)


def describe(target: Target | None = None, **settings: Any) -> Describe:
    return Describe(FEATURES, target, Descriptive(**settings), maximum=1000)


def cohort(rows: int, seed: int, gaps: float = 0.1) -> Table:
    """Returns made-up patients. The target is 0 or 1, which suits each type of target."""
    rng = np.random.default_rng(seed)
    columns = {
        "age": np.clip(rng.normal(62, 14, rows).round(), 0, 120),
        "crp": np.clip(rng.lognormal(2, 1, rows), 0.1, 300),
        "sex": rng.integers(0, 2, rows).astype(float),
        "stage": rng.choice(4, rows, p=[0.6, 0.25, 0.12, 0.03]).astype(float),
    }
    for column in columns.values():
        column[rng.random(rows) < gaps] = np.nan
    return Table(rows, columns, rng.integers(0, 2, rows).astype(float))


def by_name(summary: Summary) -> dict[str, Any]:
    return {feature.name: feature for feature in summary.features}


def order_statistic(values: Floats, q: float) -> float:
    return float(np.sort(values)[max(1, math.ceil(q * len(values) - 1e-9)) - 1])


def rounds(
    algorithm: Describe, tables: list[Table], noise: float = 0.0
) -> tuple[Summary, list[list[dict[str, Floats]]]]:
    """Runs by hand, through the codec and the layout; returns also what each site sent in each round."""
    rng, sent, state = np.random.default_rng(1), [], algorithm.init()
    while not algorithm.done(state):
        left = algorithm.progress(state)[0]
        broadcast = codec.decode(codec.encode(algorithm.broadcast(state)), algorithm.broadcast_type)
        assert broadcast == algorithm.broadcast(state)
        layout = algorithm.layout(broadcast)
        vectors = [pack(layout, algorithm.local(broadcast, table, {}, RANDOMNESS)[0]) for table in tables]
        sent.append([unpack(layout, vector) for vector in vectors])
        total = np.sum(vectors, axis=0)
        state = algorithm.update(state, unpack(layout, total + rng.uniform(-noise, noise, total.shape)))
        assert algorithm.progress(state)[0] < left
    return algorithm.finish(state), sent


TABLES = [cohort(80, 1), cohort(33, 2), cohort(120, 3)]
FRAME = pd.DataFrame(pooled(TABLES).columns)
EXACT = describe(TARGETS["binary"], small_cells=1)


@pytest.fixture(scope="module")
def summary() -> Summary:
    return in_the_clear(EXACT, TABLES, RANDOMNESS)


class TestAgainstPooled:
    @pytest.mark.parametrize("name", ["age", "crp"])
    def test_numbers(self, summary: Summary, name: str) -> None:
        found, column = by_name(summary)[name], FRAME[name]
        assert isinstance(found, NumberSummary)
        assert summary.n == len(FRAME)
        assert (found.known, found.missing) == (column.count(), column.isna().sum())
        assert found.missing_rate == pytest.approx(column.isna().mean(), rel=1e-12)
        assert found.mean == pytest.approx(column.mean(), rel=1e-12)
        assert found.sd == pytest.approx(column.std(ddof=1), rel=1e-9)
        counts, edges = np.histogram(column.dropna(), np.linspace(*BOUNDS[name], 21))
        assert found.histogram.counts == tuple(counts)
        assert found.histogram.edges == tuple(edges)
        assert found.histogram.hidden == 0

    @pytest.mark.parametrize("name", ["age", "crp"])
    def test_quantiles_are_order_statistics_within_the_last_bin(self, summary: Summary, name: str) -> None:
        low, high = BOUNDS[name]
        width = (high - low) / 20**4
        values = FRAME[name].dropna().to_numpy()
        for q, value, within in by_name(summary)[name].quantiles:
            truth = np.quantile(values, q, method="inverted_cdf")
            assert abs(value - truth) <= width * (1 + 1e-9)
            assert width / 2 * (1 - 1e-9) <= within <= width * (1 + 1e-9)
            assert abs(value - truth) <= within + 1e-12

    @pytest.mark.parametrize("name", ["sex", "stage"])
    def test_categories(self, summary: Summary, name: str) -> None:
        found, column = by_name(summary)[name], FRAME[name]
        assert isinstance(found, CategorySummary)
        assert found.counts == tuple((column == level).sum() for level in range(len(found.levels)))
        assert (found.known, found.missing, found.hidden) == (column.count(), column.isna().sum(), 0)

    @pytest.mark.parametrize("kind", TARGETS)
    def test_target(self, kind: str) -> None:
        target = TARGETS[kind]
        summary = in_the_clear(describe(target, small_cells=1), TABLES, RANDOMNESS)
        found, values = summary.features[-1], pooled(TABLES).target
        assert values is not None
        assert found.name == target.name
        assert found.kind == ("category" if kind == "binary" else "number")
        if isinstance(found, CategorySummary):
            assert (found.levels, found.counts) == (("0", "1"), ((values == 0).sum(), (values == 1).sum()))
        else:
            assert found.mean == pytest.approx(values.mean())
            assert found.histogram.edges[-1] == (9 if kind == "count" else 1)

    def test_becomes_json(self, summary: Summary) -> None:
        read = json.loads(json.dumps(dataclasses.asdict(summary), allow_nan=False))
        assert [feature["kind"] for feature in read["features"]] == ["number"] * 2 + ["category"] * 3
        assert read["features"][0]["quantiles"][2][0] == 0.5

    def test_quantising_changes_no_count_and_little_else(self, summary: Summary) -> None:
        noisy, _ = rounds(EXACT, TABLES, noise=1e-3)
        for found, clear in zip(noisy.features, summary.features, strict=True):
            if isinstance(found, NumberSummary) and isinstance(clear, NumberSummary):
                assert found.mean == pytest.approx(clear.mean, rel=1e-4)
                assert found.sd == pytest.approx(clear.sd, rel=1e-3)
                found = dataclasses.replace(found, mean=clear.mean, sd=clear.sd)
            assert found == clear


def equal_but_for_rounding(one: Summary, other: Summary) -> None:
    assert one.n == other.n
    for left, right in zip(one.features, other.features, strict=True):
        if isinstance(left, NumberSummary) and isinstance(right, NumberSummary):
            assert left.mean == pytest.approx(right.mean)
            assert left.sd == pytest.approx(right.sd, abs=1e-6)
            left = dataclasses.replace(left, mean=right.mean, sd=right.sd)
        assert left == right


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 40), min_size=1, max_size=4), st.sampled_from([1, 4, 25]))
def test_any_split_gives_what_the_pooled_rows_give(seed: int, sizes: list[int], bins: int) -> None:
    algorithm = describe(TARGETS["count"], small_cells=1, bins=max(2, bins), refinements=2)
    tables = [cohort(size, seed + index) for index, size in enumerate([*sizes, 1])]
    together = in_the_clear(algorithm, [pooled(tables)], RANDOMNESS)
    equal_but_for_rounding(in_the_clear(algorithm, tables, RANDOMNESS), together)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(4)), st.sampled_from([1, 5]))
def test_the_order_of_sites_is_irrelevant(seed: int, order: list[int], least: int) -> None:
    algorithm = describe(TARGETS["binary"], small_cells=least)
    tables = [cohort(20 + 15 * index, seed + index) for index in range(4)]
    straight = in_the_clear(algorithm, tables, RANDOMNESS)
    equal_but_for_rounding(in_the_clear(algorithm, [tables[index] for index in order], RANDOMNESS), straight)


COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=12).map(lambda cells: np.array(cells, dtype=np.float64))


class TestSuppress:
    @settings(max_examples=500, deadline=None)
    @given(COUNTS, st.integers(1, 12))
    def test_promises(self, counts: Floats, least: int) -> None:
        sent = suppress(counts, least)
        hidden = (counts - sent).sum()
        assert ((sent == 0) | (sent >= least)).all()
        assert ((sent == 0) | (sent == counts)).all()
        assert hidden == 0 or hidden >= least or hidden == counts.sum()
        assert (suppress(sent, least) == sent).all()
        assert suppress(np.sort(counts), least).sum() == sent.sum()
        covering = (counts >= least) & (sent == 0)
        assert covering.sum() <= 1

    @settings(deadline=None)
    @given(COUNTS)
    def test_one_changes_nothing(self, counts: Floats) -> None:
        assert (suppress(counts, 1) == counts).all()

    @pytest.mark.parametrize(
        ("counts", "sent"),
        [
            ([0, 5, 9], [0, 5, 9]),
            ([3, 17], [0, 0]),
            ([3, 17, 6], [0, 17, 0]),
            ([2, 3, 5, 9], [0, 0, 5, 9]),
            ([7, 4, 7], [0, 0, 7]),
            ([3, 1], [0, 0]),
        ],
    )
    def test_examples(self, counts: list[float], sent: list[float]) -> None:
        assert suppress(np.array(counts, dtype=np.float64), 5).tolist() == sent


class TestKnownValues:
    @settings(deadline=None)
    @given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=40), st.integers(1, 12))
    def test_known_and_missing_are_none_or_enough(self, cells: list[float | None], least: int) -> None:
        column = np.array([np.nan if cell is None else cell for cell in cells], dtype=np.float64)
        known, really = known_values(column, least), column[~np.isnan(column)]
        missing = len(column) - len(known)
        assert len(known) == 0 or len(known) >= least
        assert missing == 0 or missing >= least or len(column) < least
        assert (known == really[: len(known)]).all()
        assert len(known) in (len(really), 0) or missing == least

    @pytest.mark.parametrize(
        ("known", "missing", "kept"), [(20, 0, 20), (20, 3, 18), (20, 5, 20), (7, 3, 5), (6, 2, 0)]
    )
    def test_examples(self, known: int, missing: int, kept: int) -> None:
        column = np.array([np.nan] * missing + [float(value) for value in range(known)])
        assert known_values(column, 5).tolist() == list(range(kept))

    def test_moments_leave_out_the_same_values_as_counts(self) -> None:
        column = np.append(np.full(30, 60.0), [120.0, 120.0, np.nan, np.nan, np.nan])
        columns = {"age": column, "crp": column, "sex": column * 0, "stage": column * 0}
        summary = in_the_clear(describe(), [Table(35, columns)], RANDOMNESS)
        age = by_name(summary)["age"]
        assert (age.known, age.missing, age.mean, age.sd) == (30, 5, 60.0, 0.0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(2, 8), st.floats(0, 0.9), st.lists(st.integers(0, 90), min_size=1, max_size=4)
)
def test_nothing_small_is_sent_and_no_subtraction_shows_it(
    seed: int, least: int, gaps: float, sizes: list[int]
) -> None:
    algorithm = describe(TARGETS["count"], small_cells=least, bins=6)
    tables = [cohort(size, seed + index, gaps) for index, size in enumerate([*sizes, 60])]
    _, sent = rounds(algorithm, tables)

    def fine(count: float | Floats) -> bool:
        return bool(count == 0 or count >= least)

    for site in sent[0]:
        patients = site["patients"]
        assert fine(patients)
        for name in algorithm.columns:
            known, cells = site[f"{name}:known"], site[f"{name}:cells"]
            assert fine(known) and fine(patients - known) and fine(known - cells.sum())
            assert all(fine(count) for count in cells)
    for later in sent[1:]:
        for site in later:
            assert all(fine(count) for count in site["parts"].ravel())
    for vectors in sent:
        for name in vectors[0]:
            if not name.endswith(":moments"):
                assert all(fine(count) for count in np.ravel(sum(site[name] for site in vectors)))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.lists(st.integers(0, 3), max_size=3))
def test_a_hidden_part_stays_hidden_and_a_sent_one_adds_up(seed: int, least: int, cells: list[int]) -> None:
    values = np.random.default_rng(seed).beta(2, 5, 60)
    for depth, cell in enumerate(cells):
        count = part_counts(values, (0.0, 1.0), tuple(cells[:depth]), 4, least)[cell]
        hidden = count - part_counts(values, (0.0, 1.0), tuple(cells[: depth + 1]), 4, least).sum()
        assert hidden == 0 or (hidden >= least and count > 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 30), st.integers(0, 6), st.integers(1, 5))
def test_quantiles_say_how_far_they_may_be_off(seed: int, least: int, bins: int, refinements: int, sites: int) -> None:
    algorithm = describe(small_cells=least, bins=bins, refinements=refinements, quantiles=(0.01, 0.3, 0.5, 0.9))
    rng = np.random.default_rng(seed)
    tables = [cohort(int(rng.integers(8, 150)), seed + index) for index in range(sites)]
    for name, found in by_name(in_the_clear(algorithm, tables, RANDOMNESS)).items():
        if found.kind == "number":
            values = np.concatenate([known_values(table.columns[name], least) for table in tables])
            assert len(found.quantiles) == (4 if found.known else 0)
            for q, value, within in found.quantiles:
                assert abs(value - order_statistic(values, q)) <= within + 1e-9
                assert found.histogram.edges[0] <= value <= found.histogram.edges[-1]


def test_quantiles_stop_narrowing_where_cells_get_small() -> None:
    tables = [cohort(150, seed, gaps=0.0) for seed in range(3)]
    coarse = by_name(in_the_clear(describe(small_cells=5), tables, RANDOMNESS))["age"]
    exact = by_name(in_the_clear(describe(small_cells=1), tables, RANDOMNESS))["age"]
    values = pooled(tables).columns["age"]
    for found, best in zip(coarse.quantiles, exact.quantiles, strict=True):
        assert best.within < 1e-3 < found.within < 20
        assert abs(found.value - order_statistic(values, found.q)) <= found.within
    # Many patients with one value are narrowed down to it all the same.
    columns = {name: np.full(50, 1.0) for name in FEATURES}
    same = by_name(in_the_clear(describe(small_cells=5), [Table(50, columns)] * 3, RANDOMNESS))["age"]
    assert all(abs(found.value - 1.0) <= found.within < 1e-3 for found in same.quantiles)


@pytest.mark.parametrize("bounds", [(0.1, 0.3), (-1e6, 1e-6), (0.0, 3.3), (1 / 3, 0.7)])
@pytest.mark.parametrize("least", [1, 5])
@pytest.mark.parametrize("end", [0, 1])
def test_statistics_keep_within_the_layouts_bounds(bounds: tuple[float, float], least: int, end: int) -> None:
    features = {"x": Number(unit="1", range=bounds)}
    algorithm = Describe(features, None, Descriptive(small_cells=least, refinements=10, bins=7), maximum=40)
    table = Table(40, {"x": np.full(40, bounds[end])})
    state = algorithm.init()
    while not algorithm.done(state):
        broadcast = algorithm.broadcast(state)
        statistics, _ = algorithm.local(broadcast, table, {}, RANDOMNESS)
        for block in algorithm.layout(broadcast):
            assert np.abs(statistics[block.name]).max() <= block.bound
        state = algorithm.update(state, statistics)
    found = by_name(algorithm.finish(state))["x"]
    assert found.quantiles[0].value == pytest.approx(bounds[end], abs=1e-8 * (bounds[1] - bounds[0]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_random_statistics_keep_within_the_layouts_bounds(seed: int) -> None:
    algorithm = dataclasses.replace(describe(TARGETS["number"], small_cells=seed % 7 + 1), maximum=50)
    for site in rounds(algorithm, [cohort(50, seed)])[1]:
        assert all(np.abs(block).max() <= 50 for block in site[0].values())


def test_depth_beyond_floating_point_is_harmless() -> None:
    algorithm = describe(small_cells=1, bins=1000, refinements=10)
    summary = in_the_clear(algorithm, [cohort(40, 5)], RANDOMNESS)
    for q, value, _ in by_name(summary)["crp"].quantiles:
        values = cohort(40, 5).columns["crp"]
        assert value == pytest.approx(order_statistic(values[~np.isnan(values)], q), rel=1e-12)


def test_edges_end_at_the_bounds_and_never_fall() -> None:
    for low, high in [(0.1, 0.3), (1.0, np.nextafter(1.0, 2)), (0.0, 5e-324), (-7.7, -1.1)]:
        edges = split((low, high), 13)
        assert (edges[0], edges[-1]) == (low, high)
        assert (np.diff(edges) >= 0).all()


def test_a_bracket_with_hidden_ranks_covers_every_part_that_may_hold_the_quantile() -> None:
    whole = Bracket.whole(0.5, "x", (0.0, 4.0), known=100)
    sure = whole.narrowed(np.array([30.0, 60.0, 0.0, 0.0]))
    assert (sure.low, sure.high, sure.open, sure.hidden) == (1.0, 2.0, True, 10)
    unsure = whole.narrowed(np.array([45.0, 45.0, 0.0, 0.0]))
    assert (unsure.low, unsure.high, unsure.open) == (0.0, 2.0, False)
    lost = whole.narrowed(np.zeros(4))
    assert (lost.low, lost.high, lost.open) == (0.0, 4.0, False)
    assert lost.quantile().value == pytest.approx(1.98)


class TestEdges:
    def test_a_feature_missing_everywhere_is_described_without_moments(self) -> None:
        table = cohort(30, 1)
        table.columns["age"][:] = np.nan
        summary = in_the_clear(describe(), [table], RANDOMNESS)
        age = by_name(summary)["age"]
        assert (age.known, age.missing_rate, age.mean, age.sd, age.quantiles) == (0, 1.0, None, None, ())

    def test_a_small_site_sends_zeros(self) -> None:
        algorithm = describe(TARGETS["binary"], small_cells=5)
        statistics, _ = algorithm.local(DescribeBroadcast(()), cohort(4, 1), {}, RANDOMNESS)
        assert not any(np.any(array) for array in statistics.values())

    def test_no_patients_at_all_is_an_error(self) -> None:
        with pytest.raises(CohortError, match="small_cells"):
            in_the_clear(describe(small_cells=5), [cohort(4, 1), cohort(3, 2)], RANDOMNESS)

    def test_without_refinements_one_round_suffices(self) -> None:
        assert len(rounds(describe(refinements=0), [cohort(50, 1)])[1]) == 1

    def test_rounds_left_at_first(self) -> None:
        assert describe(refinements=3).progress(DescribeState(left=4)) == (4, None)
        assert describe(refinements=3).init() == DescribeState(left=4)

    @pytest.mark.parametrize(
        "interval",
        [
            Interval("sex", (1,)),
            Interval("name", (1,)),
            Interval("age", (20,)),
            Interval("age", (-1,)),
            Interval("age"),
            Interval("age", (1, 1, 1, 1)),
        ],
    )
    def test_a_site_refuses_intervals_that_no_quantile_asks_for(self, interval: Interval) -> None:
        with pytest.raises(ProtocolError, match="do not need"):
            describe().local(DescribeBroadcast((interval,)), cohort(50, 1), {}, RANDOMNESS)

    def test_a_site_refuses_more_intervals_than_quantiles(self) -> None:
        intervals = tuple(Interval("age", (cell % 20,)) for cell in range(11))
        with pytest.raises(ProtocolError, match="do not need"):
            describe().local(DescribeBroadcast(intervals), cohort(50, 1), {}, RANDOMNESS)
