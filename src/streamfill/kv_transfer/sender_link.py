"""The sender's half of one pair of ranks: a thread that carries transfers one after the other.

The life of a transfer here:

1. `submit` queues it; the thread takes it when the ones before it have ended.
2. Without a session the thread says ``Hello`` until it is welcome or ``session_s`` is over.
3. A `delivery` carries it over the session. Any failure there ends the session, and the next
   transfer opens a new one. One that ran into a time-out takes along those that waited behind
   it for most of that time.
4. Its outcome is published, exactly once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
import zmq

from streamfill.curve.keys import ConnectKeys
from streamfill.errors import TransportError
from streamfill.kv_transfer.codecs import Codec, CodecCost
from streamfill.kv_transfer.counters import Counters, SenderCount
from streamfill.kv_transfer.delivery import Delivery, SenderJob, TransferEndedError
from streamfill.kv_transfer.faults import Faults
from streamfill.kv_transfer.interface import (
    HeldNews,
    OutgoingTransfer,
    PeerAddress,
    ReceiverLost,
    TransferOutcome,
    TransferStatus,
)
from streamfill.kv_transfer.sender_session import (
    SenderSession,
    SessionLostError,
    SessionRejectedError,
)
from streamfill.kv_transfer.timeouts import TransportTimeouts
from streamfill.kv_transfer.waker import Waker
from streamfill.messages.handoff import Abort, Ask, Hello, LetGo, Pong, Reject

_log = logging.getLogger(__name__)


_MEMORY = 0.8
"""Weight that what is known of the link's speed keeps with each transfer."""

MAX_NOTES = 1024
"""Waiting for a receiver that cannot be reached; the oldest are forgotten."""


@dataclass(frozen=True)
class LinkOptions:
    """What the links of a sender share."""

    hello: Hello
    """A link sets ``attempt``; which KV heads it names depends on the peer."""
    device: torch.device
    timeouts: TransportTimeouts
    chunk_bytes: int
    with_checksum: bool
    max_queued: int
    same_host: bool
    faults: Faults | None
    codec: Codec | None = None
    """May be used where it pays."""
    codec_cost: CodecCost | None = None
    keys: ConnectKeys | None = None
    """Of control connections. None: in the clear."""


class _UnreachableError(TransportError):
    """There is no session to be had: concerns all that is queued."""


