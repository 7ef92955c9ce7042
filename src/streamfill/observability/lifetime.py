"""The life of a stream as events, and every latency figure as a pure function over them.

Router, load generator and tests use these same functions, so that a figure means the same
everywhere. Times are `time.monotonic` of one process and never leave it as absolute values.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Final, NamedTuple


class LifetimeEvent(StrEnum):
    """What can happen to a stream, roughly in order."""

    OPENED = "OPENED"
    SEGMENT_RECEIVED = "SEGMENT_RECEIVED"
    SEGMENT_TOKENISED = "SEGMENT_TOKENISED"
    SEGMENT_SENT = "SEGMENT_SENT"
    SEGMENT_COMPUTED = "SEGMENT_COMPUTED"
    COMPUTE_STARTED = "COMPUTE_STARTED"
    """The engine began a run of this stream's prompt."""
    COMPUTE_DONE = "COMPUTE_DONE"
    """It finished that run; with the tokens that it computed."""
    PREEMPTED_RECOMPUTE = "PREEMPTED_RECOMPUTE"
    """KV of the stream was found to be evicted; with the tokens that have to be computed again."""
    PREEMPTED_SWAP = "PREEMPTED_SWAP"
    """The same, but it was copied to host memory, and copied back."""
    COMMIT_RECEIVED = "COMMIT_RECEIVED"
    COMMIT_SENT = "COMMIT_SENT"
    FIRST_TOKEN = "FIRST_TOKEN"
    HANDOFF_STARTED = "HANDOFF_STARTED"
    HANDOFF_DONE = "HANDOFF_DONE"
    SECOND_TOKEN = "SECOND_TOKEN"
    TOKEN = "TOKEN"
    """Every further token between the second and the last."""
    LAST_TOKEN = "LAST_TOKEN"
    DONE = "DONE"
    ABORTED = "ABORTED"
    REJECTED = "REJECTED"
    FAILED = "FAILED"
    DEADLINE = "DEADLINE"

    def __str__(self) -> str:
        return self.value

    @property
    def is_token(self) -> bool:
        """Whether a token came with it."""
        return self in _TOKENS

    @property
    def is_ending(self) -> bool:
        """Whether it ends the stream."""
        return self in _ENDINGS


_TOKENS = frozenset(
    {
        LifetimeEvent.FIRST_TOKEN,
        LifetimeEvent.SECOND_TOKEN,
        LifetimeEvent.TOKEN,
        LifetimeEvent.LAST_TOKEN,
    }
)
_ENDINGS = frozenset(
    {
        LifetimeEvent.DONE,
        LifetimeEvent.ABORTED,
        LifetimeEvent.REJECTED,
        LifetimeEvent.FAILED,
        LifetimeEvent.DEADLINE,
    }
)


PREEMPTION_KINDS: Final = {
    LifetimeEvent.PREEMPTED_RECOMPUTE: "recompute",
    LifetimeEvent.PREEMPTED_SWAP: "swap",
}
"""How the KV came back, by event."""


class LifetimeEntry(NamedTuple):
    """One event.

    Attributes:
        event: what happened.
        at_s: when, in seconds of `time.monotonic`.
        segment: number of the segment that it is about, from 0; None for other events.
        num_tokens: how many tokens it is about; None where none are counted.
        reason: why the server computed, of COMPUTE_STARTED and COMPUTE_DONE, where it said so: a
            value of `scheduling.plan.RunReason`. Why the stream gave up memory, of a preemption.
        predicted_s: of a preemption, what having the KV back was predicted to cost, in seconds.
        actual_s: of a preemption, what it did cost; None where not all of it came back.
    """

    event: LifetimeEvent
    at_s: float
    segment: int | None = None
    num_tokens: int | None = None
    reason: str = ""
    predicted_s: float | None = None
    actual_s: float | None = None


