"""The preemption controller's socket and loop. What it thinks is in ``state``.

1. Wait for a frame, for the next silent server to expire, or for ``stop``.
2. Take what came: ``Telemetry`` is answered with a plan that changed or is due, ``ControllerHello``
   with the status. A frame that cannot be read is counted, logged, and answered with the status
   too.
3. Forget the servers that fell silent.
4. Publish how things are, for the threads that answer ``/metrics``.

An idle controller sleeps in 1.
"""

from __future__ import annotations

import errno
import logging
import math
import socket as sockets
import time
from collections.abc import Callable
from typing import assert_never

import zmq

from streamfill.config import ControllerConfig
from streamfill.curve.gate import gate_of
from streamfill.curve.keys import keys_to_listen
from streamfill.errors import ConfigError, ProtocolError
from streamfill.messages.codec import MAX_FRAME_BYTES, FrameDecoder, encode
from streamfill.messages.control import (
    ControllerHello,
    ControllerStatus,
    ControllerToServer,
    ServerToController,
    Telemetry,
)
from streamfill.observability.logging import RateLimited, log_event
from streamfill.preemption.metrics import ControllerMetrics, snapshot_of
from streamfill.preemption.state import ControllerState

_MAX_MESSAGES_PER_ROUND = 256
"""Taken before silent servers and ``stop`` are looked at again, so that a flood cannot hide
them."""

_SEND_QUEUE_FRAMES = 16
"""Plans that wait for one slow server. ZeroMQ drops further ones; the refresh makes good for
them."""

_logger = logging.getLogger(__name__)


class Controller:
    """Binds at once, serves in ``run``. One thread; only ``stop`` may be called from others."""

    def __init__(
        self,
        config: ControllerConfig,
        *,
        epoch: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            epoch: must be above that of every earlier controller; by default the wall clock, in
                milliseconds.
            clock: seconds that only go forward.

        Raises:
            ConfigError: the address cannot be bound, or not without keys; or keys cannot be read.
        """
        keys = keys_to_listen(config, "controller.host", config.host)
        self.num_malformed_frames = 0
        self._state = ControllerState(time.time_ns() // 1_000_000 if epoch is None else epoch)
        self._clock = clock
        self.metrics = ControllerMetrics()
        self._decoder: FrameDecoder[ServerToController] = FrameDecoder(ServerToController)
        self._malformed_log = RateLimited()
        self._stopping = False
        self._wake_read, self._wake_write = sockets.socketpair()
        self._wake_write.setblocking(False)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._gate = gate_of(
            self._context, self._socket, keys, self.metrics.count_refused_handshake
        )
        try:
            self._bind(config)
        except ConfigError:
            self.close()
            raise

    @property
    def port(self) -> int:
        """The TCP port that is bound."""
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return int(endpoint.rpartition(":")[2])

    @property
    def status(self) -> ControllerStatus:
        """How it is; for the thread that runs it."""
        return self._state.status(self.num_malformed_frames)

    @property
    def wake_fd(self) -> int:
        """Non-blocking descriptor; a byte written there wakes ``run``. For
        ``signal.set_wakeup_fd``."""
        return self._wake_write.fileno()

    def run(self) -> None:
        """Serve until ``stop``."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        self.metrics.publish(snapshot_of(self._state, self.status))
        while not self._stopping:
            poller.poll(self._sleep_ms())
            self._receive()
            for server_id in self._state.expire(self._clock()):
                log_event(_logger, "server_silent", level=logging.WARNING, server=server_id)
            self.metrics.publish(snapshot_of(self._state, self.status))

    def stop(self) -> None:
        """Make ``run`` return. For any thread and for signal handlers."""
        self._stopping = True
        try:
            self._wake_write.send(b"\0")
        except BlockingIOError:
            return  # full of bytes that wake just as well

    def close(self) -> None:
        """Give the port back. Idempotent."""
        self._socket.close(linger=0)
        if self._gate is not None:
            self._gate.close()
        self._context.term()
        self._wake_read.close()
        self._wake_write.close()

    def _bind(self, config: ControllerConfig) -> None:
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _SEND_QUEUE_FRAMES)
        # A frame over the protocol's limit is counted by the decoder; beyond this ZeroMQ cuts the
        # sender off.
        self._socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_FRAME_BYTES)
        try:
            self._socket.bind(f"tcp://{config.host}:{config.zmq_port or '*'}")
        except zmq.ZMQError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                remedy = f"cannot be bound ({error.strerror}); take another port, or 0 for any"
                raise ConfigError("controller.zmq_port", config.zmq_port, remedy) from error
            remedy = f"cannot be bound ({error.strerror}); give an address of this machine"
            raise ConfigError("controller.host", config.host, remedy) from error

    def _sleep_ms(self) -> int | None:
        expiry_s = self._state.next_expiry_s()
        if expiry_s is None:
            return None
        return max(0, math.ceil((expiry_s - self._clock()) * 1000))

    def _receive(self) -> None:
        for _ in range(_MAX_MESSAGES_PER_ROUND):
            try:
                sender, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            reply = self._answer(frames)
            if reply is not None:
                # A ROUTER socket drops what a vanished or slow peer does not take; it never waits.
                self._socket.send_multipart((sender, encode(reply)), zmq.NOBLOCK)

    def _answer(self, frames: list[bytes]) -> ControllerToServer | None:
        try:
            if len(frames) != 1:
                raise ProtocolError(f"message of {len(frames)} frames, not 1")
            message = self._decoder.decode(frames[0])
        except ProtocolError as error:
            self.num_malformed_frames += 1
            if self._malformed_log.allow():
                log_event(
                    _logger,
                    "malformed_frame",
                    level=logging.WARNING,
                    error=error,
                    num_malformed_frames=self.num_malformed_frames,
                )
            return self.status
        match message:
            case Telemetry():
                return self._state.receive(message, self._clock())
            case ControllerHello():
                return self.status
            case _:
                assert_never(message)
