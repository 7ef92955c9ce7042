"""A server's link to the router, in a thread of its own.

The scheduler's loop can be busy for seconds in one forward pass. This thread is not: it registers,
sends heartbeats, acknowledges and de-duplicates what arrives, and asks for what is missing. The
scheduler thread only exchanges plain messages with it through two queues and never waits.

1. ``Register`` is sent until ``Registered`` comes back; the router's silence starts it over.
2. Stream messages pass the ``InboundGate`` and wait in the inbox; ``fileno`` becomes readable.
3. The scheduler thread takes them with ``drain``, and gives its own messages to ``send``. What
   there is to be sent leaves in one frame.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

import zmq

from streamfill.curve.keys import ConnectKeys
from streamfill.errors import ProtocolError
from streamfill.kv_transfer.waker import Waker
from streamfill.links.faults import DelayedFrames, LinkFaults
from streamfill.links.inbound_gate import InboundGate
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.batch import BatchDecoder, MessageBatch, some_stream_ids
from streamfill.messages.codec import MAX_FRAME_BYTES, encode
from streamfill.messages.common import ServerCounters
from streamfill.observability.logging import RateLimited, log_event

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 0.25
"""Four in the second after which the router suspects a server."""
REGISTER_RETRY_S = 0.5
ROUTER_SILENT_S = 5.0
"""The router sends heartbeats four times a second; five silent seconds mean that it is gone or was
replaced."""
UNANSWERED_PERIOD_S = 60.0
"""The log says so often that no router answers."""
CLOSE_TIMEOUT_S = 2.0
LINGER_MS = 200
"""What is queued at the end gets so long to leave."""
MAX_QUEUED_FRAMES = 50_000
"""Towards a router that does not read; as many as it queues for us. Minutes of tokens."""


class RouterLost:
    """In the inbox: the router that knew our streams is gone; drop them all."""


Inbound = r.RouterToServer | RouterLost


class ServerLink:
    """Link of one server to the router. Owned by the scheduler thread; ``close`` ends the
    thread."""

    def __init__(
        self,
        endpoint: str,
        register: s.Register,
        on_end: Callable[[str], None],
        *,
        keys: ConnectKeys | None = None,
    ) -> None:
        """
        Args:
            endpoint: ZeroMQ address of the router.
            register: who this server is.
            on_end: called in the link's thread with the reason why there is no link any more: the
                router refuses the server, or the endpoint cannot be used.
            keys: of this side. None: in the clear.
        """
        self._keys = keys
        self._endpoint = endpoint
        self._register = register
        self._on_end = on_end
        self._inbox: deque[Inbound] = deque()
        self._outbox: deque[s.ServerToRouter] = deque()
        self._inbox_waker = Waker()
        self._outbox_waker = Waker()
        self._gate = InboundGate()
        self._gate_lock = threading.Lock()
        self._decoder: BatchDecoder[r.RouterToServer] = BatchDecoder(r.RouterToServer)
        self._batch = MessageBatch()
        """What leaves when the thread has looked at all that there is. Used in it only."""
        self._counters = ServerCounters()
        self._controller_alive = False
        self._is_stale = False
        self._last_tick = time.monotonic()
        self._closing = False
        self._router_incarnation: int | None = None
        self._router_heard = 0.0
        self._register_sent = 0.0
        self._log_malformed = RateLimited(period_s=1.0)
        self._log_full = RateLimited()
        self._log_unanswered = RateLimited(period_s=UNANSWERED_PERIOD_S)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._socket: zmq.Socket[bytes] | None = None
        """Used in the link's thread only."""
        self._faults = LinkFaults.from_environment(register.server_id)
        self._delayed = DelayedFrames()
        self.num_malformed_frames = 0
        self._thread = threading.Thread(target=self._run, name="router-link", daemon=True)

    def start(self) -> None:
        """Begin to register."""
        self._thread.start()

    @property
    def registered(self) -> bool:
        """Whether the router knows this server."""
        return self._router_incarnation is not None

    def fileno(self) -> int:
        """Readable when ``drain`` has something."""
        return self._inbox_waker.fileno()

    def wake(self) -> None:
        """Make ``fileno`` readable although nothing arrived."""
        self._inbox_waker.set()

    def drain(self) -> list[Inbound]:
        """What arrived since the last call, in order."""
        self._inbox_waker.clear()
        messages: list[Inbound] = []
        while self._inbox:
            messages.append(self._inbox.popleft())
        return messages

    def drain_while(self, kinds: tuple[type[Inbound], ...]) -> list[Inbound]:
        """What arrived since the last call, in order, up to the first message of another kind."""
        messages: list[Inbound] = []
        while self._inbox and isinstance(self._inbox[0], kinds):
            messages.append(self._inbox.popleft())
        return messages

    def send(self, message: s.ServerToRouter) -> None:
        """Queue a message; the link's thread sends it at once."""
        if isinstance(message, s.StreamFailed):
            with self._gate_lock:
                self._gate.drop(message.stream_id, message.attempt)
        self._outbox.append(message)
        self._outbox_waker.set()

    def tick(self, counters: ServerCounters, controller_alive: bool) -> None:
        """The scheduler's loop came round; ``counters`` go out with the next heartbeat."""
        self._last_tick = time.monotonic()
        self._is_stale = False
        self._counters = counters
        self._controller_alive = controller_alive

    def note_change(self) -> None:
        """The counters of the last ``tick`` are out of date. A loop that goes to sleep over that is
        woken at the next heartbeat, so that it says new ones."""
        self._is_stale = True

    def close(self) -> None:
        """Send what is queued, then end the thread."""
        self._closing = True
        self._outbox_waker.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log_event(
                logger,
                "router_link_close_timeout",
                level=logging.WARNING,
                timeout_s=CLOSE_TIMEOUT_S,
            )
            return
        self._inbox_waker.close()
        self._outbox_waker.close()

    def _run(self) -> None:
        self._poller.register(self._outbox_waker.fileno(), zmq.POLLIN)
        try:
            self._connect()
            next_heartbeat = time.monotonic()
            while not self._closing:
                wake_s = min(next_heartbeat, self._delayed.next_s)
                self._poller.poll(max(0, math.ceil((wake_s - time.monotonic()) * 1000)))
                self._outbox_waker.clear()
                self._receive()
                self._flush()
                now = time.monotonic()
                if now >= next_heartbeat:
                    next_heartbeat = now + HEARTBEAT_INTERVAL_S
                    self._beat(now)
                self._send_batch()
            self._flush()
            self._send_batch()
        except Exception as error:  # noqa: BLE001  without this thread the server is dead
            log_event(logger, "router_link_broken", level=logging.ERROR, exception=error)
            self._put(RouterLost())
            self._on_end(f"the link to the router at {self._endpoint} broke: {error}")
        finally:
            if self._socket is not None:
                self._socket.close()
            self._context.term()

    def _connect(self) -> None:
        """Open a connection, a new one if need be: ZeroMQ itself does not come back from every
        error. What was queued on the old one is dropped; its reader has not read for long."""
        if self._socket is not None:
            self._poller.unregister(self._socket)
            self._socket.close(linger=0)
            self._delayed.clear()
            self._batch.clear()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = LINGER_MS
        self._socket.sndhwm = self._socket.rcvhwm = MAX_QUEUED_FRAMES
        self._socket.maxmsgsize = 2 * MAX_FRAME_BYTES
        if self._keys is not None:
            self._keys.secure(self._socket)
        self._socket.connect(self._endpoint)
        self._poller.register(self._socket, zmq.POLLIN)
        self._router_heard = time.monotonic()

    def _beat(self, now: float) -> None:
        silent_s = now - self._router_heard
        if silent_s > ROUTER_SILENT_S:
            if self._router_incarnation is not None:
                log_event(
                    logger, "router_silent", level=logging.WARNING, silent_s=round(silent_s, 1)
                )
                self._lose_router()
            elif self._log_unanswered.allow():
                log_event(
                    *(logger, "router_does_not_answer"),
                    level=logging.WARNING,
                    endpoint=self._endpoint,
                    with_keys=self._keys is not None,
                    remedy="see that it runs there, and that its zmq_keys_dir has the same keys",
                )
            self._connect()
        if self._router_incarnation is None:
            if now - self._register_sent >= REGISTER_RETRY_S:
                self._register_sent = now
                self._transmit(self._register)
            return
        if self._is_stale:
            self.wake()
        self._transmit(
            s.ServerHeartbeat(
                server_id=self._register.server_id,
                incarnation=self._register.incarnation,
                loop_age_s=now - self._last_tick,
                controller_alive=self._controller_alive,
                counters=self._counters,
            ),
        )

    def _receive(self) -> None:
        while self._socket is not None:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 1:
                    raise ProtocolError(f"message of {len(frames)} frames, expected 1")
                messages = self._decoder.decode(frames[0])
            except ProtocolError as error:
                self.num_malformed_frames += 1
                if self._log_malformed.allow():
                    log_event(logger, "malformed_frame", level=logging.WARNING, error=str(error))
                self._transmit(s.MalformedByRouter(reason=str(error)[:500]))
                continue
            for message in messages:
                self._accept(message)

    def _accept(self, message: r.RouterToServer) -> None:
        self._router_heard = time.monotonic()
        match message:
            case r.Registered(router_incarnation=incarnation):
                if self._router_incarnation not in (None, incarnation):
                    self._lose_router()
                if self._router_incarnation is None:
                    log_event(logger, "registered", router_incarnation=incarnation)
                self._router_incarnation = incarnation
            case r.RouterHeartbeat(router_incarnation=incarnation):
                if self._router_incarnation not in (None, incarnation):
                    self._lose_router()
            case r.RegistrationRefused(reason=reason):
                self._on_end(f"the router refuses this server: {reason}")
            case r.Malformed(reason=reason):
                log_event(logger, "router_could_not_read", level=logging.ERROR, reason=reason)
            case _:
                with self._gate_lock:
                    admission = self._gate.admit(message)
                if admission.deliver:
                    self._put(message)
                if admission.reply is not None:
                    self._transmit(admission.reply)

    def _lose_router(self) -> None:
        self._router_incarnation = None
        self._register_sent = 0.0
        with self._gate_lock:
            self._gate.clear()
        self._put(RouterLost())

    def _put(self, message: Inbound) -> None:
        self._inbox.append(message)
        self._inbox_waker.set()

    def _flush(self) -> None:
        while self._outbox:
            self._transmit(self._outbox.popleft())
        for message in self._delayed.take(time.monotonic()):
            self._put_out(message)

    def _transmit(self, message: s.ServerToRouter) -> None:
        if self._faults is None:
            self._put_out(encode(message))
            return
        now_s = time.monotonic()
        for delay_s in self._faults.delays_s(self._endpoint, message):
            if delay_s:
                self._delayed.put(now_s + delay_s, encode(message))
            else:
                self._put_out(encode(message))

    def _put_out(self, message: bytes) -> None:
        if not self._batch.has_room_for(message):
            self._send_batch()
        self._batch.add(message)

    def _send_batch(self) -> None:
        num_messages = len(self._batch)
        if not num_messages or self._socket is None:
            return
        frame = self._batch.take()
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            # The queue to a router that does not read is full. It misses messages, notices by their
            # numbers, and asks.
            if self._log_full.allow():
                log_event(
                    logger,
                    "router_queue_full",
                    level=logging.WARNING,
                    num_dropped=num_messages,
                    stream_ids=some_stream_ids(frame),
                    num_suppressed=self._log_full.num_suppressed,
                )