class Lifetime:
    """Records one stream's events. Owned by whoever owns the stream.

    What servers did is learnt later than it happened, so the order of recording is not that of
    time; the figures below do not rely on it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: list[LifetimeEntry] = []
        self._has_ended = False

    @property
    def entries(self) -> Sequence[LifetimeEntry]:
        """All events in the order of their recording."""
        return self._entries

    def record(
        self,
        event: LifetimeEvent,
        *,
        segment: int | None = None,
        at_s: float | None = None,
        num_tokens: int | None = None,
        reason: str = "",
        predicted_s: float | None = None,
        actual_s: float | None = None,
    ) -> None:
        """Note that `event` happened, now or at `at_s`.

        Raises:
            ValueError: the stream has ended; an ending is the last event.
        """
        if self._has_ended:
            raise ValueError(f"{event} after {self._entries[-1].event}")
        self._has_ended = event in _ENDINGS
        moment_s = self._clock() if at_s is None else at_s
        self._entries.append(
            LifetimeEntry(event, moment_s, segment, num_tokens, reason, predicted_s, actual_s)
        )

    def record_token(self, *, is_last: bool = False) -> None:
        """Note a token: the first, the second, the last, or one between.

        The last token of an output is LAST_TOKEN; one that is also the first or the second is
        noted as both, at the same time.
        """
        at_s = self._clock()
        num_before = len(token_times_s(self._entries))
        if num_before < 2:
            event = LifetimeEvent.FIRST_TOKEN if num_before == 0 else LifetimeEvent.SECOND_TOKEN
            self.record(event, at_s=at_s)
        elif not is_last:
            self.record(LifetimeEvent.TOKEN, at_s=at_s)
        if is_last:
            self.record(LifetimeEvent.LAST_TOKEN, at_s=at_s)


Entries = Sequence[LifetimeEntry]


def first_at_s(entries: Entries, event: LifetimeEvent) -> float | None:
    """When `event` happened first; None if it did not."""
    return next((entry.at_s for entry in entries if entry.event is event), None)


def last_at_s(entries: Entries, event: LifetimeEvent) -> float | None:
    """When `event` happened last; None if it did not."""
    return next((entry.at_s for entry in reversed(entries) if entry.event is event), None)


def ttft_from_commit_s(entries: Entries) -> float | None:
    """From the client's commit to the first token."""
    return _between(
        first_at_s(entries, LifetimeEvent.COMMIT_RECEIVED),
        first_at_s(entries, LifetimeEvent.FIRST_TOKEN),
    )


def ttft_from_last_segment_s(entries: Entries) -> float | None:
    """From the arrival of the last segment to the first token."""
    return _between(
        last_at_s(entries, LifetimeEvent.SEGMENT_RECEIVED),
        first_at_s(entries, LifetimeEvent.FIRST_TOKEN),
    )


def ttft_from_open_s(entries: Entries) -> float | None:
    """From the opening of the stream to the first token."""
    return _between(
        first_at_s(entries, LifetimeEvent.OPENED),
        first_at_s(entries, LifetimeEvent.FIRST_TOKEN),
    )


def handoff_s(entries: Entries) -> float | None:
    """From the start of the latest hand-off to its end."""
    return _between(
        last_at_s(entries, LifetimeEvent.HANDOFF_STARTED),
        last_at_s(entries, LifetimeEvent.HANDOFF_DONE),
    )


def second_token_gap_s(entries: Entries) -> float | None:
    """From the first token to the second, across the hand-off."""
    return _between(
        first_at_s(entries, LifetimeEvent.FIRST_TOKEN),
        first_at_s(entries, LifetimeEvent.SECOND_TOKEN),
    )


def e2e_s(entries: Entries) -> float | None:
    """From the opening of the stream to its end, whatever the end; None while it lives."""
    if not entries or not entries[-1].event.is_ending:
        return None
    return _between(first_at_s(entries, LifetimeEvent.OPENED), entries[-1].at_s)


class ComputeInterval(NamedTuple):
    """One run of a stream's prompt in the engine."""

    start_s: float
    end_s: float
    num_tokens: int


def compute_intervals(entries: Entries) -> list[ComputeInterval]:
    """When the stream's prompt was computed, in order of time. A run without an end is left out.
    Where runs overlap, as those of several requests do, they end in the order of their starts."""
    intervals: list[ComputeInterval] = []
    starts_s: deque[float] = deque()
    for entry in sorted(entries, key=lambda entry: entry.at_s):
        if entry.event is LifetimeEvent.COMPUTE_STARTED:
            starts_s.append(entry.at_s)
        elif entry.event is LifetimeEvent.COMPUTE_DONE and starts_s:
            intervals.append(ComputeInterval(starts_s.popleft(), entry.at_s, entry.num_tokens or 0))
    return intervals


