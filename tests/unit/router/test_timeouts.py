"""When a stream's time is over. No servers, no waiting."""

from __future__ import annotations

from router import timing
from router.timeouts import NEVER_S, Timeouts
from streamfill.stream.state import StreamState

NOW_S = 100.0


def timeouts(*, idle_timeout_s: float = 60.0, deadline_after_s: float | None = None) -> Timeouts:
    return Timeouts(idle_timeout_s=idle_timeout_s, deadline_after_s=deadline_after_s, now_s=NOW_S)


def outcome(made: Timeouts, now_s: float, *, is_open: bool = True) -> StreamState | None:
    ending = made.over(now_s, is_open=is_open)
    return None if ending is None else ending.state


def test_a_silent_client_ends_a_stream_before_its_commit_only() -> None:
    """Behind the commit the client has nothing to do but wait."""
    made = timeouts()
    assert made.due_s(is_open=True) == NOW_S + 60
    assert outcome(made, NOW_S + 59.9) is None
    assert outcome(made, NOW_S + 60) is StreamState.ABORTED
    assert made.due_s(is_open=False) == NEVER_S
    assert outcome(made, NOW_S + 1e6, is_open=False) is None


def test_a_client_that_is_held_back_is_not_idle() -> None:
    """Its operation waits for room."""
    made = timeouts()
    made.is_held_back(NOW_S + 50)
    assert outcome(made, NOW_S + 60) is None
    assert outcome(made, NOW_S + 110) is StreamState.ABORTED


def test_a_deadline_goes_first_and_counts_from_the_opening() -> None:
    """Also when an earlier process opened the stream, and the client was silent as well."""
    made = timeouts(idle_timeout_s=10, deadline_after_s=30)
    assert outcome(made, NOW_S + 30) is StreamState.DEADLINE
    made.take_up(NOW_S - 25, needs_client=False)
    assert made.due_s(is_open=False) == NOW_S + 5
    assert outcome(made, NOW_S + 5, is_open=False) is StreamState.DEADLINE


def test_a_client_must_come_back_after_a_restart() -> None:
    """Committed or not; whatever it does is a sign of it."""
    made = timeouts()
    made.take_up(NOW_S, needs_client=True)
    assert made.due_s(is_open=False) == NOW_S + timing.RESUME_WAIT_S
    late_s = NOW_S + timing.RESUME_WAIT_S
    assert outcome(made, late_s, is_open=False) is StreamState.ABORTED
    made.touch()
    assert outcome(made, late_s, is_open=False) is None
