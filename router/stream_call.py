"""One stream over one two-way connection: a gRPC ``Stream`` call, a lane of a ``Streams`` call, or
a WebSocket.

1. The first message opens the stream, or goes on with one whose call a restart of the router cost,
   and comes soon; what goes wrong until then ends the call.
2. Two tasks share the call: the *operations* task reads the client's messages and applies them in
   order, the *events* task passes on what the core reports. A slow client makes both wait. While an
   operation waits for room, one message behind it is read and no more, so that the transport's flow
   control holds the client back; the one, since it may be the commit or a cancellation, which end
   the wait.
3. A refused operation is answered in the call by ``Refused`` with its number.
4. The call ends with ``DoneEvent``, or with ``Failed`` and the error that ended the stream. A
   client that closes its side without a commit, or vanishes, has given the stream up.

What a message looks like is the transport's business: it hands over what each one asks for, and
writes what the client is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import assert_never

from router.call_messages import (
    Append,
    CallEvent,
    Cancel,
    ClientMessage,
    Commit,
    Failed,
    Open,
    Opened,
    Operation,
    Refused,
    Resume,
    Unreadable,
    Update,
)
from router.events import TAKEN_OVER
from router.interface import Acknowledged, StreamHandle, StreamManager
from streamfill.errors import (
    CancelledStreamError,
    ErrorCode,
    FailedPreconditionError,
    InternalError,
    StreamError,
)
from streamfill.messages.common import StreamMode
from streamfill.stream.state import StreamState

FIRST_MESSAGE_S = 10.0
"""A client that connects has something to say; the core looks after streams that are open."""
TELL_S = 1.0
"""For the last event of a call that ends badly: a client that reads nothing does not keep it."""
MAX_UNDER_WAY = 2
"""Operations of one call that were read and are not applied yet."""


@contextmanager
def refusals_noted(handle: StreamHandle, seq: int | None) -> Iterator[None]:
    """A refused operation uses its number up, also one that the core never sees."""
    try:
        yield
    except StreamError as error:
        if seq is not None:
            handle.note_refused(seq, error)
        raise


def _applied_at_once(handle: StreamHandle, message: ClientMessage) -> bool:
    """Most segments need no task of their own. One that is refused gets its answer there."""
    operation = message.operation
    if not isinstance(operation, Append if handle.mode is StreamMode.APPEND else Update):
        return False
    try:
        return handle.change_at_once(operation.read(), message.seq)
    except StreamError:
        return False


class StreamCall:
    """Runs one call. ``run`` is awaited once.

    Attributes:
        handle: the stream, as soon as it is open.
    """

    def __init__(
        self,
        manager: StreamManager,
        messages: AsyncIterator[ClientMessage],
        write: Callable[[CallEvent], Awaitable[None]],
        acknowledge: Callable[[bool], bool] | None = None,
    ) -> None:
        """Args:
        manager: the core.
        messages: of the client; ends when it closes its side.
        write: tells the client; waits while it is slow. Called by one task at a time.
        acknowledge: tells the client soon how far the prompt is then; called with whether that
            answers an operation. Returns whether it will. None: ``write`` does that too.
        """
        self._manager = manager
        self._messages = messages
        self._write_unlocked = write
        self._acknowledge_soon = acknowledge
        self._write_lock = asyncio.Lock()
        self._last_acknowledged: Acknowledged | None = None
        self._takes_operations = False
        self._under_way: set[asyncio.Task[None]] = set()
        self.handle: StreamHandle | None = None
        self._num_resumptions = 0
        """Of the stream, up to this call's."""
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Nothing of the stream is left to cancel, or another call went on with it."""
        taken_over = (
            self.handle is not None and self.handle.num_resumptions != self._num_resumptions
        )
        return self._is_over or taken_over

    async def run(self) -> None:
        """Ends with the stream. Cancelled when the client goes away.

        Raises:
            StreamError: the stream could not be opened, or ended badly.
        """
        try:
            await self._run()
        except Exception as error:
            told = error
            if not isinstance(told, StreamError):
                told = InternalError(f"Stream failed: {error!r}")
            # Whatever becomes of the telling, how the call ends says it too.
            with suppress(Exception):
                async with asyncio.timeout(TELL_S):
                    await self._write(Failed(told))
            raise

    def change_at_once(self, message: ClientMessage) -> bool:
        """Apply a segment that comes behind all of `messages`, if nothing has to wait, and leave
        it to the caller to acknowledge it. Returns whether it was; else it goes the way of
        `messages`."""
        return (
            self.handle is not None
            and self._takes_operations
            and not self._under_way
            and _applied_at_once(self.handle, message)
        )

    async def _run(self) -> None:
        opened = await self._open()
        handle = self.handle
        assert handle is not None
        await self._write(opened)
        events = asyncio.create_task(self._pass_events_on(handle))
        operations = asyncio.create_task(self._apply_operations(handle))
        tasks = {events, operations}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not events.done():
                operations.result()
                if handle.status().state is StreamState.OPEN:
                    raise CancelledStreamError("the client ended the call without a commit")
            await events
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _open(self) -> Opened:
        try:
            async with asyncio.timeout(FIRST_MESSAGE_S):
                first = await anext(self._messages, None)
        except TimeoutError as error:
            message = f"no message within {FIRST_MESSAGE_S:g} s of the connection"
            raise StreamError(message, code=ErrorCode.ABORTED) from error
        if first is None:
            raise CancelledStreamError("the client ended the call without a message")
        operation = first.operation
        if isinstance(operation, Unreadable):
            raise operation.error
        if isinstance(operation, Resume):
            stream_id, point = operation.read()
            handle = self._manager.get(stream_id)
            resumed = handle.resume(point)
            self.handle, self._num_resumptions = handle, handle.num_resumptions
            return Opened(handle.stream_id, handle.is_resumable, resumed)
        if not isinstance(operation, Open):
            got = type(operation).__name__.lower()
            raise FailedPreconditionError(
                f"the first message of a call is open or resume, not {got}"
            )
        options = replace(operation.read(), is_resumable=True, needs_call=True)
        self.handle = await self._manager.open(options)
        return Opened(self.handle.stream_id, self.handle.is_resumable)

    async def _pass_events_on(self, handle: StreamHandle) -> None:
        try:
            if self.is_over:  # taken over while `Opened` was written: the events are not for us
                raise FailedPreconditionError(TAKEN_OVER)
            async for event in handle.events(self._on_acknowledged):
                if isinstance(event, Acknowledged):
                    await self._acknowledge(handle, is_answer=False)
                else:
                    await self._write(event)
        except StreamError:  # the stream is over, or another call took it over
            self._is_over = True
            raise
        self._is_over = True

    async def _apply_operations(self, handle: StreamHandle) -> None:
        under_way = self._under_way
        may_read = asyncio.Semaphore(MAX_UNDER_WAY)

        def end(task: asyncio.Task[None]) -> None:
            under_way.discard(task)
            may_read.release()

        try:
            async with asyncio.TaskGroup() as group:
                await may_read.acquire()
                self._takes_operations = True
                async for message in self._messages:
                    if not under_way and _applied_at_once(handle, message):
                        await self._acknowledge(handle, is_answer=True)
                        continue
                    # Tasks begin in the order in which they were made, and the handle keeps it.
                    task = group.create_task(self._apply_or_refuse(handle, message))
                    under_way.add(task)
                    task.add_done_callback(end)
                    await may_read.acquire()
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        finally:
            self._takes_operations = False

    async def _apply_or_refuse(self, handle: StreamHandle, message: ClientMessage) -> None:
        try:
            with refusals_noted(handle, message.seq):
                await self._apply(handle, message.operation, message.seq)
        except StreamError as error:
            await self._write(Refused(message.seq or 0, error))

    async def _apply(self, handle: StreamHandle, operation: Operation, seq: int | None) -> None:
        match operation:
            case Append():
                await handle.append(operation.read(), seq)
                await self._acknowledge(handle, is_answer=True)
            case Update():
                await handle.update(operation.read(), seq)
                await self._acknowledge(handle, is_answer=True)
            case Commit():
                await handle.commit(operation.read(), seq)
            case Cancel():
                await handle.cancel(operation.reason or "asked by the client")
            case Open() | Resume():
                raise FailedPreconditionError(f"stream {handle.stream_id} is already open")
            case Unreadable():
                raise operation.error
            case _:
                assert_never(operation)

    def _on_acknowledged(self) -> bool:
        return self._will_acknowledge(is_answer=False)

    def _will_acknowledge(self, *, is_answer: bool) -> bool:
        """Whether the transport does it. It must not overtake a refusal that waits."""
        soon = self._acknowledge_soon
        return soon is not None and not self._write_lock.locked() and soon(is_answer)

    async def _acknowledge(self, handle: StreamHandle, *, is_answer: bool) -> None:
        """Say how far the prompt is now: one that waited for its turn would be out of date.

        Args:
            is_answer: to an operation; such a one is sent even when it says nothing new.
        """
        if self._will_acknowledge(is_answer=is_answer):
            return
        async with self._write_lock:
            event = handle.acknowledged()
            if is_answer or event != self._last_acknowledged:
                self._last_acknowledged = event
                await self._write_unlocked(event)

    async def _write(self, event: CallEvent) -> None:
        """A transport takes one write at a time."""
        async with self._write_lock:
            await self._write_unlocked(event)
