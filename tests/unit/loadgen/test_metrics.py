"""The figures of a run."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.loadgen.figures import Distribution, Figure, distribution
from streamfill.loadgen.goodput import Goodput
from streamfill.loadgen.metrics import RunSummary, flat, summarise
from streamfill.loadgen.request_log import token_entries
from streamfill.observability.lifetime import LifetimeEvent, token_times_s
from tests.unit.loadgen.run_builders import client_events, event, failed, record, result

E = LifetimeEvent


def figure(summary: RunSummary, name: Figure) -> Distribution:
    found = summary.figure(name)
    assert found is not None
    return found


def test_times_of_one_request() -> None:
    """Each time runs between the client's events, in milliseconds."""
    summary = summarise(result(record(ttft_s=0.5)))
    assert figure(summary, Figure.TTFT_LAST_SEGMENT).p50 == pytest.approx(500)
    assert figure(summary, Figure.TTFT_COMMIT).p99 == pytest.approx(500)
    assert figure(summary, Figure.TTFT_QUERY).mean == pytest.approx(2500)
    assert figure(summary, Figure.E2E).max == pytest.approx(2800)
    assert figure(summary, Figure.TPOT).p50 == pytest.approx(150)
    assert figure(summary, Figure.ITL).num == 2
    assert figure(summary, Figure.ITL).max == pytest.approx(200)


@pytest.mark.parametrize(
    "times_s", [(1.0,), (1.0, 1.0), (1.0, 2.0, 2.0), (1.0, 1.0, 1.0), (1.0, 2.0, 2.0, 2.0)]
)
def test_tokens_that_come_together(times_s: tuple[float, ...]) -> None:
    """Each of them counts, as where a server packs several into one event."""
    assert token_times_s(token_entries(times_s)) == list(times_s)


def test_percentiles_over_requests() -> None:
    """A distribution has mean, percentiles and maximum over all completed requests."""
    ttfts = figure(
        summarise(result(*(record(n, ttft_s=n / 100) for n in range(101)))),
        Figure.TTFT_LAST_SEGMENT,
    )
    found = (ttfts.mean, ttfts.p50, ttfts.p90, ttfts.p95, ttfts.p99, ttfts.max)
    assert found == pytest.approx((500, 500, 900, 950, 990, 1000))
    assert ttfts.num == 101


def test_warm_up_and_failed_requests() -> None:
    """Warm-up requests count nowhere; failed ones count by their code, and in no time."""
    summary = summarise(
        result(
            record(0, ttft_s=9.0, is_warm_up=True, num_prompt_tokens=1000),
            record(1, ttft_s=0.5, num_prompt_tokens=10),
            failed(2, "UNAVAILABLE"),
            failed(3, "DEADLINE_EXCEEDED"),
            failed(4, "UNAVAILABLE"),
        )
    )
    assert (summary.num_requests, summary.num_completed, summary.num_failed) == (4, 1, 3)
    assert summary.failures == {"DEADLINE_EXCEEDED": 1, "UNAVAILABLE": 2}
    assert figure(summary, Figure.TTFT_LAST_SEGMENT).max == pytest.approx(500)
    assert figure(summary, Figure.E2E).num == 1
    assert summary.tokens.num_prompt == 10


def test_throughput() -> None:
    """Rates are per second of the run; input counts whole prompts."""
    records = [record(n, num_prompt_tokens=100) for n in range(4)]
    summary = summarise(result(*records, failed(4), wall_s=8.0))
    assert summary.requests_per_s == 0.5
    assert summary.output_tokens_per_s == 1.5
    assert summary.input_tokens_per_s == 50


def test_warm_up_is_not_in_the_time_of_a_run() -> None:
    """With warm-up requests, rates refer to the time from the first counted arrival to the last
    counted end."""
    warm = record(0, is_warm_up=True)
    counted = record(1, client_events=client_events(open_s=6.0, tokens_s=(9.0, 9.5, 10.0)))
    summary = summarise(result(warm, counted, wall_s=10.0))
    assert summary.wall_s == pytest.approx(4.0)
    assert summary.requests_per_s == pytest.approx(0.25)


