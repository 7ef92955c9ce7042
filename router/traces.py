"""One trace for each stream that has ended, for OpenTelemetry; nothing where nobody asks for it.

The client's own trace goes on in it: whoever takes a call in sets `TRACE_PARENT` from the call's
``traceparent``, and the stream that is opened within that call remembers it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Final

from router.ended_streams import EndedStream
from streamfill.errors import ConfigError
from streamfill.observability.logging import log_event
from streamfill.observability.spans import Span, Value, stream_span
from streamfill.observability.tracing import NoTraces, SpanExporter, trace_target

logger = logging.getLogger(__name__)

TRACE_PARENT: ContextVar[str] = ContextVar("TRACE_PARENT", default="")
"""W3C's header ``traceparent`` of the call that is being served; empty: it has none."""
TRACE_PARENT_KEY: Final = "traceparent"
MAX_TRACE_PARENT_CHARS: Final = 128
"""Of the present version it has 55, and later ones are to be longer at most by a little."""
CLOSE_TIMEOUT_S: Final = 3.0

_MISSING: Final = "needs OpenTelemetry's SDK and its OTLP exporter: pip install 'streamfill[otel]'"

_GOOD_OUTCOMES: Final = frozenset({"DONE", "ABORTED"})
"""An abort is the client's wish."""


class StreamTraces:
    """Gives streams to an exporter. Used by the thread of `EndedStreams`."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def add(self, stream: EndedStream) -> None:
        """Export its trace."""
        root = span_of(stream)
        if root is not None:
            self._exporter.export(root, stream.trace_parent)

    def close(self) -> None:
        """Send the rest, for a bounded time."""
        self._exporter.close(CLOSE_TIMEOUT_S)


def span_of(stream: EndedStream) -> Span | None:
    """The trace of a stream. Pure."""
    attributes: dict[str, Value] = {
        "streamfill.stream_id": str(stream.stream_id),  # beyond what JavaScript can count
        "streamfill.request_id": stream.request_id,
        "streamfill.mode": stream.mode,
        "streamfill.outcome": stream.outcome,
        "streamfill.prefill_server": stream.prefill_server,
        "streamfill.decode_server": stream.decode_server,
        "streamfill.handoff": stream.handoff,
        "streamfill.num_attempts": stream.num_attempts,
        "gen_ai.usage.input_tokens": stream.num_prompt_tokens,
        "gen_ai.usage.output_tokens": stream.num_output_tokens,
    }
    is_failed_handoff = stream.handoff.startswith("failed")
    return stream_span(
        stream.entries,
        name="stream",
        attributes={key: value for key, value in attributes.items() if value != ""},
        error="" if stream.outcome in _GOOD_OUTCOMES else stream.error or stream.outcome,
        handoff_error=stream.handoff if is_failed_handoff else "",
    )


def start_traces(
    endpoint: str | None, environment: Mapping[str, str], on_lost: Callable[[int], None]
) -> StreamTraces | None:
    """What the configuration or the environment asks for; None: no traces.

    Raises:
        ConfigError: our own configuration asks for them, and the packages are not there.
    """
    target = trace_target(endpoint, environment)
    if isinstance(target, NoTraces):
        if target.reason:
            log_event(logger, "traces_off", level=logging.WARNING, reason=target.reason)
        return None
    try:
        from streamfill.observability.otel import otlp_exporter
    except ImportError as error:
        if endpoint is not None:
            raise ConfigError(target.asked_by, endpoint, _MISSING) from error
        # Such variables are often set for all processes of a machine, so they stop nobody.
        reason = f"{target.asked_by} asks for traces, which {_MISSING}"
        log_event(logger, "traces_off", level=logging.WARNING, reason=reason)
        return None
    exporter = otlp_exporter(target.endpoint, on_lost=on_lost, environment=environment)
    log_event(logger, "traces_on", asked_by=target.asked_by, endpoint=target.endpoint or "")
    return StreamTraces(exporter)
