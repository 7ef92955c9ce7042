"""The tables of the page, as rows of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from streamfill.loadgen.figures import Figure
from streamfill.loadgen.metrics import RunSummary
from streamfill.loadgen.outcome import median_of
from streamfill.loadgen.ratios import ModeRatios, Spread, ratios, spread
from streamfill.loadgen.report.loads import Batch
from streamfill.loadgen.report.palette import styles
from streamfill.loadgen.report.wording import NOTHING, milliseconds, number, ratio_with_spread

GROUPS: Final = (
    ("", 1),
    ("TTFT from last segment, ms", 3),
    ("TTFT from query, ms", 3),
    ("ratio to oneshot, from last segment", 2),
    ("TPOT, ms", 1),
    ("output tokens/s", 2),
    ("overlap", 1),
    ("failed", 1),
)
"""Heads of the table of modes, each over so many columns."""
COLUMNS: Final = (
    "mode",
    *("P50", "P95", "P99") * 2,
    "P50",
    "P95",
    "P50",
    "median",
    "ratio",
    "mean",
    "requests",
)
DEFINITIONS: Final = (
    (
        "TTFT from last segment",
        "From the moment at which the last piece of context was there for the client to the first "
        "token at the client.",
    ),
    (
        "TTFT from query",
        "From the arrival of the query to the first token, retrieval included.",
    ),
    ("TPOT", "Time per output token after the first one."),
    (
        "ratio to oneshot",
        "Oneshot's percentile divided by the mode's, run by run; above 1 is better. Median over "
        "runs, in brackets the least and the greatest.",
    ),
    (
        "output tokens/s",
        "Output tokens of completed requests per second, from the first arrival to the last token; "
        "the ratio is the mode's divided by oneshot's.",
    ),
    (
        "overlap",
        "The share of the prompt's compute time that lies before the arrival of the last segment, "
        "and so is hidden under retrieval.",
    ),
    ("oneshot", "The client waits for the whole context, then sends it."),
    (
        "warmup",
        "After each segment the client sends the prefix so far as an ordinary request with one "
        "output token, so that the prefix is in the cache.",
    ),
    ("stream", "The client streams each segment as it comes."),
    (
        "mode@policy",
        "The policy by which the servers order their work. Without one it is that of the options "
        "--policy (stream) and --baseline-policy (oneshot, warmup).",
    ),
    ("P50, P95, P99", "Of all completed requests of one run; in tables the median over runs."),
)


class ModeRow(NamedTuple):
    """A row of the table of modes; ``cells`` are those of ``COLUMNS`` without the first."""

    label: str
    colour: str
    cells: tuple[str, ...]


def mode_rows(batch: Batch) -> list[ModeRow]:
    """One row for each mode: medians over its runs."""
    look = styles(batch.labels)
    by_label = ratios(batch.summaries)
    return [
        ModeRow(label, look[label].colour, _cells(batch.summaries_of(label), by_label.get(label)))
        for label in batch.labels
    ]


def _cells(runs: Sequence[RunSummary], mode: ModeRatios | None) -> tuple[str, ...]:
    latency: Mapping[str, Spread | None] = (
        {} if mode is None else mode.latency[Figure.TTFT_LAST_SEGMENT.value]
    )
    rate = spread(run.output_tokens_per_s for run in runs)
    overlaps = spread(
        None if (found := run.figure(Figure.OVERLAP)) is None else found.mean for run in runs
    )
    num_failed, num_requests = (
        sum(run.num_failed for run in runs),
        sum(run.num_requests for run in runs),
    )
    return (
        *(milliseconds(median_of(runs, Figure.TTFT_LAST_SEGMENT, p)) for p in (50, 95, 99)),
        *(milliseconds(median_of(runs, Figure.TTFT_QUERY, p)) for p in (50, 95, 99)),
        ratio_with_spread(latency.get("p50")),
        ratio_with_spread(latency.get("p95")),
        milliseconds(median_of(runs, Figure.TPOT, 50)),
        number(None if rate is None else rate.median),
        ratio_with_spread(None if mode is None else mode.throughput),
        NOTHING if overlaps is None else f"{100 * overlaps.median:.0f}%",
        f"{num_failed:,} of {num_requests:,}" if num_failed else "0",
    )


def facts(source: Mapping[str, Any] | msgspec.Struct | None) -> list[tuple[str, str]]:
    """Names and values of a configuration or an environment, nested ones with their path; what is
    empty is left out."""
    plain = {} if source is None else msgspec.to_builtins(source)
    return list(_flat(plain, ()))


def _flat(value: Any, path: tuple[str, ...]) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [row for key, each in value.items() for row in _flat(each, (*path, str(key)))]
    if value is None or value in ("", [], ()):
        return []
    name = " ".join(path).replace("_", " ")
    if path and path[-1].endswith("_bytes") and isinstance(value, int):
        return [(name.removesuffix(" bytes"), f"{value / 2**30:.1f} GiB")]
    if isinstance(value, list | tuple):
        return [(name, ", ".join(str(each) for each in value))]
    return [(name, str(value))]
