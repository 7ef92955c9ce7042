"""Streams as lanes of one ``Streams`` call, in the place of ``grpc_connection.Connection``."""

from __future__ import annotations

from typing import Final, Protocol

from streamfill.api import streamfill_pb2 as pb
from streamfill.router_bench.grpc_connection import Connection
from streamfill.router_bench.grpc_frames import MAX_FRAME_BYTES, PREFIX_BYTES, message
from streamfill.router_bench.segments import field, number_field

PATH: Final = "/streamfill.v1.Streamfill/Streams"
MAX_BATCH_BYTES: Final = MAX_FRAME_BYTES - 256


class LaneCall(Protocol):
    """What is told of one stream. Called from ``LaneConnection.on_readable``."""

    def on_event(self, event: pb.StreamEvent) -> None:
        """An event came."""

    def on_end(self) -> None:
        """The router ended the stream, well or badly."""


class LaneConnection:
    """Owned by one thread, as the connection below it."""

    def __init__(self, host: str, port: int) -> None:
        """Connects. Raises ``UnavailableError``: nobody listens there."""
        self._connection = Connection(host, port, PATH)
        self._number = self._connection.open_call(self)
        self._lanes: dict[int, LaneCall] = {}
        self._newest = 0
        self._batch: list[bytes] = []
        self._num_bytes = 0

    def fileno(self) -> int:
        """For a selector."""
        return self._connection.fileno()

    def close(self) -> None:
        """At once."""
        self._connection.close()

    def open_call(self, call: LaneCall) -> int:
        """Begin a stream; returns the number of its lane."""
        self._newest += 1
        self._lanes[self._newest] = call
        return self._newest

    def send(self, number: int, data: bytes) -> None:
        """Send a message, gRPC's prefix included, with the next ``flush``."""
        request = field(1, number_field(1, number) + field(2, data[PREFIX_BYTES:]))
        if self._num_bytes + len(request) > MAX_BATCH_BYTES:
            self._send_batch()
        self._batch.append(request)
        self._num_bytes += len(request)

    def flush(self) -> None:
        """Hand over to the kernel what was sent since the last time."""
        self._send_batch()
        self._connection.flush()

    def on_readable(self) -> None:
        """Read what there is, and tell the streams."""
        self._connection.on_readable()

    def on_message(self, body: bytes) -> None:
        """See ``grpc_connection.Call``."""
        for reply in pb.StreamsReply.FromString(body).replies:
            call = self._lanes.get(reply.lane)
            if call is None:
                continue
            call.on_event(reply.event)
            if reply.event.WhichOneof("event") in ("done", "failed"):
                del self._lanes[reply.lane]
                call.on_end()

    def on_end(self) -> None:
        """See ``grpc_connection.Call``."""
        for call in list(self._lanes.values()):
            call.on_end()

    def _send_batch(self) -> None:
        if self._batch:
            self._connection.send(self._number, message(b"".join(self._batch)))
            self._batch.clear()
            self._num_bytes = 0
