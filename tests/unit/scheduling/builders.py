"""Builders of snapshots for the tests of this folder."""

from __future__ import annotations

from streamfill.scheduling.snapshot import MemoryView, Snapshot, StreamView
from streamfill.stream.ids import StreamId


def stream(
    stream_id: int,
    known: int,
    computed: int = 0,
    *,
    committed_s: float | None = None,
    pending_since_s: float = 0.0,
    reached: int = 0,
    evictable: int = 0,
    priority: int = 0,
    in_flight: bool = False,
    waiting_on_memory: bool = False,
) -> StreamView:
    return StreamView(
        stream_id=StreamId(stream_id),
        arrival_s=0.0,
        last_segment_s=pending_since_s,
        pending_since_s=pending_since_s,
        committed_s=committed_s,
        num_known_tokens=known,
        num_computed_tokens=computed,
        num_reached_tokens=reached,
        num_evictable_tokens=evictable,
        priority=priority,
        in_flight=in_flight,
        waiting_on_memory=waiting_on_memory,
    )


def snapshot(
    *streams: StreamView,
    budget: int = 256,
    max_requests: int = 64,
    free: int = 100_000,
    evictable: int = 0,
    page_size: int = 1,
) -> Snapshot:
    memory = MemoryView(
        num_free_tokens=free,
        num_evictable_tokens=evictable,
        num_total_tokens=max(100_000, free + evictable),
        page_size=page_size,
    )
    return Snapshot(
        streams=streams, memory=memory, token_budget=budget, max_requests=max_requests, now_s=100.0
    )
