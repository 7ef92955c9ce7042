"""Many streams over one ``Streams`` call: in its lane each is what a ``Stream`` call is.

1. Messages are given to their lanes as they come. What can be applied at once is applied there; the
   rest waits in its lane, so no stream waits for another. The call is read on in any case, so gRPC
   holds nobody back: a client that sends more to one stream than it may loses that stream.
2. Replies of all lanes wait together. While one message is written the next one fills, so the
   busier the call, the less each reply costs. Acknowledgements that wait are merged. A client that
   does not read makes the lanes wait.
3. A lane ends with its last event, or without a word when the client hangs up.
4. The call ends when the client goes away, and when it had no stream for a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Final

from router.call_messages import CallEvent, Cancel, ClientMessage, Failed
from router.interface import Acknowledged
from router.service_decode import Undecodable
from router.service_stream import call_event, client_message
from router.stream_call import FIRST_MESSAGE_S, StreamCall
from router.traces import MAX_TRACE_PARENT_CHARS, TRACE_PARENT
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.lanes import MAX_UNANSWERED
from streamfill.errors import (
    ErrorCode,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    StreamError,
    UnavailableError,
)
from streamfill.observability.logging import log_event

logger = logging.getLogger(__name__)

MAX_LANES: Final = 4096
"""Of one call."""
MAX_REQUESTS: Final = 4096
"""Of one message."""
REQUESTS_PER_TURN: Final = 64
"""Some milliseconds; then others have their turn."""
MAX_WAITING_REPLIES: Final = 1024
MAX_REPLY_BYTES: Final = 256 * 1024
"""Of a message with several replies. Clients read 4 MiB unless they are told otherwise."""
IDLE_S: Final = 60.0
"""A call without a stream is ended after so long, or twice as long."""

RunStream = Callable[["Lane"], Awaitable[None]]


class Lane:
    """One stream of the call.

    Attributes:
        call: set by whoever runs the stream.
        task: that runs it.
        error: of the call, which ends the stream.
    """

    def __init__(self, number: int, lanes: Lanes) -> None:
        self.call: StreamCall | None = None
        self.task: asyncio.Task[None] | None = None
        self.error: StreamError | None = None
        self._number = number
        self._lanes = lanes
        self._queue: deque[ClientMessage] = deque()
        self._wake = asyncio.Event()
        self._is_closed = False
        self._owes_answer = False
        self._last_acknowledged: Acknowledged | None = None

    async def messages(self) -> AsyncIterator[ClientMessage]:
        """Of the client."""
        while True:
            while self._queue:
                yield self._queue.popleft()
            if self._is_closed:
                return
            self._wake.clear()
            await self._wake.wait()

    async def write(self, event: CallEvent) -> None:
        """Tell the client."""
        await self._lanes.write(self._number, event)

    def acknowledge(self, is_answer: bool) -> bool:
        """Tell the client how far the prompt is, with the next message to it. Returns False while
        it is slow.

        Args:
            is_answer: to an operation; such a one is sent even when it says nothing new.
        """
        if not self._lanes.has_room:
            return False
        self._owes_answer |= is_answer
        self._lanes.acknowledge(self._number, self)
        return True

    def take_acknowledgement(self) -> Acknowledged | None:
        """What there is to tell now, if anything."""
        handle = None if self.call is None else self.call.handle
        if handle is None:
            return None
        event = handle.acknowledged()
        if event == self._last_acknowledged and not self._owes_answer:
            return None
        self._last_acknowledged, self._owes_answer = event, False
        return event

    @property
    def stream_id(self) -> int:
        """0 before the stream is open."""
        handle = None if self.call is None else self.call.handle
        return 0 if handle is None else handle.stream_id

    def take(self, message: ClientMessage) -> None:
        """A message came."""
        if not self._queue and self.call is not None and self._lanes.has_room:
            try:
                is_applied = self.call.change_at_once(message)
            except Exception as error:  # noqa: BLE001 - the edge of a stream: others go on
                log_event(logger, "call_failed", level=logging.ERROR, call="Streams", error=error)
                self.fail(InternalError(f"Stream failed: {error!r}"))
                return
            if is_applied:
                self.acknowledge(True)
                return
        if len(self._queue) > MAX_UNANSWERED + isinstance(message.operation, Cancel):
            self.fail(
                ResourceExhaustedError(
                    f"more than {MAX_UNANSWERED} operations of the stream were sent and are "
                    "neither acknowledged nor refused; wait for the answer to some",
                    details={"limit": "unanswered_operations", "limit_value": MAX_UNANSWERED},
                )
            )
            return
        self._queue.append(message)
        self._wake.set()

    def close(self) -> None:
        """No more messages will come."""
        self._is_closed = True
        self._wake.set()

    def fail(self, error: StreamError) -> None:
        """End the stream with this."""
        if self.error is None and self.task is not None:
            self.error = error
            self.task.cancel()

    def hang_up(self) -> None:
        """End the stream without a word."""
        if self.task is not None:
            self.task.cancel()


class Lanes:
    """All streams of one call. ``run`` is awaited once."""

    def __init__(
        self,
        run_stream: RunStream,
        write: Callable[[pb.StreamsReply], Awaitable[None]],
        vocab_size: int,
        take_request: Callable[[], None],
        note_refused: Callable[[StreamError], None],
    ) -> None:
        """Args:
        run_stream: runs the stream of a lane to its end; called in a task for each. Tells the
            client itself how it ended.
        write: tells the client; waits while it is slow.
        vocab_size: of the model.
        take_request: called for each stream but the first, which the call itself was. Raises
            ``StreamError`` where the caller may have no further one.
        note_refused: called with what ends a stream that its runner does not know of.
        """
        self._run_stream = run_stream
        self._write = write
        self._vocab_size = vocab_size
        self._take_request = take_request
        self._note_refused = note_refused
        self._lanes: dict[int, Lane] = {}
        self._newest = 0
        self._is_stopping = False
        self._is_empty = asyncio.Event()
        """Of a call that takes no further streams."""
        self._is_finished = False
        """No further replies will come."""
        self._replies: list[tuple[int, int, CallEvent | Lane | None]] = []
        """That wait: lane, stream, event; a lane in its place is asked what it acknowledges. None:
        it had nothing to say."""
        self._acknowledging: dict[int, int] = {}
        """Lanes whose newest reply that waits is an acknowledgement, with its place."""
        self._wake = asyncio.Event()
        self._room = asyncio.Event()

    async def run(
        self, requests: AsyncIterator[pb.StreamsRequest | Undecodable[pb.StreamsRequest]]
    ) -> None:
        """Ends with the call. Cancelled when the client goes away.

        Raises:
            StreamError: the client said something that no stream can be told.
        """
        reading = asyncio.create_task(self._read(requests))
        writing = asyncio.create_task(self._pass_on())
        idling = asyncio.create_task(self._idle())
        emptying = asyncio.create_task(self._become_empty())
        tasks = [reading, writing, idling, emptying]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            self._close()
            await asyncio.wait({writing, emptying}, return_when=asyncio.FIRST_COMPLETED)
            self._is_finished = True
            self._wake.set()
            await writing
        finally:
            tasks.extend(lane.task for lane in self._lanes.values() if lane.task is not None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        """Take no further streams; the call ends with the last one."""
        self._is_stopping = True
        self._note_empty()

    @property
    def has_room(self) -> bool:
        """For a further reply."""
        return len(self._replies) < MAX_WAITING_REPLIES

    async def write(self, number: int, event: CallEvent) -> None:
        """Tell the client of a lane, behind what it was told before."""
        self._settle_acknowledgement(number)
        while not self.has_room:
            self._room.clear()
            await self._room.wait()
        self.write_now(number, event)

    def write_now(self, number: int, event: CallEvent) -> None:
        """As ``write``, and in any case."""
        lane = self._lanes.get(number)
        self._settle_acknowledgement(number)
        self._replies.append((number, 0 if lane is None else lane.stream_id, event))
        self._wake.set()

    def acknowledge(self, number: int, lane: Lane) -> None:
        """Tell the client of a lane how far its prompt is when the next message leaves."""
        if number not in self._acknowledging:
            self._acknowledging[number] = len(self._replies)
            self._replies.append((number, lane.stream_id, lane))
            self._wake.set()

    def _settle_acknowledgement(self, number: int) -> None:
        """What a lane acknowledges that waits is what it would now, whatever follows: it must not
        acknowledge what is applied behind a refusal that is told behind it."""
        place = self._acknowledging.pop(number, None)
        if place is not None:
            self._replies[place] = _settled(*self._replies[place])

    async def _read(
        self, requests: AsyncIterator[pb.StreamsRequest | Undecodable[pb.StreamsRequest]]
    ) -> None:
        async for request in requests:
            if isinstance(request, Undecodable):
                raise request.error
            if len(request.requests) > MAX_REQUESTS:
                raise InvalidArgumentError(
                    f"a message with {len(request.requests)} requests; {MAX_REQUESTS} are the most",
                    details={"limit": "requests_of_a_message", "limit_value": MAX_REQUESTS},
                )
            for number, item in enumerate(request.requests, 1):
                self._take(item)
                if not number % REQUESTS_PER_TURN:
                    await asyncio.sleep(0)
            while len(self._replies) > 2 * MAX_WAITING_REPLIES:
                # Of refusals, which wait for nobody: somebody opens streams and does not read.
                self._room.clear()
                await self._room.wait()

    def _take(self, item: pb.LaneRequest) -> None:
        lane = self._lanes.get(item.lane)
        is_hang_up = item.HasField("hang_up")
        if lane is None:
            if item.lane < 1:
                raise InvalidArgumentError(f"lane {item.lane}: streams are numbered from 1 on")
            if item.lane <= self._newest:
                return  # it is over, which the client does not know yet
            is_first = not self._newest
            self._newest = item.lane
            if is_hang_up:
                return
            lane = self._begin(item, is_first=is_first)
            if lane is None:
                return
        if is_hang_up:
            lane.hang_up()
        else:
            lane.take(client_message(item.request, self._vocab_size))

    def _begin(self, item: pb.LaneRequest, *, is_first: bool) -> Lane | None:
        try:
            if self._is_stopping:
                raise UnavailableError("the router is about to end")
            if len(self._lanes) >= MAX_LANES:
                raise ResourceExhaustedError(
                    f"the call has {MAX_LANES} streams, which is the most; open another call",
                    details={"limit": "streams_of_a_call", "limit_value": MAX_LANES},
                )
            if not is_first:
                self._take_request()
        except StreamError as error:
            self._refuse(item.lane, error)
            return None
        lane = self._lanes[item.lane] = Lane(item.lane, self)
        lane.task = asyncio.create_task(self._run_lane(lane, item.traceparent))
        # And not in the task, which may be cancelled before it begins.
        lane.task.add_done_callback(partial(self._end_lane, item.lane, lane))
        return lane

    async def _run_lane(self, lane: Lane, trace_parent: str) -> None:
        if trace_parent:
            TRACE_PARENT.set(trace_parent[:MAX_TRACE_PARENT_CHARS])
        await self._run_stream(lane)

    def _end_lane(self, number: int, lane: Lane, task: asyncio.Task[None]) -> None:
        if task.cancelled() and lane.error is not None:
            self._refuse(number, lane.error)
        del self._lanes[number]
        self._note_empty()

    def _refuse(self, number: int, error: StreamError) -> None:
        self._note_refused(error)
        self.write_now(number, Failed(error))

    def _close(self) -> None:
        self._is_stopping = True
        for lane in self._lanes.values():
            lane.close()
        self._note_empty()

    def _note_empty(self) -> None:
        if self._is_stopping and not self._lanes:
            self._is_empty.set()

    async def _become_empty(self) -> None:
        await self._is_empty.wait()

    async def _idle(self) -> None:
        """Ends when nobody uses the call."""
        await asyncio.sleep(FIRST_MESSAGE_S)
        if not self._newest:
            message = f"no message within {FIRST_MESSAGE_S:g} s of the connection"
            raise StreamError(message, code=ErrorCode.ABORTED)
        before = 0
        while self._lanes or before != self._newest:
            before = self._newest
            await asyncio.sleep(IDLE_S)

    async def _pass_on(self) -> None:
        while not self._is_finished or self._replies:
            if not self._replies:
                self._wake.clear()
                await self._wake.wait()
                continue
            # Before anything else happens, as in `_settle_acknowledgement`.
            replies = [_settled(*each) for each in self._replies]
            self._replies = []
            self._acknowledging.clear()
            self._room.set()
            reply, num_bytes = pb.StreamsReply(), 0
            for number, stream_id, event in replies:
                if event is None:
                    continue
                told = call_event(event, stream_id)
                size = told.ByteSize()
                if num_bytes + size > MAX_REPLY_BYTES and num_bytes:
                    await self._write(reply)
                    reply, num_bytes = pb.StreamsReply(), 0
                num_bytes += size
                reply.replies.add(lane=number, event=told)
            if num_bytes:
                await self._write(reply)


def _settled(
    number: int, stream_id: int, waiting: CallEvent | Lane | None
) -> tuple[int, int, CallEvent | None]:
    """A reply with what there is to tell now."""
    event = waiting.take_acknowledgement() if isinstance(waiting, Lane) else waiting
    return number, stream_id, event
