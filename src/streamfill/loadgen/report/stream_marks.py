"""The marks of a timeline: what is drawn of each stream, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from streamfill.loadgen.figures import server_lives
from streamfill.loadgen.records import RequestRecord
from streamfill.loadgen.report.drawing import Trace, plain, thinned
from streamfill.loadgen.report.palette import NEUTRAL, StageColour
from streamfill.loadgen.report.wording import duration, plural
from streamfill.observability import lifetime as lt
from streamfill.observability.lifetime import PREEMPTION_KINDS, LifetimeEntry, LifetimeEvent

_MOST_TOKENS: Final = 48
"""Dots of one stream."""


@dataclass
class _Marks:
    """Points, or bars that start at ``base``, over the rows of a drawing."""

    x: list[float] = field(default_factory=list)
    y: list[int] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def point(self, row: int, at_s: float, words: str = "") -> None:
        self.x.append(round(at_s, 3))
        self.y.append(row)
        self.words.append(words)

    def bar(self, row: int, start_s: float, end_s: float, words: str) -> None:
        self.base.append(round(start_s, 3))
        self.point(row, max(end_s - start_s, 0.0), words)


class StreamMarks:
    """Everything of one drawing, by what it is. Rows are numbered from the top."""

    def __init__(self) -> None:
        self._retrieval = _Marks()
        self._waiting = _Marks()
        self._compute = _Marks()
        self._handoff = _Marks()
        self._segments = _Marks()
        self._first_tokens = _Marks()
        self._tokens = _Marks()
        self._losses = _Marks()
        self._failures = _Marks()

    def add(self, row: int, record: RequestRecord, zero_s: float) -> None:
        """One stream, its times less ``zero_s``."""
        client = _moved(record.client_lifetime(), zero_s)
        lives = [_moved(life, zero_s) for life in server_lives(record)]
        name = f"request {plain(record.request_id, 40)}"
        open_s = lt.first_at_s(client, LifetimeEvent.OPENED)
        last_s = lt.last_at_s(client, LifetimeEvent.SEGMENT_RECEIVED)
        first_s = lt.first_at_s(client, LifetimeEvent.FIRST_TOKEN)
        if open_s is not None and last_s is not None:
            words = f"{name}: retrieval takes {duration(last_s - open_s)}"
            self._retrieval.bar(row, open_s, last_s, words)
        for number, entry in enumerate(
            entry for entry in client if entry.event is LifetimeEvent.SEGMENT_RECEIVED
        ):
            self._segments.point(row, entry.at_s, f"{name}: segment {number + 1} arrives")
        if last_s is not None and first_s is not None:
            words = f"{name}: first token {duration(first_s - last_s)} after the last segment"
            self._waiting.bar(row, last_s, first_s, words)
            self._first_tokens.point(row, first_s, words)
        for life in lives:
            for run in lt.compute_intervals(life):
                words = (
                    f"{name}: {plural(run.num_tokens, 'token')} of the prompt computed in "
                    f"{duration(run.end_s - run.start_s)}{_relative(run.end_s, last_s)}"
                )
                self._compute.bar(row, run.start_s, run.end_s, words)
            for entry in life:
                if entry.event in PREEMPTION_KINDS:
                    words = f"{name}: {plural(entry.num_tokens or 0, 'token')} lost to eviction"
                    self._losses.point(row, entry.at_s, words)
        if lives:
            start_s = lt.last_at_s(lives[-1], LifetimeEvent.HANDOFF_STARTED)
            end_s = lt.last_at_s(lives[-1], LifetimeEvent.HANDOFF_DONE)
            if start_s is not None and end_s is not None:
                words = f"{name}: hand-off takes {duration(end_s - start_s)}"
                self._handoff.bar(row, start_s, end_s, words)
        for at_s in thinned(lt.token_times_s(client)[1:], _MOST_TOKENS):
            self._tokens.point(row, at_s)
        if record.error_code is not None and client:
            words = f"{name}: {plain(record.error_code)} {plain(record.error, 120)}"
            self._failures.point(row, client[-1].at_s, words)

    def traces(self) -> Iterator[Trace]:
        """For plotly.js, in the order in which they cover each other."""
        yield _bars("retrieval", NEUTRAL, self._retrieval, width=0.16, opacity=0.7)
        yield _bars("wait", StageColour.QUEUE, self._waiting, width=0.72)
        yield _bars("compute", StageColour.COMPUTE, self._compute, width=0.72)
        yield _bars("hand-off", StageColour.HANDOFF, self._handoff, width=0.72)
        yield _points("segment", self._segments, "line-ns", 7, NEUTRAL)
        yield _points("tokens", self._tokens, "circle", 2, "#56B4E9")
        yield _points("first token", self._first_tokens, "circle", 5, "#0072B2")
        if self._losses.x:
            yield _points("evicted", self._losses, "triangle-down", 6, "#CC3311")
        if self._failures.x:
            yield _points("failed", self._failures, "x", 8, "#CC3311")


def _moved(entries: Sequence[LifetimeEntry], zero_s: float) -> list[LifetimeEntry]:
    return [entry._replace(at_s=entry.at_s - zero_s) for entry in entries]


def _relative(at_s: float, last_s: float | None) -> str:
    """Before or after the last segment."""
    if last_s is None:
        return ""
    side = "before" if at_s <= last_s else "after"
    return f", {duration(abs(at_s - last_s))} {side} the last segment"


def _bars(title: str, colour: str, marks: _Marks, *, width: float, opacity: float = 1.0) -> Trace:
    return {
        "type": "bar",
        "orientation": "h",
        "name": title,
        "x": marks.x,
        "y": marks.y,
        "base": marks.base,
        "width": width,
        "marker": {"color": colour, "opacity": opacity, "line": {"width": 0}},
        "hovertext": marks.words,
        "hoverinfo": "text",
        "textposition": "none",
    }


def _points(title: str, marks: _Marks, symbol: str, size: int, colour: str) -> Trace:
    marker: dict[str, Any] = {"color": colour, "symbol": symbol, "size": size}
    if symbol.startswith("line"):
        marker["line"] = {"color": colour, "width": 1.5}
    has_words = any(marks.words)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": title,
        "x": marks.x,
        "y": marks.y,
        "marker": marker,
        "hovertext": marks.words if has_words else [],
        "hoverinfo": "text" if has_words else "skip",
    }
