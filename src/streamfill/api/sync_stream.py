"""Streams and answers of the synchronous client: the asyncio ones, run in a thread of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from streamfill.api.answer import Answer
from streamfill.api.loop_thread import LoopThread
from streamfill.api.stream import Stream
from streamfill.api.types import Progress, Result, SamplingOptions, Token

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SyncAnswer(Iterator[Token]):
    """The tokens of one answer, in order; then ``result``. As ``Answer``."""

    def __init__(self, loop: LoopThread, answer: Answer) -> None:
        self._loop = loop
        self._answer = answer

    def __iter__(self) -> SyncAnswer:
        return self

    def __next__(self) -> Token:
        token = self._loop.run(_next(self._answer))
        if token is None:
            raise StopIteration
        return token

    def texts(self) -> Iterator[str]:
        """The text as it comes, for printing, with the tail that belongs to no token."""
        for token in self:
            if token.text:
                yield token.text
        if self.result.text_tail:
            yield self.result.text_tail

    def read(self) -> Result:
        """The whole answer at once: reads what is left of it."""
        return self._loop.run(self._answer.read())

    @property
    def result(self) -> Result:
        """The whole answer, when all its tokens have been read."""
        return self._answer.result

    def close(self) -> None:
        """Give up what is left of the answer. Idempotent."""
        self._loop.run(self._answer.aclose())

    def __enter__(self) -> SyncAnswer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class SyncStream:
    """One stream, used inside ``with``. As ``Stream``."""

    def __init__(self, loop: LoopThread, stream: Stream) -> None:
        self._loop = loop
        self._stream = stream

    def __enter__(self) -> SyncStream:
        self._loop.run(self._stream.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.run(self._stream.__aexit__(kind, error, traceback))

    @property
    def stream_id(self) -> int:
        """Minted by the router."""
        return self._stream.stream_id

    @property
    def num_resumptions(self) -> int:
        """How often it went on with a router that was restarted."""
        return self._stream.num_resumptions

    @property
    def progress(self) -> Progress:
        """How far the prompt has come, as last heard."""
        return self._stream.progress

    @property
    def result(self) -> Result:
        """The whole answer, when it is complete."""
        return self._stream.result

    def append(
        self,
        text: str | bytes | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        next_in_s: float | None = None,
    ) -> Progress:
        """Put a piece behind the context; returns when the router has it."""
        return self._loop.run(
            self._stream.append(text, token_ids=token_ids, messages=messages, next_in_s=next_in_s)
        )

    def update(
        self,
        text: str | bytes | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        next_in_s: float | None = None,
    ) -> Progress:
        """Replace the whole context."""
        return self._loop.run(
            self._stream.update(text, token_ids=token_ids, messages=messages, next_in_s=next_in_s)
        )

    def commit(
        self,
        text: str | bytes | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        keep_s: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> SyncAnswer:
        """The prompt is complete, with an optional last piece; iterate over what this returns."""
        answer = self._stream.commit(
            text, token_ids=token_ids, messages=messages, keep_s=keep_s, **sampling
        )
        return SyncAnswer(self._loop, answer)

    def wait_computed(self, timeout_s: float | None = None) -> Progress:
        """Wait until the KV of everything that was sent is computed."""
        return self._loop.run(self._stream.wait_computed(timeout_s))

    def cancel(self, reason: str = "") -> None:
        """Give the stream up, on every server. Idempotent."""
        self._loop.run(self._stream.cancel(reason))


async def _next(answer: Answer) -> Token | None:
    """None at the end: a future cannot carry ``StopAsyncIteration``."""
    return await anext(answer, None)
