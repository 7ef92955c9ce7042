"""How times to the first token are distributed: boxes with dots, and how many wait longer."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Final, NamedTuple

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
from streamfill.observability.lifetime import percentile, ttft_from_last_segment_s, ttft_from_open_s

_MOST_DOTS: Final = 250
_MOST_STEPS: Final = 300
"""Points of one curve; the slowest requests are kept one by one."""
_SLOWEST_KEPT: Final = 60
_ROW_PX: Final = 88


class Times(NamedTuple):
    """Times to the first token of a mode's completed requests over all runs, in ms, sorted."""

    from_last_segment: list[float]
    from_query: list[float]


def times_of(batch: Batch) -> dict[str, Times]:
    """By mode."""
    times = {label: Times([], []) for label in batch.labels}
    for result in batch.results:
        for record in result.records:
            if record.is_warm_up or record.error_code is not None:
                continue
            client = record.client_lifetime()
            last_s, open_s = ttft_from_last_segment_s(client), ttft_from_open_s(client)
            if last_s is not None:
                times[result.label].from_last_segment.append(1000 * last_s)
            if open_s is not None:
                times[result.label].from_query.append(1000 * open_s)
    for found in times.values():
        found.from_last_segment.sort()
        found.from_query.sort()
    return times


def distribution_charts(batches: Sequence[Batch]) -> list[Chart]:
    """Boxes and curves, for both clocks; one view for each load."""
    by_load = {batch.name: times_of(batch) for batch in batches}
    shown = list(by_load)[-1]
    last = {name: {k: t.from_last_segment for k, t in v.items()} for name, v in by_load.items()}
    query = {name: {k: t.from_query for k, t in v.items()} for name, v in by_load.items()}
    return [
        Chart(
            id="box-last-segment",
            title="Time to the first token, from the last segment",
            note="What a user waits once all context is there. The box holds the middle half of "
            "the requests, the line in it is the median; the whiskers end at P5 and P95.",
            views={name: _boxes(times) for name, times in last.items()},
            shown=shown,
        ),
        Chart(
            id="box-query",
            title="Time to the first token, from the query",
            note="Retrieval included. No mode can answer before the context is there, so modes "
            "differ less here.",
            views={name: _boxes(times) for name, times in query.items()},
            shown=shown,
        ),
        Chart(
            id="ccdf-last-segment",
            title="How many wait longer, from the last segment",
            note="The share of requests that wait longer than a time; lower and further left is "
            "better. Both axes are logarithmic, so that the slowest requests can be seen.",
            views={name: _curves(times) for name, times in last.items()},
            shown=shown,
        ),
        Chart(
            id="ccdf-query",
            title="How many wait longer, from the query",
            note="Likewise, retrieval included.",
            views={name: _curves(times) for name, times in query.items()},
            shown=shown,
        ),
    ]


def _boxes(times_ms: dict[str, list[float]]) -> Drawing:
    known = list(times_ms)
    look = styles(known)
    jitter = random.Random(1)
    data: list[Trace] = []
    for row, label in enumerate(known):
        if times_ms[label]:
            data += _row(label, row, times_ms[label], look[label], jitter)
    every = [value for values in times_ms.values() for value in (values[:1] + values[-1:])]
    return {
        "data": data,
        "layout": layout(
            height=70 + _ROW_PX * len(known),
            showlegend=False,
            xaxis=log_ms_axis("time to the first token", every),
            yaxis={
                "tickvals": list(range(len(known))),
                "ticktext": [_row_name(label, times_ms[label]) for label in known],
                "range": [len(known) - 0.4, -0.5],
                "zeroline": False,
                "showgrid": False,
                "automargin": True,
                "fixedrange": True,
            },
        ),
    }


def _row_name(label: str, values: Sequence[float]) -> str:
    return f"<b>{plain(label)}</b>" + ("" if values else "<br>no answer")


def _row(
    label: str, row: int, values: Sequence[float], style: Style, jitter: random.Random
) -> list[Trace]:
    marks = {percent: on_log_axis(percentile(values, percent) or 0.0) for percent in (50, 95, 99)}
    fences = [on_log_axis(percentile(values, percent) or 0.0) for percent in (5, 25, 75, 95)]
    dots = thinned(values, _MOST_DOTS)
    name = plain(label)
    box: Trace = {
        "type": "box",
        "orientation": "h",
        "y": [row - 0.08],
        "lowerfence": fences[:1],
        "q1": fences[1:2],
        "median": [marks[50]],
        "q3": fences[2:3],
        "upperfence": fences[3:],
        "width": 0.34,
        "line": {"color": style.colour, "width": 2},
        "hoverinfo": "skip",
        "name": name,
    }
    strip: Trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [on_log_axis(value) for value in dots],
        "y": [round(row + 0.27 + jitter.uniform(-0.09, 0.09), 3) for _ in dots],
        "marker": {"color": style.colour, "size": 4, "opacity": 0.45},
        "hoverinfo": "skip",
        "name": name,
    }
    points: Trace = {
        "type": "scatter",
        "mode": "markers+text",
        "x": list(marks.values()),
        "y": [row - 0.08] * len(marks),
        "text": ["", "", "P99"],
        "textposition": "middle right",
        "cliponaxis": False,
        "textfont": {"size": 11},
        "marker": {"color": style.colour, "size": [9, 9, 9], "symbol": ["line-ns", "x", "circle"]},
        "hovertext": [
            f"{name}: {_share(percent)} of {len(values):,} requests have their first token "
            f"within {duration(ms / 1000)} (P{percent})"
            for percent, ms in marks.items()
        ],
        "hoverinfo": "text",
        "name": name,
    }
    return [strip, box, points]


def _share(percent: int) -> str:
    return "half" if percent == 50 else f"{percent}%"


def _curves(times_ms: dict[str, list[float]]) -> Drawing:
    look = styles(list(times_ms))
    data = [_curve(label, values, look[label]) for label, values in times_ms.items() if values]
    every = [value for values in times_ms.values() for value in (values[:1] + values[-1:])]
    most = max((len(values) for values in times_ms.values()), default=1)
    least = 1 / max(most, 10)
    return {
        "data": data,
        "layout": layout(
            height=380,
            xaxis=log_ms_axis("time to the first token", every),
            yaxis={
                "type": "log",
                "title": {"text": "requests that wait longer", "standoff": 12},
                "automargin": True,
                "tickvals": [1, 0.5, 0.1, 0.05, 0.01, 0.001, 0.0001],
                "ticktext": ["100%", "50%", "10%", "5%", "1%", "0.1%", "0.01%"],
                "rangemode": "normal",
                "autorange": False,
                "range": [math.log10(least) - 0.08, 0.05],
            },
        ),
    }


def _curve(label: str, values: Sequence[float], style: Style) -> Trace:
    num = len(values)
    cut = max(0, num - _SLOWEST_KEPT)
    places = thinned(range(cut), _MOST_STEPS - _SLOWEST_KEPT) + list(range(cut, num))
    name = plain(label)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [on_log_axis(values[place]) for place in places],
        "y": [short((num - place) / num) for place in places],
        "line": {"color": style.colour, "dash": style.dash, "width": 2.5, "shape": "vh"},
        "hovertext": [
            f"{name}: {100 * (num - place) / num:.3g}% of the requests wait "
            f"{duration(values[place] / 1000)} or longer"
            for place in places
        ],
        "hoverinfo": "text",
        "name": name,
    }
