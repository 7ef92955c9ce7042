"""The receiver's control thread: who may send, what is accepted, what became of it.

The life of a transfer here:

1. ``Offer`` of an open session: checked, staging reserved, ``Accept``; or ``Refuse``.
2. The session's lane receives into the staging, which nobody else touches meanwhile.
3. The lane reports. Complete: ``Complete``, and the server gets it. Failed: the staging is
   freed, the session ends, ``Abort``. Given up by the sender: the staging is freed, ``Abort``.
   Session gone meanwhile: the staging is freed, counted as a late write. Where several sender
   ranks send a part each (``assembly``), the server gets it with the last one, and what ends one
   ends all.
4. The server releases the staging.

The thread owns socket, sessions and lanes. What the scheduler's thread shares with it is the
pool, the counters and `publish`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import torch
import zmq

from streamfill.errors import ProtocolError
from streamfill.kv_transfer.assembly import Assembly
from streamfill.kv_transfer.control_socket import ControlSocket
from streamfill.kv_transfer.counters import Counters, ReceiverCount
from streamfill.kv_transfer.faults import Faults
from streamfill.kv_transfer.group import RECEIVER_RANK, Pair, make_pair
from streamfill.kv_transfer.inbound_lane import InboundLane, LaneJob, LaneReport
from streamfill.kv_transfer.interface import (
    Farewell,
    HeldReport,
    IncomingTransfer,
    Question,
    SenderLost,
    SenderNote,
)
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.pool import StagingPool
from streamfill.kv_transfer.reception_desk import ReceptionDesk
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.session_table import InboundSession, SessionTable
from streamfill.kv_transfer.slices import HeadShare
from streamfill.kv_transfer.timeouts import JOIN_SLACK_S, TransportTimeouts
from streamfill.kv_transfer.waker import Waker
from streamfill.messages.codec import unpack_ids
from streamfill.messages.handoff import (
    Abort,
    Accept,
    Ask,
    Complete,
    Held,
    Hello,
    LetGo,
    Offer,
    Ping,
    Pong,
    Refuse,
    Rendezvous,
    ToReceiver,
    Welcome,
)

_log = logging.getLogger(__name__)

MAX_FRAMES_PER_TURN = 64
"""So that a flood of frames cannot keep the lanes' reports waiting."""


@dataclass(frozen=True)
class InboundOptions:
    """What a receiver is."""

    server_id: str
    incarnation: int
    layout: KvLayout
    share: HeadShare
    """Which of the model's KV heads those of the layout are."""
    device: torch.device
    advertise_host: str
    timeouts: TransportTimeouts
    same_host: bool
    """Share memory with senders on the same machine."""
    faults: Faults | None

    @property
    def rank(self) -> int:
        """Within the server."""
        return self.share.rank


