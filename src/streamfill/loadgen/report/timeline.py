"""What happened when, stream by stream: segments, compute, hand-off, tokens.

For each mode there is a drawing with all streams moved so that their last segments stand below each
other, and one by the clock of the run. Requests and seconds are the same in all modes, so that they
can be set side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final

from streamfill.loadgen.ratios import baseline_label
from streamfill.loadgen.records import RequestRecord, RunResult
from streamfill.loadgen.report.drawing import Chart, Drawing, layout
from streamfill.loadgen.report.loads import Batch
from streamfill.loadgen.report.stream_marks import StreamMarks
from streamfill.loadgen.report.wording import plural
from streamfill.observability import lifetime as lt
from streamfill.observability.lifetime import LifetimeEvent

MOST_STREAMS: Final = 60
"""More rows could not be told apart."""
_MOST_MODES: Final = 12
"""Drawn of all loads together: each takes up to 300 kB of the page."""
_ROW_PX: Final = 10
_MOST_ROW_PX: Final = 24
_ROWS_PX: Final = 480
_LEAST_ROWS: Final = 8
"""As much room as so many rows take is there even for fewer."""


class _Clock(Enum):
    """What the seconds of a drawing count from; values are ends of names."""

    LAST_SEGMENT = ""
    RUN = ", by the clock of the run"


_AXES: Final = {
    _Clock.LAST_SEGMENT: "seconds since the request's last segment",
    _Clock.RUN: "seconds into the run",
}


def timeline_charts(batches: Sequence[Batch]) -> list[Chart]:
    """Two charts with the same views, of which one shows the baseline and the other one the mode
    that is compared with it; one chart where there is one mode."""
    views: dict[str, Drawing] = {}
    first: dict[str, str] = {}
    num_all = num_shown = 0
    for batch in _drawn(batches):
        indices, num_all = _chosen(batch)
        num_shown = len(indices)
        for clock in _Clock:
            span_s = _span_s(batch, indices, clock)
            for label in batch.labels:
                name = f"{label}, {batch.name}" if len(batches) > 1 else label
                name += clock.value
                views[name] = _drawing(batch.of(label)[0], indices, span_s, clock)
                if clock is _Clock.LAST_SEGMENT:
                    first[label] = name
    note = (
        "Each row is a request. The grey line is retrieval, with a tick where a segment arrives; "
        "green is compute. Yellow is the wait from the last segment, at 0, to the first token."
    )
    if num_shown < num_all:
        note += f" Shown are {num_shown} of {plural(num_all, 'request')}, the middle of one run."
    known = batches[-1].labels
    left = baseline_label(batches[-1].summaries) or known[0]
    others = [label for label in known if label != left]
    shown = [left] + (
        [others[others.index("stream") if "stream" in others else 0]] if others else []
    )
    return [
        Chart(
            id=f"timeline-{side}",
            title="Stream by stream",
            note=note,
            views=views,
            shown=first[label],
        )
        for side, label in zip(("left", "right"), shown, strict=False)
    ]


def _drawn(batches: Sequence[Batch]) -> list[Batch]:
    """The last load, and as many before it as there is room for in a page."""
    kept: list[Batch] = []
    num_modes = 0
    for batch in reversed(batches):
        num_modes += len(batch.labels)
        if kept and num_modes > _MOST_MODES:
            break
        kept.insert(0, batch)
    return kept


def _chosen(batch: Batch) -> tuple[list[int], int]:
    """Places in the trace of the requests that are drawn, and how many there are."""
    every = sorted({r.index for run in batch.results for r in run.records if not r.is_warm_up})
    start = max(0, (len(every) - MOST_STREAMS) // 2)
    return every[start : start + MOST_STREAMS], len(every)


def _zero_s(record: RequestRecord, clock: _Clock) -> float:
    """Where a record's times begin on a clock; without a segment, at its arrival."""
    if clock is _Clock.RUN or not record.client_events:
        return 0.0
    last_s = lt.last_at_s(record.client_lifetime(), LifetimeEvent.SEGMENT_RECEIVED)
    return record.client_events[0][1] if last_s is None else last_s


def _span_s(batch: Batch, indices: Sequence[int], clock: _Clock) -> tuple[float, float]:
    """The seconds in which anything happened to these requests, in any mode."""
    wanted = set(indices)
    spans = [
        (record.client_events[0][1] - zero_s, record.client_events[-1][1] - zero_s)
        for label in batch.labels
        for record in batch.of(label)[0].records
        if record.index in wanted and record.client_events
        for zero_s in (_zero_s(record, clock),)
    ]
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    return (min(starts), max(ends)) if spans else (0.0, 1.0)


def _drawing(
    result: RunResult, indices: Sequence[int], span_s: tuple[float, float], clock: _Clock
) -> Drawing:
    rows = {index: row for row, index in enumerate(indices)}
    marks = StreamMarks()
    for record in result.records:
        row = rows.get(record.index)
        if row is not None and not record.is_warm_up:
            marks.add(row, record, _zero_s(record, clock))
    num_rows = max(_LEAST_ROWS, len(indices))
    pad_s = 0.01 * (span_s[1] - span_s[0]) or 0.1
    labelled = [row for row, index in enumerate(indices) if index % 5 == 0 or len(indices) <= 20]
    return {
        "data": list(marks.traces()),
        "layout": layout(
            height=110 + num_rows * max(_ROW_PX, min(_MOST_ROW_PX, _ROWS_PX // num_rows)),
            barmode="overlay",
            bargap=0.25,
            legend={
                "orientation": "h",
                "x": 0,
                "y": 1,
                "yanchor": "bottom",
                "itemsizing": "constant",
            },
            xaxis={
                "title": {"text": _AXES[clock]},
                "range": [span_s[0] - pad_s, span_s[1] + pad_s],
                "zeroline": False,
            },
            yaxis={
                "title": {"text": "request"},
                "tickvals": labelled,
                "ticktext": [str(indices[row]) for row in labelled],
                "range": [num_rows - 0.3, -0.7],
                "showgrid": False,
                "zeroline": False,
            },
        ),
    }
