"""The receiver's control socket: messages in and out, and the border of zmq errors."""

from __future__ import annotations

import logging

import zmq

from streamfill.curve.gate import CurveGate, gate_of
from streamfill.curve.keys import ListenKeys
from streamfill.errors import ProtocolError, TransportError
from streamfill.kv_transfer.counters import Counters, ReceiverCount
from streamfill.messages.codec import MAX_FRAME_BYTES, FrameDecoder, encode
from streamfill.messages.handoff import Reject, ToReceiver, ToSender
from streamfill.observability.logging import RateLimited

_log = logging.getLogger(__name__)


class ControlSocket:
    """A ROUTER socket whose senders are named by their route. Bound by one thread, used and
    closed by another."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        host: str,
        port: int,
        counters: Counters[ReceiverCount],
        keys: ListenKeys | None = None,
    ) -> None:
        """Listen.

        Args:
            context: of the receiver.
            host: address to listen on; empty or ``*`` for all.
            port: 0 takes a free one.
            counters: of the receiver.
            keys: who is let in. None: everybody, in the clear.

        Raises:
            TransportError: it cannot listen there.
        """
        self._counters = counters
        self._decoder: FrameDecoder[ToReceiver] = FrameDecoder(ToReceiver)
        self._log_malformed = RateLimited()
        self._gate: CurveGate | None = None
        self._socket = context.socket(zmq.ROUTER)
        try:
            self._socket.set(zmq.LINGER, 0)
            # A reply to a sender that is gone is an error that we count, not silence.
            self._socket.set(zmq.ROUTER_MANDATORY, 1)
            # A frame up to this size is counted and answered; beyond, ZeroMQ cuts its sender off.
            self._socket.set(zmq.MAXMSGSIZE, 2 * MAX_FRAME_BYTES)
            self._gate = gate_of(
                *(context, self._socket, keys),
                lambda failure: counters.add(ReceiverCount.REFUSED_HANDSHAKES),
            )
            self._socket.bind(f"tcp://{host or '*'}:{port or '*'}")
            endpoint = str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        except zmq.ZMQError as error:
            self.close()
            raise TransportError(f"cannot listen on {host}:{port}: {error}") from error
        self._port = int(endpoint.rstrip("\0").rpartition(":")[2])

    @property
    def port(self) -> int:
        """On which it listens."""
        return self._port

    def register(self, poller: zmq.Poller) -> None:
        """Have ``poller`` wait for messages."""
        poller.register(self._socket, zmq.POLLIN)

    def receive(self) -> tuple[bytes, ToReceiver | ProtocolError] | None:
        """The next message, or why its frame is none, with its sender's route; None if there is
        nothing. Never waits.

        Raises:
            TransportError: the socket is broken.
        """
        try:
            route, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            raise TransportError(f"the control socket is broken: {error}") from error
        try:
            if len(frames) != 1:
                raise ProtocolError(f"{len(frames)} frames instead of one")
            return route, self._decoder.decode(frames[0])
        except ProtocolError as error:
            self._counters.add(ReceiverCount.MALFORMED_FRAMES)
            if self._log_malformed.allow():
                _log.warning(
                    "malformed frame dropped: %s (%d more since the last such line)",
                    error,
                    self._log_malformed.num_suppressed,
                )
            return route, error

    def reply(self, route: bytes, message: ToSender) -> None:
        """Send without waiting. A sender that is gone, or does not read, notices by time-out."""
        try:
            self._socket.send_multipart([route, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self._counters.add(ReceiverCount.STALE_FRAMES)
            _log.info("%s was not delivered: %s", type(message).__name__, error)

    def reject(self, route: bytes, reason: str) -> None:
        """Tell somebody that there is no session."""
        self.reply(route, Reject(reason=reason))

    def close(self) -> None:
        """Stop to listen; what was not sent is lost."""
        self._socket.close(0)
        if self._gate is not None:
            self._gate.close()
