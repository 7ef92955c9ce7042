"""Drawn requests have all published quantiles at once.

4,000 requests are drawn of each workload. The tolerances are those of a sample of this size: 5 %
for means and for quantiles up to P75, 8 % for P95 and the rare values behind it, 20 % for the ends.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pytest

from streamfill.observability.lifetime import percentile
from streamfill.traces.draws import (
    MIN_SEGMENT_TOKENS,
    DrawnRequest,
    Draws,
    assumptions,
    divide_tokens,
)
from streamfill.traces.published import ANN, CRAWL, WORKLOADS, Figures, Workload, WorkloadName

NUM_REQUESTS = 4000
BOTH = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))


@functools.cache
def sample(name: WorkloadName) -> list[DrawnRequest]:
    return list(itertools.islice(Draws(WORKLOADS[name], seed=1), NUM_REQUESTS))


def assert_near(values: Sequence[float], figures: Figures) -> None:
    assert sum(values) / len(values) == pytest.approx(figures.mean, rel=0.05)
    for probability, expected in figures.quantiles.items():
        tolerance = 0.05 if probability <= 0.75 else 0.08
        found = percentile(values, 100 * probability)
        assert found == pytest.approx(expected, rel=tolerance), f"P{100 * probability:g}"
    if figures.maximum is not None:
        assert max(values) == pytest.approx(figures.maximum, rel=0.2)


@BOTH
def test_segments_per_query(workload: Workload) -> None:
    """The number of segments has the published mean and median, and both ends of the range."""
    counts = [len(each.delays_ms) for each in sample(workload.name)]
    expected = workload.segments
    assert sum(counts) / len(counts) == pytest.approx(expected.mean, rel=0.05)
    assert percentile(counts, 50) == expected.median
    assert min(counts) == expected.least
    assert expected.most * 0.8 <= max(counts) <= expected.most


@BOTH
def test_gaps_between_segments(workload: Workload) -> None:
    """Gaps have the published mean, P5 to P99 and maximum."""
    requests = sample(workload.name)
    gaps = slice(0, -1) if workload.name is WorkloadName.ANN else slice(1, None)
    assert_near([gap for each in requests for gap in each.delays_ms[gaps]], workload.gap_ms)


@BOTH
def test_retrieval_time(workload: Workload) -> None:
    """All delays of a request sum up to the published retrieval times."""
    requests = sample(workload.name)
    assert_near([sum(each.delays_ms) / 1000 for each in requests], workload.retrieval_s)


@BOTH
def test_prompt_tokens(workload: Workload) -> None:
    """Final prompts have the published lengths, and their parts sum up to them."""
    requests = sample(workload.name)
    assert_near([each.prompt_tokens for each in requests], workload.prompt_tokens)
    for each in requests[:200]:
        assert sum(divide_tokens(each.prompt_tokens, each.weights)) == each.prompt_tokens


@BOTH
def test_arrivals(workload: Workload) -> None:
    """Arrivals are those of a Poisson process: as many per second, and exponential gaps."""
    arrivals = [each.arrival_ms for each in sample(workload.name)]
    gaps = [late - early for early, late in itertools.pairwise(arrivals)]
    mean_ms = sum(gaps) / len(gaps)
    assert mean_ms == pytest.approx(1000 / workload.highest_request_rate, rel=0.05)
    assert percentile(gaps, 50) == pytest.approx(0.693 * mean_ms, rel=0.08)
    assert arrivals[0] == 0


def test_scales_multiply_and_change_nothing_else() -> None:
    """A scaled trace is the same one with other units."""
    plain = list(itertools.islice(Draws(CRAWL, seed=2), 20))
    scaled = list(itertools.islice(Draws(CRAWL, seed=2, token_scale=0.1, time_scale=3.0), 20))
    for one, other in zip(plain, scaled, strict=True):
        assert other.delays_ms == pytest.approx([3.0 * each for each in one.delays_ms])
        assert other.arrival_ms == pytest.approx(3.0 * one.arrival_ms)
        assert other.prompt_tokens == pytest.approx(0.1 * one.prompt_tokens, abs=0.6)


def test_seeds_differ_and_repeat() -> None:
    """One seed always gives the same requests, another one others."""

    def drawn(seed: int) -> list[DrawnRequest]:
        return list(itertools.islice(Draws(ANN, seed=seed, num_parts=10), 5))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert all(len(each.weights) == 10 for each in drawn(1))


def test_too_few_tokens_for_all_parts() -> None:
    """Each part has a least size, even where that is more than there is to divide."""
    assert divide_tokens(5, (0.2, 0.5, 0.3)) == [MIN_SEGMENT_TOKENS] * 3
    assert divide_tokens(22, (0.2, 0.5, 0.3)) == [6, 9, 7]


@BOTH
def test_assumptions_name_what_is_drawn(workload: Workload) -> None:
    """The header of a trace can say of each drawn field that it was drawn, and from what."""
    assert set(assumptions(workload)) == {
        "arrival_ms",
        "segments",
        "segments.delay_ms",
        "prompt_tokens",
    }
