"""What `streamfill bench policies` shows of a cell: a table of modes, and a line per percentile
about ``adaptive``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from streamfill.loadgen.figures import Figure
from streamfill.loadgen.metrics import RunSummary
from streamfill.loadgen.policy_outcome import (
    ADAPTIVE,
    WARMUP,
    CellOutcome,
    Verdict,
    latency_ratio,
    throughput_ratio,
    verdicts,
)
from streamfill.loadgen.ratios import RATIO_PERCENTS, baseline_label, labels
from streamfill.loadgen.table import failed_cell, spread_cell, times_cell

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS: Final = (
    "last segment\nP50/P95/P99",
    "ratio to oneshot\nP50/P95/P99",
    "ratio to warmup\nP50/P95/P99",
    "tokens/s\nratio",
    "failed",
)


def policy_table(outcome: CellOutcome) -> Table:
    """One row for each mode: medians over its runs."""
    from rich import box
    from rich.table import Table

    title = (
        f"{outcome.cell.title}, {outcome.cell.rate:g} requests/s: time to the first token, ms; "
        "ratios above 1 are better"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("\nmode", style="bold", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", vertical="bottom")
    for label in labels(outcome.summaries):
        table.add_row(label, *_row(outcome.summaries, label))
    return table


def verdict_lines(outcome: CellOutcome) -> list[str]:
    """Whether ``adaptive`` is as good as the best other policy; nothing where it or all others did
    not run."""
    return [_verdict_line(verdict) for verdict in verdicts(outcome.summaries).values()]


def _verdict_line(verdict: Verdict) -> str:
    found = verdict.ratio
    spread = ", one repetition"
    if found.num_runs > 1:
        spread = f", {found.min:.3f} to {found.max:.3f} over {found.num_runs} repetitions"
    return (
        f"P{verdict.percent}: {ADAPTIVE} is {verdict.word} than the best other policy, "
        f"{verdict.best_other}: ratio {found.median:.3f}{spread}"
    )


def _row(summaries: Sequence[RunSummary], label: str) -> list[str]:
    runs = [summary for summary in summaries if summary.label == label]
    warmup = WARMUP if WARMUP in labels(summaries) else None
    return [
        times_cell(runs, Figure.TTFT_LAST_SEGMENT, RATIO_PERCENTS),
        _ratios(summaries, baseline_label(summaries), label),
        _ratios(summaries, warmup, label),
        spread_cell(throughput_ratio(summaries, label)),
        failed_cell(runs),
    ]


def _ratios(summaries: Sequence[RunSummary], baseline: str | None, label: str) -> str:
    found = [latency_ratio(summaries, baseline, label, percent) for percent in RATIO_PERCENTS]
    return "/".join("-" if each is None else f"{each.median:.2f}" for each in found)
