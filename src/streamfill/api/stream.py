"""A stream of the asyncio client: one bidirectional call.

1. ``async with`` opens the call, sends ``Open`` and waits for ``Opened``.
2. A reader task takes every event in: acknowledgements wake whoever waits for them, tokens go into
   a bounded queue, so that a slow reader of the answer slows the router down instead of filling
   this process.
3. ``append`` and ``update`` send an operation with the next sequence number and wait until it is
   acknowledged or refused.
4. ``commit`` returns an ``Answer``, which sends the commit when its first token is asked for. One
   that is left half read cancels the call.
5. Leaving ``async with`` before the end of an answer cancels the call, and with it the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import grpc.aio

from streamfill.api import replies, requests
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.answer import Answer
from streamfill.api.status_details import from_error_event, from_rpc_error
from streamfill.api.types import Progress, Result, SamplingOptions
from streamfill.errors import (
    CancelledStreamError,
    FailedPreconditionError,
    InternalError,
    StreamError,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from streamfill.api.streamfill_pb2_grpc import StreamfillStub

MAX_QUEUED_TOKENS = 256
"""Of the answer, read from the call and not yet by the user."""

CANCEL_TIMEOUT_S = 2.0
"""How long ``cancel`` waits for the router's word before it drops the call."""


class Stream:
    """One stream. Made by ``Client.stream``; used inside ``async with`` in one event loop."""

    def __init__(self, stub: StreamfillStub, opening: pb.Open) -> None:
        self._stub = stub
        self._opening = opening
        self._send_lock = asyncio.Lock()
        self._last_seq = 0
        self._last_segment_sent_s: float | None = None
        self._pending: dict[int, asyncio.Future[None]] = {}
        self._changed = asyncio.Condition()
        self._answer_queue: asyncio.Queue[tuple[pb.Token | pb.Done | StreamError, float]]
        self._answer_queue = asyncio.Queue(MAX_QUEUED_TOKENS)
        self._commit_seq: int | None = None
        self._stream_id: int | None = None
        self._progress = Progress()
        self._result: Result | None = None
        self._end: StreamError | None = None

    async def __aenter__(self) -> Stream:
        self._loop = asyncio.get_running_loop()
        self._call: grpc.aio.StreamStreamCall[pb.StreamRequest, pb.StreamEvent]
        self._call = self._stub.Stream(None)
        self._reader = asyncio.create_task(self._read_events())
        try:
            await self._write(pb.StreamRequest(open=self._opening))
            async with self._changed:
                await self._changed.wait_for(lambda: self._stream_id is not None or self._end)
            if self._stream_id is None and self._end is not None:
                raise self._end
        except BaseException:
            await self._drop_call()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._drop_call()

    @property
    def stream_id(self) -> int:
        """Minted by the router."""
        return self._check_open()

    @property
    def progress(self) -> Progress:
        """How far the prompt has come, as last heard."""
        return self._progress

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
    ) -> Progress:
        """Put a piece behind the context; exactly one argument. Returns when the router has it.

        Raises:
            StreamError: it was refused. The stream is unharmed, unless it has ended.
        """
        segment = requests.segment(text, token_ids, messages)
        return await self._operate(pb.StreamRequest(append=pb.Append(segment=segment)))

    async def update(
        self,
        text: str | bytes | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
    ) -> Progress:
        """Replace the whole context. As ``append`` otherwise."""
        segment = requests.segment(text, token_ids, messages)
        return await self._operate(pb.StreamRequest(update=pb.Update(segment=segment)))

    def commit(
        self,
        text: str | bytes | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """The prompt is complete, with an optional last piece; read the answer from what this
        returns. A refused commit raises there and may be corrected and tried again."""
        commit = pb.Commit(
            sampling=requests.sampling(sampling),
            final_segment=requests.optional_segment(text, token_ids, messages),
        )
        return Answer(_StreamAnswerSource(self, commit))

    async def wait_computed(self, timeout_s: float | None = None) -> Progress:
        """Wait until the KV of everything that was sent is computed.

        Raises:
            asyncio.TimeoutError: it is not, after ``timeout_s``.
            StreamError: the stream ended.
        """

        async def wait() -> None:
            async with self._changed:
                await self._changed.wait_for(lambda: self._is_computed() or self._end)

        await asyncio.wait_for(wait(), timeout_s)
        if self._end is not None and not self._is_computed():
            raise self._end
        return self._progress

    async def cancel(self, reason: str = "") -> None:
        """Give the stream up, on every server. Idempotent."""
        self._check_open()
        if self._end is None:
            try:
                async with self._send_lock:
                    await self._write(pb.StreamRequest(cancel=pb.Cancel(reason=reason)))
                await asyncio.wait({self._reader}, timeout=CANCEL_TIMEOUT_S)
            except StreamError:
                pass  # it has ended meanwhile, which is what was wanted
        await self._drop_call()

    def _check_open(self) -> int:
        if self._stream_id is None:
            raise FailedPreconditionError("the stream is not open; use it inside `async with`")
        return self._stream_id

    def _is_computed(self) -> bool:
        return not self._pending and self._progress.is_computed

    async def _operate(self, request: pb.StreamRequest) -> Progress:
        """Send an operation and wait for its answer. A caller who is cancelled meanwhile leaves the
        operation in place: gRPC would otherwise cancel the whole call."""
        self._check_open()
        await asyncio.shield(asyncio.ensure_future(self._send_operation(request)))
        return self._progress

    async def _send_operation(self, request: pb.StreamRequest) -> None:
        async with self._send_lock:
            self._last_seq += 1
            seq = request.seq = self._last_seq
            answered = asyncio.get_running_loop().create_future()
            self._pending[seq] = answered
            self._last_segment_sent_s = time.monotonic()
            try:
                await self._write(request)
            except StreamError:
                if self._pending.pop(seq, None) is not None:
                    raise
        await answered  # the reader may know already why the stream has ended

    async def send_commit(self, commit: pb.Commit) -> tuple[float, float]:
        """For the answer's source only."""
        self._check_open()
        return await asyncio.shield(asyncio.ensure_future(self._send_commit(commit)))

    async def _send_commit(self, commit: pb.Commit) -> tuple[float, float]:
        async with self._send_lock:
            self._last_seq += 1
            self._commit_seq = self._last_seq
            now_s = time.monotonic()
            if commit.HasField("final_segment") or self._last_segment_sent_s is None:
                self._last_segment_sent_s = now_s
            await self._write(pb.StreamRequest(seq=self._last_seq, commit=commit))
            return now_s, self._last_segment_sent_s

    async def next_answer_event(self) -> tuple[pb.Token | pb.Done, float]:
        """For the answer's source only."""
        if self._answer_queue.empty() and self._end is not None:
            raise self._end
        event, arrival_s = await self._answer_queue.get()
        if isinstance(event, StreamError):
            raise event
        return event, arrival_s

    def finish(self, result: Result) -> None:
        """For the answer's source only."""
        self._result = result

    def abandon(self) -> None:
        """For the answer's source only: a half read answer is given up, in any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)

    async def _write(self, request: pb.StreamRequest) -> None:
        try:
            await self._call.write(request)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.InvalidStateError as error:  # the call is over
            await self._reader
            if self._end is None:
                raise
            raise self._end from error

    async def _read_events(self) -> None:
        """The reader task. Ends with the call and never raises but for its cancellation."""
        end: StreamError = CancelledStreamError("this client gave the stream up")
        try:
            while True:
                event = await self._call.read()
                if not isinstance(event, pb.StreamEvent):
                    break
                await self._take_in(event)
            end = FailedPreconditionError(f"stream {self._stream_id} is complete")
        except grpc.aio.AioRpcError as error:
            end = from_rpc_error(error)
            end.__cause__ = error
        except asyncio.CancelledError:
            pass  # by `_drop_call`, or because the loop closes
        except Exception as error:  # noqa: BLE001 - the edge of the loop; told to every waiter
            end = InternalError(f"a reply cannot be used: {error!r}")
            end.__cause__ = error
        finally:
            await self._finish_reading(end)

    async def _take_in(self, event: pb.StreamEvent) -> None:
        match event.WhichOneof("event"):
            case "opened":
                self._stream_id = event.opened.stream_id
                await self._notify()
            case "acknowledged":
                self._progress = replies.progress(event.acknowledged)
                for seq in [seq for seq in self._pending if seq <= self._progress.seq]:
                    _resolve(self._pending.pop(seq), None)
                await self._notify()
            case "token":
                await self._answer_queue.put((event.token, time.monotonic()))
            case "done":
                await self._answer_queue.put((event.done, time.monotonic()))
            case "error":
                await self._take_in_error(event.error)
            case _:
                pass  # an event of a later version of the protocol

    async def _take_in_error(self, event: pb.Error) -> None:
        error = from_error_event(event)
        if event.seq == self._commit_seq:
            self._commit_seq = None
            await self._answer_queue.put((error, time.monotonic()))
        elif event.seq in self._pending:
            _resolve(self._pending.pop(event.seq), error)

    async def _finish_reading(self, end: StreamError) -> None:
        self._end = end
        for seq in list(self._pending):
            _resolve(self._pending.pop(seq), end)
        if not self._answer_queue.full():  # a reader with a full queue meets `_end` behind it
            self._answer_queue.put_nowait((end, time.monotonic()))
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _drop_call(self) -> None:
        self._call.cancel()
        self._reader.cancel()
        await asyncio.wait({self._reader})


class _StreamAnswerSource:
    """An ``AnswerSource`` over the events of a ``Stream``."""

    def __init__(self, stream: Stream, commit: pb.Commit) -> None:
        self._stream = stream
        self._commit = commit

    async def start(self) -> tuple[float, float]:
        return await self._stream.send_commit(self._commit)

    async def next_event(self) -> tuple[pb.Token | pb.Done, float]:
        return await self._stream.next_answer_event()

    def finish(self, result: Result) -> None:
        self._stream.finish(result)

    def abandon(self) -> None:
        self._stream.abandon()


def _resolve(future: asyncio.Future[None], error: StreamError | None) -> None:
    """Wake the operation, unless its caller has gone."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
