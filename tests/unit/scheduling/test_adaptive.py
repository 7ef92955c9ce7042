"""Our policy, rule by rule."""

from __future__ import annotations

import pytest

from streamfill.scheduling.adaptive import AGEING, BACKLOG_STEPS, MAX_SLO_S, PRIORITY_S
from streamfill.scheduling.plan import DeferReason
from streamfill.scheduling.snapshot import (
    UNIT_COSTS,
    ContextMode,
    Experience,
    Habits,
    StepCosts,
    StreamView,
)
from tests.unit.scheduling.builders import order, policy, runs, said, snapshot, stream, victims

adaptive = policy("adaptive")


def first(*views: StreamView) -> int:
    """Whose commit runs first."""
    return adaptive.decide(snapshot(*views, budget=100_000)).runs[0].stream_id


def test_shortest_rest_first() -> None:
    """Of commits of the same moment the one with the least left goes first, not the shortest."""
    views = (stream(1, 100, committed_s=5.0), stream(2, 5000, 4950, committed_s=5.0))
    assert first(*views) == 2


def test_waiting_makes_up_for_length() -> None:
    """One second of work is outweighed by so many seconds of waiting, neither more nor less."""
    work_s = UNIT_COSTS.per_token_s * 300
    long = stream(1, 400, committed_s=5.0)
    assert first(long, stream(2, 100, committed_s=5.0 + AGEING * work_s - 0.01)) == 2
    assert first(long, stream(2, 100, committed_s=5.0 + AGEING * work_s + 0.01)) == 1


@pytest.mark.parametrize(("ageing", "expected"), [("0", 1), ("100", 2)])
def test_ageing_is_an_option(ageing: str, expected: int) -> None:
    """None is first come, first served; much is shortest first."""
    by = policy(f"adaptive(ageing={ageing})")
    views = (stream(1, 400, committed_s=5.0), stream(2, 100, committed_s=6.0))
    assert by.decide(snapshot(*views)).runs[0].stream_id == expected


def test_priority_is_a_head_start() -> None:
    """A priority of one more is worth so many seconds, for commits and for context."""
    urgent_s = 5.0 + PRIORITY_S
    base = stream(1, 100, committed_s=5.0)
    assert first(base, stream(2, 100, committed_s=urgent_s - 0.01, priority=1)) == 2
    assert first(base, stream(2, 100, committed_s=urgent_s + 0.01, priority=1)) == 1
    base = stream(1, 100, last_segment_s=5.0)
    assert first(base, stream(2, 100, last_segment_s=urgent_s - 0.01, priority=1)) == 2
    assert first(base, stream(2, 100, last_segment_s=urgent_s + 0.01, priority=1)) == 1
    eager = policy("adaptive(priority_s=50)")
    assert order(eager, base, stream(2, 100, last_segment_s=54.0, priority=1)) == [2, 1]


def test_a_tight_slo_is_a_head_start() -> None:
    """By how much tighter it is; having none counts as a second, and no hurry has an end."""
    base = stream(1, 100, committed_s=5.0)
    assert first(base, stream(2, 100, committed_s=5.8, ttft_slo_s=0.1)) == 2
    assert first(base, stream(2, 100, committed_s=6.0, ttft_slo_s=0.1)) == 1
    lazy = stream(1, 100, committed_s=5.0, ttft_slo_s=1e6)
    assert first(lazy, stream(2, 100, committed_s=5.0 + MAX_SLO_S - 1.01)) == 2
    assert first(lazy, stream(2, 100, committed_s=5.0 + MAX_SLO_S - 0.99)) == 1


def test_a_commit_joins_while_that_saves_more_than_it_costs() -> None:
    """With one in the step, k tokens join while k * p < (n - 1) * F."""
    costs = Experience(costs=StepCosts(fixed_s=0.1, per_token_s=0.001))
    for num_waiting, most in ((2, 99), (3, 199)):
        others = [stream(9, 1000, committed_s=9.0) for _ in range(num_waiting - 2)]
        for tokens, joins in ((most, True), (most + 1, False)):
            views = (stream(1, 10, committed_s=1.0), stream(2, tokens, committed_s=2.0), *others)
            shot = snapshot(*views, budget=2000, experience=costs)
            assert ((2, tokens, True) in runs(adaptive, shot)) is joins
            if not joins:
                assert said(adaptive.decide(shot), shot)[2] is DeferReason.NOT_WORTH_IT


