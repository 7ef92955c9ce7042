"""What came out of a comparison, as the facts of its ``RESULT`` line; docs/benchmarks/compare.md
explains each key.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from streamfill.loadgen.figures import PERCENTS, Figure
from streamfill.loadgen.identity import Identity
from streamfill.loadgen.metrics import RunSummary
from streamfill.loadgen.ratios import (
    ModeRatios,
    Spread,
    baseline_label,
    labels,
    ratios,
)

_DIGITS: Final = 3
_RATES: Final = ("requests_per_s", "output_tokens_per_s", "input_tokens_per_s", "goodput_per_s")
_MOST_DIFFERENCES: Final = 20
"""In the line; all of them can be found again in the records."""


def median_of(runs: Sequence[RunSummary], figure: Figure, percent: int) -> float | None:
    """Of the runs' percentiles of a figure; None: no run has it."""
    found = [each.at(percent) for run in runs if (each := run.figure(figure)) is not None]
    return statistics.median(found) if found else None


def result_facts(
    summaries: Sequence[RunSummary], identity: Identity, skipped: Mapping[str, str]
) -> dict[str, Any]:
    """The content of the ``RESULT`` line.

    Args:
        skipped: why a mode did not run, by its label.
    """
    by_label = ratios(summaries)
    known = labels(summaries)
    return {
        "identical": identity.is_identical,
        "num_compared": identity.num_compared,
        "num_different": identity.num_different,
        "num_different_by_label": identity.num_different_by_label,
        "differences": msgspec.to_builtins(identity.differences[:_MOST_DIFFERENCES]),
        "baseline": baseline_label(summaries),
        "num_runs": len({summary.run for summary in summaries}),
        "ratio_to_oneshot": {label: _latency(mode) for label, mode in by_label.items()},
        "ratio_spread": {label: _latency_range(mode) for label, mode in by_label.items()},
        "throughput_ratio_to_oneshot": {
            label: _median(mode.throughput) for label, mode in by_label.items()
        },
        "throughput_ratio_spread": {
            label: _range(mode.throughput) for label, mode in by_label.items()
        },
        "modes": {label: _mode(summaries, label) for label in known},
        "failures": {label: _failures(summaries, label) for label in known},
        "skipped": dict(skipped),
    }


def has_failures(summaries: Sequence[RunSummary]) -> bool:
    """Whether any request of any run went without an answer."""
    return any(summary.num_failed for summary in summaries)


def _mode(summaries: Sequence[RunSummary], label: str) -> dict[str, Any]:
    """Medians over the runs of a mode."""
    runs = [summary for summary in summaries if summary.label == label]
    facts: dict[str, Any] = {
        "num_requests": sum(run.num_requests for run in runs),
        "num_completed": sum(run.num_completed for run in runs),
        "num_late": sum(run.num_late for run in runs),
        "num_preemptions": _added([run.num_preemptions for run in runs]),
        "num_priced_preemptions": sum(run.num_priced_preemptions for run in runs),
        "preemption_cost_error": _median_known([run.preemption_cost_error for run in runs]),
    }
    for figure in Figure:
        percentiles = {f"p{p}": _rounded(median_of(runs, figure, p)) for p in PERCENTS}
        if any(value is not None for value in percentiles.values()):
            facts[figure.value] = percentiles
    for rate in _RATES:
        facts[rate] = _median_known([getattr(run, rate) for run in runs])
    facts["goodput_ratio"] = _median_known([run.goodput_ratio for run in runs])
    facts["num_handoffs"] = sum(run.num_handoffs for run in runs)
    for field in ("handoff_bytes", "wall_s"):
        facts[field] = _median_known([getattr(run, field) for run in runs])
    facts["tokens"] = {
        field: _median_known([getattr(run.tokens, field) for run in runs])
        for field in runs[0].tokens.__struct_fields__
    }
    return facts


def _failures(summaries: Sequence[RunSummary], label: str) -> dict[str, int]:
    return _added([summary.failures for summary in summaries if summary.label == label])


def _added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _latency(mode: ModeRatios) -> dict[str, dict[str, float | None]]:
    return {
        figure: {percent: _median(found) for percent, found in by_percent.items()}
        for figure, by_percent in mode.latency.items()
    }


def _latency_range(mode: ModeRatios) -> dict[str, dict[str, list[float] | None]]:
    return {
        figure: {percent: _range(found) for percent, found in by_percent.items()}
        for figure, by_percent in mode.latency.items()
    }


def _median(found: Spread | None) -> float | None:
    return None if found is None else _rounded(found.median)


def _range(found: Spread | None) -> list[float] | None:
    return None if found is None else [round(found.min, _DIGITS), round(found.max, _DIGITS)]


def _median_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(statistics.median(known)) if known else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
