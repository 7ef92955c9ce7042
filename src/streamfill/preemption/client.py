"""A prefill server's line to the preemption controller, for a plain thread without asyncio."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import assert_never

import msgspec
import zmq

from streamfill.curve.keys import ConnectKeys
from streamfill.errors import ProtocolError, TransportError
from streamfill.messages.codec import MAX_FRAME_BYTES, FrameDecoder, encode
from streamfill.messages.control import (
    ControllerHello,
    ControllerStatus,
    ControllerToServer,
    Plan,
    Telemetry,
)
from streamfill.observability.logging import RateLimited, log_event
from streamfill.preemption.timeouts import CONTROLLER_ALIVE_S

_SEND_QUEUE_FRAMES = 2
"""Reports that wait for a slow controller. Old ones are worth nothing, so few are kept."""

_RECEIVE_QUEUE_FRAMES = 64
"""Plans that wait for a server in a long forward pass; more than come in a minute of one."""

_RECONNECT_MS = 100
_RECONNECT_MAX_MS = 2_000
"""Back-off towards a dead controller: costs nothing, and a restarted one is found within two
seconds."""

_HEARTBEAT_MS = 1_000
"""Of ZeroMQ itself: a controller whose machine vanished closes no connection. After
``CONTROLLER_ALIVE_S`` without an answer the connection is dropped and tried anew."""

_logger = logging.getLogger(__name__)


class ControllerClient:
    """Reports to the controller and hears of its plans. Never blocks, never raises for a dead one.

    For one thread only. ``socket`` may be registered with a ``zmq.Poller``; when it is readable,
    ``poll``.
    """

    def __init__(
        self,
        endpoint: str,
        server_id: str,
        incarnation: int,
        *,
        keys: ConnectKeys | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects in the background.

        Args:
            endpoint: ``tcp://host:port`` of the controller.
            incarnation: random, new at each start of the server.
            keys: of this side. None: in the clear.
            context: the process's own; by default ``zmq.Context.instance()``.
            clock: seconds that only go forward.

        Raises:
            TransportError: ``endpoint`` is no ZeroMQ address.
        """
        self.num_dropped_reports = 0
        """Reports that a newer one replaced before they were sent."""
        self.num_refused_plans = 0
        """Plans of an older version, of an older epoch while a newer one lives, or for another
        server."""
        self.num_malformed_frames = 0
        self._server_id = server_id
        self._incarnation = incarnation
        self._clock = clock
        self._num_reports = 0
        self._unsent: bytes | None = None
        self._newest = (0, 0)
        """Epoch and version of the newest plan."""
        self._heard_s: float | None = None
        self._decoder: FrameDecoder[ControllerToServer] = FrameDecoder(ControllerToServer)
        self._malformed_log = RateLimited()
        self._refused_log = RateLimited()
        self.socket = _connect(context or zmq.Context.instance(), endpoint, keys)

    def report(self, telemetry: Telemetry) -> None:
        """Send ``telemetry``, or keep it until the controller can be reached; a newer one replaces
        it.

        Its ``server_id``, ``incarnation`` and ``report`` are filled in here.
        """
        self._num_reports += 1
        stamped = msgspec.structs.replace(
            telemetry,
            server_id=self._server_id,
            incarnation=self._incarnation,
            report=self._num_reports,
        )
        if self._unsent is not None:
            self.num_dropped_reports += 1
        self._unsent = encode(stamped)
        self._flush()

    def poll(self) -> Plan | None:
        """The newest plan that came since the last call, if it is newer than all before."""
        self._flush()
        newest: Plan | None = None
        for _ in range(_RECEIVE_QUEUE_FRAMES):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            plan = self._accept(frames)
            if plan is not None:
                newest = plan
        return newest

    @property
    def alive(self) -> bool:
        """Whether a plan came within ``CONTROLLER_ALIVE_S``, as of the last ``poll``."""
        return self._heard_s is not None and self._clock() - self._heard_s < CONTROLLER_ALIVE_S

    def close(self) -> None:
        """Give the socket up; unsent reports are dropped. Idempotent."""
        self.socket.close(linger=0)

    def _flush(self) -> None:
        if self._unsent is None:
            return
        try:
            self.socket.send(self._unsent, zmq.NOBLOCK)
        except zmq.Again:
            return
        self._unsent = None

    def _accept(self, frames: list[bytes]) -> Plan | None:
        """The plan in a message, if it is newer than all before. Any plan that is not refused is a
        sign of life."""
        try:
            message = _only_message(self._decoder, frames)
        except ProtocolError as error:
            self.num_malformed_frames += 1
            if self._malformed_log.allow():
                log_event(
                    _logger,
                    "malformed_frame",
                    level=logging.WARNING,
                    sender="controller",
                    error=error,
                )
            return None
        match message:
            case Plan():
                place = (message.epoch, message.version)
                # Of two controllers the newer one counts. With nobody heard of for so long there
                # is only one, whatever the wall clock said when it chose its epoch.
                is_outdated = place < self._newest and (
                    message.epoch == self._newest[0] or self.alive
                )
                if message.server_id != self._server_id or is_outdated:
                    self._refuse(message)
                    return None
                self._heard_s = self._clock()
                if place == self._newest:
                    return None
                self._newest = place
                return message
            case ControllerStatus():
                return None
            case _:
                assert_never(message)

    def _refuse(self, plan: Plan) -> None:
        self.num_refused_plans += 1
        if self._refused_log.allow():
            epoch, version = self._newest
            log_event(
                _logger,
                "plan_refused",
                level=logging.WARNING,
                server=plan.server_id,
                epoch=plan.epoch,
                version=plan.version,
                newest_epoch=epoch,
                newest_version=version,
            )


