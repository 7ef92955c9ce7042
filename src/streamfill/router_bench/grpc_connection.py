"""One HTTP/2 connection with many gRPC calls on it, over a plain non-blocking socket.

A general client costs more per message than the router that is to be measured. This one writes
requests that are bytes already, puts what is due together into one system call, and looks at no
header but for the end of a call.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Final, Protocol

from streamfill.errors import UnavailableError
from streamfill.router_bench import grpc_frames as h2

READ_BYTES: Final = 256 * 1024
CONNECT_TIMEOUT_S: Final = 10.0


class Call(Protocol):
    """What is told of one call. Called from `Connection.on_readable`."""

    def on_message(self, body: bytes) -> None:
        """A message came."""

    def on_end(self) -> None:
        """The server ended the call, well or badly."""


class Connection:
    """Owned by one thread. Whoever polls `fileno` calls `on_readable`, and `flush` once a turn."""

    def __init__(self, host: str, port: int, path: str) -> None:
        """Connects.

        Raises:
            UnavailableError: nobody listens there.
        """
        try:
            self._socket = socket.create_connection((host, port), CONNECT_TIMEOUT_S)
        except OSError as error:
            raise UnavailableError(f"no connection to {host}:{port}: {error}") from error
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._headers = h2.call_headers(f"{host}:{port}", path)
        self._next_id = 1
        self._calls: dict[int, Call] = {}
        self._out: list[bytes] = [h2.hello()]
        self._unsent = b""
        self._window = h2.INITIAL_WINDOW_BYTES
        self._call_window = h2.INITIAL_WINDOW_BYTES
        self._windows: dict[int, int] = {}
        self._held: deque[tuple[int, bytes]] = deque()
        self._rest = b""
        self._partial: dict[int, bytes] = {}

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether the last `flush` could not send all."""
        return bool(self._unsent)

    def close(self) -> None:
        """At once; calls are cancelled by the server."""
        self._socket.close()

    def open_call(self, call: Call) -> int:
        """Begin a call; returns its number on this connection."""
        number = self._next_id
        self._next_id += 2
        self._calls[number] = call
        self._windows[number] = self._call_window
        self._out.append(h2.frame(h2.HEADERS, h2.END_HEADERS, number, self._headers))
        return number

    def send(self, number: int, data: bytes) -> None:
        """Send a message, prefix included, as soon as the server's windows let it."""
        if self._held or not self._fits(number, len(data)):
            self._held.append((number, data))
        else:
            self._send_now(number, data)

    def flush(self) -> None:
        """Hand over to the kernel what was sent since the last time, as far as it takes it."""
        if not self._out and not self._unsent:
            return
        data = self._unsent + b"".join(self._out)
        self._out.clear()
        try:
            self._unsent = data[self._socket.send(data) :]
        except BlockingIOError:
            self._unsent = data

    def on_readable(self) -> None:
        """Read what there is, and tell the calls.

        Raises:
            UnavailableError: the server closed the connection.
        """
        try:
            data = self._rest + self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        if len(data) == len(self._rest):
            raise UnavailableError("the router closed a connection of the load")
        at, end = 0, len(data)
        while at + h2.HEAD_BYTES <= end:
            length = int.from_bytes(data[at : at + 3], "big")
            begin = at + h2.HEAD_BYTES
            if begin + length > end:
                break
            number = int.from_bytes(data[at + 5 : begin], "big")
            self._take(data[at + 3], data[at + 4], number, data[begin : begin + length])
            at = begin + length
        self._rest = data[at:]

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == h2.DATA:
            self._on_data(number, payload)
        elif kind == h2.WINDOW_UPDATE:
            self._widen(number, int.from_bytes(payload, "big"))
        elif kind == h2.PING and not flags & h2.ACK:
            self._out.append(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif kind == h2.SETTINGS and not flags & h2.ACK:
            self._on_settings(payload)
        elif kind == h2.RST_STREAM or (kind == h2.HEADERS and flags & h2.END_STREAM):
            self._on_end(number)
        elif kind == h2.GOAWAY:
            raise UnavailableError(f"the router ended a connection of the load: {payload[8:]!r}")

    def _on_data(self, number: int, payload: bytes) -> None:
        call = self._calls.get(number)
        if call is None:
            return
        if self._partial:
            payload = self._partial.pop(number, b"") + payload
        at, end = 0, len(payload)
        while (begin := at + h2.PREFIX_BYTES) <= end:
            length = int.from_bytes(payload[at + 1 : begin], "big")
            if begin + length > end:
                break
            call.on_message(payload[begin : begin + length])
            at = begin + length
        if at < end:
            self._partial[number] = payload[at:]

    def _on_settings(self, payload: bytes) -> None:
        window = h2.settings_of(payload).get(h2.SETTING_WINDOW)
        if window is not None:
            more, self._call_window = window - self._call_window, window
            for number in self._windows:
                self._windows[number] += more
        self._out.append(h2.frame(h2.SETTINGS, h2.ACK, 0))
        self._send_held()

    def _on_end(self, number: int) -> None:
        call = self._calls.pop(number, None)
        self._windows.pop(number, None)
        self._partial.pop(number, None)
        if call is not None:
            call.on_end()

    def _widen(self, number: int, num_bytes: int) -> None:
        if number == 0:
            self._window += num_bytes
        elif number in self._windows:
            self._windows[number] += num_bytes
        if self._held:
            self._send_held()

    def _send_held(self) -> None:
        for _ in range(len(self._held)):
            number, data = self._held.popleft()
            if number not in self._windows:
                continue
            if self._fits(number, len(data)):
                self._send_now(number, data)
            else:  # behind the others: each call has one message under way, so none is overtaken
                self._held.append((number, data))

    def _fits(self, number: int, num_bytes: int) -> bool:
        return num_bytes <= self._window and num_bytes <= self._windows.get(number, 0)

    def _send_now(self, number: int, data: bytes) -> None:
        self._window -= len(data)
        self._windows[number] -= len(data)
        self._out.append(h2.frame(h2.DATA, 0, number, data))
