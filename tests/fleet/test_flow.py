"""Whoever sends too many frames is read more slowly, and nobody else is."""

from hypothesis import given
from hypothesis import strategies as st

from cohortium.engines.fleet.flow import Flow


@given(st.lists(st.floats(0, 0.05), min_size=1, max_size=400))
def test_no_more_is_read_than_the_rate_and_the_burst_allow(gaps: list[float]) -> None:
    now = 0.0
    flow = Flow(100.0, 10, lambda: now)
    for read, gap in enumerate(gaps, 1):
        now += gap
        # as a gateway does: it waits for as long as it is told before it reads on
        now += flow("loud", 1)
        assert read <= 10 + 100.0 * now + 1
    assert flow("quiet", 1) == 0.0


def test_who_keeps_to_the_rate_never_waits() -> None:
    now = 0.0
    flow = Flow(100.0, 10, lambda: now)
    for _ in range(1000):
        now += 0.01
        assert flow("site", 1) == 0.0