def test_overlap_counts_compute_before_the_last_segment_at_the_client() -> None:
    """Compute time before the client's last segment is hidden, whatever the server received
    when."""
    events = (
        event(E.OPENED, 0.0),
        event(E.SEGMENT_RECEIVED, 1.0, segment=0),
        event(E.COMPUTE_STARTED, 1.0),
        event(E.COMPUTE_DONE, 1.6, num_tokens=60),
        event(E.COMPUTE_STARTED, 2.2),
        event(E.COMPUTE_DONE, 2.4, num_tokens=20),
        event(E.SEGMENT_RECEIVED, 9.0, segment=1),
    )
    overlap = figure(summarise(result(record(server_events=events))), Figure.OVERLAP)
    assert overlap.p50 == pytest.approx(0.75)


def test_overlap_of_warm_ups_that_run_at_the_same_time() -> None:
    """Intervals of several requests of one prompt are not mixed up, even where they overlap."""
    events = (
        event(E.OPENED, 0.0),
        event(E.COMPUTE_STARTED, 0.0),
        event(E.COMPUTE_DONE, 1.0),
        event(E.OPENED, 0.5),
        event(E.COMPUTE_STARTED, 0.5),
        event(E.COMPUTE_DONE, 2.5),
        event(E.OPENED, 2.0),
        event(E.COMPUTE_STARTED, 2.0),
        event(E.COMPUTE_DONE, 3.0),
    )
    overlap = figure(summarise(result(record(server_events=events))), Figure.OVERLAP)
    assert overlap.p50 == pytest.approx((1.0 + 1.5 + 0.0) / 4.0)


def test_stages_are_those_of_the_answered_request() -> None:
    """Tokenisation, queues and hand-off come from the last request; warm-ups add nothing."""
    warm_up = (
        event(E.OPENED, 0.0),
        event(E.SEGMENT_RECEIVED, 0.0, segment=0),
        event(E.SEGMENT_SENT, 0.5, segment=0),
        event(E.COMMIT_RECEIVED, 0.0),
        event(E.FIRST_TOKEN, 5.0),
        event(E.DONE, 5.0),
    )
    answered = (
        event(E.OPENED, 6.0),
        event(E.SEGMENT_RECEIVED, 6.0, segment=0),
        event(E.SEGMENT_SENT, 6.01, segment=0),
        event(E.COMMIT_RECEIVED, 6.0),
        event(E.COMPUTE_STARTED, 6.1),
        event(E.COMPUTE_DONE, 6.3),
        event(E.FIRST_TOKEN, 6.4),
        event(E.HANDOFF_STARTED, 6.3),
        event(E.HANDOFF_DONE, 6.45),
        event(E.SECOND_TOKEN, 6.5),
    )
    summary = summarise(result(record(server_events=(*warm_up, *answered))))
    assert figure(summary, Figure.TOKENISE).max == pytest.approx(10)
    assert figure(summary, Figure.PREFILL_QUEUE).max == pytest.approx(200)
    assert figure(summary, Figure.HANDOFF).max == pytest.approx(150)
    assert figure(summary, Figure.DECODE_QUEUE).max == pytest.approx(50)


def test_tokens_and_counters() -> None:
    """Requests' reports are added up; servers' counters are after minus before."""
    told: dict[str, Any] = {"num_computed_tokens": 70, "num_reused_tokens": 30}
    summary = summarise(
        result(
            record(0, **told),
            record(1, **told, num_recomputed_tokens=5, num_invalidated_tokens=2),
            counters_before={"num_computed_tokens": 1000, "num_evicted_tokens": 7},
            counters_after={"num_computed_tokens": 1140, "num_evicted_tokens": 3},
        )
    )
    tokens = summary.tokens
    assert (tokens.num_computed, tokens.num_reused) == (140, 60)
    assert (tokens.num_recomputed, tokens.num_invalidated) == (5, 2)
    assert tokens.num_computed_by_servers == 140
    assert tokens.num_evicted_by_servers is None, "a server that began anew has no difference"
    assert tokens.num_prompt is None


