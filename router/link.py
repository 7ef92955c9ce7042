"""The router's end of the ZeroMQ links: one ROUTER socket, to which all servers connect.

The socket is read from the asyncio loop's readiness callback, without a task or a future per frame:
an answer's token costs one callback. ZeroMQ's file descriptor only tells of *changes*, therefore
whoever leaves frames in the socket, or sends, looks again (`_look_again`).

What is sent within one turn of the loop to one server leaves in one frame, when the turn is over.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable

import zmq

from streamfill.curve.gate import CurveGate, HandshakeFailure, gate_of
from streamfill.curve.keys import ListenKeys
from streamfill.errors import ConfigError, ProtocolError
from streamfill.links.faults import LinkFaults
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.batch import BatchDecoder, MessageBatch, some_stream_ids
from streamfill.messages.codec import MAX_FRAME_BYTES, encode
from streamfill.observability.logging import RateLimited, log_event

logger = logging.getLogger(__name__)

MAX_QUEUED_FRAMES = 50_000
"""Towards one server that does not read. It is dead within seconds, and what is lost is resent."""

MAX_MESSAGES_PER_TURN = 256
"""After so many the loop gets to its other work, such as the clients."""

LINGER_MS = 200
"""What is queued at the end, such as cancellations, gets so long to leave."""

Identity = bytes
"""ZeroMQ's name of one connection. A reconnected server has a new one."""


class RouterLink:
    """Sends to and receives from servers. Owned by the asyncio loop that calls `bind`."""

    def __init__(
        self,
        on_message: Callable[[Identity, s.ServerToRouter], None],
        *,
        keys: ListenKeys | None = None,
        on_refused: Callable[[HandshakeFailure], None] = lambda failure: None,
        on_unreachable: Callable[[Identity], None] = lambda identity: None,
    ) -> None:
        """
        Args:
            on_message: called in the loop with each message and who sent it.
            keys: who is let in. None: everybody, in the clear.
            on_refused: called in a thread of its own for each connection that is not let in.
            on_unreachable: called in the loop when something could not be sent, since there is no
                such connection any more.
        """
        self._keys = keys
        self._on_refused = on_refused
        self._gate: CurveGate | None = None
        self._on_message = on_message
        self._on_unreachable = on_unreachable
        self._decoder: BatchDecoder[s.ServerToRouter] = BatchDecoder(s.ServerToRouter)
        self._batches: dict[Identity, MessageBatch] = {}
        """What leaves when the turn of the loop is over."""
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._descriptor = -1
        self._look_again_planned = False
        self._log_malformed = RateLimited()
        self._log_full = RateLimited()
        self._log_unsent = RateLimited()
        self._faults = LinkFaults.from_environment("router")
        self.num_malformed_frames = 0

    def bind(self, host: str, port: int) -> int:
        """Listen; returns the port.

        Args:
            port: 0 for any free one.

        Raises:
            ConfigError: the address cannot be had.
        """
        self._context = zmq.Context()
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = LINGER_MS
        socket.sndhwm = socket.rcvhwm = MAX_QUEUED_FRAMES
        # A frame up to this size is read and answered; beyond, ZeroMQ closes the connection.
        socket.maxmsgsize = 2 * MAX_FRAME_BYTES
        socket.router_mandatory = True
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._gate = gate_of(self._context, socket, self._keys, self._on_refused)
        try:
            socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            socket.close()
            self._end_context()
            if error.errno == errno.EADDRINUSE:
                remedy = f"the port is in use on {host}; choose another, or 0 for any free one"
                raise ConfigError("router.zmq_port", port, remedy) from error
            remedy = f"cannot listen on {host} ({error}); give an address of this machine"
            raise ConfigError("router.host", host, remedy) from error
        endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._socket = socket
        self._loop = asyncio.get_running_loop()
        self._descriptor = socket.fileno()
        self._loop.add_reader(self._descriptor, self._on_readable)
        self._look_again()
        return int(endpoint.rpartition(":")[2])

    def close(self) -> None:
        """Send what waits and stop listening. Idempotent."""
        if self._socket is None or self._loop is None or self._context is None:
            return
        self._flush()
        self._loop.remove_reader(self._descriptor)
        self._socket.close()
        self._socket = None
        self._end_context()

    def send(self, identity: Identity, message: r.RouterToServer) -> None:
        """Queue a message for one connection; see `on_unreachable`."""
        if self._faults is None or self._loop is None:
            self._put(identity, encode(message))
            return
        for delay_s in self._faults.delays_s(identity, message):
            if delay_s:
                self._loop.call_later(delay_s, self._put, identity, encode(message))
            else:
                self._put(identity, encode(message))

    def _put(self, identity: Identity, message: bytes) -> None:
        if self._loop is None:
            return
        batch = self._batches.get(identity)
        if batch is None:
            if not self._batches:
                self._loop.call_soon(self._flush)
            batch = self._batches[identity] = MessageBatch()
        elif not batch.has_room_for(message):
            self._send(identity, batch)
        batch.add(message)

    def _flush(self) -> None:
        batches, self._batches = self._batches, {}
        for identity, batch in batches.items():
            self._send(identity, batch)
        if batches:
            self._look_again()

    def _send(self, identity: Identity, batch: MessageBatch) -> None:
        if self._socket is None:
            return
        num_messages, frame = len(batch), batch.take()
        try:
            self._socket.send_multipart((identity, frame), zmq.NOBLOCK)
        except zmq.Again:
            if self._log_full.allow():
                log_event(
                    logger,
                    "server_queue_full",
                    level=logging.WARNING,
                    num_dropped=num_messages,
                    stream_ids=some_stream_ids(frame),
                    num_suppressed=self._log_full.num_suppressed,
                )
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                self._on_unreachable(identity)
            elif self._log_unsent.allow():  # what others are to get must not be lost with it
                log_event(
                    logger,
                    "frame_not_sent",
                    level=logging.ERROR,
                    error=str(error),
                    num_dropped=num_messages,
                    stream_ids=some_stream_ids(frame),
                    num_suppressed=self._log_unsent.num_suppressed,
                )

    def _end_context(self) -> None:
        if self._gate is not None:
            self._gate.close()
        if self._context is not None:
            self._context.term()

    def _look_again(self) -> None:
        if not self._look_again_planned and self._loop is not None:
            self._look_again_planned = True
            self._loop.call_soon(self._on_readable)

    def _on_readable(self) -> None:
        self._look_again_planned = False
        num_messages = 0
        while num_messages < MAX_MESSAGES_PER_TURN:
            if self._socket is None:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            num_messages += self._receive(frames)
        self._look_again()

    def _receive(self, frames: list[bytes]) -> int:
        """Hand the messages on; how many there were, or one that was none."""
        identity = frames[0]
        try:
            if len(frames) != 2:
                raise ProtocolError(f"message of {len(frames) - 1} frames, expected 1")
            messages = self._decoder.decode(frames[1])
        except ProtocolError as error:
            self.num_malformed_frames += 1
            if self._log_malformed.allow():
                log_event(
                    logger,
                    "malformed_frame",
                    level=logging.WARNING,
                    error=str(error)[:300],
                    num_suppressed=self._log_malformed.num_suppressed,
                )
            self.send(identity, r.Malformed(reason=str(error)[:500]))
            return 1
        for message in messages:
            try:
                self._on_message(identity, message)
            except Exception as error:  # noqa: BLE001  one message must not take the others down
                log_event(
                    logger,
                    "message_handler_failed",
                    stream_id=getattr(message, "stream_id", None),
                    level=logging.ERROR,
                    exception=error,
                    message=type(message).__name__,
                )
        return len(messages)
