"""Ordinary requests over HTTP/1.1: ``python -m streamfill.router_bench.http_load``.

Each connection sends a request, reads its answer, and sends the next one. The same bytes go to
every server, and an answer that is not 200 ends the measurement.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import sys
import time
from array import array
from collections.abc import Sequence
from typing import Any, Final

from streamfill.errors import StreamfillError, UnavailableError
from streamfill.observability.lifetime import percentile
from streamfill.router_bench.processes import cpu_s

SILENT_S: Final = 20.0
CONNECT_TIMEOUT_S: Final = 10.0
READ_BYTES: Final = 256 * 1024
_HEAD_END: Final = b"\r\n\r\n"
_LAST_CHUNK: Final = b"0\r\n\r\n"


def request_bytes(host: str, path: str, body: bytes) -> bytes:
    """One POST request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


def answer_end(data: bytes) -> int | None:
    """Where the first answer in ``data`` ends; None: it is not complete.

    Raises:
        StreamfillError: it is no success, or its length cannot be told.
    """
    head_end = data.find(_HEAD_END)
    if head_end < 0:
        return None
    head = data[:head_end].lower()
    if not head.startswith(b"http/1.1 200 "):
        raise StreamfillError(f"a request was answered with {data[:300]!r}")
    begin = head_end + len(_HEAD_END)
    if b"transfer-encoding: chunked" in head:
        end = data.find(b"\r\n" + _LAST_CHUNK, begin - 2)
        return None if end < 0 else end + 2 + len(_LAST_CHUNK)
    _, found, rest = head.partition(b"content-length:")
    if not found:
        raise StreamfillError(f"an answer does not say how long it is: {data[:300]!r}")
    end = begin + int(rest.split(b"\r\n", 1)[0])
    return end if len(data) >= end else None


class _Connection:
    def __init__(self, host: str, port: int, request: bytes) -> None:
        try:
            self.socket = socket.create_connection((host, port), CONNECT_TIMEOUT_S)
        except OSError as error:
            raise UnavailableError(f"no connection to {host}:{port}: {error}") from error
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = request
        self._data = b""
        self._sent_s = 0.0

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self) -> None:
        self._sent_s = time.monotonic()
        self.socket.sendall(self._request)

    def on_readable(self) -> float | None:
        """The seconds that a request took, when its answer is complete; the next one is sent."""
        data = self.socket.recv(READ_BYTES)
        if not data:
            raise UnavailableError("the server closed a connection of the load")
        self._data += data
        end = answer_end(self._data)
        if end is None:
            return None
        took_s = time.monotonic() - self._sent_s
        self._data = self._data[end:]
        self.send()
        return took_s


def _run(args: argparse.Namespace) -> dict[str, Any]:
    host, _, port = args.address.rpartition(":")
    body = sys.stdin.buffer.read()
    request = request_bytes(args.address, args.path, body)
    selector = selectors.EpollSelector()
    for _ in range(args.connections):
        connection = _Connection(host, int(port), request)
        selector.register(connection, selectors.EVENT_READ, connection)
        connection.send()
    _serve(selector, args.warm_s)
    began_s, own_s, router_s = time.monotonic(), time.process_time(), cpu_s(args.router_pid)
    took_us = _serve(selector, args.seconds)
    wall_s = time.monotonic() - began_s
    own_s, router_s = time.process_time() - own_s, cpu_s(args.router_pid) - router_s
    if not took_us:
        raise StreamfillError("not one request was answered while the load was measured")
    return {
        "requests_per_s": round(len(took_us) / wall_s, 1),
        "router_cpu_us": round(1e6 * router_s / len(took_us), 1),
        "router_cores": round(router_s / wall_s, 3),
        "load_cpu_us": round(1e6 * own_s / len(took_us), 1),
        "p50_ms": round((percentile(took_us, 50) or 0.0) / 1000, 2),
        "p99_ms": round((percentile(took_us, 99) or 0.0) / 1000, 2),
    }


def _serve(selector: selectors.EpollSelector, seconds: float) -> array[int]:
    took_us = array("q")
    end_s = time.monotonic() + seconds
    heard_s = time.monotonic()
    while (now_s := time.monotonic()) < end_s:
        ready = selector.select(0.05)
        if ready:
            heard_s = now_s
        elif now_s > heard_s + SILENT_S:
            raise UnavailableError(f"no answer came for {SILENT_S:g} s")
        for key, _ in ready:
            took_s = key.data.on_readable()
            if took_s is not None:
                took_us.append(int(1e6 * took_s))
    return took_us


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one load; prints ``RESULT {json}``."""
    parser = argparse.ArgumentParser(
        prog="python -m streamfill.router_bench.http_load",
        description="The same request again and again; its body comes from the standard input.",
    )
    parser.add_argument("--address", required=True, help="HOST:PORT")
    parser.add_argument("--path", default="/v1/completions")
    parser.add_argument("--router-pid", type=int, required=True, help="whose CPU time counts")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--warm-s", type=float, default=2.0, help="before anything counts")
    parser.add_argument("--seconds", type=float, default=6.0, help="that count")
    args = parser.parse_args(argv)
    try:
        result = _run(args)
    except (StreamfillError, OSError) as error:
        print(f"http_load: {error}", file=sys.stderr)
        return 1
    print(f"RESULT {json.dumps(result)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
