"""Predicted and actual costs of preemptions, from a server's lifetime to the figures and the
page."""

from __future__ import annotations

import pytest

from streamfill.loadgen.metrics import priced_preemptions, summarise
from streamfill.loadgen.records import Preempted
from streamfill.loadgen.report.costs import costs_chart
from streamfill.loadgen.report.loads import batches
from streamfill.loadgen.request_log import _preemptions
from streamfill.loadgen.target import ServerAccount
from streamfill.observability.lifetime import LifetimeEntry, LifetimeEvent
from tests.unit.loadgen.run_builders import record, result

_LOSSES: tuple[Preempted, ...] = (
    ("swap", 100, 0.010, 0.008),
    ("swap", 100, 0.010, 0.010),
    ("recompute", 50, 0.5, 1.0),
    ("recompute", 50, 0.5, None),
    ("recompute", 50, None, None),
)


def test_a_lifetime_tells_what_preemptions_cost() -> None:
    lifetime = (
        LifetimeEntry(LifetimeEvent.OPENED, 0.0),
        LifetimeEntry(LifetimeEvent.PREEMPTED_SWAP, 1.0, None, 64, "idle", 0.01, 0.02),
        LifetimeEntry(LifetimeEvent.PREEMPTED_RECOMPUTE, 2.0, None, 32),
    )
    assert _preemptions(ServerAccount(lifetime=lifetime)) == [
        ("swap", 64, 0.01, 0.02),
        ("recompute", 32, None, None),
    ]


def test_only_what_came_back_is_compared() -> None:
    priced = priced_preemptions([record(0, preemptions=_LOSSES)])
    assert [each.kind for each in priced] == ["swap", "swap", "recompute"]


def test_median_error_and_sums() -> None:
    summary = summarise(result(record(0, preemptions=_LOSSES)))
    assert summary.num_priced_preemptions == 3
    assert summary.preemption_cost_error == pytest.approx(0.25)
    assert summary.preemption_costs_s == {
        "swap": pytest.approx((0.020, 0.018)),
        "recompute": pytest.approx((0.5, 1.0)),
    }


def test_no_preemptions_no_error() -> None:
    summary = summarise(result(record(0)))
    assert summary.preemption_cost_error is None
    assert summary.preemption_costs_s == {}


def test_the_page_draws_them() -> None:
    runs = [result(record(0, preemptions=_LOSSES))]
    chart = costs_chart(batches(runs, [summarise(run) for run in runs]))
    assert chart is not None
    (drawing,) = chart.views.values()
    _, *marks = drawing["data"]
    assert [len(each["x"]) for each in marks] == [2, 1]
    assert marks[1]["y"] == [1000.0]


def test_without_preemptions_there_is_no_chart() -> None:
    runs = [result(record(0))]
    assert costs_chart(batches(runs, [summarise(run) for run in runs])) is None