def test_preemptions_and_handoffs() -> None:
    """Preemptions count by kind with their tokens, hand-offs by how they went with their bytes."""
    lost = event(E.PREEMPTED_RECOMPUTE, 1.0, num_tokens=40)
    summary = summarise(
        result(
            record(0, server_events=(lost, lost), handoff="done", handoff_bytes=100),
            record(1, handoff="done", handoff_bytes=50),
            record(2, handoff="failed: no memory", handoff_bytes=0),
            record(3, handoff="none"),
        )
    )
    assert summary.num_preemptions == {"recompute": 2}
    assert summary.num_preempted_tokens == {"recompute": 80}
    assert summary.handoffs == {"done": 2, "failed": 1, "none": 1}
    assert (summary.num_handoffs, summary.handoff_bytes) == (2, 150)


def test_lag_of_all_requests() -> None:
    """Lag counts for requests that failed too; what is more than 5 ms late is counted."""
    summary = summarise(
        result(record(0, lag_s=(0.001, 0.006)), failed(1, lag_s=(0.002, 0.004, 0.1)))
    )
    assert figure(summary, Figure.LAG).num == 5
    assert figure(summary, Figure.LAG).max == pytest.approx(100)
    assert summary.num_late == 2


def test_goodput() -> None:
    """Only requests that meet every objective are good; the share is of all requests."""
    limits = Goodput(objectives_ms={"ttft_last_segment_ms": 500.5, "tpot_ms": 200.0})
    records = [record(n, ttft_s=ttft) for n, ttft in enumerate((0.1, 0.5, 0.6))]
    summary = summarise(result(*records, failed(3), wall_s=4.0), limits)
    assert summary.goodput_per_s == 0.5
    assert summary.goodput_ratio == 0.5
    assert summary.objectives_ms == limits.objectives_ms


def test_nothing_to_say() -> None:
    """A run without a completed request has no figures and no NaN."""
    for empty in (result(wall_s=0.0), result(failed(0), wall_s=0.0)):
        summary = summarise(empty, Goodput(objectives_ms={"e2e_ms": 1.0}))
        assert summary.figures == {}
        assert summary.requests_per_s is None
        json.dumps(flat(summary), allow_nan=False)


def test_summary_as_json() -> None:
    """A summary survives JSON, and its flat form has the customary keys."""
    summary = summarise(result(record(ttft_s=0.5, lag_s=(0.001,)), failed(1)))
    assert msgspec.json.decode(msgspec.json.encode(summary), type=RunSummary) == summary
    facts = flat(summary)
    assert facts["p99_ttft_ms"] == facts["mean_ttft_ms"] == 500
    assert facts["p50_ttft_query_ms"] == 2500
    assert facts["p95_overlap_ratio"] is None
    assert facts["num_completed"] == 1
    assert facts["failures"] == {"UNAVAILABLE": 1}
    assert not any(isinstance(v, dict) and "p50" in v for v in facts.values())


@given(st.lists(st.floats(min_value=0, max_value=1e6), min_size=1))
def test_distribution_is_ordered(values: list[float]) -> None:
    """Percentiles grow, end at the maximum, and the mean lies between least and greatest."""
    found = distribution(values)
    assert found is not None
    assert min(values) <= found.p50 <= found.p90 <= found.p95 <= found.p99 <= found.max
    assert found.max == max(values)
    assert math.isfinite(found.mean)
    assert min(values) * (1 - 1e-9) <= found.mean <= max(values) * (1 + 1e-9)