class InboundControl:
    """The control thread of a `KvReceiver`."""

    def __init__(
        self,
        socket: ControlSocket,
        *,
        options: InboundOptions,
        pool: StagingPool,
        counters: Counters[ReceiverCount],
        publish: Callable[[IncomingTransfer], None],
        publish_note: Callable[[SenderNote], None],
        num_ready: Callable[[], int],
    ) -> None:
        """Take a control socket over and start the thread.

        Args:
            socket: owned, and closed, by the thread from now on.
            options: of the receiver.
            pool: staging memory, shared with the server.
            counters: of the receiver.
            publish: hands a complete transfer to the server.
            publish_note: hands a sender's question to the server.
            num_ready: how many of those the server has not polled.
        """
        self._socket = socket
        self._options = options
        self._pool = pool
        self._counters = counters
        self._publish = publish
        self._publish_note = publish_note
        self._waker = Waker()
        self._reports: deque[LaneReport] = deque()  # filled by the lanes
        self._outbox: deque[tuple[bytes, Rendezvous]] = deque()  # filled by the lanes
        self._answers: deque[tuple[str, HeldReport]] = deque()  # filled by the server
        self._stopping = False  # set by `close`
        self._sessions = SessionTable(options.layout, options.share, options.device)
        self._desk = ReceptionDesk(
            options.layout, options.share, pool=pool, counters=counters, num_ready=num_ready
        )
        self._ending: list[InboundLane] = []
        self._thread = threading.Thread(
            target=self._run, name=f"kv-control-{options.server_id}-{options.rank}", daemon=True
        )
        self._thread.start()

    @property
    def num_sessions(self) -> int:
        """Open sessions; exact in the control thread, recent in others."""
        return len(self._sessions)

    @property
    def num_receptions(self) -> int:
        """Transfers accepted and not reported; exact in the control thread, recent in others."""
        return len(self._desk)

    def allow_early(self, num_bytes: int) -> None:
        """See `interface.KvReceiverInterface.allow_early`; called by the server."""
        self._desk.early_room_bytes = num_bytes

    def tell(self, sender_id: str, report: HeldReport) -> None:
        """See `interface.KvReceiverInterface.tell`; called by the server."""
        self._answers.append((sender_id, report))
        self._waker.set()

    def close(self) -> bool:
        """End the thread and all lanes; whether they ended within ``join_s``."""
        self._stopping = True
        self._waker.set()
        # The lanes end side by side within ``join_s``, then the thread itself.
        self._thread.join(self._options.timeouts.join_s + JOIN_SLACK_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        poller = zmq.Poller()
        self._socket.register(poller)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        silence_s = self._options.timeouts.silence_s
        try:
            while not self._stopping:
                is_busy = len(self._sessions) or len(self._desk) or self._ending
                poller.poll(round(silence_s * 250) if is_busy else None)
                self._waker.clear()
                try:
                    self._take_frames()
                    self._send_posted()
                    self._take_reports()
                    self._end_silent()
                    self._end_overdue(time.monotonic() - self._options.timeouts.parts_s)
                except Exception:  # noqa: BLE001 - the edge of this thread's loop
                    # One bad frame or report must not end the service to other peers.
                    _log.exception("the control loop of the KV receiver goes on after an error")
                self._ending = [lane for lane in self._ending if not lane.join(0)]
        finally:
            self._shut_down()

    def _shut_down(self) -> None:
        for session in self._sessions.all():
            self._end(session, "the receiver was closed")
        deadline_s = time.monotonic() + self._options.timeouts.join_s
        for lane in self._ending:
            if not lane.join(max(0.0, deadline_s - time.monotonic())):
                _log.error("the lane of epoch %d did not end", lane.epoch)
        self._take_reports()
        self._end_overdue(time.monotonic())
        self._socket.close()
        self._waker.close()

    def _take_frames(self) -> None:
        for _ in range(MAX_FRAMES_PER_TURN):
            received = self._socket.receive()
            if received is None:
                return
            route, message = received
            if not isinstance(message, ProtocolError):
                self._handle(route, message)
            elif not self._sessions.knows(route):
                self._socket.reject(route, f"malformed frame: {message}")

    def _handle(self, route: bytes, message: ToReceiver) -> None:
        if isinstance(message, Hello):
            self._on_hello(route, message)
            return
        session = self._sessions.find(route, message.epoch)
        if session is None:
            self._counters.add(ReceiverCount.STALE_FRAMES)
            if not isinstance(message, Abort):
                self._socket.reject(route, f"no session of epoch {message.epoch}")
            return
        session.heard_s = time.monotonic()
        match message:
            case Offer():
                self._on_offer(session, message)
            case Abort():
                if not self._desk.give_up(session, message.transfer_id):
                    self._counters.add(ReceiverCount.STALE_FRAMES)
            case Rendezvous():
                if session.lane is None:
                    self._counters.add(ReceiverCount.STALE_FRAMES)
                else:
                    session.lane.put(message.key, message.value)
            case Ping():
                self._socket.reply(route, Pong(epoch=session.epoch))
            case Ask():
                self._on_ask(session, message)
            case LetGo(stream_id=stream_id):
                self._publish_note(Farewell(session.server_id, stream_id))
            case _:
                assert_never(message)

    def _on_ask(self, session: InboundSession, message: Ask) -> None:
        if len(message.token_ids) % 4:
            self._counters.add(ReceiverCount.MALFORMED_FRAMES)
            return
        self._publish_note(
            Question(
                server_id=session.server_id,
                stream_id=message.stream_id,
                version=message.version,
                token_ids=unpack_ids(message.token_ids),
                namespace=message.namespace,
            )
        )

    def _on_hello(self, route: bytes, hello: Hello) -> None:
        greeting = self._sessions.greet(route, hello, time.monotonic())
        if greeting.refusal is not None:
            _log.warning("sender %s/%d rejected: %s", hello.server_id, hello.rank, greeting.refusal)
            self._socket.reject(route, greeting.refusal)
        if greeting.replaced is not None:
            self._retire(greeting.replaced, "replaced by a newer session")
        if greeting.session is not None:
            self._welcome(greeting.session)

    def _welcome(self, session: InboundSession) -> None:
        self._socket.reply(
            session.route,
            Welcome(
                server_id=self._options.server_id,
                rank=self._options.rank,
                incarnation=self._options.incarnation,
                attempt=session.attempt,
                epoch=session.epoch,
            ),
        )

    def _on_offer(self, session: InboundSession, offer: Offer) -> None:
        answer = self._desk.accept(session, offer, session.heard_s)
        if isinstance(answer, str):
            self._counters.add(ReceiverCount.REFUSED)
            self._socket.reply(
                session.route,
                Refuse(transfer_id=offer.transfer_id, epoch=offer.epoch, reason=answer),
            )
            return
        self._socket.reply(session.route, Accept(transfer_id=offer.transfer_id, epoch=offer.epoch))
        if offer.num_bytes == 0:
            self._on_report(LaneReport(session.epoch, offer.transfer_id, error=None, seconds=0.0))
            return
        try:
            lane = session.lane = session.lane or self._make_lane(session)
        except RuntimeError as error:  # no thread to be had; nobody else would free the staging
            self._on_report(LaneReport(session.epoch, offer.transfer_id, str(error), seconds=0.0))
            return
        lane.start(
            LaneJob(
                transfer_id=offer.transfer_id,
                staging=answer.staging,
                chunk_bytes=offer.chunk_bytes,
                cuts=offer.cuts,
                checksum=offer.checksum,
                encoded=answer.encoded,
                codec=offer.codec,
            )
        )

    def _make_lane(self, session: InboundSession) -> InboundLane:
        return InboundLane(
            session.epoch,
            layout=session.layout,
            store=RendezvousStore(
                publish=lambda key, value: self._post(session, key, value),
                timeout_s=self._options.timeouts.group_setup_s,
            ),
            make_group=lambda store: self._make_group(session, store),
            report=self._report,
            chunk_s=self._options.timeouts.chunk_s,
            faults=self._options.faults,
        )

    def _send_posted(self) -> None:
        while self._outbox:
            self._socket.reply(*self._outbox.popleft())
        while self._answers:
            sender_id, report = self._answers.popleft()
            session = self._sessions.of(sender_id, self._options.rank)
            if session is not None:
                self._socket.reply(
                    session.route,
                    Held(
                        epoch=session.epoch,
                        stream_id=report.stream_id,
                        version=report.version,
                        num_tokens=report.num_tokens,
                        is_loss=report.is_loss,
                        missed_transfer_id=report.missed_transfer_id,
                    ),
                )

    def _take_reports(self) -> None:
        while self._reports:
            self._on_report(self._reports.popleft())

    def _on_report(self, report: LaneReport) -> None:
        now_s = time.monotonic()
        reception = self._desk.finish(report, now_s)
        session, offer, assembly = reception.session, reception.offer, reception.assembly
        is_current = self._sessions.is_current(session)
        session.heard_s = now_s
        is_wanted = is_current and not reception.given_up and assembly.problem is None
        if report.error is None and is_wanted:
            if self._desk.arrived(reception):
                self._deliver(session, assembly)
            self._socket.reply(
                session.route, Complete(transfer_id=offer.transfer_id, epoch=session.epoch)
            )
            return
        end = "cancelled by the sender" if reception.given_up else "the session of a part ended"
        reason = report.error or assembly.problem or end
        is_first = self._desk.give_up_all(assembly, reason)
        if report.error is not None:
            self._counters.add(ReceiverCount.FAILED, int(is_first))
            _log.warning("transfer %d failed: %s", offer.transfer_id, report.error)
        elif reception.given_up:
            self._counters.add(ReceiverCount.ABORTED, int(is_first))
        elif not is_current:
            self._counters.add(ReceiverCount.LATE_WRITES)
            _log.warning(
                "transfer %d thrown away: it was written after its session %d with %s had ended",
                offer.transfer_id,
                session.epoch,
                session.server_id,
            )
        if is_current:
            self._socket.reply(
                session.route,
                Abort(transfer_id=offer.transfer_id, epoch=session.epoch, reason=reason),
            )
            if report.error is not None:
                self._end(session, report.error)

    def _deliver(self, session: InboundSession, assembly: Assembly) -> None:
        """Hand a complete transfer to the server."""
        offer = assembly.offer
        self._counters.add(ReceiverCount.COMPLETED)
        self._counters.add(ReceiverCount.BYTES_RECEIVED, assembly.num_bytes)
        self._publish(
            IncomingTransfer(
                transfer_id=offer.transfer_id,
                stream_id=offer.stream_id,
                epoch=session.epoch,
                source_server_id=session.server_id,
                token_ids=unpack_ids(offer.token_ids),
                first_token=offer.first_token,
                staging=assembly.staging,
                blocks=assembly.blocks,
                version=offer.version,
                is_early=offer.is_early,
                replaces=offer.replaces,
                codec=assembly.codec,
                namespace=offer.namespace,
            )
        )

    def _end_overdue(self, before_s: float) -> None:
        """Transfers whose other parts do not come."""
        for assembly in self._desk.overdue(before_s):
            num_arrived = sum(part.num for part in assembly.arrived)
            reason = f"{num_arrived} of {assembly.heads.num} KV heads came, and no more"
            self._counters.add(ReceiverCount.FAILED)
            _log.warning("transfer %d failed: %s", assembly.offer.transfer_id, reason)
            self._desk.give_up_all(assembly, reason)

    def _end_silent(self) -> None:
        """A sender that is gone says nothing; one that is receiving is watched by its lane."""
        silent_since_s = time.monotonic() - self._options.timeouts.silence_s
        for session in self._sessions.all():
            if session.heard_s < silent_since_s and not self._desk.is_receiving(session):
                self._end(session, f"silent for {self._options.timeouts.silence_s} s")

    def _end(self, session: InboundSession, reason: str) -> None:
        """Nothing of this session counts any more."""
        self._sessions.end(session)
        self._retire(session, reason)

    def _retire(self, session: InboundSession, reason: str) -> None:
        """Let the lane of an ended session end; staging that it fills stays with it until then."""
        _log.info("session %d with %s ended: %s", session.epoch, session.server_id, reason)
        if session.rank == self._options.rank:  # the one that asks, and is told
            self._publish_note(SenderLost(session.server_id))
        if session.lane is not None:
            session.lane.stop()
            self._ending.append(session.lane)

    def _make_group(self, session: InboundSession, store: RendezvousStore) -> Pair:
        """Called by the lanes' threads."""
        return make_pair(
            rank=RECEIVER_RANK,
            store=store,
            local_host=self._options.advertise_host,
            device=self._options.device,
            timeouts=self._options.timeouts,
            layout=session.layout,
            same_host=self._options.same_host,
        )

    def _post(self, session: InboundSession, key: str, value: bytes) -> None:
        """Called by the lanes' threads."""
        message = Rendezvous(epoch=session.epoch, key=key, value=value)
        self._outbox.append((session.route, message))
        self._waker.set()

    def _report(self, report: LaneReport) -> None:
        """Called by the lanes' threads."""
        self._reports.append(report)
        self._waker.set()
