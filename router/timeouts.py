"""When one stream's time is over, whatever its servers do. No clock of its own, but for `touch`."""

from __future__ import annotations

import time

from router import timing
from router.ended_streams import Ending
from streamfill.errors import DeadlineExceededError, ErrorCode, StreamError
from streamfill.stream.state import StreamState

NEVER_S = float("inf")


class Timeouts:
    """The deadline that a client set, and how long it may be silent. Owned by the session."""

    __slots__ = (
        "_deadline_after_s",
        "_deadline_s",
        "_idle_timeout_s",
        "_resume_by_s",
        "_touched_s",
    )

    def __init__(
        self, *, idle_timeout_s: float, deadline_after_s: float | None, now_s: float
    ) -> None:
        """
        Args:
            idle_timeout_s: how long a client may do nothing before its commit.
            deadline_after_s: when all must be done, after the opening. None: whenever.
        """
        self._idle_timeout_s = idle_timeout_s
        self._deadline_after_s = deadline_after_s
        self._touched_s = now_s
        self._resume_by_s = NEVER_S
        """When its client must have come back."""
        self._deadline_s = NEVER_S
        self._set_deadline(now_s)

    def take_up(self, opened_s: float, *, needs_client: bool) -> None:
        """The stream is older than this process.

        Args:
            opened_s: when it was opened, by this process's clock.
            needs_client: it is of no use unless its client comes back.
        """
        self._set_deadline(opened_s)
        if needs_client:
            self._resume_by_s = self._touched_s + timing.RESUME_WAIT_S

    def touch(self) -> None:
        """The client did something, just now."""
        self._touched_s = time.monotonic()
        self._resume_by_s = NEVER_S

    def is_held_back(self, now_s: float) -> None:
        """Its client is not idle, we keep it waiting."""
        self._touched_s = now_s

    def over(self, now_s: float, *, is_open: bool) -> Ending | None:
        """How the stream ends now, as its time is over; None: it is not.

        Args:
            is_open: it is not committed.
        """
        if now_s >= self._deadline_s:
            message = f"the stream's deadline of {self._deadline_after_s} s is over"
            return Ending(StreamState.DEADLINE, DeadlineExceededError(message))
        if is_open and now_s >= self._touched_s + self._idle_timeout_s:
            message = f"not committed and not touched for {self._idle_timeout_s} s"
        elif now_s >= self._resume_by_s:
            message = f"its client did not come back within {timing.RESUME_WAIT_S} s of a restart"
        else:
            return None
        return Ending(StreamState.ABORTED, StreamError(message, code=ErrorCode.ABORTED))

    def due_s(self, *, is_open: bool) -> float:
        """When to look again."""
        due_s = min(self._deadline_s, self._resume_by_s)
        return min(due_s, self._touched_s + self._idle_timeout_s) if is_open else due_s

    def _set_deadline(self, opened_s: float) -> None:
        if self._deadline_after_s is not None:
            self._deadline_s = opened_s + self._deadline_after_s
