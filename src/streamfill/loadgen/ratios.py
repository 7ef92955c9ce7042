"""How much better a mode is than ``oneshot``, or than another one: ratios run by run, and their
spread over runs.

Latency: oneshot's percentile divided by the mode's. Throughput: the mode's divided by oneshot's. So
above 1 is better in both.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from streamfill.loadgen.figures import Figure
from streamfill.loadgen.metrics import RunSummary

BASELINE: Final = "oneshot"
RATIO_FIGURES: Final = (Figure.TTFT_LAST_SEGMENT, Figure.TTFT_QUERY, Figure.TTFT_COMMIT, Figure.E2E)
RATIO_PERCENTS: Final = (50, 95, 99)


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure over the runs that have it."""

    median: float
    min: float
    max: float
    num_runs: int


class ModeRatios(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One mode beside the baseline.

    Attributes:
        latency: by figure (``ttft_last_segment_ms``), then percentile (``p50``).
        throughput: of output tokens per second.
    """

    latency: dict[str, dict[str, Spread | None]]
    throughput: Spread | None


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median, least and greatest of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(
        median=statistics.median(known), min=min(known), max=max(known), num_runs=len(known)
    )


def labels(summaries: Sequence[RunSummary]) -> list[str]:
    """The modes of the runs, each once: ours first, and of each engine its baseline first."""
    return sorted({summary.label for summary in summaries}, key=_place)


def baseline_label(summaries: Sequence[RunSummary]) -> str | None:
    """What ratios refer to: our own oneshot, plain before ``oneshot@POLICY``, or that of the first
    other engine; None: neither ran."""
    known = labels(summaries)
    return next((label for label in known if label_parts(label)[1] == BASELINE), None)


def label_parts(label: str) -> tuple[str, str, str]:
    """Engine, mode and policy of ``vllm:warmup`` or ``stream@fcfs``; empty what is not in it."""
    head, _, policy = label.partition("@")
    engine, _, mode = head.rpartition(":")
    return engine, mode, policy


def ratios(summaries: Sequence[RunSummary]) -> dict[str, ModeRatios]:
    """Each mode beside the baseline, by its label; empty without a baseline. The baseline itself is
    among them, with ratios of 1."""
    baseline = baseline_label(summaries)
    if baseline is None:
        return {}
    return {label: mode_ratios(summaries, baseline, label) for label in labels(summaries)}


def mode_ratios(summaries: Sequence[RunSummary], baseline: str, label: str) -> ModeRatios:
    """One mode beside another one, over the repetitions that both have."""
    base_by_run = {summary.run: summary for summary in summaries if summary.label == baseline}
    pairs = [
        (base_by_run[summary.run], summary)
        for summary in summaries
        if summary.label == label and summary.run in base_by_run
    ]
    latency = {
        figure.value: {
            f"p{percent}": spread(
                _quotient(_at(base, figure, percent), _at(mode, figure, percent))
                for base, mode in pairs
            )
            for percent in RATIO_PERCENTS
        }
        for figure in RATIO_FIGURES
    }
    throughput = spread(
        _quotient(mode.output_tokens_per_s, base.output_tokens_per_s) for base, mode in pairs
    )
    return ModeRatios(latency=latency, throughput=throughput)


def _at(summary: RunSummary, figure: Figure, percent: int) -> float | None:
    found = summary.figure(figure)
    return None if found is None else found.at(percent)


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _place(label: str) -> tuple[str, int, str, str]:
    engine, mode, policy = label_parts(label)
    order = (BASELINE, "warmup", "stream")
    return engine, order.index(mode) if mode in order else len(order), mode, policy
