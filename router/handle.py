"""What a client does to its stream: one operation at a time, each all or nothing.

Numbers (`client_seq`) make repeating safe. The next new number is applied; one that was applied
before, or that leaves a gap, is ignored and acknowledged. A refused operation uses its number up,
but may also be sent again under it.

An operation that lets the context grow may have to wait for room on the stream's server, between
its tokenisation and its record in the token log (`waiting_room`). It has its turn meanwhile, so
those behind it wait as well. A commit behind it lets all of them pass: with it the context is not
uncommitted any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from router.cluster import Cluster
from router.interface import (
    Acknowledged,
    CommitOptions,
    Resumed,
    ResumePoint,
    Segment,
    StreamEvent,
    StreamStatus,
)
from router.recovery.journal import Journal
from router.session import Session
from streamfill.errors import FailedPreconditionError, StreamError, UnavailableError
from streamfill.messages.common import StreamMode
from streamfill.observability.lifetime import LifetimeEvent
from streamfill.stream.splice import Splice, apply_splice, token_array
from streamfill.stream.state import StreamState
from streamfill.stream.token_log import LoggedSplice

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
        self._refused_next_seq = 0
        """Refused by the service while the operation before it had its turn."""
        self._num_commits = 0
        """That wait for their turn or have it."""
        self._num_resumptions = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def session(self) -> Session:
        """What it is a handle of."""
        return self._session

    @property
    def stream_id(self) -> int:
        return self._session.stream_id

    @property
    def mode(self) -> StreamMode:
        return self._session.options.mode

    @property
    def tenant(self) -> str:
        return self._session.options.tenant

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

    async def begin(self, first: list[Splice], journal: Journal | None) -> None:
        """Put the messages in that the stream was opened with. Called once, before anything else.

        Args:
            first: as drafted.
            journal: None: the stream is in no log.

        Raises:
            StreamError: there was no room for them, or the stream ended meanwhile; it has ended.
        """
        session = self._session
        logged: list[LoggedSplice] = []
        if first:
            self._place(first, is_complete=False)
            try:
                await self._cluster.room.admit(session.stream_id, first[-1].num_tokens)
            except StreamError as error:
                session.end(StreamState.REJECTED, error)
            except BaseException:
                session.cancel("given up while it was opened")
                raise
            ended = session.events.end
            if isinstance(ended, StreamError):
                raise ended
            logged = session.prompt.record(first)
            self._count_tokens(logged)
            session.send_changes(logged, None)
        if journal is not None:
            session.keep(journal, logged)
            try:
                await journal.durable()
            except BaseException:
                session.cancel("given up while it was opened")
                raise

    async def append(self, segment: Segment, client_seq: int | None = None) -> Acknowledged:
        """See `interface.StreamHandle`."""
        await self._change(StreamMode.APPEND, segment, client_seq)
        return self._session.acknowledged()

    async def update(self, segment: Segment, client_seq: int | None = None) -> Acknowledged:
        """See `interface.StreamHandle`."""
        await self._change(StreamMode.UPDATE, segment, client_seq)
        return self._session.acknowledged()

    def change_at_once(self, segment: Segment, client_seq: int | None = None) -> bool:
        """See `interface.StreamHandle`. Streams in the log wait for it, long texts for a thread."""
        session = self._session
        seq = self._newest_seq + 1
        if (
            session.journal is not None
            or session.state is not StreamState.OPEN
            or session.prefilling.may_be_placed
            or client_seq not in (None, seq)
            or self._lock.locked()
            or _is_long(segment)
        ):
            return False
        began_s = time.monotonic()
        prompt = session.prompt
        try:
            splices = prompt.draft(self.mode, segment, self._cluster.limits())
        except StreamError:
            return False
        if not self._cluster.room.take(session.stream_id, splices[-1].num_tokens):
            prompt.undo_draft()
            return False
        number = session.segments.received(began_s)
        session.segments.tokenised(number)
        self._record_segment(splices, number, segment, seq)
        session.client_seq = seq
        self._note_next_refused()
        session.timeouts.touch()
        return True

    def acknowledged(self) -> Acknowledged:
        """See `interface.StreamHandle`."""
        return self._session.acknowledged()

    async def commit(self, options: CommitOptions, client_seq: int | None = None) -> None:
        """See `interface.StreamHandle`."""
        final = options.final_segment
        apply = partial(self._commit, options)
        self._num_commits += 1
        self._cluster.room.let_pass(self._session.stream_id)
        try:
            await self._in_turn(client_seq, apply, is_long=final is not None and _is_long(final))
        finally:
            self._num_commits -= 1

    def events(
        self, on_acknowledged: Callable[[], bool] | None = None
    ) -> AsyncIterator[StreamEvent]:
        """See `interface.StreamHandle`."""
        return self._session.events.events(on_acknowledged)

    async def cancel(self, reason: str) -> None:
        """See `interface.StreamHandle`. Does not wait for an operation under way."""
        self._session.cancel(reason)

    def note_refused(self, client_seq: int, error: StreamError) -> None:
        """See `interface.StreamHandle`."""
        if client_seq == self._newest_seq + 1:
            self._refused_seq = client_seq
        elif client_seq == self._newest_seq + 2 and self._lock.locked():
            self._refused_next_seq = client_seq
        else:
            return  # applied or refused before, or behind a gap
        self._log_refusal(client_seq, error)

    @property
    def is_resumable(self) -> bool:
        return self._session.journal is not None

    @property
    def num_resumptions(self) -> int:
        return self._num_resumptions

    def take_up(self, refused_seqs: Sequence[int]) -> None:
        """These were refused before this process began."""
        self._note_refusals(refused_seqs)

    def resume(self, point: ResumePoint) -> Resumed:
        """See `interface.StreamHandle`."""
        session, next_seq = self._session, point.next_seq
        session.events.rewind(point.next_token_index)
        self._num_resumptions += 1
        is_paid_anew = session.resumed(point.payer)
        refused: Sequence[tuple[int, StreamError]] = ()
        if next_seq is not None:
            # What the client has heard of is in the log when it was applied, so this was refused.
            self._refused_seq = max(self._refused_seq, next_seq - 1)
            self._note_refusals(point.refused_seqs)
            if session.journal is not None:
                refused = session.journal.refusals_from(next_seq)
        return Resumed(
            stream_id=session.stream_id,
            acknowledged=session.acknowledged(),
            is_committed=session.state is not StreamState.OPEN,
            refused=refused,
            is_paid_anew=is_paid_anew,
        )

    def _note_refusals(self, seqs: Sequence[int]) -> None:
        for seq in sorted(seqs):
            if seq == self._newest_seq + 1:
                self._refused_seq = seq
            elif seq == self._newest_seq + 2:
                self._refused_next_seq = seq

    def _log_refusal(self, seq: int, error: StreamError) -> None:
        if self._session.journal is not None and not self._session.machine.is_terminal:
            self._session.journal.refused(seq, error)

    async def _change(self, mode: StreamMode, segment: Segment, client_seq: int | None) -> None:
        apply = partial(self._apply_segment, mode, segment)
        await self._in_turn(client_seq, apply, is_long=_is_long(segment))

    async def _in_turn(
        self, client_seq: int | None, apply: Callable[[int], Awaitable[None]], *, is_long: bool
    ) -> None:
        # Here and not in the task: turns are taken in the order in which the calls were made.
        await self._lock.acquire()
        if not is_long:
            try:
                await self._take_turn(client_seq, apply)
            finally:
                self._lock.release()
            return
        # A call that is given up must not leave a thread in the tokenizer behind with the lock
        # open, so such an operation is finished in any case.
        task = asyncio.ensure_future(self._take_turn(client_seq, apply))
        self._tasks.add(task)
        finished = asyncio.shield(task)
        # Behind what wakes the caller: it says how its operation ended before the next one begins.
        task.add_done_callback(self._end_turn)
        await finished

    def _end_turn(self, task: asyncio.Task[None]) -> None:
        self._lock.release()
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # so that nobody complains when the caller was gone before it failed

    async def _take_turn(
        self, client_seq: int | None, apply: Callable[[int], Awaitable[None]]
    ) -> None:
        session = self._session
        session.timeouts.touch()
        newest = self._newest_seq
        if client_seq is not None and not session.client_seq < client_seq <= newest + 1:
            await self._until_durable()
            session.events.put_acknowledged(session.acknowledged)
            return
        seq = newest + 1 if client_seq is None else client_seq
        try:
            await apply(seq)
            session.client_seq = seq
        except Exception as error:
            self._refused_seq = max(self._refused_seq, seq)
            if isinstance(error, StreamError):
                self._log_refusal(seq, error)
            raise
        finally:
            self._note_next_refused()
        session.timeouts.touch()
        await self._until_durable()
        session.events.put_acknowledged(session.acknowledged)

    def _note_next_refused(self) -> None:
        if self._refused_next_seq == self._newest_seq + 1:
            self._refused_seq = self._refused_next_seq

    @property
    def _newest_seq(self) -> int:
        return max(self._session.client_seq, self._refused_seq)

    async def _until_durable(self) -> None:
        if self._session.journal is not None:
            await self._session.journal.durable()

    async def _apply_segment(self, mode: StreamMode, segment: Segment, seq: int) -> None:
        session = self._session
        self._check_open()
        if mode is not session.options.mode:
            raise FailedPreconditionError(
                f"stream {session.stream_id} is in {session.options.mode.value} mode: "
                f"{mode.value} is not possible"
            )
        number = session.segments.received()
        prompt, limits = session.prompt, self._cluster.limits()
        is_long = _is_long(segment)
        splices = await _in_thread_if(is_long, partial(prompt.draft, mode, segment, limits))
        try:
            self._check_open()
            session.segments.tokenised(number)
            self._place(splices, is_complete=False)
            if not self._num_commits:
                await self._cluster.room.admit(session.stream_id, splices[-1].num_tokens)
                self._check_open()
        except BaseException:
            await _in_thread_if(is_long, prompt.undo_draft)
            raise
        self._record_segment(splices, number, segment, seq)

    def _record_segment(
        self, splices: Sequence[Splice], number: int, segment: Segment, seq: int
    ) -> None:
        """From here on nothing can go wrong: into the token log, the log and to the server."""
        session = self._session
        logged = session.prompt.record(splices)
        self._count_segment(logged)
        if session.journal is not None:
            session.journal.changed(seq, session.prompt, logged)
        session.send_changes(logged, number, next_in_s=segment.next_in_s)

    async def _commit(self, options: CommitOptions, seq: int) -> None:
        session = self._session
        self._check_open()
        session.lifetime.record(LifetimeEvent.COMMIT_RECEIVED)
        limits = self._cluster.limits()
        if not await self._is_served():
            raise UnavailableError("no prefill server is alive; the stream is kept, commit again")
        self._check_open()
        final = options.final_segment
        number = None if final is None else session.segments.received()
        prompt = session.prompt
        splices = await _in_thread_if(
            final is not None and _is_long(final),
            partial(prompt.draft_commit, session.options.mode, final, limits),
        )
        self._check_open()
        if number is not None:
            session.segments.tokenised(number)
        self._place(splices, is_complete=True)
        logged = prompt.record(splices)
        if number is None:
            self._count_tokens(logged)
        else:
            self._count_segment(logged)
        session.send_changes(logged, number, commit_follows=True)
        session.commit(options, seq, logged)

    async def _is_served(self) -> bool:
        attempts = self._session.attempts
        if attempts.is_kept_by_server:
            return True
        is_served = await self._cluster.wait_for_prefill(self._session.place_wait_s)
        return is_served or attempts.is_kept_by_server  # that has connected again

    def _place(self, splices: Sequence[Splice], *, is_complete: bool) -> None:
        """Before they are recorded and sent: the stream may still go to another server."""
        session = self._session
        if splices and session.prefilling.may_be_placed:
            prompt = token_array(session.prompt.log.ids)
            for splice in splices:
                apply_splice(prompt, splice)
            session.attempts.place_by(prompt, is_complete=is_complete)

    def _count_segment(self, logged: Sequence[LoggedSplice]) -> None:
        self._cluster.metrics.segments[self.mode].inc()
        self._count_tokens(logged)

    def _count_tokens(self, logged: Sequence[LoggedSplice]) -> None:
        num_tokens = sum(len(each.splice.new_token_ids) for each in logged)
        self._cluster.metrics.tokens_in.inc(num_tokens)
        payer = self._session.options.payer
        if payer is not None:
            payer.used(num_tokens)

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


async def _in_thread_if(is_long: bool, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if is_long else work()
