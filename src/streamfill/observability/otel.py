"""Traces through OpenTelemetry's SDK: the one border to it, imported where traces are asked for.

The SDK sends in a thread of its own, in batches, and knows its standard variables: headers,
time-outs, sampler, resource attributes, sizes of batches.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export import (
    SpanExporter as SdkExporter,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from streamfill import __version__
from streamfill.observability.spans import Span

SERVICE_NAME = "streamfill-router"
"""Unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say another."""


class OtelExporter:
    """Implements `tracing.SpanExporter`."""

    def __init__(
        self,
        sdk_exporter: SdkExporter,
        *,
        on_lost: Callable[[int], None],
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """
        Args:
            sdk_exporter: where the spans go.
            on_lost: told how many spans an export failed for; called in the SDK's thread.
            environment: what the process was started with.
        """
        resource = Resource.create(_own_attributes(environment))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Counting(sdk_exporter, on_lost)))
        self._tracer = self._provider.get_tracer("streamfill", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def export(self, root: Span, trace_parent: str) -> None:
        """See `tracing.SpanExporter`."""
        context = self._propagator.extract({"traceparent": trace_parent}, Context())
        # One offset for the whole trace, or its parts would not fit together.
        offset_ns = time.time_ns() - time.monotonic_ns()
        self._put(root, context, offset_ns, trace.SpanKind.SERVER)

    def close(self, timeout_s: float) -> None:
        """See `tracing.SpanExporter`."""
        # The SDK's own end waits for as long as the network takes.
        ending = threading.Thread(target=self._provider.shutdown, name="otel-end", daemon=True)
        ending.start()
        ending.join(timeout_s)

    def _put(self, span: Span, context: Context, offset_ns: int, kind: trace.SpanKind) -> None:
        def wall_ns(at_s: float) -> int:
            return int(at_s * 1e9) + offset_ns

        shown = self._tracer.start_span(
            span.name,
            context,
            kind=kind,
            attributes=dict(span.attributes),
            start_time=wall_ns(span.start_s),
            record_exception=False,
        )
        for event in span.events:
            shown.add_event(event.name, dict(event.attributes), timestamp=wall_ns(event.at_s))
        if span.error:
            shown.set_status(trace.StatusCode.ERROR, span.error)
        below = trace.set_span_in_context(shown, context)
        for child in span.children:
            self._put(child, below, offset_ns, trace.SpanKind.INTERNAL)
        shown.end(wall_ns(span.end_s))


def otlp_exporter(
    endpoint: str | None,
    *,
    on_lost: Callable[[int], None],
    environment: Mapping[str, str] = os.environ,
) -> OtelExporter:
    """An exporter over OTLP/HTTP. ``endpoint`` None: where the standard variables say."""
    return OtelExporter(
        OTLPSpanExporter(endpoint=endpoint), on_lost=on_lost, environment=environment
    )


class _Counting(SdkExporter):  # type: ignore[misc]  # not read by mypy
    """Counts what an export failed for."""

    def __init__(self, inner: SdkExporter, on_lost: Callable[[int], None]) -> None:
        self._inner = inner
        self._on_lost = on_lost

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._on_lost(len(spans))
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._inner.force_flush(timeout_millis))


def _own_attributes(environment: Mapping[str, str]) -> dict[str, Any]:
    attributes = {"service.version": __version__}
    is_named = "OTEL_SERVICE_NAME" in environment
    if not is_named and "service.name=" not in environment.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes["service.name"] = SERVICE_NAME
    return attributes