def compute_s(entries: Entries) -> float:
    """Time in which the stream's prompt was computed."""
    return sum(run.end_s - run.start_s for run in compute_intervals(entries))


def overlap_ratio(entries: Entries) -> float | None:
    """The share of the prompt's compute time that lies before the arrival of the last segment, and
    so is hidden under the client's retrieval. None: nothing was computed, or no segment came."""
    intervals = compute_intervals(entries)
    last_s = last_at_s(entries, LifetimeEvent.SEGMENT_RECEIVED)
    total_s = sum(run.end_s - run.start_s for run in intervals)
    if last_s is None or total_s <= 0:
        return None
    hidden_s = sum(max(0.0, min(run.end_s, last_s) - run.start_s) for run in intervals)
    return hidden_s / total_s


def tokenise_s(entries: Entries) -> list[float]:
    """For each segment, from its arrival at the router to its being sent to a server."""
    received = _by_segment(entries, LifetimeEvent.SEGMENT_RECEIVED)
    sent = _by_segment(entries, LifetimeEvent.SEGMENT_SENT)
    return [sent[n] - at_s for n, at_s in received.items() if n in sent]


def prefill_queue_s(entries: Entries) -> float | None:
    """Between commit and first token, the time in which nothing of the stream was computed: it
    waited for other streams, or was on its way."""
    commit_s = first_at_s(entries, LifetimeEvent.COMMIT_RECEIVED)
    first_s = first_at_s(entries, LifetimeEvent.FIRST_TOKEN)
    total_s = _between(commit_s, first_s)
    if total_s is None or commit_s is None or first_s is None:
        return None
    computing_s = sum(
        max(0.0, min(run.end_s, first_s) - max(run.start_s, commit_s))
        for run in compute_intervals(entries)
    )
    return max(0.0, total_s - computing_s)


def decode_queue_s(entries: Entries) -> float | None:
    """From the end of the hand-off, or from the first token where that is later, to the second
    token."""
    handoff_s = last_at_s(entries, LifetimeEvent.HANDOFF_DONE)
    first_s = first_at_s(entries, LifetimeEvent.FIRST_TOKEN)
    if handoff_s is None or first_s is None:
        return None
    return _between(max(handoff_s, first_s), first_at_s(entries, LifetimeEvent.SECOND_TOKEN))


def tpot_s(entries: Entries) -> float | None:
    """Time per output token after the first; None with fewer than two."""
    times = token_times_s(entries)
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def token_times_s(entries: Entries) -> list[float]:
    """When each token came; LAST_TOKEN at the very time of FIRST or SECOND is the same token."""
    times: list[float] = []
    previous: LifetimeEntry | None = None
    for entry in entries:
        if not entry.event.is_token:
            continue
        is_same = (
            entry.event is LifetimeEvent.LAST_TOKEN
            and previous is not None
            and previous.event in (LifetimeEvent.FIRST_TOKEN, LifetimeEvent.SECOND_TOKEN)
            and previous.at_s == entry.at_s
        )
        if not is_same:
            times.append(entry.at_s)
        previous = entry
    return times


def inter_token_s(entries: Entries) -> list[float]:
    """The times between consecutive tokens; empty with fewer than two."""
    times = token_times_s(entries)
    return [after - before for before, after in pairwise(times)]


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The value below which `percent` of the values lie, interpolated linearly; None of nothing.

    Raises:
        ValueError: `percent` is outside 0..100.
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in 0..100, got {percent}")
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentiles(values: Iterable[float], percents: Sequence[float]) -> dict[float, float | None]:
    """Several percentiles of the same values."""
    ordered = sorted(values)
    return {percent: percentile(ordered, percent) for percent in percents}


def _by_segment(entries: Entries, event: LifetimeEvent) -> dict[int, float]:
    """When `event` happened first, by segment."""
    times: dict[int, float] = {}
    for entry in entries:
        if entry.event is event and entry.segment is not None:
            times.setdefault(entry.segment, entry.at_s)
    return times


def _between(start_s: float | None, end_s: float | None) -> float | None:
    """None unless both happened, in this order."""
    if start_s is None or end_s is None or end_s < start_s:
        return None
    return end_s - start_s
