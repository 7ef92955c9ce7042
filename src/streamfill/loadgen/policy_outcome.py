"""What came out of a comparison of policies: each cell's figures, and whether ``adaptive`` is as
good as the best other policy; docs/benchmarks/policies.md explains each key.

All ratios are formed so that above 1 is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from streamfill.loadgen.figures import Figure
from streamfill.loadgen.identity import Identity
from streamfill.loadgen.metrics import RunSummary
from streamfill.loadgen.outcome import median_of
from streamfill.loadgen.policy_cells import Cell
from streamfill.loadgen.ratios import (
    RATIO_PERCENTS,
    Spread,
    baseline_label,
    label_parts,
    labels,
    mode_ratios,
)
from streamfill.loadgen.records import ModeName

ADAPTIVE: Final = f"{ModeName.STREAM.value}@adaptive"
WARMUP: Final = ModeName.WARMUP.value
_FIGURE: Final = Figure.TTFT_LAST_SEGMENT
_DIGITS: Final = 3


@dataclass(frozen=True, kw_only=True)
class CellOutcome:
    """All finished runs of one trace at one load."""

    cell: Cell
    summaries: Sequence[RunSummary]
    identity: Identity


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``adaptive`` beside the best other policy at one percentile.

    Attributes:
        best_other: its label.
        ratio: its time divided by that of ``adaptive``, over the runs.
    """

    percent: int
    best_other: str
    ratio: Spread

    @property
    def word(self) -> str:
        """What the runs say; where they contradict each other, nothing was shown."""
        if self.ratio.median >= 1:
            return "not worse"
        return "not shown to be worse" if self.ratio.max >= 1 else "worse"


def verdicts(summaries: Sequence[RunSummary]) -> dict[int, Verdict]:
    """By percentile; without those for which ``adaptive`` or all others have no figure."""
    found: dict[int, Verdict] = {}
    for percent in RATIO_PERCENTS:
        times_ms = {
            label: ms
            for label in labels(summaries)
            if _is_other(label) and (ms := time_ms(summaries, label, percent)) is not None
        }
        if not times_ms:
            continue
        best = min(times_ms, key=lambda label: times_ms[label])
        ratio = latency_ratio(summaries, best, ADAPTIVE, percent)
        if ratio is not None:
            found[percent] = Verdict(percent=percent, best_other=best, ratio=ratio)
    return found


def time_ms(summaries: Sequence[RunSummary], label: str, percent: int) -> float | None:
    """TTFT from the last segment, the median over the runs of a mode."""
    runs = [summary for summary in summaries if summary.label == label]
    return median_of(runs, _FIGURE, percent)


def latency_ratio(
    summaries: Sequence[RunSummary], baseline: str | None, label: str, percent: int
) -> Spread | None:
    """The same of the baseline divided by the mode's, over the runs; None: one of them has none."""
    if baseline is None:
        return None
    return mode_ratios(summaries, baseline, label).latency[_FIGURE.value][f"p{percent}"]


def throughput_ratio(summaries: Sequence[RunSummary], label: str) -> Spread | None:
    """Output tokens per second of the mode divided by those of ``oneshot``."""
    baseline = baseline_label(summaries)
    return None if baseline is None else mode_ratios(summaries, baseline, label).throughput


def policy_facts(outcomes: Sequence[CellOutcome], *, is_complete: bool) -> dict[str, Any]:
    """The content of the ``RESULT`` line.

    Args:
        is_complete: every run was made.
    """
    facts: dict[str, Any] = {
        "identical": bool(outcomes) and all(each.identity.is_identical for each in outcomes),
        "complete": is_complete,
    }
    for outcome in outcomes:
        facts.setdefault(outcome.cell.trace, {})[outcome.cell.load] = _cell(outcome)
    return facts


def _cell(outcome: CellOutcome) -> dict[str, Any]:
    summaries = outcome.summaries
    found = verdicts(summaries)
    return {
        "request_rate": outcome.cell.rate,
        "num_runs": len({summary.run for summary in summaries}),
        "identical": outcome.identity.is_identical,
        "num_compared": outcome.identity.num_compared,
        "num_different_by_label": outcome.identity.num_different_by_label,
        **{label: _mode(summaries, label) for label in labels(summaries)},
        "adaptive_to_best_other": _by_percent(
            {percent: verdict.ratio for percent, verdict in found.items()}
        ),
        "best_other": {f"p{percent}": each.best_other for percent, each in found.items()},
    }


def _mode(summaries: Sequence[RunSummary], label: str) -> dict[str, Any]:
    oneshot = baseline_label(summaries)
    warmup = WARMUP if WARMUP in labels(summaries) else None
    throughput = throughput_ratio(summaries, label)
    return {
        **{f"p{p}_ttft_ms": _rounded(time_ms(summaries, label, p)) for p in RATIO_PERCENTS},
        "ratio_to_oneshot": _by_percent(
            {p: latency_ratio(summaries, oneshot, label, p) for p in RATIO_PERCENTS}
        ),
        "ratio_to_warmup": _by_percent(
            {p: latency_ratio(summaries, warmup, label, p) for p in RATIO_PERCENTS}
        ),
        "throughput_ratio_to_oneshot": _rounded(throughput.median if throughput else None),
        "num_failed": sum(run.num_failed for run in summaries if run.label == label),
    }


def _is_other(label: str) -> bool:
    """Whether it streams by a policy that is not ``adaptive``, with whatever options."""
    _, mode, policy = label_parts(label)
    return mode == ModeName.STREAM.value and policy.partition("(")[0].strip() != "adaptive"


def _by_percent(found: Mapping[int, Spread | None]) -> dict[str, float | None]:
    return {
        f"p{percent}": _rounded(None if each is None else each.median)
        for percent, each in found.items()
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
