"""What waits for the client of one stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from router.interface import Acknowledged, DoneEvent, StreamEvent, TokenEvent
from streamfill.errors import FailedPreconditionError, StreamError


class EventQueue:
    """Acknowledgements are merged into the newest one, tokens are all kept, the end is final.

    Filled from the router's loop without waiting. One consumer at a time: a new one takes over,
    since the old one may be a connection that nobody has noticed to be dead.
    """

    def __init__(self) -> None:
        self._acknowledged: Acknowledged | None = None
        self._tokens: deque[TokenEvent] = deque()
        self._end: DoneEvent | StreamError | None = None
        self._wake = asyncio.Event()
        self._consumer = 0

    @property
    def end(self) -> DoneEvent | StreamError | None:
        """How the stream ended; None while it lives."""
        return self._end

    def put_acknowledged(self, event: Acknowledged) -> None:
        """Replace an acknowledgement that nobody has fetched."""
        self._acknowledged = event
        self._wake.set()

    def put_token(self, event: TokenEvent) -> None:
        """Behind all other tokens."""
        self._tokens.append(event)
        self._wake.set()

    def close(self, end: DoneEvent | StreamError) -> None:
        """The last event, given to everybody who asks from now on. The first call counts."""
        if self._end is None:
            self._end = end
            self._wake.set()

    async def events(self) -> AsyncIterator[StreamEvent]:
        """Events up to the `DoneEvent`.

        Raises:
            StreamError: the one that ended the stream.
            FailedPreconditionError: another consumer took over.
        """
        self._consumer += 1
        me = self._consumer
        self._wake.set()
        while me == self._consumer:
            if self._acknowledged is not None:
                acknowledged, self._acknowledged = self._acknowledged, None
                yield acknowledged
            elif self._tokens:
                yield self._tokens.popleft()
            elif isinstance(self._end, DoneEvent):
                yield self._end
                return
            elif self._end is not None:
                raise self._end.with_traceback(None)
            else:
                self._wake.clear()
                await self._wake.wait()
        raise FailedPreconditionError("another call took over the events of this stream")
