"""A real prefill server without a cluster: the test is its router and its controller."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec
import zmq

from streamfill.config import ServerConfig
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.batch import BatchDecoder
from streamfill.messages.codec import encode
from streamfill.messages.common import Role

START_S = 180.0
REPLY_S = 60.0
HEARTBEAT_S = 0.25
ROUTER_INCARNATION = 77

T = TypeVar("T")
M = TypeVar("M", bound=s.ServerToRouter)


class LoneServer:
    """Used inside ``with``, by one thread, which must not be away for longer than the server's
    patience with a silent router (5 s)."""

    def __init__(self, folder: Path, model: Path, controller_endpoint: str | None = None) -> None:
        self.heartbeat: s.ServerHeartbeat | None = None
        """The newest one."""
        self.log_file = folder / "server.log"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind("tcp://127.0.0.1:*")
        self._decoder: BatchDecoder[s.ServerToRouter] = BatchDecoder(s.ServerToRouter)
        self._route = b""
        self._received: list[s.ServerToRouter] = []
        self._beat_due_s = 0.0
        config = ServerConfig(
            role=Role.PREFILL,
            server_id="lone",
            model_path=str(model),
            router_endpoint=self._socket.getsockopt_string(zmq.LAST_ENDPOINT),
            controller_endpoint=controller_endpoint,
        )
        config_file = folder / "server.json"
        config_file.write_bytes(msgspec.json.encode(config))
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefill_server", "--config-file", str(config_file)],
                cwd=folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> LoneServer:
        try:
            self.wait_for("its heartbeat", lambda: self.heartbeat, START_S)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def send(self, message: r.RouterToServer) -> None:
        """Send a message."""
        self.send_frames([encode(message)])

    def send_frames(self, frames: list[bytes]) -> None:
        """Send whatever."""
        self._socket.send_multipart([self._route, *frames])

    def take(self, kind: type[M], stream_id: int | None = None) -> list[M]:
        """What has come of this kind, about this stream; it is not given out again."""
        self._pump(0.0)
        wanted: list[M] = [
            message
            for message in self._received
            if isinstance(message, kind)
            and (stream_id is None or getattr(message, "stream_id", None) == stream_id)
        ]
        self._received = [m for m in self._received if not any(m is w for w in wanted)]
        return wanted

    def wait_for(self, what: str, condition: Callable[[], T], timeout_s: float = REPLY_S) -> T:
        """Play the router until the condition is true; returns its value."""
        end_s = time.monotonic() + timeout_s
        while not (value := condition()):
            assert self.process.poll() is None, f"the server ended:\n{self.log()}"
            assert time.monotonic() < end_s, f"not after {timeout_s:g} s: {what}\n{self.log()}"
            self._pump(0.05)
        return value

    @property
    def num_malformed_frames(self) -> int:
        """As the newest heartbeat says."""
        return 0 if self.heartbeat is None else self.heartbeat.counters.num_malformed_frames

    def log(self) -> str:
        """The end of what the server has written."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")[-8000:]

    def _pump(self, wait_s: float) -> None:
        if self._route and time.monotonic() >= self._beat_due_s:
            self._beat_due_s = time.monotonic() + HEARTBEAT_S
            self.send(r.RouterHeartbeat(router_incarnation=ROUTER_INCARNATION))
        while self._socket.poll(round(wait_s * 1000)):
            wait_s = 0.0
            self._route, frame = self._socket.recv_multipart()
            for message in self._decoder.decode(frame):
                self._hear(message)

    def _hear(self, message: s.ServerToRouter) -> None:
        match message:
            case s.Register():
                self.send(
                    r.Registered(
                        router_incarnation=ROUTER_INCARNATION, heartbeat_interval_s=HEARTBEAT_S
                    )
                )
            case s.ServerHeartbeat() as heartbeat:
                self.heartbeat = heartbeat
            case message:
                self._received.append(message)

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._context.destroy(linger=0)
