"""What a stream's journal needs of a log. Called in the router's loop, never waits, never raises.

Two implement it: `log_writer.LogWriter`, and the one of the tests. A router that keeps its streams
in memory only has none at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NewType, Protocol

Ticket = NewType("Ticket", int)
"""Number of something that was given to the log. Later is larger."""


class StreamLog(Protocol):
    """Keeps records of streams beyond the end of this process."""

    def append(self, stream_id: int, record: bytes) -> Ticket:
        """Write a record behind all others of the stream."""
        ...

    def rewrite(self, stream_id: int, records: Sequence[bytes]) -> Ticket:
        """Put these in the place of all records of the stream, at one moment."""
        ...

    def forget(self, stream_id: int) -> None:
        """Remove all records of the stream. One that is not known is ignored."""
        ...

    def when_durable(self, ticket: Ticket, then: Callable[[], None]) -> None:
        """Call `then` in the loop, when everything up to `ticket` outlives this process; at once
        when it does already, or never will since the log failed. In the order of the tickets."""
        ...