def fetch_status(
    endpoint: str, timeout_s: float, keys: ConnectKeys | None = None
) -> ControllerStatus:
    """Ask the controller how it is; blocks for at most ``timeout_s``.

    Raises:
        TransportError: no answer, or none that can be read.
    """
    decoder: FrameDecoder[ControllerToServer] = FrameDecoder(ControllerToServer)
    socket = _connect(zmq.Context.instance(), endpoint, keys)
    deadline_s = time.monotonic() + timeout_s
    try:
        _wait(socket, zmq.POLLOUT, deadline_s, endpoint)
        socket.send(encode(ControllerHello()), zmq.NOBLOCK)
        _wait(socket, zmq.POLLIN, deadline_s, endpoint)
        message = _only_message(decoder, socket.recv_multipart())
    except ProtocolError as error:
        raise TransportError(f"{endpoint} is no preemption controller: {error}") from error
    finally:
        socket.close(linger=0)
    if not isinstance(message, ControllerStatus):
        raise TransportError(f"{endpoint} answered with a {type(message).__name__}")
    return message


def _wait(socket: zmq.Socket[bytes], event: int, deadline_s: float, endpoint: str) -> None:
    left_ms = max(0, int((deadline_s - time.monotonic()) * 1000))
    if not socket.poll(left_ms, event):
        raise TransportError(f"no preemption controller answers at {endpoint}")


def _only_message(
    decoder: FrameDecoder[ControllerToServer], frames: list[bytes]
) -> ControllerToServer:
    if len(frames) != 1:
        raise ProtocolError(f"message of {len(frames)} frames, not 1")
    return decoder.decode(frames[0])


def _connect(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: ConnectKeys | None
) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    if keys is not None:
        keys.secure(socket)
    socket.setsockopt(zmq.LINGER, 0)
    # Only a live connection takes frames, so what waits for a dead controller waits in one place,
    # where a newer report can replace it.
    socket.setsockopt(zmq.IMMEDIATE, 1)
    # A frame up to this size is counted; beyond, ZeroMQ closes the connection.
    socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_FRAME_BYTES)
    socket.setsockopt(zmq.SNDHWM, _SEND_QUEUE_FRAMES)
    socket.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE_FRAMES)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(CONTROLLER_ALIVE_S * 1000))
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise TransportError(f"{endpoint} is no address to connect to: {error}") from error
    return socket
