"""A log for tests of a stream's side of it: keeps rows in a list, durable when the test says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.recovery.interface import Ticket
from router.recovery.log_file import Row


class LogInMemory:
    """Implements `interface.StreamLog`."""

    def __init__(self, *, is_quick: bool = True) -> None:
        """With `is_quick` everything is durable at once, else after `make_durable`."""
        self.rows: list[Row] = []
        self._is_quick = is_quick
        self._next_id = 1
        self._ticket = 0
        self._durable = 0
        self._waiting: list[tuple[int, Callable[[], None]]] = []

    def append(self, stream_id: int, record: bytes) -> Ticket:
        self.rows.append(Row(self._next_id, stream_id, record))
        self._next_id += 1
        return self._put()

    def rewrite(self, stream_id: int, records: Sequence[bytes]) -> Ticket:
        self.forget(stream_id)
        for record in records:
            self.append(stream_id, record)
        return Ticket(self._ticket)

    def forget(self, stream_id: int) -> None:
        self.rows = [row for row in self.rows if row.stream_id != stream_id]

    def when_durable(self, ticket: Ticket, then: Callable[[], None]) -> None:
        if ticket <= self._durable:
            then()
        else:
            self._waiting.append((ticket, then))

    def make_durable(self) -> None:
        """All that was written so far."""
        self._durable = self._ticket
        waiting, self._waiting = self._waiting, []
        for _, then in waiting:
            then()

    def _put(self) -> Ticket:
        self._ticket += 1
        if self._is_quick:
            self._durable = self._ticket
        return Ticket(self._ticket)
