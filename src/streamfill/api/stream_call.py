"""The bidirectional call under a stream of the asyncio client.

A reader task takes every event in: acknowledgements wake whoever waits for them, tokens go into a
bounded queue, so that a slow reader of the answer slows the router down instead of filling this
process. A task of the user that is cancelled leaves the call alone: gRPC itself would cancel the
call with any task that writes to it or reads from it.

When the router vanishes and had the stream in its log, the reader task looks for it, and what was
not answered is sent again on a new call under its old number. Nobody else notices.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio

from streamfill.api import replies
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.resumption import OpenCall, is_gone, resume_call, without_log
from streamfill.api.status_details import from_error_event, from_rpc_error
from streamfill.api.types import Progress, Result
from streamfill.errors import (
    CancelledStreamError,
    ErrorCode,
    FailedPreconditionError,
    InternalError,
    StreamError,
)

T = TypeVar("T")

MAX_QUEUED_TOKENS = 256
"""Of the answer, read from the call and not yet by the user."""

CANCEL_TIMEOUT_S = 2.0
"""How long ``cancel`` waits for the router's word before it drops the call."""


@dataclass(frozen=True)
class _Operation:
    """Sent, and not answered yet."""

    request: pb.StreamRequest
    answered: asyncio.Future[None]


class StreamCall:
    """One call, from ``open`` to ``drop``. Everything happens in the loop that made it.

    Attributes:
        stream_id: None until the router has answered.
        progress: as last heard.
        end: why the call is over, None while it lives; FailedPreconditionError after a good end.
    """

    def __init__(self, open_call: OpenCall, reconnect_s: float = 0.0) -> None:
        """Args:
        open_call: makes a call to the router.
        reconnect_s: how long to look for a router that vanished; 0: not at all.
        """
        self.num_resumptions = 0
        self.stream_id: int | None = None
        self.progress = Progress()
        self.end: StreamError | None = None
        self._open_call = open_call
        self._reconnect_s = reconnect_s
        self._is_resumable = False
        self._is_given_up = False
        self._next_token_index = 0
        self._refused_seqs: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._send_lock = asyncio.Lock()
        self._last_seq = 0
        self._last_segment_sent_s: float | None = None
        self._pending: dict[int, _Operation] = {}
        self._commit_seq: int | None = None
        self._commit_request = pb.StreamRequest()
        self._told_end: StreamError | None = None
        self._changed = asyncio.Condition()
        self._answer_queue: asyncio.Queue[tuple[pb.Token | pb.Done | StreamError, float]]
        self._answer_queue = asyncio.Queue(MAX_QUEUED_TOKENS)
        self._call = open_call()
        self._resender: asyncio.Task[None] | None = None
        self._reader = asyncio.create_task(self._read_events())

    async def open(self, opening: pb.Open) -> None:
        """Open the stream. Raises ``StreamError``."""
        await self._write(pb.StreamRequest(open=opening))
        await self.wait_until(lambda: self.stream_id is not None)

    async def operate(self, request: pb.StreamRequest) -> None:
        """Send an append or update under the next number; returns when it is acknowledged.

        Raises:
            StreamError: it was refused, or the call is over.
        """
        await _shielded(self._operate(request))

    async def commit(self, commit: pb.Commit) -> tuple[float, float]:
        """Send the commit. Returns as ``AnswerSource.start``."""
        return await _shielded(self._commit(commit))

    async def next_answer_event(self) -> tuple[pb.Token | pb.Done, float]:
        """As ``AnswerSource.next_event``."""
        if self._answer_queue.empty() and self.end is not None:
            raise self.end
        event, arrival_s = await self._answer_queue.get()
        if isinstance(event, StreamError):
            raise event
        return event, arrival_s

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that an event brings about. Raises ``end`` if it never will be."""
        async with self._changed:
            await self._changed.wait_for(lambda: condition() or self.end is not None)
        if self.end is not None and not condition():
            raise self.end

    @property
    def is_computed(self) -> bool:
        """Whether everything that was sent has arrived and is computed."""
        return not self._pending and self.progress.is_computed

    async def cancel(self, reason: str) -> None:
        """Ask the router to end the stream, and wait until it has."""
        request = pb.StreamRequest(cancel=pb.Cancel(reason=reason))
        self._is_given_up = True
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT_S), self._send_lock:
                await self._write(request)
        except (StreamError, TimeoutError):
            return  # it has ended meanwhile, which is what was wanted, or its router is away
        await asyncio.wait({self._reader}, timeout=CANCEL_TIMEOUT_S)

    def cancel_soon(self) -> None:
        """End the call without waiting, from any thread."""
        self._is_given_up = True
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_call)

    def _end_call(self) -> None:
        self._call.cancel()

    async def drop(self) -> None:
        """End the call if it lives, and its reader. Idempotent."""
        self._is_given_up = True
        self._call.cancel()
        self._reader.cancel()
        await asyncio.wait({self._reader})
        if self._resender is not None:
            self._resender.cancel()
            await asyncio.wait({self._resender})

    async def _operate(self, request: pb.StreamRequest) -> None:
        async with self._send_lock:
            if self.end is not None:  # it came while others sent; nobody will read an answer
                raise self.end
            self._last_seq += 1
            seq = request.seq = self._last_seq
            answered: asyncio.Future[None] = self._loop.create_future()
            self._pending[seq] = _Operation(request, answered)
            self._last_segment_sent_s = time.monotonic()
            try:
                await self._write(request)
            except StreamError:
                if self._pending.pop(seq, None) is not None:
                    raise
        await answered  # the reader may know already why the stream has ended

    async def _commit(self, commit: pb.Commit) -> tuple[float, float]:
        async with self._send_lock:
            if self._commit_seq is not None:
                # Its refusal would come in between the tokens of the first answer.
                already = f"stream {self.stream_id} is already committed"
                raise self.end or FailedPreconditionError(already)
            self._last_seq += 1
            self._commit_seq = self._last_seq
            now_s = time.monotonic()
            if commit.HasField("final_segment") or self._last_segment_sent_s is None:
                self._last_segment_sent_s = now_s
            self._commit_request = pb.StreamRequest(seq=self._last_seq, commit=commit)
            await self._write(self._commit_request)
            return now_s, self._last_segment_sent_s

    async def _write(self, request: pb.StreamRequest) -> None:
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            # The call is over. That may be all that gRPC can say of a write; the reader knows why,
            # and sends the operation again if the stream goes on.
            if self._may_go_on and self.end is None:
                return
            await asyncio.wait({self._reader})
            if self.end is None:
                raise
            raise self.end from error

    async def _read_events(self) -> None:
        """The reader task. Ends with the call, and tells everybody why."""
        end: StreamError = CancelledStreamError("this client gave the stream up")
        try:
            while True:
                try:
                    event = await self._call.read()
                except grpc.aio.AioRpcError as error:
                    if self._told_end is not None or not is_gone(error):
                        raise
                    if not self._may_go_on:
                        raise self._lost(from_rpc_error(error)) from error
                    await self._go_on()
                    continue
                if not isinstance(event, pb.StreamEvent):
                    break
                await self._take_in(event)
            complete = FailedPreconditionError(f"stream {self.stream_id} is complete")
            end = self._told_end or complete
        except grpc.aio.AioRpcError as error:
            end = self._told_end or from_rpc_error(error)
            end.__cause__ = error
        except StreamError as error:
            end = error
        except asyncio.CancelledError:
            pass  # by `drop` or `cancel_soon`, or because the loop closes
        except Exception as error:  # noqa: BLE001 - the edge of the loop; told to every waiter
            end = InternalError(f"a reply cannot be used: {error!r}")
            end.__cause__ = error
        finally:
            await self._finish_reading(end)

    @property
    def _may_go_on(self) -> bool:
        """Whether the stream is looked for when its call breaks."""
        return self._is_resumable and self._reconnect_s > 0 and not self._is_given_up

    def _lost(self, error: StreamError) -> StreamError:
        unknown = self.stream_id is None or self._is_resumable or self._reconnect_s <= 0
        return error if unknown else without_log(error)

    async def _go_on(self) -> None:
        """Have a new call in the place of one that broke."""
        await self._send_lock.acquire()  # what is sent now has to wait for what was sent before
        try:
            assert self.stream_id is not None
            unanswered = [*self._pending, self._last_seq + 1]
            if self._commit_seq is not None and self.progress.seq < self._commit_seq:
                unanswered.append(self._commit_seq)
            next_seq = min(unanswered)
            resume = pb.Resume(
                stream_id=self.stream_id,
                next_token_index=self._next_token_index,
                next_seq=next_seq,
                refused_seqs=[seq for seq in self._refused_seqs if seq > next_seq],
            )
            self._call, opened = await resume_call(
                self._open_call,
                resume,
                reconnect_s=self._reconnect_s,
                is_given_up=lambda: self._is_given_up,
            )
            self.num_resumptions += 1
            await self._take_in_resumed(opened)
            again = [self._pending[seq].request for seq in sorted(self._pending)]
            if self._commit_seq is not None and self._commit_seq > opened.acknowledged.seq:
                again.append(self._commit_request)
        except BaseException:
            self._send_lock.release()
            raise
        # Not by the reader: the router may write before it reads on.
        self._resender = asyncio.create_task(self._send_again(again))

    async def _take_in_resumed(self, opened: pb.Opened) -> None:
        if opened.acknowledged.seq < self.progress.seq:
            raise StreamError(
                f"the router had acknowledged operation {self.progress.seq}, and after its restart "
                f"knows only of {opened.acknowledged.seq}: its log has lost something",
                code=ErrorCode.DATA_LOSS,
            )
        for error in opened.refused:
            await self._take_in_error(error)
        await self._take_in(pb.StreamEvent(acknowledged=opened.acknowledged))

    async def _send_again(self, requests: Sequence[pb.StreamRequest]) -> None:
        try:
            for request in requests:
                await self._write(request)
        except StreamError:
            pass  # everybody who waits is told the same by the reader
        finally:
            self._send_lock.release()

    async def _take_in(self, event: pb.StreamEvent) -> None:
        match event.WhichOneof("event"):
            case "opened":
                self.stream_id = event.opened.stream_id
                self._is_resumable = event.opened.is_resumable
                await self._notify()
            case "acknowledged":
                self.progress = replies.progress(event.acknowledged)
                for seq in [seq for seq in self._pending if seq <= self.progress.seq]:
                    _resolve(self._pending.pop(seq).answered, None)
                await self._notify()
            case "token":
                if event.token.index != self._next_token_index:
                    raise InternalError(
                        f"token {event.token.index} came instead of {self._next_token_index}"
                    )
                self._next_token_index += 1
                await self._answer_queue.put((event.token, time.monotonic()))
            case "done":
                await self._answer_queue.put((event.done, time.monotonic()))
            case "error":
                await self._take_in_error(event.error)
            case "failed":
                self._told_end = from_error_event(event.failed)
            case _:
                pass  # an event of a later version of the protocol

    async def _take_in_error(self, event: pb.Error) -> None:
        error = from_error_event(event)
        self._refused_seqs.append(event.seq)
        if event.seq == self._commit_seq:
            self._commit_seq = None
            await self._answer_queue.put((error, time.monotonic()))
        elif event.seq in self._pending:
            _resolve(self._pending.pop(event.seq).answered, error)

    async def _finish_reading(self, end: StreamError) -> None:
        self.end = end
        for seq in list(self._pending):
            _resolve(self._pending.pop(seq).answered, end)
        if not self._answer_queue.full():  # a reader with a full queue meets `end` behind it
            self._answer_queue.put_nowait((end, time.monotonic()))
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class StreamAnswerSource:
    """An ``AnswerSource`` over the events of a call. ``on_result`` gets the whole answer."""

    def __init__(
        self, call: StreamCall, commit: pb.Commit, on_result: Callable[[Result], None]
    ) -> None:
        self._call = call
        self._commit = commit
        self._on_result = on_result

    async def start(self) -> tuple[float, float]:
        return await self._call.commit(self._commit)

    async def next_event(self) -> tuple[pb.Token | pb.Done, float]:
        return await self._call.next_answer_event()

    def finish(self, result: Result) -> None:
        self._on_result(result)

    def abandon(self) -> None:
        self._call.cancel_soon()


async def _shielded(work: Coroutine[Any, Any, T]) -> T:
    """Like ``asyncio.shield``. When nobody waits any more, an error in the end is not worth a line
    on the user's terminal."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(task)


def _resolve(future: asyncio.Future[None], error: StreamError | None) -> None:
    """Wake the operation, unless its caller has gone."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # where its task was cancelled while it wrote, nobody else looks
