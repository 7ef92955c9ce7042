"""Where the time between the complete prompt and the second token goes, on the mean of a mode.

The stages of a request follow each other and add up. They come from the server's own events of the
request that was answered; a target that tells none has one bar for everything until the first
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from streamfill.loadgen.figures import server_lives
from streamfill.loadgen.records import RequestRecord
from streamfill.loadgen.report.drawing import Chart, Drawing, Trace, layout, plain, short
from streamfill.loadgen.report.loads import Batch
from streamfill.loadgen.report.palette import StageColour
from streamfill.loadgen.report.wording import duration
from streamfill.observability import lifetime as lt
from streamfill.observability.lifetime import LifetimeEvent

_ROW_PX: Final = 46
_LEAST_PX: Final = 380


class StageTimes(NamedTuple):
    """Consecutive times of one request, or their means, in seconds.

    Attributes:
        tokenise: router, from the commit until the last piece is on its way to a server.
        queue: until the first token, while nothing of this prompt was computed.
        compute: after the commit, while it was computed; before the commit it costs no waiting.
        handoff: from the first token to the end of the hand-off.
        decode: from there to the second token.
        unknown: from the commit to the first token, of a target that tells no more.
    """

    tokenise: float = 0.0
    queue: float = 0.0
    compute: float = 0.0
    handoff: float = 0.0
    decode: float = 0.0
    unknown: float = 0.0


_NAMES: Final = StageTimes._fields
_TITLES: Final = {
    "tokenise": ("tokenise", StageColour.TOKENISE, "the router's work on the last piece"),
    "queue": ("wait for prefill", StageColour.QUEUE, "others were computed, or it was on its way"),
    "compute": ("compute", StageColour.COMPUTE, "of what was left of the prompt"),
    "handoff": ("hand-off", StageColour.HANDOFF, "until the KV was at the decode server"),
    "decode": ("wait for decode", StageColour.DECODE_QUEUE, "until the second token"),
    "unknown": ("not told by the target", StageColour.UNKNOWN, "until the first token"),
}


def stages_chart(batches: Sequence[Batch]) -> Chart:
    """Stacked bars, one for each mode; in seconds, or as shares."""
    views: dict[str, Drawing] = {}
    for batch in batches:
        means = {label: mean_stages(batch, label) for label in batch.labels}
        prefix = f"{batch.name}: " if len(batches) > 1 else ""
        views[f"{prefix}share of the time"] = _bars(means, is_share=True)
        views[f"{prefix}mean time"] = _bars(means, is_share=False)
    return Chart(
        id="stages",
        title="Where the time goes after the commit",
        note="Mean over the completed requests, from the moment at which the prompt is complete to "
        "the second token. What was computed before the commit is hidden under retrieval and is "
        "not in a bar.",
        views=views,
        shown=list(views)[-1],
    )


def mean_stages(batch: Batch, label: str) -> StageTimes | None:
    """Over all completed requests of a mode; None: none of them has a first token."""
    found = [
        times
        for result in batch.of(label)
        for record in result.records
        if not record.is_warm_up and record.error_code is None
        if (times := stage_times(record)) is not None
    ]
    if not found:
        return None
    return StageTimes(*(sum(column) / len(found) for column in zip(*found, strict=True)))


def stage_times(record: RequestRecord) -> StageTimes | None:
    """The stages of a completed request; None: it has no first token."""
    lives = server_lives(record)
    life = lives[-1] if lives else []
    until_first_s, queue_s = lt.ttft_from_commit_s(life), lt.prefill_queue_s(life)
    commit_s = lt.first_at_s(life, LifetimeEvent.COMMIT_RECEIVED)
    if until_first_s is None or queue_s is None or commit_s is None:
        client_s = lt.ttft_from_commit_s(record.client_lifetime())
        return None if client_s is None else StageTimes(unknown=client_s)
    sent_s = lt.last_at_s(life, LifetimeEvent.SEGMENT_SENT)
    tokenise_s = 0.0 if sent_s is None else min(queue_s, max(0.0, sent_s - commit_s))
    gap_s = lt.second_token_gap_s(life) or 0.0
    # The news of the hand-off's end may come after the second token.
    handoff_s = min(gap_s, _after_first_s(life))
    return StageTimes(
        tokenise=tokenise_s,
        queue=queue_s - tokenise_s,
        compute=until_first_s - queue_s,
        handoff=handoff_s,
        decode=gap_s - handoff_s,
    )


def _after_first_s(life: lt.Entries) -> float:
    """From the first token to the end of the hand-off; 0 without one."""
    first_s = lt.first_at_s(life, LifetimeEvent.FIRST_TOKEN)
    done_s = lt.last_at_s(life, LifetimeEvent.HANDOFF_DONE)
    return 0.0 if first_s is None or done_s is None else max(0.0, done_s - first_s)


def _bars(means: dict[str, StageTimes | None], *, is_share: bool) -> Drawing:
    known = [(label, times) for label, times in means.items() if times is not None]
    total_s = {label: sum(times) for label, times in known}
    scale = {label: 100 / total if is_share and total else 1.0 for label, total in total_s.items()}
    rows = [f"<b>{plain(label)}</b>" for label, _ in known]
    data: list[Trace] = []
    for place, stage in enumerate(_NAMES):
        if any(times[place] for _, times in known):
            title, colour, meaning = _TITLES[stage]
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": title,
                    "y": rows,
                    "x": [short(times[place] * scale[label]) for label, times in known],
                    "marker": {"color": colour, "line": {"width": 0}},
                    "hovertext": [
                        f"{plain(label)}, {title}: {duration(times[place])} on the mean,<br>"
                        f"{meaning} ({_percent(times[place], total_s[label])})"
                        for label, times in known
                    ],
                    "hoverinfo": "text",
                    "textposition": "none",
                }
            )
    totals = [
        {
            "x": total_s[label] * scale[label],
            "y": row,
            "text": duration(total_s[label]),
            "xanchor": "left",
            "xshift": 4,
            "showarrow": False,
        }
        for (label, _), row in zip(known, rows, strict=True)
    ]
    most = max((total_s[label] * scale[label] for label, _ in known), default=1.0) or 1.0
    axis = "share of the time, %" if is_share else "seconds, mean"
    return {
        "data": data,
        "layout": layout(
            height=max(_LEAST_PX, 110 + _ROW_PX * len(known)),
            barmode="stack",
            bargap=0.45,
            annotations=totals,
            legend={
                "orientation": "h",
                "x": 0,
                "y": 1.02,
                "yanchor": "bottom",
                "traceorder": "normal",
            },
            xaxis={"title": {"text": axis}, "range": [0, 1.1 * most], "zeroline": False},
            yaxis={
                "automargin": True,
                "autorange": "reversed",
                "fixedrange": True,
                "showgrid": False,
            },
        ),
    }


def _percent(part_s: float, whole_s: float) -> str:
    return f"{100 * part_s / whole_s:.0f}%" if whole_s else "0%"
