"""Short and long prefills in steps of their own, example by example."""

from __future__ import annotations

import pytest

from streamfill.scheduling.laps import LONG_WAIT_MS, SHORT_TOKENS, WINDOW_MS
from streamfill.scheduling.plan import DeferReason, RunReason
from streamfill.scheduling.snapshot import Snapshot
from tests.unit.scheduling.builders import order, policy, runs, said, snapshot, stream, victims

laps = policy("laps")
WINDOW_S = WINDOW_MS / 1e3
LONG_WAIT_S = LONG_WAIT_MS / 1e3
SHORT = stream(1, SHORT_TOKENS, committed_s=10.0)
LONG = stream(2, SHORT_TOKENS + 1, committed_s=9.0)


def at(now_s: float) -> Snapshot:
    """A short commit of second ten and a long one of second nine, seen later."""
    return snapshot(SHORT, LONG, now_s=now_s)


def test_short_ones_gather_while_a_long_one_runs() -> None:
    """Within the window of the first short commit the long ones have the step to themselves."""
    shot = at(10.0 + WINDOW_S / 2)
    assert runs(laps, shot) == [(2, 97, True)]
    assert said(laps.decide(shot), shot) == {1: DeferReason.WINDOW, 2: RunReason.COMMIT}


def test_after_the_window_short_ones_run_together() -> None:
    """The long one does not join them: they would all take as long as it."""
    late = stream(3, 10, committed_s=10.0 + WINDOW_S)
    shot = snapshot(SHORT, late, LONG, now_s=10.0 + WINDOW_S)
    assert runs(laps, shot) == [(1, 96, True), (3, 10, True)]
    assert said(laps.decide(shot), shot)[2] is DeferReason.NOT_WORTH_IT


def test_an_overdue_long_one_goes_first() -> None:
    """Short ones cannot keep it waiting for ever."""
    assert runs(laps, at(9.0 + LONG_WAIT_S - 0.1)) == [(1, 96, True)]
    assert runs(laps, at(9.0 + LONG_WAIT_S)) == [(2, 97, True)]


def test_an_overdue_long_one_passes_no_older_one() -> None:
    """Nor one of higher priority: what counts then is the order of the commits."""
    older = stream(1, 10, committed_s=9.0)
    urgent = stream(1, 10, committed_s=50.0, priority=1)
    for short in (older, urgent):
        assert runs(laps, snapshot(short, LONG, now_s=99.0)) == [(1, 10, True)]


@pytest.mark.parametrize("now_s", [10.0, 10.0 + WINDOW_S / 2, 10.0 + WINDOW_S, 99.0])
def test_the_engine_never_idles_for_the_window(now_s: float) -> None:
    """Where no long one waits, short ones run at once, and the other way round."""
    assert runs(laps, snapshot(SHORT, now_s=now_s)) == [(1, 96, True)]
    assert runs(laps, snapshot(LONG, now_s=now_s)) == [(2, 97, True)]
    in_flight = stream(2, 200, committed_s=10.0, in_flight=True)
    assert runs(laps, snapshot(SHORT, in_flight, now_s=now_s)) == [(1, 96, True)]


def test_context_does_not_use_the_window() -> None:
    """Uncommitted streams wait for commits of either kind, and run by queue without a window."""
    views = (stream(1, 97, pending_since_s=1.0), stream(2, 90, pending_since_s=2.0))
    assert order(laps, *views) == [2, 1]
    assert order(laps, *views, stream(3, 10, committed_s=5.0)) == [3]


def test_within_a_queue_older_goes_first() -> None:
    """Commits by their commit, context by its newest segment; higher priority before that."""
    short = (stream(1, 10, committed_s=3.0), stream(2, 90, committed_s=2.0))
    assert order(laps, *short) == [2, 1]
    assert order(laps, *short, stream(3, 50, committed_s=9.0, priority=1)) == [3, 2, 1]
    context = (stream(1, 10, pending_since_s=3.0), stream(2, 90, pending_since_s=2.0))
    assert order(laps, *context) == [2, 1]
    assert order(laps, *context, stream(3, 50, pending_since_s=9.0, priority=1)) == [3, 2, 1]


def test_a_wholly_computed_prompt_is_short() -> None:
    """What counts is what is left to compute, not the length of the prompt."""
    views = (stream(1, 5000, 4990, committed_s=10.0), LONG)
    assert runs(laps, snapshot(*views, now_s=11.0)) == [(1, 5000, True)]


def test_options() -> None:
    """What is short, how long the window is, and when a long one is overdue."""
    all_short = policy("laps(short_tokens=97)")
    assert [run[0] for run in runs(all_short, at(10.0))] == [2, 1]
    no_window = policy("laps(window_ms=0)")
    assert [run[0] for run in runs(no_window, at(10.0))] == [1]
    impatient = policy("laps(window_ms=0,long_wait_ms=1100)")
    assert [run[0] for run in runs(impatient, at(10.05))] == [1]
    assert [run[0] for run in runs(impatient, at(10.11))] == [2]


def test_memory_is_taken_from_the_last_in_turn() -> None:
    """Uncommitted streams first, newest arrival first."""
    holders = (
        stream(1, 20, 20, evictable=20, arrival_s=1.0),
        stream(2, 20, 20, evictable=20, arrival_s=2.0),
        stream(3, 20, 20, evictable=20, arrival_s=3.0, committed_s=4.0),
    )
    needs = stream(9, 50, committed_s=1.0, priority=1)
    shot = snapshot(needs, *holders, free=0, evictable=60, max_requests=1)
    assert victims(laps, shot) == [(2, 20), (1, 20), (3, 20)]


def test_overdue_and_nearly_finished_ones_keep_their_order() -> None:
    """Or they would take each other's KV for ever, the nearly finished one now short, now long."""
    overdue = stream(1, 600, committed_s=10.0)
    whole = stream(2, 600, 550, reached=550, committed_s=9.0)
    robbed = stream(2, 600, 450, reached=550, committed_s=9.0)
    for view in (whole, robbed):
        assert runs(laps, snapshot(overdue, view, now_s=99.0))[0][0] == 2


def test_taking_memory_moves_nobody_forward() -> None:
    """Of two contexts the order stays, whatever one of them loses."""
    other = stream(1, 400, 200, reached=200, pending_since_s=5.0, last_segment_s=8.0)
    whole = stream(2, 400, 200, reached=200, pending_since_s=9.0, last_segment_s=9.0)
    robbed = stream(2, 400, 0, reached=200, pending_since_s=1.0, last_segment_s=9.0)
    assert order(laps, other, whole) == order(laps, other, robbed) == [1, 2]
