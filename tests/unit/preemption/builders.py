"""Builders of telemetry for the tests of this folder."""

from __future__ import annotations

from streamfill.messages.control import Residency, StreamTelemetry, Telemetry


def stream(
    stream_id: int,
    *,
    idle_s: float = 1.0,
    priority: int = 0,
    active: bool = False,
    committed: bool = False,
) -> StreamTelemetry:
    return StreamTelemetry(
        stream_id=stream_id,
        num_known_tokens=100,
        num_computed_tokens=100,
        residency=Residency.DEVICE,
        committed=committed,
        active=active,
        idle_s=idle_s,
        priority=priority,
    )


def report(
    *streams: StreamTelemetry, server_id: str = "prefill-0", incarnation: int = 7, number: int = 1
) -> Telemetry:
    return Telemetry(
        server_id=server_id,
        incarnation=incarnation,
        report=number,
        num_free_tokens=10,
        num_cached_tokens=20,
        num_total_tokens=100,
        streams=streams,
    )
