"""Whether traces are exported, where to, and what an exporter is.

OpenTelemetry's standard environment variables decide, or an endpoint of our own configuration goes
before them. The packages behind them are an extra (``streamfill[otel]``); without a wish for traces
nothing of them is imported (`otel`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from streamfill.observability.spans import Span

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
HTTP_PROTOCOL: Final = "http/protobuf"
TRACES_PATH: Final = "/v1/traces"
"""Behind an endpoint that is a bare address, as the OTLP specification has it."""


class SpanExporter(Protocol):
    """Takes whole traces. Used by one thread, which is none that serves anybody."""

    def export(self, root: Span, trace_parent: str) -> None:
        """Send a root with all below it, sooner or later. Never waits for the network.

        Args:
            root: times are of `time.monotonic`.
            trace_parent: of the span above it, as W3C's header ``traceparent``; empty: it is the
                first of its trace.
        """

    def close(self, timeout_s: float) -> None:
        """Send what is not sent yet, for at most so long. Call it once."""


@dataclass(frozen=True, kw_only=True)
class TraceTarget:
    """Where traces go."""

    endpoint: str | None
    """A URL to post to. None: what OpenTelemetry's own variables say."""
    asked_by: str
    """The key or the variable that asks for traces, for errors."""


@dataclass(frozen=True, kw_only=True)
class NoTraces:
    """Why there are none, although something speaks of them; empty: nothing does."""

    reason: str = ""


def trace_target(endpoint: str | None, environment: Mapping[str, str]) -> TraceTarget | NoTraces:
    """What the configuration and the environment ask for. Pure.

    Args:
        endpoint: ``router.otlp_endpoint``, which goes before the variables.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return NoTraces(reason="OTEL_SDK_DISABLED is true" if endpoint else "")
    if endpoint is not None:
        return TraceTarget(endpoint=_with_path(endpoint), asked_by="router.otlp_endpoint")
    wanted = environment.get("OTEL_TRACES_EXPORTER", "").strip()
    given = next((name for name in _ENDPOINTS if environment.get(name, "").strip()), None)
    if wanted == "none" or (not wanted and given is None):
        return NoTraces()
    if wanted not in ("", "otlp"):
        return NoTraces(reason=f"OTEL_TRACES_EXPORTER is {wanted}; only otlp and none are known")
    for name in _PROTOCOLS:
        protocol = environment.get(name, "").strip() or HTTP_PROTOCOL
        if protocol != HTTP_PROTOCOL:
            return NoTraces(reason=f"{name} is {protocol}; only {HTTP_PROTOCOL} is known")
        if environment.get(name, "").strip():
            break  # the one of the traces goes before the general one
    return TraceTarget(endpoint=None, asked_by=given or "OTEL_TRACES_EXPORTER")


def _with_path(endpoint: str) -> str:
    scheme, _, rest = endpoint.partition("://")
    host, _, path = rest.partition("/")
    return endpoint if path else f"{scheme}://{host}{TRACES_PATH}"
