"""What a client does to its stream: one operation at a time, each all or nothing.

Numbers (`client_seq`) make repeating safe. The next new number is applied; one that was applied
before, or that leaves a gap, is ignored and acknowledged. A refused operation uses its number up,
but may also be sent again under it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from router import timing
from router.cluster import Cluster
from router.interface import Acknowledged, CommitOptions, Segment, StreamEvent, StreamStatus
from router.sampling import check_sampling
from router.session import Session
from streamfill.errors import FailedPreconditionError, UnavailableError
from streamfill.messages.common import StreamMode
from streamfill.observability.lifetime import LifetimeEvent
from streamfill.stream.splice import Splice
from streamfill.stream.state import StreamState

T = TypeVar("T")

INLINE_CHARS = 64 * 1024
"""A longer text is tokenised in a thread: it takes longer than other streams should wait."""


class ClientHandle:
    """Implements `interface.StreamHandle`. One per stream, shared by all calls on it."""

    def __init__(self, session: Session, cluster: Cluster) -> None:
        self._session = session
        self._cluster = cluster
        self._lock = asyncio.Lock()
        self._refused_seq = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def stream_id(self) -> int:
        return self._session.stream_id

    @property
    def mode(self) -> StreamMode:
        return self._session.options.mode

    def status(self) -> StreamStatus:
        """The stream at this moment."""
        session = self._session
        return StreamStatus(
            stream_id=session.stream_id,
            request_id=session.options.request_id,
            mode=session.options.mode,
            priority=session.options.priority,
            state=session.state,
            acknowledged=session.acknowledged(),
            num_output_tokens=session.num_output_tokens,
        )

    async def append(self, segment: Segment, client_seq: int | None = None) -> Acknowledged:
        """See `interface.StreamHandle`."""
        await self._change(StreamMode.APPEND, segment, client_seq)
        return self._session.acknowledged()

    async def update(self, segment: Segment, client_seq: int | None = None) -> Acknowledged:
        """See `interface.StreamHandle`."""
        await self._change(StreamMode.UPDATE, segment, client_seq)
        return self._session.acknowledged()

    async def commit(self, options: CommitOptions, client_seq: int | None = None) -> None:
        """See `interface.StreamHandle`."""
        final = options.final_segment
        apply = partial(self._commit, options)
        await self._in_turn(client_seq, apply, is_long=final is not None and _is_long(final))

    def events(self) -> AsyncIterator[StreamEvent]:
        """See `interface.StreamHandle`."""
        return self._session.events.events()

    async def cancel(self, reason: str) -> None:
        """See `interface.StreamHandle`. Does not wait for an operation under way."""
        self._session.cancel(reason)

    def note_refused(self, client_seq: int) -> None:
        """See `interface.StreamHandle`."""
        if client_seq == self._newest_seq + 1:
            self._refused_seq = client_seq

    async def _change(self, mode: StreamMode, segment: Segment, client_seq: int | None) -> None:
        apply = partial(self._apply_segment, mode, segment)
        await self._in_turn(client_seq, apply, is_long=_is_long(segment))

    async def _in_turn(
        self, client_seq: int | None, apply: Callable[[], Awaitable[None]], *, is_long: bool
    ) -> None:
        turn = self._take_turn(client_seq, apply)
        if not is_long:
            await turn
            return
        # A call that is given up must not leave a thread in the tokenizer behind with the lock
        # open, so such an operation is finished in any case.
        task = asyncio.ensure_future(turn)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_retrieve_exception)
        await asyncio.shield(task)

    async def _take_turn(
        self, client_seq: int | None, apply: Callable[[], Awaitable[None]]
    ) -> None:
        session = self._session
        async with self._lock:
            session.touch()
            newest = self._newest_seq
            if client_seq is not None and not session.client_seq < client_seq <= newest + 1:
                session.events.put_acknowledged(session.acknowledged())
                return
            seq = newest + 1 if client_seq is None else client_seq
            try:
                await apply()
            except Exception:
                self._refused_seq = max(self._refused_seq, seq)
                raise
            session.client_seq = seq
            session.touch()
            session.events.put_acknowledged(session.acknowledged())

    @property
    def _newest_seq(self) -> int:
        return max(self._session.client_seq, self._refused_seq)

    async def _apply_segment(self, mode: StreamMode, segment: Segment) -> None:
        session = self._session
        self._check_open()
        if mode is not session.options.mode:
            raise FailedPreconditionError(
                f"stream {session.stream_id} is in {session.options.mode.value} mode: "
                f"{mode.value} is not possible"
            )
        number = session.segments.received()
        prompt, limits = session.prompt, self._cluster.limits()
        splices = await _tokenise(
            partial(prompt.draft, mode, segment, limits), is_long=_is_long(segment)
        )
        self._check_open()
        session.segments.tokenised(number)
        session.send_changes(prompt.record(splices), number)

    async def _commit(self, options: CommitOptions) -> None:
        session = self._session
        self._check_open()
        session.lifetime.record(LifetimeEvent.COMMIT_RECEIVED)
        limits = self._cluster.limits()
        check_sampling(options.sampling, options.stop, limits.vocab_size)
        if not await self._cluster.wait_for_prefill(timing.PLACE_WAIT_S):
            raise UnavailableError("no prefill server is alive; the stream is kept, commit again")
        self._check_open()
        final = options.final_segment
        number = None if final is None else session.segments.received()
        prompt = session.prompt
        splices = await _tokenise(
            partial(prompt.draft_commit, session.options.mode, final, limits),
            is_long=final is not None and _is_long(final),
        )
        self._check_open()
        if number is not None:
            session.segments.tokenised(number)
        session.send_changes(prompt.record(splices), number, commit_follows=True)
        session.commit(options)

    def _check_open(self) -> None:
        session = self._session
        if session.state is StreamState.OPEN:
            return
        if session.machine.is_terminal:
            raise FailedPreconditionError(
                f"stream {session.stream_id} has ended: {session.state}",
                details={"state": session.state.value},
            )
        raise FailedPreconditionError(
            f"stream {session.stream_id} is already committed",
            details={"state": session.state.value},
        )


def _is_long(segment: Segment) -> bool:
    if segment.messages is not None:
        return sum(len(str(message.get("content"))) for message in segment.messages) > INLINE_CHARS
    return segment.text is not None and len(segment.text) > INLINE_CHARS


async def _tokenise(draft: Callable[[], list[Splice]], *, is_long: bool) -> list[Splice]:
    return await asyncio.to_thread(draft) if is_long else draft()


def _retrieve_exception(task: asyncio.Task[None]) -> None:
    """So that nobody complains when the caller was gone before it failed."""
    if not task.cancelled():
        task.exception()