class SenderLink:
    """Queue, thread and session for one receiver rank."""

    def __init__(
        self,
        address: PeerAddress,
        *,
        options: LinkOptions,
        context: zmq.Context[zmq.Socket[bytes]],
        publish: Callable[[TransferOutcome], None],
        publish_held: Callable[[HeldNews], None],
        counters: Counters[SenderCount],
    ) -> None:
        """Start the thread; it connects when the first transfer comes.

        Args:
            address: of the receiver rank.
            options: of the sender.
            context: of the sender.
            publish: called once per submitted transfer, by any thread.
            publish_held: called by the link's thread with what the receiver says that it holds.
            counters: of the sender.
        """
        self.address = address
        self._options = options
        self._context = context
        self._publish = publish
        self._publish_held = publish_held
        self._time_out_s = min(options.timeouts.chunk_s, options.timeouts.reply_s)
        self._counters = counters
        self._waker = Waker()
        self._lock = threading.Lock()
        self._queue: deque[SenderJob] = deque()
        self._notes: deque[Ask | LetGo] = deque(maxlen=MAX_NOTES)
        self._current: SenderJob | None = None
        self._stop_reason: str | None = None
        self._session: SenderSession | None = None  # the thread's
        self._num_attempts = 0
        self._seconds_per_byte: float | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"kv-send-{address.server_id}-{address.rank}", daemon=True
        )
        self._thread.start()

    def submit(self, transfer: OutgoingTransfer) -> None:
        """Queue a transfer, or publish at once that it cannot be."""
        job = SenderJob(transfer, self.address.rank)
        with self._lock:
            refusal = self._stop_reason
            if refusal is None and len(self._queue) >= self._options.max_queued:
                refusal = f"{len(self._queue)} transfers to this peer are queued already"
            if refusal is None:
                self._queue.append(job)
        if refusal is None:
            self._waker.set()
        else:
            self._publish(job.outcome(TransferStatus.FAILED, refusal))

    def say(self, note: Ask | LetGo) -> None:
        """Queue a note; it goes out between two transfers."""
        with self._lock:
            if self._stop_reason is None:
                self._notes.append(note)
        self._waker.set()

    def cancel(self, transfer_id: int) -> None:
        """Drop a queued transfer, or tell the thread to give up the current one."""
        with self._lock:
            dropped = [job for job in self._queue if job.transfer.transfer_id == transfer_id]
            for job in dropped:
                self._queue.remove(job)
            current = self._current
            if current is not None and current.transfer.transfer_id == transfer_id:
                current.cancelled = True
        for job in dropped:
            self._publish(job.outcome(TransferStatus.CANCELLED, "cancelled before the offer"))
        self._waker.set()

    def stop(self, reason: str) -> None:
        """Fail what is pending and end the thread as soon as its current wait allows."""
        with self._lock:
            if self._stop_reason is None:
                self._stop_reason = reason
        self._waker.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it has ended. Call `stop` first."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._waker.close()
        return True

    def _run(self) -> None:
        try:
            while (job := self._next_job()) is not None:
                self._carry(job)
        finally:
            self._end_session()
            self.stop("the thread of this link ended")
            self._fail_queued(TransferStatus.FAILED, self._stop_reason or "")

    def _next_job(self) -> SenderJob | None:
        """Wait for a transfer, keeping the session alive; None when told to stop."""
        while True:
            with self._lock:
                if self._stop_reason is not None:
                    return None
                note = self._notes.popleft() if self._notes else None
                if note is None and self._queue:
                    self._current = self._queue.popleft()
                    return self._current
            try:
                if note is None:
                    self._idle()
                else:
                    self._send_note(note)
            except TransportError as error:
                _log.info("session with %s ended: %s", self.address, error)
                self._end_session()

    def _idle(self) -> None:
        session = self._session
        if session is None:
            zmq.zmq_poll([(self._waker.fileno(), zmq.POLLIN)], -1)
            self._waker.clear()
            return
        match session.receive(session.keep_alive()):
            case None | Pong():
                pass
            case Reject(reason=reason):
                raise SessionLostError(reason)
            case _:
                self._counters.add(SenderCount.STALE_FRAMES)

    def _send_note(self, note: Ask | LetGo) -> None:
        """Of a receiver without a session there is nothing to let go of; to ask one opens it."""
        if self._session is None and isinstance(note, LetGo):
            return
        try:
            session = self._session or self._open_session(None)
        except _UnreachableError as error:
            _log.info("%s was not asked: %s", self.address, error)
            self._fail_queued(TransferStatus.FAILED, str(error))
            return
        except (TransportError, TransferEndedError) as error:
            _log.info("%s was not asked: %s", self.address, error)
            return
        session.send(msgspec.structs.replace(note, epoch=session.epoch))

    def _carry(self, job: SenderJob) -> None:
        """Carry one transfer to whatever end it takes, and publish that."""
        status, reason = TransferStatus.DELIVERED, ""
        try:
            self._deliver(job)
        except TransferEndedError as end:
            status, reason = end.status, end.reason
        except SessionRejectedError as error:
            status, reason = TransferStatus.REFUSED, str(error)
            self._fail_queued(status, reason)
        except _UnreachableError as error:
            status, reason = TransferStatus.FAILED, str(error)
            self._fail_queued(status, reason)
        except TransportError as error:
            status, reason = TransferStatus.FAILED, str(error)
            if job.outcome(status, reason).seconds >= self._time_out_s:
                # Another time-out would cost streams that have waited for most of this one more
                # than to compute the KV again.
                self._fail_queued(
                    status,
                    f"the peer let the one before it wait: {reason}",
                    after_s=self._time_out_s / 2,
                )
        except Exception as error:  # noqa: BLE001 - the edge of this thread's loop
            _log.exception("transfer %d failed", job.transfer.transfer_id)
            status, reason = TransferStatus.FAILED, f"internal error: {error!r}"
        if status is TransferStatus.FAILED:
            _log.warning("transfer %d failed: %s", job.transfer.transfer_id, reason)
            self._end_session(job, reason)
        with self._lock:
            self._current = None
        outcome = job.outcome(status, reason)
        self._note_speed(job, outcome)
        self._publish(outcome)

    def _deliver(self, job: SenderJob) -> None:
        delivery = self._delivery(job)
        try:
            delivery.offer()
        except SessionLostError:
            # A receiver that restarted while the session was idle. It knows no transfer of
            # the old session, so the same id can be offered again.
            self._end_session()
            delivery = self._delivery(job)
            delivery.offer()
        delivery.carry()

    def _delivery(self, job: SenderJob) -> Delivery:
        session = self._session or self._open_session(job)
        return Delivery(
            job,
            session,
            codec=self._codec_for(job),
            layout=self._options.hello.layout,
            chunk_bytes=self._options.chunk_bytes,
            with_checksum=self._options.with_checksum,
            reply_s=self._options.timeouts.reply_s,
            chunk_s=self._options.timeouts.chunk_s,
            faults=self._options.faults,
            stop_reason=lambda: self._stop_reason,
            counters=self._counters,
        )

    def _codec_for(self, job: SenderJob) -> Codec | None:
        """What this transfer is written in: nothing before the link's speed is known."""
        codec, cost = self._options.codec, self._options.codec_cost
        if codec is None or cost is None or self._seconds_per_byte is None:
            return None
        if not job.transfer.kv.num_bytes:
            return None
        pays = cost.pays(codec, self._options.hello.layout, self._seconds_per_byte)
        return codec if pays else None

    def _note_speed(self, job: SenderJob, outcome: TransferOutcome) -> None:
        """How long the link needs for a byte as it travels, lately."""
        if outcome.bytes_per_s is None:
            return
        num_bytes = job.transfer.kv.num_bytes
        codec = self._options.codec
        if codec is not None and job.codec == codec.name:
            num_bytes = codec.num_bytes(num_bytes, self._options.hello.layout)
        cost = outcome.seconds / num_bytes
        old = self._seconds_per_byte
        self._seconds_per_byte = cost if old is None else _MEMORY * old + (1 - _MEMORY) * cost

    def _open_session(self, job: SenderJob | None) -> SenderSession:
        """Say ``Hello`` with back-off until welcome."""
        timeouts = self._options.timeouts
        self._num_attempts += 1
        hello = msgspec.structs.replace(self._options.hello, attempt=self._num_attempts)
        self._session = session = SenderSession(
            self.address,
            context=self._context,
            waker=self._waker,
            device=self._options.device,
            timeouts=timeouts,
            counters=self._counters,
            layout=self._options.hello.layout,
            same_host=self._options.same_host,
            on_held=self._publish_held,
            keys=self._options.keys,
        )
        deadline_s = time.monotonic() + timeouts.session_s
        retry_s = timeouts.hello_retry_first_s
        next_hello_s = time.monotonic()
        try:
            while (now_s := time.monotonic()) < deadline_s:
                if self._stop_reason is not None:
                    raise TransportError(self._stop_reason)
                if job is not None and job.cancelled:
                    raise TransferEndedError(TransferStatus.CANCELLED, "cancelled before the offer")
                if now_s >= next_hello_s:
                    session.send(hello)
                    next_hello_s = now_s + retry_s
                    retry_s = min(2 * retry_s, timeouts.hello_retry_last_s)
                if session.is_welcome(
                    session.receive(min(next_hello_s, deadline_s) - now_s), hello
                ):
                    self._counters.add(SenderCount.SESSIONS)
                    return session
        except BaseException:
            self._end_session()
            raise
        self._end_session()
        raise _UnreachableError(f"{self.address} did not answer within {timeouts.session_s} s")

    def _end_session(self, job: SenderJob | None = None, reason: str = "") -> None:
        session, self._session = self._session, None
        if session is None:
            return
        try:
            if job is not None and job.offered_s is not None:
                transfer_id = job.transfer.transfer_id
                session.send(Abort(transfer_id=transfer_id, epoch=session.epoch, reason=reason))
        except TransportError as error:
            _log.info("the receiver %s was not told: %s", self.address, error)
        finally:
            session.close()
            with self._lock:
                # Who hears of the loss asks anew; and a receiver that cannot be reached would be
                # waited for once for each of them, by the transfers behind them too.
                self._notes.clear()
            self._publish_held(ReceiverLost(self.address.server_id))

    def _fail_queued(self, status: TransferStatus, reason: str, *, after_s: float = 0.0) -> None:
        """End those that have waited for at least so long."""
        submitted_until_s = time.monotonic() - after_s
        with self._lock:
            failed = [job for job in self._queue if job.submitted_s <= submitted_until_s]
            for job in failed:
                self._queue.remove(job)
        for job in failed:
            self._publish(job.outcome(status, reason))
