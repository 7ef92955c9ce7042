"""How late the generator was, and what it cost."""

from __future__ import annotations

import time

import pytest

from streamfill.loadgen.lag import CpuMeter, lag_of
from streamfill.loadgen.records import RequestRecord


def record(*lag_s: float) -> RequestRecord:
    return RequestRecord(index=0, request_id="q", lag_s=lag_s)


def test_lag_is_that_of_all_sends_together() -> None:
    """A request with more pieces counts for more."""
    lag = lag_of([record(0.001, 0.002), record(0.009)])
    assert lag.num_sent == 3
    assert [lag.p50_ms, lag.p99_ms, lag.max_ms] == pytest.approx([2.0, 8.86, 9.0])
    assert "P50 2.00 ms" in lag.line


def test_a_run_that_sent_nothing_was_not_late() -> None:
    """There is a figure all the same."""
    lag = lag_of([])
    assert (lag.num_sent, lag.p99_ms, lag.max_ms) == (0, 0.0, 0.0)


def test_work_is_seen_and_sleep_is_not() -> None:
    """In cores, since the meter was made."""
    meter = CpuMeter()
    time.sleep(0.05)
    assert meter.cores < 0.5
    begun_s = time.process_time()
    meter = CpuMeter()
    while time.process_time() - begun_s < 0.05:
        sum(range(1000))
    assert meter.cores > 0.0
