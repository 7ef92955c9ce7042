"""When a stream whose attempts failed is looked at again."""

from __future__ import annotations

from router import timing
from router.retries import NEVER_S, Retries


def failed_twice(at_s: float) -> Retries:
    """The second failure is the first one with a pause behind it."""
    retries = Retries()
    for _ in range(2):
        assert retries.failed(None, None, at_s)
    return retries


def test_a_pause_that_nobody_tried_behind_is_due_until_somebody_does() -> None:
    """However late somebody asks. Afterwards only giving up is due, and what servers bring."""
    retries = failed_twice(100.0)
    retries.wait(100.0)
    pause_end_s = 100.0 + timing.RETRY_PAUSE_S
    assert retries.due_s == pause_end_s
    assert not retries.begin_try(pause_end_s - 0.01)
    assert retries.due_s == pause_end_s
    assert retries.begin_try(pause_end_s + 1.0)
    assert retries.due_s == 100.0 + timing.REPLACE_WAIT_S


def test_nothing_is_due_while_a_server_has_the_stream() -> None:
    """Also when the pause behind its last failure is not over."""
    retries = failed_twice(100.0)
    assert retries.due_s == NEVER_S
    retries.wait(100.0)
    retries.placed()
    assert retries.due_s == NEVER_S
