"""What processes tell of themselves: logs, health pages, metrics, traces. Nothing of patients is in any of it."""

import io
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from cohortium.adapters import health, logs
from cohortium.adapters.telemetry import AgentMeter, CoordinatorMeter, Tracer
from cohortium.coordinator.ports import RunEvent
from cohortium.core.errors import SiteError, StudyError

ROUND = RunEvent(kind="round", facts={"number": 2, "seconds": 0.25, "bytes_up": 100, "bytes_down": 50})


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    logger = logging.getLogger("cohortium")
    before = logger.handlers, logger.level, logger.propagate
    logs.begin("info", "json", stream)
    yield stream
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_a_line_holds_what_is_on_the_list_and_nothing_else(written: io.StringIO) -> None:
    logging.getLogger("cohortium.agent").info("answered", extra={"run": "r", "patient": "p-17", "seconds": 0.5})
    logging.getLogger("cohortium.agent").debug("not told")
    (line,) = map(json.loads, written.getvalue().splitlines())
    assert line == {
        "at": line["at"],
        "level": "info",
        "part": "cohortium.agent",
        "message": "answered",
        "run": "r",
        "seconds": 0.5,
    }


def test_an_unforeseen_error_tells_its_kind_and_place_but_not_its_text(written: io.StringIO) -> None:
    try:
        raise ValueError("patient p-17 has 120")
    except ValueError:
        logging.getLogger("cohortium.agent").exception("it failed")
    (line,) = map(json.loads, written.getvalue().splitlines())
    assert line["error"] == "ValueError" and "test_telemetry.py:" in line["where"]
    assert "p-17" not in written.getvalue()


@pytest.mark.parametrize(("level", "style"), [("loud", "json"), ("info", "xml")])
def test_levels_and_styles_that_there_are_not(level: str, style: str) -> None:
    with pytest.raises(StudyError, match="levels are debug, info"):
        logs.begin(level, style)


def get(address: str, page: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://{address}{page}", timeout=5) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_a_health_page_says_alive_ready_and_metrics() -> None:
    state = {"well": False}
    meter = AgentMeter(lambda: state["well"])
    meter.answered("MaskedUpdate", 0.02, refused=False)
    meter.answered("Refusal", 0.01, refused=True)
    with health.serving("127.0.0.1:0", lambda: (state["well"], {"site": "zurich"}), meter.text) as address:
        assert get(address, "/healthz") == (200, b"alive\n")
        assert get(address, "/readyz") == (503, b'{"site": "zurich"}')
        state["well"] = True
        assert get(address, "/readyz")[0] == 200
        status, text = get(address, "/metrics")
        assert status == 200
        for line in (
            b"cohortium_agent_attached 1.0",
            b"cohortium_agent_refusals_total 1.0",
            b'cohortium_agent_answer_seconds_count{kind="MaskedUpdate"} 1.0',
        ):
            assert line in text
        assert get(address, "/etc/passwd")[0] == 404
        with pytest.raises(SiteError, match="cannot listen"), health.serving(address, lambda: (True, {}), meter.text):
            pass


def test_a_coordinator_counts_rounds_and_ends() -> None:
    meter = CoordinatorMeter(lambda: ["one", "two"], lambda: ["zurich"])
    for event in (RunEvent(kind="began"), ROUND, RunEvent(kind="finished")):
        meter.observe("run", event)
    text = meter.text()
    for line in (
        b"cohortium_runs_led 2.0",
        b"cohortium_sites_attached 1.0",
        b'cohortium_runs_ended_total{status="finished"} 1.0',
        b"cohortium_round_seconds_count 1.0",
        b'cohortium_round_bytes_total{direction="up"} 100.0',
    ):
        assert line in text


def test_a_run_is_one_trace_with_a_span_for_each_event() -> None:
    memory: Any = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    tracer = Tracer("coordinator", exporter)
    assert tracer.on
    for event in (RunEvent(kind="began"), ROUND, RunEvent(kind="finished")):
        tracer.observe("run-1", event)
    tracer.close()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"run", "began", "round", "finished"}
    assert len({span.context.trace_id for span in spans.values()}) == 1
    assert spans["round"].end_time - spans["round"].start_time == pytest.approx(0.25e9, rel=1e-3)
    assert dict(spans["round"].attributes) == {"cohortium.run": "run-1", "cohortium.round": 2}


def test_nothing_is_traced_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    tracer = Tracer("agent")
    assert not tracer.on
    tracer.observe("run", ROUND)
    tracer.close()
