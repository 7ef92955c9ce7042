"""The first rule: who has been silent longest gives up its KV first, and has it recomputed."""

from __future__ import annotations

from collections.abc import Sequence

from streamfill.messages.control import PlanEntry, PreemptionAction, StreamTelemetry


def rank_victims(streams: Sequence[StreamTelemetry]) -> tuple[PlanEntry, ...]:
    """All ``streams``, first to give up first. The same set gives the same order, always.

    1. Idle streams: least recently extended first; of equals the lower priority, then the lower id.
       Their KV is dropped and recomputed (``RECOMPUTE``).
    2. Streams that compute or wait to, in the same order, then committed ones: ``KEEP``. They stand
       in the list for completeness; taking their memory would throw away work that is wanted right
       now.
    """
    return tuple(_entry(stream) for stream in sorted(streams, key=_victim_key))


def is_expendable(stream: StreamTelemetry) -> bool:
    """Whether the stream's KV may be taken at all: nobody waits for it right now."""
    return not (stream.committed or stream.active)


def _victim_key(stream: StreamTelemetry) -> tuple[bool, bool, float, int, int]:
    return stream.committed, stream.active, -stream.idle_s, stream.priority, stream.stream_id


def _entry(stream: StreamTelemetry) -> PlanEntry:
    if stream.committed:
        action, reason = PreemptionAction.KEEP, "committed"
    elif stream.active:
        action, reason = PreemptionAction.KEEP, "being computed"
    else:
        action, reason = PreemptionAction.RECOMPUTE, f"idle for {stream.idle_s:.1f} s"
    return PlanEntry(stream_id=stream.stream_id, action=action, reason=reason)
