"""A stream of the asyncio client.

1. ``async with`` opens a call and waits until the router has made the stream.
2. ``append`` and ``update`` send an operation and wait until it is acknowledged or refused.
3. ``commit`` returns an ``Answer``, which sends the commit when its first token is asked for. One
   that is left half read cancels the call.
4. Leaving ``async with`` before the end of an answer cancels the call, and with it the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from streamfill.api import requests
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.answer import Answer
from streamfill.api.resumption import OpenCall
from streamfill.api.stream_call import StreamAnswerSource, StreamCall
from streamfill.api.types import Progress, Result, SamplingOptions
from streamfill.errors import FailedPreconditionError

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Stream:
    """One stream. Made by ``Client.stream``; used inside ``async with`` in one event loop."""

    def __init__(self, open_call: OpenCall, opening: pb.Open, reconnect_s: float = 0.0) -> None:
        self._open_call = open_call
        self._reconnect_s = reconnect_s
        self._opening = opening
        self._opened_call: StreamCall | None = None
        self._result: Result | None = None

    async def __aenter__(self) -> Stream:
        call = StreamCall(self._open_call, self._reconnect_s)
        try:
            await call.open(self._opening)
        except BaseException:
            await call.drop()
            raise
        self._opened_call = call
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._call.drop()

    @property
    def stream_id(self) -> int:
        """Minted by the router."""
        stream_id = self._call.stream_id
        assert stream_id is not None  # it came before `async with` was entered
        return stream_id

    @property
    def num_resumptions(self) -> int:
        """How often it went on with a router that was restarted."""
        return self._call.num_resumptions

    @property
    def progress(self) -> Progress:
        """How far the prompt has come, as last heard."""
        return self._call.progress

    @property
    def result(self) -> Result:
        """The whole answer.

        Raises:
            FailedPreconditionError: it is not complete.
        """
        if self._result is None:
            raise FailedPreconditionError("the answer is not complete; read all its tokens first")
        return self._result

    async def append(
        self,
        text: str | bytes | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        next_in_s: float | None = None,
    ) -> Progress:
        """Put a piece behind the context; exactly one kind of it. Returns when the router has it.

        ``next_in_s`` says in how many seconds the next piece, or the commit, is to be expected:
        servers short of memory take it rather from streams that stay idle.

        A caller who is cancelled meanwhile leaves the operation in place.

        Raises:
            StreamError: it was refused. The stream is unharmed, unless it has ended.
        """
        segment = requests.segment(text, token_ids, messages, next_in_s)
        await self._call.operate(pb.StreamRequest(append=pb.Append(segment=segment)))
        return self.progress

    async def update(
        self,
        text: str | bytes | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        next_in_s: float | None = None,
    ) -> Progress:
        """Replace the whole context. As ``append`` otherwise."""
        segment = requests.segment(text, token_ids, messages, next_in_s)
        await self._call.operate(pb.StreamRequest(update=pb.Update(segment=segment)))
        return self.progress

    def commit(
        self,
        text: str | bytes | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        keep_s: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """The prompt is complete, with an optional last piece; read the answer from what this
        returns. A refused commit raises there and may be corrected and tried again.

        ``keep_s`` says within how many seconds a prompt that begins with this one is expected, as
        of an agent that waits for a tool; until then its KV is not given up as a leftover.
        """
        commit = pb.Commit(
            sampling=requests.sampling(sampling),
            final_segment=requests.optional_segment(text, token_ids, messages),
            keep_s=keep_s,
        )
        return Answer(StreamAnswerSource(self._call, commit, self._keep_result))

    async def wait_computed(self, timeout_s: float | None = None) -> Progress:
        """Wait until the KV of everything that was sent is computed.

        Raises:
            asyncio.TimeoutError: it is not, after ``timeout_s``.
            StreamError: the stream ended.
        """
        call = self._call
        await asyncio.wait_for(call.wait_until(lambda: call.is_computed), timeout_s)
        return call.progress

    async def cancel(self, reason: str = "") -> None:
        """Give the stream up, on every server. Idempotent."""
        if self._call.end is None:
            await self._call.cancel(reason)
        await self._call.drop()

    @property
    def _call(self) -> StreamCall:
        if self._opened_call is None:
            raise FailedPreconditionError("the stream is not open; use it inside `async with`")
        return self._opened_call

    def _keep_result(self, result: Result) -> None:
        self._result = result
