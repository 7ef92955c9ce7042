"""The life of a stream as a tree of spans, from its recorded events. Pure; no OpenTelemetry here.

::

    stream      |--------------------------------------------------------------|
      segment    |-----|      |------|    |----------------|                      sent to computed
      prefill      |--|          |---|         |---|  |----|                      in the engine
      queue                                        |--|                           after the commit
      hand-off                                             |------|
      decode                                               |------------------|

They are built once the stream has ended, so that its life costs nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from streamfill.observability.lifetime import (
    PREEMPTION_KINDS,
    Entries,
    LifetimeEntry,
    LifetimeEvent,
    compute_intervals,
    first_at_s,
    last_at_s,
    token_times_s,
)

Value = str | bool | int | float

SEGMENT, QUEUE, PREFILL, HANDOFF, DECODE = "segment", "queue", "prefill", "hand-off", "decode"
"""Names of the children. The root has the name that it is given."""
_MOMENTS: Final[Mapping[LifetimeEvent, str]] = {
    LifetimeEvent.COMMIT_RECEIVED: "commit",
    LifetimeEvent.FIRST_TOKEN: "first token",
    LifetimeEvent.SECOND_TOKEN: "second token",
    LifetimeEvent.LAST_TOKEN: "last token",
}
_MIN_QUEUE_S: Final = 0.001
"""Less lies between two runs that follow each other."""


@dataclass(frozen=True, kw_only=True)
class SpanEvent:
    """A moment within a span."""

    name: str
    at_s: float
    attributes: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of time, in seconds of the clock of the lifetime, with what lies in it."""

    name: str
    start_s: float
    end_s: float
    attributes: Mapping[str, Value] = field(default_factory=dict)
    events: tuple[SpanEvent, ...] = ()
    error: str = ""
    """Why it failed; empty when it did not."""
    children: tuple[Span, ...] = ()


def stream_span(
    entries: Entries,
    *,
    name: str,
    attributes: Mapping[str, Value],
    error: str = "",
    handoff_error: str = "",
) -> Span | None:
    """The whole life; None while the stream lives.

    Args:
        entries: in the order of recording.
        name: of the root.
        attributes: of the root.
        error: why the stream ended badly; empty when it did not.
        handoff_error: why its hand-off failed; empty when it did not.
    """
    opened_s = first_at_s(entries, LifetimeEvent.OPENED)
    if opened_s is None or not entries[-1].event.is_ending:
        return None
    end_s = max(opened_s, entries[-1].at_s)
    children = (
        *_segments(entries, end_s),
        *_prefills(entries),
        *_queues(entries),
        *_handoff(entries, end_s, handoff_error),
        *_decode(entries, end_s),
    )
    within = (_clipped(child, opened_s, end_s) for child in children)
    return Span(
        name=name,
        start_s=opened_s,
        end_s=end_s,
        attributes=attributes,
        events=tuple(_moments(entries)),
        error=error,
        children=tuple(sorted(within, key=lambda child: child.start_s)),
    )


def _segments(entries: Entries, end_s: float) -> Iterator[Span]:
    """From when it was sent to a server until all up to it was computed: at the latest with the
    first token, and for those of a stream that never came so far, until its end."""
    received = {e.segment: e.at_s for e in entries if e.event is LifetimeEvent.SEGMENT_RECEIVED}
    computed = {e.segment: e.at_s for e in entries if e.event is LifetimeEvent.SEGMENT_COMPUTED}
    first_token_s = first_at_s(entries, LifetimeEvent.FIRST_TOKEN)
    for entry in entries:
        if entry.event is not LifetimeEvent.SEGMENT_SENT or entry.segment is None:
            continue
        done_s = computed.get(entry.segment, first_token_s)
        attributes: dict[str, Value] = {
            "streamfill.segment": entry.segment,
            "streamfill.computed": done_s is not None,
        }
        if entry.segment in received:
            attributes["streamfill.tokenise_s"] = entry.at_s - received[entry.segment]
        yield Span(
            name=SEGMENT,
            start_s=entry.at_s,
            end_s=end_s if done_s is None else done_s,
            attributes=attributes,
        )


