"""Least slack first, example by example."""

from __future__ import annotations

import pytest

from streamfill.scheduling.snapshot import UNIT_COSTS, Experience, StepCosts
from tests.unit.scheduling.builders import order, policy, runs, snapshot, stream, victims

edf = policy("edf")


def test_the_earlier_due_goes_first() -> None:
    """A commit is due its own SLO after it came, whoever came first."""
    patient = stream(1, 100, committed_s=1.0, ttft_slo_s=9.0)
    hurried = stream(2, 100, committed_s=5.0, ttft_slo_s=0.5)
    assert order(edf, patient, hurried) == [2, 1]
    late = stream(2, 100, committed_s=9.6, ttft_slo_s=0.5)
    assert order(edf, patient, late) == [1, 2]


def test_slack_leaves_out_the_work_that_is_left() -> None:
    """Of two that are due at the same time the one with more to do has less slack."""
    short = stream(1, 100, committed_s=1.0)
    long = stream(2, 400, committed_s=1.0)
    assert order(edf, short, long) == [2, 1]
    assert order(edf, short, stream(2, 400, 350, committed_s=1.0)) == [1, 2]
    later_s = 1.0 + UNIT_COSTS.step_s(400) - UNIT_COSTS.step_s(100)
    assert order(edf, short, stream(2, 400, committed_s=later_s + 0.01)) == [1, 2]
    assert order(edf, short, stream(2, 400, committed_s=later_s - 0.01)) == [2, 1]


def test_work_costs_what_was_learned() -> None:
    """On a fast server the work that is left hardly counts."""
    views = (stream(1, 100, committed_s=1.0), stream(2, 400, committed_s=1.1))
    fast = Experience(costs=StepCosts(fixed_s=0.01, per_token_s=1e-6))
    assert [run[0] for run in runs(edf, snapshot(*views, budget=1000))] == [2, 1]
    assert [run[0] for run in runs(edf, snapshot(*views, budget=1000, experience=fast))] == [1, 2]


@pytest.mark.parametrize(("slo_ms", "first"), [("1000", 1), ("5000", 2)])
def test_streams_without_an_slo_get_the_default(slo_ms: str, first: int) -> None:
    """It is an option of the policy."""
    unsaid = stream(1, 100, committed_s=1.0)
    said = stream(2, 100, committed_s=1.0, ttft_slo_s=3.0)
    assert order(policy(f"edf(slo_ms={slo_ms})"), unsaid, said)[0] == first


def test_commits_go_before_context() -> None:
    """Nobody waits for an uncommitted stream, however little slack it would have."""
    views = (stream(1, 100, ttft_slo_s=0.1), stream(2, 100, committed_s=50.0, ttft_slo_s=30.0))
    assert order(edf, *views) == [2]


def test_context_goes_by_the_slack_that_it_would_have() -> None:
    """As if it had been committed when its newest segment came."""
    old = stream(1, 100, pending_since_s=1.0)
    new = stream(2, 100, pending_since_s=2.0)
    hurried = stream(3, 100, pending_since_s=2.5, ttft_slo_s=0.1)
    assert order(edf, new, old, hurried) == [1, 3, 2]


def test_higher_priority_goes_before_slack() -> None:
    """Among commits, and among the others."""
    for committed_s in (None, 1.0):
        hurried = stream(1, 100, committed_s=committed_s, ttft_slo_s=0.1)
        urgent = stream(2, 100, committed_s=committed_s, ttft_slo_s=9.0, priority=1)
        assert order(edf, hurried, urgent) == [2, 1]


def test_memory_is_taken_where_most_slack_is() -> None:
    """From uncommitted streams first, and from a higher priority last."""
    needs = stream(99, 30, committed_s=1.0, priority=9)
    holders = (
        stream(1, 20, 20, evictable=20, ttft_slo_s=1.0),
        stream(2, 20, 20, evictable=20, ttft_slo_s=5.0),
        stream(3, 20, 20, evictable=20, ttft_slo_s=9.0, priority=1),
        stream(4, 20, 20, evictable=20, ttft_slo_s=30.0, committed_s=1.0),
    )
    shot = snapshot(needs, *holders, free=0, evictable=80, max_requests=1)
    assert victims(edf, shot) == [(2, 20), (1, 20)]
    more = snapshot(stream(99, 79, committed_s=1.0, priority=9), *holders, evictable=80, free=0)
    assert victims(edf, more) == [(2, 20), (1, 20), (3, 20), (4, 20)]


def test_taking_memory_moves_nobody_forward() -> None:
    """Or two streams that do not fit together would take each other's KV for ever."""
    other = stream(1, 400, 200, reached=200, committed_s=1.0)
    whole = stream(2, 400, 250, reached=250, committed_s=1.0)
    robbed = stream(2, 400, 50, reached=250, committed_s=1.0)
    assert order(edf, other, whole) == order(edf, other, robbed) == [1, 2]
    other, whole, robbed = (
        stream(view.stream_id, 400, view.num_computed_tokens, reached=view.num_reached_tokens)
        for view in (other, whole, robbed)
    )
    assert order(edf, other, whole) == order(edf, other, robbed) == [1, 2]
