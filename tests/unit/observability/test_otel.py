"""Traces through OpenTelemetry's own SDK. Skipped where ``streamfill[otel]`` is not installed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("opentelemetry.sdk", reason="streamfill[otel] is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from streamfill.observability.otel import SERVICE_NAME, OtelExporter, otlp_exporter
from streamfill.observability.spans import Span, SpanEvent

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PATIENCE_S = 10.0


def tree(start_s: float) -> Span:
    return Span(
        name="stream",
        start_s=start_s,
        end_s=start_s + 2.0,
        attributes={"streamfill.mode": "append", "streamfill.num_attempts": 1},
        events=(SpanEvent(name="commit", at_s=start_s + 1.0, attributes={"n": 1}),),
        children=(
            Span(name="segment", start_s=start_s + 0.25, end_s=start_s + 0.5),
            Span(name="hand-off", start_s=start_s + 1.0, end_s=start_s + 1.5, error="failed: no"),
        ),
    )


def test_a_tree_arrives_as_one_trace() -> None:
    """Parents, kinds, attributes, events and status, and times of the wall clock."""
    sdk = InMemorySpanExporter()
    exporter = OtelExporter(sdk, on_lost=lambda _: None, environment={})
    start_s, wall_s = time.monotonic() - 10.0, time.time() - 10.0
    exporter.export(tree(start_s), "")
    exporter.close(PATIENCE_S)
    spans = {span.name: span for span in sdk.get_finished_spans()}
    assert set(spans) == {"stream", "segment", "hand-off"}
    root = spans["stream"]
    assert root.parent is None
    assert root.kind is SpanKind.SERVER
    assert dict(root.attributes) == {"streamfill.mode": "append", "streamfill.num_attempts": 1}
    assert root.start_time / 1e9 == pytest.approx(wall_s, abs=0.5)
    assert (root.end_time - root.start_time) / 1e9 == pytest.approx(2.0, abs=1e-6)
    (event,) = root.events
    assert (event.name, dict(event.attributes)) == ("commit", {"n": 1})
    assert (event.timestamp - root.start_time) / 1e9 == pytest.approx(1.0, abs=1e-6)
    for name in ("segment", "hand-off"):
        assert spans[name].parent.span_id == root.context.span_id
        assert spans[name].context.trace_id == root.context.trace_id
    assert (spans["segment"].start_time - root.start_time) / 1e9 == pytest.approx(0.25, abs=1e-6)
    assert root.status.status_code is StatusCode.UNSET
    assert spans["hand-off"].status.status_code is StatusCode.ERROR
    assert spans["hand-off"].status.description == "failed: no"
    assert root.resource.attributes["service.name"] == SERVICE_NAME


def test_the_clients_span_is_the_parent() -> None:
    """By its ``traceparent``; what is none begins a trace of its own."""
    sdk = InMemorySpanExporter()
    exporter = OtelExporter(sdk, on_lost=lambda _: None, environment={})
    for parent in (PARENT, "garbage", ""):
        exporter.export(tree(time.monotonic()), parent)
    exporter.close(PATIENCE_S)
    roots = [span for span in sdk.get_finished_spans() if span.name == "stream"]
    assert f"{roots[0].context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{roots[0].parent.span_id:016x}" == PARENT.split("-")[2]
    assert roots[1].parent is roots[2].parent is None


@pytest.mark.parametrize(
    "environment",
    [{"OTEL_SERVICE_NAME": "mine"}, {"OTEL_RESOURCE_ATTRIBUTES": "service.name=mine,a=b"}],
)
def test_the_service_is_named_by_the_standard_variables(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which go before our own name for it."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    sdk = InMemorySpanExporter()
    exporter = OtelExporter(sdk, on_lost=lambda _: None, environment=environment)
    exporter.export(tree(time.monotonic()), "")
    exporter.close(PATIENCE_S)
    assert sdk.get_finished_spans()[0].resource.attributes["service.name"] == "mine"


class _Broken(InMemorySpanExporter):  # type: ignore[misc]  # not read by mypy
    def export(self, spans: object) -> SpanExportResult:
        return SpanExportResult.FAILURE


def test_what_cannot_be_sent_is_counted() -> None:
    """By the spans of the export that failed."""
    lost: list[int] = []
    exporter = OtelExporter(_Broken(), on_lost=lost.append, environment={})
    exporter.export(tree(time.monotonic()), "")
    exporter.close(PATIENCE_S)
    assert sum(lost) == 3


class _Collector(BaseHTTPRequestHandler):
    received: list[tuple[str, ExportTraceServiceRequest]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def collector() -> Iterator[ThreadingHTTPServer]:
    _Collector.received = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("by", ["endpoint", "variable"])
def test_otlp_over_a_socket(
    collector: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """A collector gets the trace at the path of the specification, whoever named it."""
    address = f"http://127.0.0.1:{collector.server_address[1]}"
    if by == "variable":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        exporter = otlp_exporter(None, on_lost=lambda _: None)
    else:
        exporter = otlp_exporter(f"{address}/v1/traces", on_lost=lambda _: None)
    exporter.export(tree(time.monotonic()), PARENT)
    exporter.close(PATIENCE_S)
    assert {path for path, _ in _Collector.received} == {"/v1/traces"}
    names = {
        span.name
        for _, request in _Collector.received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }
    assert names == {"stream", "segment", "hand-off"}


def test_a_collector_that_is_away_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    """The end comes within its time; what was not sent is lost."""
    lost: list[int] = []
    with caplog.at_level(logging.CRITICAL):
        exporter = otlp_exporter("http://127.0.0.1:9/v1/traces", on_lost=lost.append)
        began_s = time.monotonic()
        exporter.export(tree(time.monotonic()), "")
        assert time.monotonic() - began_s < 5.0
        began_s = time.monotonic()
        exporter.close(1.0)
        assert time.monotonic() - began_s < 6.0
