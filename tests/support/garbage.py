"""What a broken or hostile peer may send to a ZeroMQ socket."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping
from types import TracebackType

import msgspec
import zmq

from streamfill.messages.codec import MAX_FRAME_BYTES, encode

QUIET_MS = 500
HOST = "127.0.0.1"
ANSWER_S = 20.0
"""Reading and answering a frame of 32 MiB takes a tenth of a second on a quiet machine."""


def bad_messages(valid: msgspec.Struct, foreign: msgspec.Struct) -> Mapping[str, list[bytes]]:
    """Messages, by what is wrong with them; each is a list of frames, and each is one mistake.

    Args:
        valid: what the socket would take.
        foreign: a message of another direction.
    """
    good = encode(valid)
    fields = msgspec.msgpack.decode(good)
    encode_any = msgspec.msgpack.encode
    return {
        "empty": [b""],
        "random": [random.Random(0).randbytes(300)],
        "never used code": [b"\xc1"],
        "truncated": [good[:-1]],
        "half": [good[: len(good) // 2]],
        "with a tail": [good + b"\x00"],
        "two frames": [good, good],
        "foreign": [encode(foreign)],
        "no map": [encode_any([1, 2, 3])],
        "no tag": [encode_any({"stream_id": 1})],
        "unknown tag": [encode_any(fields | {"type": "surprise"})],
        "unknown field": [encode_any(fields | {"surprise": 1})],
        "wrong type": [
            encode_any({key: {"a": [key]} for key in fields} | {"type": fields["type"]})
        ],
        "deep": [b"\x91" * 100_000],
        "huge length": [b"\xdd\xff\xff\xff\xff"],
        "bad text": [b"\x81\xa4type\xa2\xff\xfe"],
        "oversized": [bytes(MAX_FRAME_BYTES + 1)],
    }


def beyond_what_zeromq_takes() -> bytes:
    """A frame for which the receiving socket closes the connection."""
    return bytes(2 * MAX_FRAME_BYTES + 1)


class Stranger:
    """A DEALER socket of nobody in particular."""

    def __init__(self, port: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(f"tcp://{HOST}:{port}")

    def __enter__(self) -> Stranger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._context.destroy(linger=0)

    def send(self, frames: list[bytes]) -> None:
        """Send one message."""
        self._socket.send_multipart(frames)

    def ask(self, frames: list[bytes]) -> bytes:
        """Send one message and return its answer, which is one frame."""
        self.send(frames)
        assert self._socket.poll(round(ANSWER_S * 1000)), f"no answer to {frames[0][:40]!r}"
        return self._socket.recv()

    def flood(self, frames: list[bytes], times: int) -> None:
        """Send the same message many times, and stay until no answer comes any more: who leaves
        earlier takes with him what was not read yet."""
        for _ in range(times):
            self.send(frames)
        while self._socket.poll(QUIET_MS):
            self._socket.recv()


def talk_another_protocol(port: int) -> None:
    """Bytes that are no ZeroMQ: HTTP, random ones, half a greeting, a greeting and then garbage."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    for content in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        random.Random(1).randbytes(4096),
        greeting[:10],
        greeting + random.Random(2).randbytes(4096),
        b"",
    ):
        with socket.create_connection((HOST, port), timeout=ANSWER_S) as connection:
            connection.sendall(content)


def speaks_zeromq(port: int) -> bool:
    """Whether who listens there greets as ZeroMQ does, which speaks first."""
    with socket.create_connection((HOST, port), timeout=1.0) as connection:
        try:
            return connection.recv(1) == b"\xff"
        except TimeoutError:
            return False
