"""One answer, read token by token."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.replies import AnswerBuilder
from streamfill.api.types import Result, Token
from streamfill.errors import FailedPreconditionError, StreamError


class AnswerSource(Protocol):
    """Where the events of one answer come from. Used by one ``Answer`` only."""

    async def start(self) -> tuple[float, float]:
        """Send the commit; called once, before anything else. Returns when the commit and when the
        last piece of the prompt was sent, by ``time.monotonic``. Raises ``StreamError``."""
        ...

    async def next_event(self) -> tuple[pb.Token | pb.Done, float]:
        """The next event and when it arrived, by ``time.monotonic``. Never called after ``Done``.
        Raises ``StreamError``: the answer ends badly, or its commit was refused."""
        ...

    def finish(self, result: Result) -> None:
        """``Done`` came. Called at most once."""
        ...

    def abandon(self) -> None:
        """Nobody reads the rest; called after ``start``, in any thread, at most once."""
        ...


class Answer(AsyncIterator[Token]):
    """The tokens of one answer, in order; then ``result``.

    Nothing is sent before the first token is asked for. One consumer at a time. An answer that was
    left half read is cancelled when it is closed or forgotten.
    """

    def __init__(self, source: AnswerSource) -> None:
        self._source = source
        self._builder: AnswerBuilder | None = None
        self._result: Result | None = None
        self._ended = False

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Token:
        if self._ended:
            raise StopAsyncIteration
        if self._builder is None:
            self._ended = True  # a commit is never sent twice, however its sending ends
            self._builder = AnswerBuilder(*await self._source.start())
            self._ended = False
        try:
            event, arrival_s = await self._source.next_event()
        except StreamError:
            self._ended = True
            raise
        if isinstance(event, pb.Token):
            return self._builder.add(event, arrival_s)
        self._ended = True
        self._result = self._builder.finish(event, arrival_s)
        self._source.finish(self._result)
        raise StopAsyncIteration

    async def texts(self) -> AsyncIterator[str]:
        """The text as it comes, for printing. Unlike the texts of the tokens it has the tail: what
        was held back at the end because a character or a stop string might have gone on."""
        async for token in self:
            if token.text:
                yield token.text
        if self.result.text_tail:
            yield self.result.text_tail

    async def read(self) -> Result:
        """The whole answer at once: reads what is left of it.

        Raises:
            StreamError: the answer ended badly, or its commit was refused.
        """
        async for _ in self:
            pass
        return self.result

    @property
    def result(self) -> Result:
        """The whole answer.

        Raises:
            FailedPreconditionError: it is not complete.
        """
        if self._result is None:
            raise FailedPreconditionError("the answer is not complete; read all its tokens first")
        return self._result

    async def aclose(self) -> None:
        """Give up what is left of the answer. Idempotent."""
        self._abandon()

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._abandon()

    def _abandon(self) -> None:
        if not self._ended and self._builder is not None:
            self._source.abandon()
        self._ended = True