def _prefills(entries: Entries) -> Iterator[Span]:
    reasons = {e.at_s: e.reason for e in entries if e.event is LifetimeEvent.COMPUTE_DONE}
    for run in compute_intervals(entries):
        yield Span(
            name=PREFILL,
            start_s=run.start_s,
            end_s=run.end_s,
            attributes={
                "streamfill.num_tokens": run.num_tokens,
                "streamfill.reason": reasons.get(run.end_s, ""),
            },
        )


def _queues(entries: Entries) -> Iterator[Span]:
    """Between commit and first token, the times in which nothing of the stream was computed; their
    sum is `lifetime.prefill_queue_s`."""
    at_s = first_at_s(entries, LifetimeEvent.COMMIT_RECEIVED)
    until_s = first_at_s(entries, LifetimeEvent.FIRST_TOKEN)
    if at_s is None or until_s is None:
        return
    for run in compute_intervals(entries):
        if min(run.start_s, until_s) - at_s >= _MIN_QUEUE_S:
            yield Span(name=QUEUE, start_s=at_s, end_s=min(run.start_s, until_s))
        at_s = max(at_s, run.end_s)
    if until_s - at_s >= _MIN_QUEUE_S:
        yield Span(name=QUEUE, start_s=at_s, end_s=until_s)


def _handoff(entries: Entries, end_s: float, error: str) -> Iterator[Span]:
    """The latest one. One that failed ends with the second token, which was not kept waiting by it
    any longer."""
    started_s = last_at_s(entries, LifetimeEvent.HANDOFF_STARTED)
    if started_s is None:
        return
    done_s = last_at_s(entries, LifetimeEvent.HANDOFF_DONE)
    if done_s is None:
        second_s = first_at_s(entries, LifetimeEvent.SECOND_TOKEN)
        done_s = end_s if second_s is None else second_s
    yield Span(name=HANDOFF, start_s=started_s, end_s=max(started_s, done_s), error=error)


def _decode(entries: Entries, end_s: float) -> Iterator[Span]:
    """From the first token to the last one, or to the end of a stream that broke off."""
    times_s = token_times_s(entries)
    if not times_s:
        return
    is_whole = last_at_s(entries, LifetimeEvent.LAST_TOKEN) is not None
    yield Span(
        name=DECODE,
        start_s=times_s[0],
        end_s=times_s[-1] if is_whole else end_s,
        attributes={"streamfill.num_tokens": len(times_s)},
    )


def _moments(entries: Entries) -> Iterator[SpanEvent]:
    for entry in sorted(entries, key=lambda entry: entry.at_s):
        if entry.event in _MOMENTS:
            yield SpanEvent(name=_MOMENTS[entry.event], at_s=entry.at_s)
        elif entry.event in PREEMPTION_KINDS:
            yield SpanEvent(name="preempted", at_s=entry.at_s, attributes=_preemption(entry))


def _preemption(entry: LifetimeEntry) -> dict[str, Value]:
    told: Sequence[tuple[str, Value | None]] = (
        ("streamfill.action", PREEMPTION_KINDS[entry.event]),
        ("streamfill.num_tokens", entry.num_tokens),
        ("streamfill.reason", entry.reason or None),
        ("streamfill.predicted_s", entry.predicted_s),
        ("streamfill.actual_s", entry.actual_s),
    )
    return {key: value for key, value in told if value is not None}


def _clipped(span: Span, start_s: float, end_s: float) -> Span:
    """What servers did is placed by ages, which may be off by the time a message was under way."""
    first_s = min(max(span.start_s, start_s), end_s)
    return replace(span, start_s=first_s, end_s=min(max(span.end_s, first_s), end_s))
