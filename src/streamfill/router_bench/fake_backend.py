"""An HTTP server with one answer: ``python -m streamfill.router_bench.fake_backend``.

It stands behind routers that pass HTTP on, where `fake_server` stands behind ours. POST is answered
with the JSON that it was started with, GET, as of health checks, with facts of a model.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

import msgspec

from streamfill.launcher.ready_line import announce_ready

_HEAD_END: Final = b"\r\n\r\n"
_FACTS: Final = {"status": "ok", "model_path": "fake", "is_generation": True}


def answer_bytes(body: bytes) -> bytes:
    """A success with this JSON."""
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


def request_end(data: bytes) -> int | None:
    """Where the first request in ``data`` ends; None: it is not complete."""
    head_end = data.find(_HEAD_END)
    if head_end < 0:
        return None
    begin = head_end + len(_HEAD_END)
    head = data[:head_end].lower()
    if b"transfer-encoding: chunked" in head:
        end = data.find(b"0\r\n\r\n", begin)
        return None if end < 0 else end + 5
    _, found, rest = head.partition(b"content-length:")
    end = begin + (int(rest.split(b"\r\n", 1)[0]) if found else 0)
    return end if len(data) >= end else None


class _Protocol(asyncio.Protocol):
    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._data = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._data += data
        while self._data and (end := request_end(self._data)) is not None:
            is_post = self._data.startswith(b"POST")
            self._data = self._data[end:]
            facts = answer_bytes(msgspec.json.encode(_FACTS))
            self._transport.write(self._answer if is_post else facts)


async def _serve(answer: bytes) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    server = await loop.create_server(lambda: _Protocol(answer), "127.0.0.1", 0, backlog=1024)
    announce_ready({"port": server.sockets[0].getsockname()[1], "pid": os.getpid()})
    await stopped.wait()
    server.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal."""
    parser = argparse.ArgumentParser(
        prog="python -m streamfill.router_bench.fake_backend",
        description="An HTTP server with one answer.",
    )
    parser.add_argument("--answer", required=True, help="JSON that every POST gets")
    args = parser.parse_args(argv)
    asyncio.run(_serve(answer_bytes(args.answer.encode())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
