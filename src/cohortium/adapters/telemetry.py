"""Metrics for Prometheus and traces for OpenTelemetry, made from what runs and agents report. No value of data is in.

Traces are sent where `OTEL_EXPORTER_OTLP_ENDPOINT` says, if the extra `telemetry` is installed; else nowhere.
"""

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cohortium.coordinator.ports import ENDED, RunEvent

_MOST_OPEN = 1000
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)


class CoordinatorMeter:
    """A coordinator's metrics.

    Args:
        led, attached: return the runs that are led, and the sites that are attached, just now.
    """

    def __init__(self, led: Callable[[], Iterable[str]], attached: Callable[[], Iterable[str]]) -> None:
        self._registry = CollectorRegistry()
        make = {"registry": self._registry, "namespace": "cohortium"}
        self._ended = Counter("runs_ended", "Runs that ended here, by status", ["status"], **make)  # type: ignore[arg-type]
        self._events = Counter("run_events", "What happened to runs, by kind", ["kind"], **make)  # type: ignore[arg-type]
        self._rounds = Histogram("round_seconds", "Rounds from opening to sum", buckets=_SECONDS, **make)  # type: ignore[arg-type]
        self._bytes = Counter("round_bytes", "Bytes of messages of rounds", ["direction"], **make)  # type: ignore[arg-type]
        runs = Gauge("runs_led", "Runs that are led here", **make)  # type: ignore[arg-type]
        sites = Gauge("sites_attached", "Sites whose streams end here", **make)  # type: ignore[arg-type]
        runs.set_function(lambda: len(list(led())))
        sites.set_function(lambda: len(list(attached())))

    def observe(self, run: str, event: RunEvent) -> None:
        """Counts an event of a run."""
        self._events.labels(event.kind).inc()
        if event.kind in ENDED:
            self._ended.labels(event.kind).inc()
        if event.kind == "round":
            self._rounds.observe(float(event.facts.get("seconds", 0.0)))
            for direction in ("up", "down"):
                self._bytes.labels(direction).inc(int(event.facts.get(f"bytes_{direction}", 0)))

    def text(self) -> bytes:
        """Returns the metrics as Prometheus reads them."""
        return generate_latest(self._registry)


class AgentMeter:
    """An agent's metrics. `connected` returns whether it is attached just now."""

    def __init__(self, connected: Callable[[], bool]) -> None:
        self._registry = CollectorRegistry()
        make = {"registry": self._registry, "namespace": "cohortium_agent"}
        self._answers = Histogram("answer_seconds", "From a message to its answer", ["kind"], buckets=_SECONDS, **make)  # type: ignore[arg-type]
        self._refused = Counter("refusals", "Requests that this site refused", **make)  # type: ignore[arg-type]
        gauge = Gauge("attached", "Whether the agent is attached to a coordinator", **make)  # type: ignore[arg-type]
        gauge.set_function(lambda: float(connected()))

    def answered(self, kind: str, seconds: float, refused: bool) -> None:
        """Counts a message of this kind that was dealt with."""
        self._answers.labels(kind).observe(seconds)
        if refused:
            self._refused.inc()

    def text(self) -> bytes:
        """Returns the metrics as Prometheus reads them."""
        return generate_latest(self._registry)


class Tracer:
    """A trace for each run that is led or served here, with a span for each round or answer."""

    def __init__(self, part: str, exporter: Any = None) -> None:
        self._tracer: Any = None
        self._provider: Any = None
        self._open: dict[str, Any] = {}
        if exporter is None and not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
            return
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter()
        except ImportError:
            return
        self._provider = TracerProvider(resource=Resource.create({"service.name": f"cohortium-{part}"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("cohortium")

    @property
    def on(self) -> bool:
        """Whether traces are sent anywhere."""
        return self._tracer is not None

    def observe(self, run: str, event: RunEvent) -> None:
        """Adds a run's event to its trace."""
        if self._tracer is None:
            return
        if run not in self._open:
            # a run that another coordinator took over ends there
            while len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open))).end()
            self._open[run] = self._tracer.start_span("run", attributes={"cohortium.run": run})
        self.took(run, event.kind, float(event.facts.get("seconds", 0.0)), int(event.facts.get("number", 0)))
        if event.kind in ENDED:
            self._open.pop(run).end()

    def took(self, run: str, kind: str, seconds: float, number: int = 0) -> None:
        """Adds a span that ends now."""
        if self._tracer is None:
            return
        from opentelemetry import trace

        now = time.time_ns()
        parent = trace.set_span_in_context(self._open[run]) if run in self._open else None
        attributes = {"cohortium.run": run, "cohortium.round": number}
        span = self._tracer.start_span(kind, parent, attributes=attributes, start_time=now - int(seconds * 1e9))
        span.end(now)

    def close(self) -> None:
        """Sends what is left."""
        if self._provider is not None:
            self._provider.shutdown()
