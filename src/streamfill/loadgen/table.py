"""What `streamfill bench` shows at its end: a table of modes, and answers that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from streamfill.loadgen.figures import Figure
from streamfill.loadgen.identity import Difference, Identity
from streamfill.loadgen.metrics import RunSummary
from streamfill.loadgen.outcome import median_of
from streamfill.loadgen.ratios import ModeRatios, Spread, labels, ratios, spread

if TYPE_CHECKING:
    from rich.table import Table

TABLE_WIDTH: Final = 140
"""Of the table where there is no terminal."""
_NOTHING: Final = "-"
_MOST_DIFFERENCES: Final = 10
_COLUMNS: Final = (
    "last segment\nP50/P95/P99",
    "query\nP50/P95",
    "P50\nratio",
    "P95\nratio",
    "output\ntokens/s",
    "tokens/s\nratio",
    "overlap",
    "failed",
)


def print_table(table: Table) -> None:
    """On the standard output."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    console.print(table)


def comparison_table(summaries: Sequence[RunSummary]) -> Table:
    """One row for each mode: medians over its runs; in brackets the least and the greatest."""
    from rich import box
    from rich.table import Table

    title = "Time to the first token since …, ms; ratios to oneshot, above 1 is better"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("\nmode", style="bold", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", vertical="bottom")
    by_label = ratios(summaries)
    for label in labels(summaries):
        runs = [summary for summary in summaries if summary.label == label]
        table.add_row(label, *_row(runs, by_label.get(label)))
    return table


def _row(runs: Sequence[RunSummary], mode: ModeRatios | None) -> list[str]:
    latency: Mapping[str, Spread | None] = (
        {} if mode is None else mode.latency[Figure.TTFT_LAST_SEGMENT.value]
    )
    rate = spread(run.output_tokens_per_s for run in runs)
    return [
        times_cell(runs, Figure.TTFT_LAST_SEGMENT, (50, 95, 99)),
        times_cell(runs, Figure.TTFT_QUERY, (50, 95)),
        spread_cell(latency.get("p50")),
        spread_cell(latency.get("p95")),
        _number(None if rate is None else rate.median, ".1f"),
        spread_cell(None if mode is None else mode.throughput),
        _number(median_of(runs, Figure.OVERLAP, 50), ".2f"),
        failed_cell(runs),
    ]


def times_cell(runs: Sequence[RunSummary], figure: Figure, percents: Sequence[int]) -> str:
    """Percentiles of a figure, medians over the runs: ``474/1313``."""
    return "/".join(_number(median_of(runs, figure, percent), ".0f") for percent in percents)


def failed_cell(runs: Sequence[RunSummary]) -> str:
    """How many requests got no answer."""
    num_failed = sum(run.num_failed for run in runs)
    num_requests = sum(run.num_requests for run in runs)
    return f"{num_failed} of {num_requests}" if num_failed else "0"


def identity_lines(identity: Identity) -> list[str]:
    """Whether the answers are the same, and the first ones that are not."""
    if not identity.num_compared:
        return ["No request completed in every run, so no answers could be compared."]
    if identity.is_identical:
        return [f"All runs gave the same answers to the {identity.num_compared} compared requests."]
    lines = [f"{identity.num_different} of {identity.num_compared} compared requests differ:"]
    lines += [_difference_line(each) for each in identity.differences[:_MOST_DIFFERENCES]]
    num_more = len(identity.differences) - _MOST_DIFFERENCES
    return [*lines, f"  and {num_more} more"] if num_more > 0 else lines


def _difference_line(difference: Difference) -> str:
    unit = "character" if difference.is_text else "token"
    return (
        f"  request {difference.index} ({difference.request_id}), {unit} {difference.position}:"
        f" {difference.expected!r} in {difference.expected_label} run {difference.expected_run},"
        f" {difference.found!r} in {difference.label} run {difference.run}"
    )


def spread_cell(found: Spread | None) -> str:
    """Median, and least and greatest where they differ."""
    if found is None:
        return _NOTHING
    extremes = "" if found.min == found.max else f" ({found.min:.2f}..{found.max:.2f})"
    return f"{found.median:.2f}{extremes}"


def _number(value: float | None, form: str) -> str:
    return _NOTHING if value is None else format(value, form)