def test_each_one_in_the_step_has_to_wait_for_who_joins() -> None:
    """With two in the step, the third may cost half as much, and saves one less a step."""
    costs = Experience(costs=StepCosts(fixed_s=0.1, per_token_s=0.001))
    for tokens, num_runs in ((49, 3), (50, 2)):
        views = [stream(i, tokens, committed_s=float(i)) for i in (1, 2, 3)]
        assert len(runs(adaptive, snapshot(*views, budget=2000, experience=costs))) == num_runs


def test_a_lone_commit_has_the_whole_step() -> None:
    """The rule is about others."""
    assert runs(adaptive, snapshot(stream(1, 9000, committed_s=1.0))) == [(1, 256, False)]


def test_context_goes_by_its_expected_commit() -> None:
    """The stream's own pauses say when, and how many segments streams of its mode had."""
    habits = (Habits(expected_more=(5.0, 4.0, 3.0, 1.0), gap_s=1.0), Habits(gap_s=1.0))
    by_habit = Experience(habits=habits)
    base = stream(1, 100, last_segment_s=5.0, num_segments=1)
    nearly = stream(2, 100, last_segment_s=6.0, num_segments=3)
    quick = stream(3, 100, last_segment_s=7.0, num_segments=1, gaps_s=(0.1, 0.1, 0.1))
    updated = stream(4, 100, last_segment_s=7.8, num_segments=1, mode=ContextMode.UPDATE)
    shot = snapshot(base, nearly, quick, updated, budget=1000, experience=by_habit)
    # 5 + 4 * 1, 6 + 1 * 1, 7 + 4 * 0.325, 7.8 + 1 * 1
    assert [run[0] for run in runs(adaptive, shot)] == [2, 3, 4, 1]


@pytest.mark.parametrize(
    ("num_streams", "expected"), [(1, 96), (2, 100), (3, 150), (4, 192), (9, 192)]
)
def test_segments_grow_with_the_backlog(num_streams: int, expected: int) -> None:
    """Context is to be computed in six steps, within once and twice the segment size."""
    assert BACKLOG_STEPS == 6
    shot = snapshot(*(stream(i, 300) for i in range(num_streams)), budget=1000)
    assert runs(policy("adaptive", segment_tokens=96), shot) == [(0, expected, False)]


def test_without_a_segment_size_context_has_the_whole_step() -> None:
    """As on servers where nobody says otherwise."""
    assert runs(adaptive, snapshot(stream(1, 1000), budget=700)) == [(1, 700, False)]


def test_memory_is_taken_in_the_order_of_the_preemption_plan() -> None:
    """As far as needed, running streams passed over; what others share frees nothing."""
    holders = [stream(i, 20, 20, evictable=20) for i in (1, 2, 3)]
    shared = stream(4, 20, 20, evictable=20, shared=20)
    needs = stream(9, 39, committed_s=1.0)
    shot = snapshot(*holders, shared, needs, free=0, evictable=80, standing_order=(9, 4, 3, 1, 2))
    assert victims(adaptive, shot) == [(3, 20), (1, 20)]
    assert {each.reason for each in adaptive.decide(shot).victims} == {
        "first in the preemption plan"
    }


def test_without_a_plan_the_last_to_be_committed_gives_first() -> None:
    """Uncommitted streams by their expected commit, then committed ones."""
    holders = (
        stream(1, 20, 20, evictable=20, last_segment_s=1.0),
        stream(2, 20, 20, evictable=20, last_segment_s=9.0),
        stream(3, 20, 20, evictable=20, last_segment_s=9.5, committed_s=9.5),
    )
    shot = snapshot(*holders, stream(9, 39, committed_s=1.0), free=0, evictable=60, max_requests=1)
    assert victims(adaptive, shot) == [(2, 20), (1, 20)]


def test_taking_memory_moves_nobody_forward() -> None:
    """Or two streams that do not fit together would take each other's KV for ever."""
    other = stream(1, 400, 200, reached=200, pending_since_s=5.0, last_segment_s=9.0)
    whole = stream(2, 400, 200, reached=200, pending_since_s=9.0, last_segment_s=9.0)
    robbed = stream(2, 400, 0, reached=200, pending_since_s=1.0, last_segment_s=9.0)
    assert order(adaptive, other, whole) == order(adaptive, other, robbed) == [1, 2]
