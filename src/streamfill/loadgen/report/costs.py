"""What having KV back was predicted to cost and did cost, preemption by preemption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streamfill.loadgen.metrics import PricedPreemption, priced_preemptions
from streamfill.loadgen.report.drawing import (
    LEAST_MS,
    Chart,
    Drawing,
    Trace,
    layout,
    log_ms_axis,
    plain,
    short,
    thinned,
)
from streamfill.loadgen.report.loads import Batch
from streamfill.loadgen.report.palette import Style, styles

_MOST_DOTS: Final = 500
_SYMBOLS: Final = {"swap": "circle", "recompute": "diamond"}


def costs_chart(batches: Sequence[Batch]) -> Chart | None:
    """One view for each load that had preemptions; None where there were none."""
    views = {batch.name: drawing for batch in batches if (drawing := _dots(batch)) is not None}
    if not views:
        return None
    return Chart(
        id="preemption-costs",
        title="Preemptions: predicted and actual cost",
        note="Each mark is KV that memory pressure took from an open stream and that came back: "
        "swapped in (circle) or computed again (diamond). On the line the prediction was right; "
        "below it, getting the KV back was cheaper than predicted.",
        views=views,
        shown=list(views)[-1],
    )


def _dots(batch: Batch) -> Drawing | None:
    look = styles(batch.labels)
    traces: list[Trace] = []
    values: list[float] = []
    for label in batch.labels:
        records = [r for result in batch.of(label) for r in result.records]
        priced = thinned(priced_preemptions(records), _MOST_DOTS)
        for kind, symbol in _SYMBOLS.items():
            found = [each for each in priced if each.kind == kind]
            if found:
                traces.append(_trace(f"{label}: {kind}", found, symbol, look[label]))
                values += [1000 * cost for each in found for cost in each[2:]]
    if not values:
        return None
    low, high = max(LEAST_MS, min(values)), max(LEAST_MS, *values)
    line: Trace = {
        "type": "scatter",
        "mode": "lines",
        "name": "right",
        "x": [short(low), short(high)],
        "y": [short(low), short(high)],
        "line": {"dash": "dot", "width": 1},
        "hoverinfo": "skip",
    }
    return {
        "data": [line, *traces],
        "layout": layout(
            height=420,
            xaxis=log_ms_axis("predicted", values),
            yaxis=log_ms_axis("actual", values),
        ),
    }


def _trace(name: str, found: Sequence[PricedPreemption], symbol: str, style: Style) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(name),
        "x": [short(max(LEAST_MS, 1000 * each.predicted_s)) for each in found],
        "y": [short(max(LEAST_MS, 1000 * each.actual_s)) for each in found],
        "text": [f"{each.num_tokens} tokens" for each in found],
        "marker": {"color": style.colour, "symbol": symbol, "size": 6, "opacity": 0.6},
    }
