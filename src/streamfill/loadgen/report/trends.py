"""Times to the first token over the time of a run, and over the rate where several were offered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streamfill.loadgen.figures import Figure
from streamfill.loadgen.ratios import Spread, spread
from streamfill.loadgen.records import RequestRecord
from streamfill.loadgen.report.drawing import (
    Chart,
    Drawing,
    Trace,
    layout,
    log_ms_axis,
    on_log_axis,
    plain,
    short,
    thinned,
)
from streamfill.loadgen.report.loads import Batch
from streamfill.loadgen.report.palette import Style, styles
from streamfill.loadgen.report.wording import duration
from streamfill.observability.lifetime import LifetimeEvent, last_at_s, ttft_from_last_segment_s

_MOST_DOTS: Final = 500
"""Of one mode; which are left out is evenly spread over the run."""


def over_time_chart(batches: Sequence[Batch]) -> Chart:
    """Does waiting grow while the run goes on? One view for each load."""
    return Chart(
        id="over-time",
        title="Over the time of the run",
        note="Each dot is a request: when its last segment arrived, and how long it then waited. "
        "A rising cloud means that the servers cannot keep up with the load.",
        views={batch.name: _dots(batch) for batch in batches},
        shown=batches[-1].name,
    )


def over_rate_chart(batches: Sequence[Batch]) -> Chart | None:
    """Waiting over the offered rate; None unless there are at least two."""
    rated = [batch for batch in batches if batch.load.request_rate is not None]
    if len({batch.load.request_rate for batch in rated}) < 2:
        return None
    drawings = {
        "from the last segment": _over_rate(rated, Figure.TTFT_LAST_SEGMENT),
        "from the query": _over_rate(rated, Figure.TTFT_QUERY),
    }
    return Chart(
        id="over-rate",
        title="Over the offered rate",
        note="Time to the first token: medians over runs of P50 (full marks) and P95 (faint line), "
        "with the least and the greatest run.",
        views=drawings,
        shown="from the last segment",
    )


def _dots(batch: Batch) -> Drawing:
    look = styles(batch.labels)
    data: list[Trace] = []
    every: list[float] = []
    for label in batch.labels:
        points = [
            (at_s, ttft_ms, run.run, record)
            for run in batch.of(label)
            for record in run.records
            for at_s, ttft_ms in _point(record)
        ]
        points.sort(key=lambda point: point[:3])
        every += [ttft_ms for _, ttft_ms, _, _ in points]
        if points:
            data.append(_cloud(label, look[label], thinned(points, _MOST_DOTS)))
    bounds = [min(every), max(every)] if every else []
    return {
        "data": data,
        "layout": layout(
            height=380,
            xaxis={"title": {"text": "arrival of the last segment, seconds into the run"}},
            yaxis=log_ms_axis("time to the first token", bounds),
        ),
    }


def _point(record: RequestRecord) -> list[tuple[float, float]]:
    if record.is_warm_up or record.error_code is not None:
        return []
    client = record.client_lifetime()
    last_s = last_at_s(client, LifetimeEvent.SEGMENT_RECEIVED)
    ttft_s = ttft_from_last_segment_s(client)
    return [] if last_s is None or ttft_s is None else [(last_s, 1000 * ttft_s)]


def _cloud(
    label: str, style: Style, points: Sequence[tuple[float, float, int, RequestRecord]]
) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [round(at_s, 2) for at_s, _, _, _ in points],
        "y": [on_log_axis(ttft_ms) for _, ttft_ms, _, _ in points],
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 6, "opacity": 0.65},
        "hovertext": [
            f"{plain(label)}, run {run}: request {plain(record.request_id)} waited "
            f"{duration(ttft_ms / 1000)}"
            for _, ttft_ms, run, record in points
        ],
        "hoverinfo": "text",
        "name": plain(label),
    }


def _over_rate(batches: Sequence[Batch], figure: Figure) -> Drawing:
    known = list(dict.fromkeys(label for batch in batches for label in batch.labels))
    look = styles(known)
    data: list[Trace] = []
    every: list[float] = []
    for label in known:
        for percent in (50, 95):
            found = [
                (batch.load.request_rate, over_runs)
                for batch in batches
                if (over_runs := _over_runs(batch, label, figure, percent)) is not None
            ]
            every += [value for _, each in found for value in (each.min, each.max)]
            data.append(_rate_line(label, percent, look[label], found))
    return {
        "data": data,
        "layout": layout(
            height=400,
            xaxis={"title": {"text": "offered requests per second"}, "rangemode": "tozero"},
            yaxis=log_ms_axis("time to the first token", every),
        ),
    }


def _over_runs(batch: Batch, label: str, figure: Figure, percent: int) -> Spread | None:
    found = (summary.figure(figure) for summary in batch.summaries_of(label))
    return spread(None if each is None else each.at(percent) for each in found)


def _rate_line(
    label: str, percent: int, style: Style, points: Sequence[tuple[float | None, Spread]]
) -> Trace:
    is_median = percent == 50
    name = f"{plain(label)} P{percent}"
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [rate for rate, _ in points],
        "y": [on_log_axis(each.median) for _, each in points],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [short(each.max - each.median) for _, each in points],
            "arrayminus": [short(each.median - each.min) for _, each in points],
            "thickness": 1,
            "width": 3,
        },
        "opacity": 1.0 if is_median else 0.55,
        "line": {"color": style.colour, "dash": style.dash, "width": 2.5 if is_median else 1.5},
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 8 if is_median else 5},
        "hovertext": [
            f"{name} at {rate:g} requests per second: {duration(each.median / 1000)}"
            for rate, each in points
        ],
        "hoverinfo": "text",
        "name": name,
    }
