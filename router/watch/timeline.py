"""A stream's lifetime as rows that can be drawn, kept up to date at the cost of what is new.

The router records a stream's life anyway. A timeline is made when somebody looks at the stream for
the first time, and reads on from where it was at each further look.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any, Final

from router.watch.frames import Moments, Row, ToMs
from streamfill.observability.lifetime import PREEMPTION_KINDS, Entries, LifetimeEntry
from streamfill.observability.lifetime import LifetimeEvent as Event

MAX_ROWS: Final = 200
"""Of each kind and stream. Older ones are forgotten; the page says so."""

_SEGMENT_PLACES: Final = {
    Event.SEGMENT_RECEIVED: 0,
    Event.SEGMENT_SENT: 1,
    Event.SEGMENT_COMPUTED: 2,
}
_MOMENTS: Final = {
    Event.COMMIT_RECEIVED: "commit_ms",
    Event.FIRST_TOKEN: "first_token_ms",
    Event.HANDOFF_STARTED: "handoff_started_ms",
    Event.HANDOFF_DONE: "handoff_done_ms",
}


class Rows:
    """The newest rows of one kind, each with the stamp of its last change."""

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._rows: OrderedDict[int, tuple[int, list[Any]]] = OrderedDict()
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, values: list[Any], stamp: int) -> None:
        """A row with the next number."""
        self.put(self._next, values, stamp)

    def put(self, number: int, values: list[Any], stamp: int) -> None:
        """A row with this number, which is new or replaces the old one."""
        self._next = max(self._next, number + 1)
        self._rows[number] = (stamp, values)
        self._rows.move_to_end(number)
        while len(self._rows) > self._max_rows:
            self._rows.popitem(last=False)

    def get(self, number: int) -> list[Any] | None:
        """The values of a row, to be changed through `put` only."""
        found = self._rows.get(number)
        return None if found is None else found[1]

    def values(self) -> list[list[Any]]:
        """Of all rows, those that changed last at the end."""
        return [values for _, values in self._rows.values()]

    def since(self, stamp: int) -> list[Row] | None:
        """Rows that changed behind `stamp`, by number; None when none did."""
        changed: list[Row] = []
        for number, (changed_at, values) in reversed(self._rows.items()):
            if changed_at <= stamp:
                break
            changed.append([number, *values])
        return sorted(changed, key=lambda row: int(row[0])) if changed else None


class Timeline:
    """Of one stream."""

    def __init__(self, to_ms: ToMs) -> None:
        """Args:
        to_ms: from the clock of the lifetime to that of the frames.
        """
        self.stamp = 0
        """Grows with each change."""
        self.moments = Moments()
        self.moments_stamp = 0
        self.segments = Rows()
        self.runs = Rows()
        self.preemptions = Rows()
        self.progress = Rows()
        self._to_ms = to_ms
        self._num_read = 0
        self._starts_ms: deque[int] = deque()
        self._num_computed_tokens: int | None = None
        self._sampled_ms = 0

    def read(self, entries: Entries) -> None:
        """Take in what was recorded since the last time."""
        num_entries = len(entries)
        if num_entries == self._num_read:
            return
        self.stamp += 1
        before = self.moments
        moments: dict[str, int] = {}
        newest_token_s: float | None = None
        for place in range(self._num_read, num_entries):
            entry = entries[place]
            if entry.event.is_token:
                newest_token_s = entry.at_s
            if entry.event is not Event.TOKEN:  # of which there are thousands
                self._take(entry, moments)
        self._num_read = num_entries
        if newest_token_s is not None:
            moments["newest_token_ms"] = self._to_ms(newest_token_s)
        if moments:
            old = {name: getattr(before, name) for name in Moments.__struct_fields__}
            self.moments = Moments(**{**old, **moments})
            self.moments_stamp = self.stamp

    def sample(self, num_computed_tokens: int, now_ms: int, *, is_first_token_out: bool) -> None:
        """So much of the prompt is computed now."""
        before, before_ms = self._num_computed_tokens, self._sampled_ms
        self._num_computed_tokens, self._sampled_ms = num_computed_tokens, now_ms
        if before is None or num_computed_tokens <= before or is_first_token_out:
            return
        self.stamp += 1
        from_ms, until_ms = self._computing(before_ms, now_ms)
        self.progress.append([from_ms, until_ms, num_computed_tokens], self.stamp)

    def _computing(self, before_ms: int, now_ms: int) -> tuple[int, int]:
        """When it can have been, between two samples: not before a segment was sent that was not
        computed at the first one, and not behind the last one that is computed."""
        sent = [
            int(sent_ms)
            for _, sent_ms, computed_ms in self.segments.values()
            if sent_ms is not None and (computed_ms is None or computed_ms > before_ms)
        ]
        computed = [computed_ms for _, _, computed_ms in self.segments.values()]
        until_ms = now_ms
        if computed and None not in computed:
            until_ms = max(before_ms, min(now_ms, max(computed)))
        return min(until_ms, max([before_ms, *([min(sent)] if sent else [])])), until_ms

    def _take(self, entry: LifetimeEntry, moments: dict[str, int]) -> None:
        event, at_ms = entry.event, self._to_ms(entry.at_s)
        if event in _SEGMENT_PLACES and entry.segment is not None:
            row = list(self.segments.get(entry.segment) or (None, None, None))
            row[_SEGMENT_PLACES[event]] = at_ms
            # What is about a segment that was forgotten already is not worth a place.
            if event is Event.SEGMENT_RECEIVED or row[0] is not None:
                self.segments.put(entry.segment, row, self.stamp)
        elif event is Event.COMPUTE_STARTED:
            self._starts_ms.append(at_ms)
        elif event is Event.COMPUTE_DONE and self._starts_ms:
            start_ms = self._starts_ms.popleft()
            self.runs.append([start_ms, at_ms, entry.num_tokens or 0, entry.reason], self.stamp)
        elif event in PREEMPTION_KINDS:
            kind = PREEMPTION_KINDS[event]
            values = [at_ms, kind, entry.num_tokens or 0, entry.reason]
            self.preemptions.append(values, self.stamp)
        elif event in _MOMENTS:
            moments[_MOMENTS[event]] = at_ms
