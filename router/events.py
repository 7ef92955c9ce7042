"""What waits for the client of one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Final

from router.interface import Acknowledged, DoneEvent, StreamEvent, TokenEvent
from streamfill.errors import ErrorCode, FailedPreconditionError, StreamError

MAX_READ_TOKENS: Final = 256
"""Tokens that were given out and stand in front of others; then they are removed."""
TAKEN_OVER: Final = "another call took over the events of this stream"


class EventQueue:
    """Acknowledgements are merged into the newest one, tokens are all kept, the end is final.

    Filled from the router's loop without waiting. One consumer at a time: a new one takes over,
    since the old one may be a connection that nobody has noticed to be dead.
    """

    def __init__(self) -> None:
        self.keeps_tokens = False
        """Those that were given out too, until the end is given out: somebody may come back."""
        self._acknowledged: Acknowledged | None = None
        self._tokens: list[TokenEvent] = []
        self._first_index = 0
        """Of the first of `_tokens`."""
        self._num_read = 0
        """Of `_tokens`, those that were given out."""
        self._end: DoneEvent | StreamError | None = None
        self._wake = asyncio.Event()
        self._consumer = 0
        self._on_acknowledged: Callable[[], bool] | None = None

    @property
    def end(self) -> DoneEvent | StreamError | None:
        """How the stream ended; None while it lives."""
        return self._end

    def put_acknowledged(self, how_far: Callable[[], Acknowledged]) -> None:
        """Replace an acknowledgement that nobody has fetched."""
        if self._on_acknowledged is not None and self._on_acknowledged():
            return
        self._acknowledged = how_far()
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

    def rewind(self, index: int) -> None:
        """The next token to be given out is this one, counted from 0. One that is not there yet is
        waited for. Who has taken events so far gets no more: they are for the one who asks next.

        Raises:
            StreamError: OUT_OF_RANGE, it is not kept any more.
        """
        if index < self._first_index:
            raise StreamError(
                f"token {index} of the answer is not kept any more; the first one that is has the "
                f"index {self._first_index}",
                code=ErrorCode.OUT_OF_RANGE,
            )
        self._num_read = index - self._first_index
        self._consumer += 1
        self._on_acknowledged = None
        self._wake.set()

    async def events(
        self, on_acknowledged: Callable[[], bool] | None = None
    ) -> AsyncIterator[StreamEvent]:
        """Events up to the `DoneEvent`.

        Args:
            on_acknowledged: called for each acknowledgement; returns whether it has taken it. What
                it has not comes as an event.

        Raises:
            StreamError: the one that ended the stream.
            FailedPreconditionError: another consumer took over.
        """
        self._consumer += 1
        me = self._consumer
        self._on_acknowledged = on_acknowledged
        self._wake.set()
        while me == self._consumer:
            if self._acknowledged is not None:
                acknowledged, self._acknowledged = self._acknowledged, None
                yield acknowledged
            elif self._num_read < len(self._tokens):
                event = self._tokens[self._num_read]
                self._num_read += 1
                self._drop_read()
                yield event
            elif isinstance(self._end, DoneEvent):
                yield self._end
                if me == self._consumer:
                    self.keeps_tokens = False
                    self._drop_read()
                return
            elif self._end is not None:
                raise self._end.with_traceback(None)
            else:
                self._wake.clear()
                await self._wake.wait()
        raise FailedPreconditionError(TAKEN_OVER)

    def _drop_read(self) -> None:
        """What is kept for nobody. Costs little for each token, also where many wait."""
        if self.keeps_tokens:
            return
        if self._num_read in (len(self._tokens), MAX_READ_TOKENS):
            self._first_index += self._num_read
            del self._tokens[: self._num_read]
            self._num_read = 0
