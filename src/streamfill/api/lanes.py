"""Many streams over one ``Streams`` call, each with what ``StreamCall`` needs of a call of its own.

What streams say within one turn of the loop leaves in one message, and while it is written the next
one fills. One reader gives every event to its stream, whether somebody waits for it there or not:
a stream whose answer nobody reads keeps it here, and does not hold the others up.
"""

from __future__ import annotations

import asyncio
import bisect
from collections import deque
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio

from streamfill.api import streamfill_pb2 as pb

if TYPE_CHECKING:
    from streamfill.api.streamfill_pb2_grpc import StreamfillStub

MAX_UNANSWERED: Final = 16
"""Appends and updates of one stream that are neither acknowledged nor refused; the router's limit,
as ``streamfill.proto`` says it. A commit and a cancellation may come on top."""
MAX_WAITING: Final = 1024
"""Requests of all streams that gRPC has not taken yet."""
MAX_BATCH_REQUESTS: Final = 1024
MAX_BATCH_BYTES: Final = 1024 * 1024
"""Of a message of several requests."""
IDLE_S: Final = 20.0
"""A call without streams is ended after so long. The router would do so after a minute."""


class Lane:
    """One stream of the call. Made by ``SharedCall.open``."""

    def __init__(self, number: int, shared: SharedCall) -> None:
        self._number = number
        self._shared = shared
        self._events: deque[pb.StreamEvent] = deque()
        self._changed = asyncio.Event()
        self._unanswered: list[int] = []
        self._is_over = False
        self._is_cancelled = False
        self._error: grpc.aio.AioRpcError | None = None

    async def write(self, request: pb.StreamRequest) -> None:
        """Send a message; waits while the stream, or the whole call, has too much under way.

        Raises:
            grpc.aio.AioRpcError: the call broke.
            asyncio.InvalidStateError: the stream is over.
        """
        is_counted = request.WhichOneof("operation") in ("append", "update")
        while is_counted and len(self._unanswered) >= MAX_UNANSWERED and not self._is_over:
            self._changed.clear()
            await self._changed.wait()
        await self._shared.wait_for_room(self)
        if self._error is not None:
            raise self._error
        if self._is_over:
            raise asyncio.InvalidStateError("the stream is over")
        if is_counted and request.HasField("seq"):
            bisect.insort(self._unanswered, request.seq)
        self._shared.send(pb.LaneRequest(lane=self._number, request=request))

    async def read(self) -> pb.StreamEvent | None:
        """The next event; None behind the last one.

        Raises:
            grpc.aio.AioRpcError: the call broke.
            asyncio.CancelledError: the stream was given up.
        """
        while not self._events:
            if self._is_cancelled:
                raise asyncio.CancelledError
            if self._error is not None:
                raise self._error
            if self._is_over:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()

    def cancel(self) -> bool:
        """Give the stream up. Returns whether it was not over."""
        if self._is_over:
            return False
        self._shared.send(pb.LaneRequest(lane=self._number, hang_up=pb.HangUp()))
        self._shared.forget(self._number)
        self._events.clear()
        self.end(is_cancelled=True)
        return True

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be said to it."""
        return self._is_over

    def take(self, event: pb.StreamEvent) -> None:
        """An event came."""
        kind = event.WhichOneof("event")
        if kind == "acknowledged":
            del self._unanswered[: bisect.bisect_right(self._unanswered, event.acknowledged.seq)]
        elif kind == "error" and event.error.seq in self._unanswered:
            self._unanswered.remove(event.error.seq)
        self._events.append(event)
        if kind in ("done", "failed"):
            self._shared.forget(self._number)
            self.end()
        self._changed.set()

    def end(self, error: grpc.aio.AioRpcError | None = None, *, is_cancelled: bool = False) -> None:
        """No more events will come."""
        self._is_over = True
        self._error = error
        self._is_cancelled = is_cancelled
        self._changed.set()


class SharedCall:
    """One ``Streams`` call."""

    def __init__(self, stub: StreamfillStub) -> None:
        self.is_over = False
        """Further streams need another call."""
        self._call = stub.Streams(None)
        self._lanes: dict[int, Lane] = {}
        self._newest = 0
        self._waiting: deque[pb.LaneRequest] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._idle: asyncio.TimerHandle | None = None
        self._writer = asyncio.create_task(self._write())
        self._reader = asyncio.create_task(self._read())

    def open(self) -> Lane:
        """A lane for a further stream."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self._newest += 1
        lane = self._lanes[self._newest] = Lane(self._newest, self)
        return lane

    def forget(self, number: int) -> None:
        """The stream of this lane is over."""
        self._lanes.pop(number, None)
        if not self._lanes and not self.is_over:
            self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._end_if_idle)

    async def wait_for_room(self, lane: Lane) -> None:
        """Until gRPC has taken enough, or the stream is over."""
        while len(self._waiting) >= MAX_WAITING and not lane.is_over:
            self._room.clear()
            await self._room.wait()

    def send(self, request: pb.LaneRequest) -> None:
        """Behind what was sent before."""
        if not self.is_over:
            self._waiting.append(request)
            self._wake.set()

    async def close(self) -> None:
        """Give all streams up. Idempotent."""
        self._end(None)
        self._call.cancel()
        for task in (self._reader, self._writer):
            task.cancel()
        await asyncio.wait({self._reader, self._writer})

    def _end_if_idle(self) -> None:
        if not self._lanes:
            self._end(None)
            self._call.cancel()
            self._writer.cancel()

    def _end(self, error: grpc.aio.AioRpcError | None) -> None:
        """No lane gets anything more; None: because this client gave them up."""
        self.is_over = True
        if self._idle is not None:
            self._idle.cancel()
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            # Each its own: what is raised collects the places it was raised at.
            lane.end(None if error is None else _copy(error), is_cancelled=error is None)
        self._waiting.clear()
        self._room.set()

    async def _read(self) -> None:
        error: grpc.aio.AioRpcError | None = None
        try:
            while isinstance(reply := await self._call.read(), pb.StreamsReply):
                for each in reply.replies:
                    lane = self._lanes.get(each.lane)
                    if lane is not None:
                        lane.take(each.event)
            error = _broken(
                grpc.StatusCode.UNAVAILABLE, "the router ended the call that its streams shared"
            )
        except grpc.aio.AioRpcError as broken:
            error = broken
        except asyncio.CancelledError:
            pass  # by `close`, or because the channel closes
        finally:
            self._end(error)
            self._writer.cancel()

    async def _write(self) -> None:
        while True:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            batch = [self._waiting.popleft()]
            num_bytes = batch[0].ByteSize()
            while self._waiting and len(batch) < MAX_BATCH_REQUESTS:
                num_bytes += self._waiting[0].ByteSize()
                if num_bytes > MAX_BATCH_BYTES:
                    break
                batch.append(self._waiting.popleft())
            self._room.set()
            try:
                await self._call.write(pb.StreamsRequest(requests=batch))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reader knows why


class Lanes:
    """The lanes of one client, over one call at a time."""

    def __init__(self, stub: StreamfillStub) -> None:
        self._stub = stub
        self._shared: SharedCall | None = None

    def open(self) -> Lane:
        """A lane for a further stream, of a new call if the last one is over."""
        if self._shared is None or self._shared.is_over:
            self._shared = SharedCall(self._stub)
        return self._shared.open()

    async def close(self) -> None:
        """Give all streams up. Idempotent."""
        if self._shared is not None:
            await self._shared.close()


def _broken(code: grpc.StatusCode, details: str | None) -> grpc.aio.AioRpcError:
    none = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, none, none, details, None)


def _copy(error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(*(error.trailing_metadata() or ()))  # type: ignore[arg-type]
    return grpc.aio.AioRpcError(
        error.code(), grpc.aio.Metadata(), trailing, error.details(), error.debug_error_string()
    )
