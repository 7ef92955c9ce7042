"""A server's link to the router, in a thread of its own.

The scheduler's loop can be busy for seconds in one forward pass. This thread is not: it registers,
sends heartbeats, acknowledges and de-duplicates what arrives, and asks for what is missing. The
scheduler thread only exchanges plain messages with it through two queues and never waits.

1. ``Register`` is sent until ``Registered`` comes back; the router's silence starts it over.
2. Stream messages pass the ``InboundGate`` and wait in the inbox; ``fileno`` becomes readable.
3. The scheduler thread takes them with ``drain``, and gives its own messages to ``send``.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

import zmq

from streamfill.errors import ProtocolError
from streamfill.kv_transfer.waker import Waker
from streamfill.links.inbound_gate import InboundGate
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import MAX_FRAME_BYTES, FrameDecoder, encode
from streamfill.messages.common import ServerCounters
from streamfill.observability.logging import RateLimited, log_event

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 0.25
"""Four in the second after which the router suspects a server."""
REGISTER_RETRY_S = 0.5
ROUTER_SILENT_S = 5.0
"""The router sends heartbeats four times a second; five silent seconds mean that it is gone or was
replaced."""
CLOSE_TIMEOUT_S = 2.0


class RouterLost:
    """In the inbox: the router that knew our streams is gone; drop them all."""


Inbound = r.RouterToServer | RouterLost


class ServerLink:
    """Link of one server to the router. Owned by the scheduler thread; ``close`` ends the
    thread."""

    def __init__(
        self, endpoint: str, register: s.Register, on_refused: Callable[[str], None]
    ) -> None:
        """
        Args:
            endpoint: ZeroMQ address of the router.
            register: who this server is.
            on_refused: called in the link's thread when the router refuses the server.
        """
        self._endpoint = endpoint
        self._register = register
        self._on_refused = on_refused
        self._inbox: deque[Inbound] = deque()
        self._outbox: deque[s.ServerToRouter] = deque()
        self._inbox_waker = Waker()
        self._outbox_waker = Waker()
        self._gate = InboundGate()
        self._gate_lock = threading.Lock()
        self._decoder: FrameDecoder[r.RouterToServer] = FrameDecoder(r.RouterToServer)
        self._counters = ServerCounters()
        self._controller_alive = False
        self._last_tick = time.monotonic()
        self._closing = False
        self._router_incarnation: int | None = None
        self._router_heard = 0.0
        self._register_sent = 0.0
        self._log_malformed = RateLimited(period_s=1.0)
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

    def drain(self) -> list[Inbound]:
        """What arrived since the last call, in order."""
        self._inbox_waker.clear()
        messages: list[Inbound] = []
        while self._inbox:
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
        self._counters = counters
        self._controller_alive = controller_alive

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
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.linger = 200
        socket.maxmsgsize = 2 * MAX_FRAME_BYTES
        socket.connect(self._endpoint)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._outbox_waker.fileno(), zmq.POLLIN)
        next_heartbeat = time.monotonic()
        try:
            while not self._closing:
                poller.poll(max(0, math.ceil((next_heartbeat - time.monotonic()) * 1000)))
                self._outbox_waker.clear()
                self._receive(socket)
                self._flush(socket)
                now = time.monotonic()
                if now >= next_heartbeat:
                    next_heartbeat = now + HEARTBEAT_INTERVAL_S
                    self._beat(socket, now)
            self._flush(socket)
        except zmq.ZMQError as error:
            log_event(logger, "router_link_broken", level=logging.ERROR, error=str(error))
            self._put(RouterLost())
        finally:
            socket.close()
            context.term()

    def _beat(self, socket: zmq.Socket[bytes], now: float) -> None:
        if self._router_incarnation is not None and now - self._router_heard > ROUTER_SILENT_S:
            log_event(
                logger,
                "router_silent",
                level=logging.WARNING,
                silent_s=round(now - self._router_heard, 1),
            )
            self._lose_router()
        if self._router_incarnation is None:
            if now - self._register_sent >= REGISTER_RETRY_S:
                self._register_sent = now
                self._transmit(socket, self._register)
            return
        self._transmit(
            socket,
            s.ServerHeartbeat(
                server_id=self._register.server_id,
                incarnation=self._register.incarnation,
                loop_age_s=now - self._last_tick,
                controller_alive=self._controller_alive,
                counters=self._counters,
            ),
        )

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 1:
                    raise ProtocolError(f"message of {len(frames)} frames, expected 1")
                message = self._decoder.decode(frames[0])
            except ProtocolError as error:
                self.num_malformed_frames += 1
                if self._log_malformed.allow():
                    log_event(logger, "malformed_frame", level=logging.WARNING, error=str(error))
                self._transmit(socket, s.MalformedByRouter(reason=str(error)[:500]))
                continue
            self._accept(socket, message)

    def _accept(self, socket: zmq.Socket[bytes], message: r.RouterToServer) -> None:
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
                self._on_refused(reason)
            case r.Malformed(reason=reason):
                log_event(logger, "router_could_not_read", level=logging.ERROR, reason=reason)
            case _:
                with self._gate_lock:
                    admission = self._gate.admit(message)
                if admission.deliver:
                    self._put(message)
                if admission.reply is not None:
                    self._transmit(socket, admission.reply)

    def _lose_router(self) -> None:
        self._router_incarnation = None
        self._register_sent = 0.0
        with self._gate_lock:
            self._gate.clear()
        self._put(RouterLost())

    def _put(self, message: Inbound) -> None:
        self._inbox.append(message)
        self._inbox_waker.set()

    def _flush(self, socket: zmq.Socket[bytes]) -> None:
        while self._outbox:
            self._transmit(socket, self._outbox.popleft())

    def _transmit(self, socket: zmq.Socket[bytes], message: s.ServerToRouter) -> None:
        try:
            socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # The queue to a router that does not read is full. It misses messages, notices by their
            # numbers, and asks.
            log_event(
                logger, "router_queue_full", level=logging.WARNING, dropped=type(message).__name__
            )
