"""Ratios to oneshot, and their spread over runs."""

from __future__ import annotations

import pytest

from streamfill.loadgen.metrics import RunSummary, summarise
from streamfill.loadgen.ratios import (
    Spread,
    baseline_label,
    label_parts,
    labels,
    ratios,
    spread,
)
from tests.unit.loadgen.run_builders import failed, result, run_with_ttft


def summaries(*runs: tuple[str, int, float]) -> list[RunSummary]:
    return [summarise(run_with_ttft(label, run, ttft_s)) for label, run, ttft_s in runs]


def test_ratio_is_oneshot_by_mode_run_by_run() -> None:
    """Each run's ratio is formed by itself; the median and the extremes of them are kept."""
    found = ratios(
        summaries(
            ("oneshot", 0, 4.0),
            ("stream", 0, 0.5),
            ("oneshot", 1, 9.0),
            ("stream", 1, 1.0),
            ("oneshot", 2, 4.0),
            ("stream", 2, 2.0),
        )
    )
    ratio = found["stream"].latency["ttft_last_segment_ms"]["p95"]
    assert ratio is not None
    assert (ratio.median, ratio.min, ratio.max) == pytest.approx((8, 2, 9))
    assert ratio.num_runs == 3
    base = found["oneshot"].latency["ttft_query_ms"]["p50"]
    assert base == Spread(median=1, min=1, max=1, num_runs=3)


def test_throughput_ratio_is_mode_by_oneshot() -> None:
    """A mode that needs half the time has twice the throughput."""
    runs = [
        run_with_ttft("oneshot", 0, 1.0, wall_s=10.0),
        run_with_ttft("warmup", 0, 1.0, wall_s=5.0),
    ]
    found = ratios([summarise(run) for run in runs])
    assert found["warmup"].throughput == Spread(median=2, min=2, max=2, num_runs=1)


def test_without_figures_there_is_no_ratio() -> None:
    """A run in which nothing completed, or that has no partner, adds no ratio."""
    broken = [summarise(result(failed(0), label="stream", run=0))]
    found = ratios([*summaries(("oneshot", 0, 1.0), ("warmup", 1, 1.0)), *broken])
    assert found["stream"].latency["ttft_last_segment_ms"]["p50"] is None
    assert found["warmup"].latency["ttft_last_segment_ms"]["p50"] is None
    assert ratios(summaries(("stream", 0, 1.0))) == {}


def test_baseline_is_ours_if_it_ran() -> None:
    """Our own oneshot is the baseline; where it did not run, that of another engine is."""
    peers = summaries(("vllm:stream", 0, 1.0), ("vllm:oneshot", 0, 1.0))
    assert baseline_label(peers) == "vllm:oneshot"
    assert baseline_label([*peers, *summaries(("oneshot", 0, 1.0))]) == "oneshot"
    assert baseline_label(summaries(("stream", 0, 1.0))) is None


def test_a_plain_oneshot_is_the_baseline_before_one_with_a_policy() -> None:
    """One with a policy is, where there is no plain one of ours."""
    with_policy = summaries(("oneshot@mcps", 0, 1.0), ("stream@fcfs", 0, 1.0))
    peer = summaries(("vllm:oneshot", 0, 1.0))
    assert baseline_label([*with_policy, *peer]) == "oneshot@mcps"
    assert baseline_label([*with_policy, *summaries(("oneshot", 0, 1.0))]) == "oneshot"


def test_a_label_and_its_parts() -> None:
    """A colon in a policy names no engine."""
    assert label_parts("vllm:warmup") == ("vllm", "warmup", "")
    assert label_parts("stream@my(at=1:2)") == ("", "stream", "my(at=1:2)")


def test_labels_are_in_a_stable_order() -> None:
    """Ours come first, and of each engine its baseline."""
    found = labels(
        summaries(
            ("vllm:warmup", 0, 1.0),
            ("stream", 0, 1.0),
            ("vllm:oneshot", 0, 1.0),
            ("oneshot", 0, 1.0),
            ("stream", 1, 1.0),
            ("stream@fcfs", 0, 1.0),
            ("stream@edf", 0, 1.0),
        )
    )
    assert found == [
        "oneshot",
        "stream",
        "stream@edf",
        "stream@fcfs",
        "vllm:oneshot",
        "vllm:warmup",
    ]


def test_spread_of_what_is_known() -> None:
    """Unknown values are left out; nothing known is nothing."""
    assert spread([3.0, None, 1.0]) == Spread(median=2, min=1, max=3, num_runs=2)
    assert spread([None]) is None
