"""Whether and when a stream whose attempt failed is tried again."""

from __future__ import annotations

from router import timing
from router.servers import Server
from streamfill.stream.ids import ServerId

NEVER_S = float("inf")


class Retries:
    """Failures in a row of one stream, and its waiting for a server."""

    def __init__(self) -> None:
        self.num_failures = 0
        """In a row."""
        self.failed_on: set[ServerId] = set()
        """Taken again only when there is no other."""
        self._not_before_s = 0.0
        self._try_at_s = NEVER_S
        """When the pause is over that nobody tried behind yet."""
        self._waiting_since_s: float | None = None

    def failed(self, began_s: float | None, server: Server | None, now_s: float) -> bool:
        """Note a failure; False when it was one too many.

        Args:
            began_s: when the attempt began. One that lived long ends the row.
            server: to be avoided from now on; None when it is not to blame.
        """
        if began_s is not None and now_s - began_s > timing.ATTEMPT_HEALTHY_AFTER_S:
            self.num_failures = 0
            self.failed_on.clear()
        self.num_failures += 1
        if server is not None:
            self.failed_on.add(server.server_id)
        if self.num_failures > 1:
            pause_s = timing.RETRY_PAUSE_S * 2 ** (self.num_failures - 2)
            self._not_before_s = self._try_at_s = now_s + pause_s
        return self.num_failures < timing.MAX_ATTEMPTS

    def begin_try(self, now_s: float) -> bool:
        """Try now, unless the pause since the last failure is not over; returns whether it is."""
        if now_s < self._not_before_s:
            return False
        self._try_at_s = NEVER_S
        return True

    def wait(self, now_s: float) -> None:
        """No server has the stream. Idempotent."""
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s

    def placed(self) -> None:
        """A server has it again."""
        self._waiting_since_s = None

    @property
    def is_waiting(self) -> bool:
        """Whether no server has the stream."""
        return self._waiting_since_s is not None

    def gave_up(self, now_s: float) -> bool:
        """Whether it waited too long."""
        return now_s >= self._gives_up_s

    @property
    def due_s(self) -> float:
        """When to look again, besides whenever a server becomes alive."""
        return NEVER_S if self._waiting_since_s is None else min(self._gives_up_s, self._try_at_s)

    @property
    def _gives_up_s(self) -> float:
        if self._waiting_since_s is None:
            return NEVER_S
        return self._waiting_since_s + timing.REPLACE_WAIT_S
