"""Who gets through a gate, over real sockets."""

from __future__ import annotations

import contextlib
import logging
import socket as sockets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import zmq

from streamfill.curve.gate import CurveGate, HandshakeFailure
from streamfill.curve.keys import ConnectKeys, read_connect_keys, read_listen_keys

PATIENCE_MS = 10_000
QUIET_MS = 300
"""In which nothing must come."""


class Listener:
    """A ROUTER socket behind a gate."""

    def __init__(self, folder: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.refused: Counter[HandshakeFailure] = Counter()
        self.gate = CurveGate(
            self.context,
            self.socket,
            read_listen_keys(folder),
            lambda failure: self.refused.update([failure]),
        )
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")

    def close(self) -> None:
        self.socket.close()
        self.gate.close()
        self.gate.close()
        self.context.term()

    def until_refused(self, *failures: HandshakeFailure) -> None:
        until(lambda: any(self.refused[failure] for failure in failures))


def until(condition: Callable[[], object]) -> None:
    """Of the gate's thread."""
    deadline_s = time.monotonic() + PATIENCE_MS / 1000
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.01)


@pytest.fixture
def listener(folder: str) -> Iterator[Listener]:
    made = Listener(folder)
    assert "curve-gate" in thread_names()
    yield made
    made.close()
    assert "curve-gate" not in thread_names()


def thread_names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


def connected(
    context: zmq.Context[zmq.Socket[bytes]], listener: Listener, keys: ConnectKeys | None
) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if keys is not None:
        keys.secure(socket)
    socket.connect(f"tcp://127.0.0.1:{listener.port}")
    socket.send(b"hello")
    return socket


def test_the_right_key_is_let_in(
    listener: Listener, context: zmq.Context[zmq.Socket[bytes]], folder: str
) -> None:
    """In both directions, and nothing is counted."""
    with connected(context, listener, read_connect_keys(folder)) as client:
        assert listener.socket.poll(PATIENCE_MS)
        identity, message = listener.socket.recv_multipart()
        assert message == b"hello"
        listener.socket.send_multipart((identity, b"welcome"))
        assert client.poll(PATIENCE_MS)
        assert client.recv() == b"welcome"
    assert not listener.refused


def wrong_key(folder: str, other: str) -> ConnectKeys:
    """Knows whom it looks for, and owns a key that is not admitted."""
    ours, theirs = read_connect_keys(folder), read_connect_keys(other)
    return ConnectKeys(public=theirs.public, secret=theirs.secret, listener=ours.listener)


def wrong_listener(folder: str, other: str) -> ConnectKeys:
    """Owns an admitted key, and looks for somebody else."""
    ours, theirs = read_connect_keys(folder), read_connect_keys(other)
    return ConnectKeys(public=ours.public, secret=ours.secret, listener=theirs.listener)


@pytest.mark.parametrize(
    ("make", "failures"),
    [
        (wrong_key, {HandshakeFailure.UNKNOWN_KEY}),
        (wrong_listener, {HandshakeFailure.WRONG_SERVER_KEY}),
        # Which one depends on who of both is the first to see it.
        (
            lambda folder, other: None,
            {HandshakeFailure.BROKEN_OFF, HandshakeFailure.NOT_CURVE},
        ),
    ],
    ids=["unknown key", "another server's key", "in the clear"],
)
def test_others_neither_send_nor_read(  # noqa: PLR0917  fixtures
    listener: Listener,
    context: zmq.Context[zmq.Socket[bytes]],
    folder: str,
    other_folder: str,
    make: object,
    failures: set[HandshakeFailure],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing of them comes to the socket, nothing goes to them; they are counted by reason, and
    the log has one line."""
    assert callable(make)
    stranger = connected(context, listener, make(folder, other_folder))
    with stranger, caplog.at_level(logging.WARNING):
        listener.until_refused(*failures)
        assert not listener.socket.poll(QUIET_MS)
        assert not stranger.poll(0)
        until(lambda: "handshake_refused" in caplog.text)  # counted first
    (record,) = [each for each in caplog.records if "handshake_refused" in each.message]
    assert any(f"reason={failure.value} " in record.message for failure in failures)
    with connected(context, listener, read_connect_keys(folder)):
        assert listener.socket.poll(PATIENCE_MS)
        assert listener.socket.recv_multipart()[1] == b"hello"


def test_garbage_is_counted(
    listener: Listener, context: zmq.Context[zmq.Socket[bytes]], folder: str
) -> None:
    """A browser, a scan, and whoever goes away without a word; members are served all the same."""
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000, b"\0" * 1000):
        with sockets.create_connection(("127.0.0.1", listener.port)) as stranger:
            stranger.sendall(garbage)
    listener.until_refused(HandshakeFailure.BROKEN_OFF)
    with connected(context, listener, read_connect_keys(folder)):
        assert listener.socket.poll(PATIENCE_MS)


def test_what_travels_is_not_readable(
    context: zmq.Context[zmq.Socket[bytes]], listener: Listener, folder: str
) -> None:
    """Seen by somebody in the middle who hands everything on."""
    seen = bytearray()
    with sockets.create_server(("127.0.0.1", 0)) as middle:

        def hand_on() -> None:
            near, _ = middle.accept()
            far = sockets.create_connection(("127.0.0.1", listener.port))
            with near, far:
                back = threading.Thread(target=copy, args=(far, near), daemon=True)
                back.start()
                copy(near, far)
                back.join()  # it reads of a socket that is closed here

        def copy(source: sockets.socket, target: sockets.socket) -> None:
            with contextlib.suppress(ConnectionError):  # either end may go first
                while data := source.recv(65536):
                    seen.extend(data)
                    target.sendall(data)
            for end in (source, target):
                with contextlib.suppress(OSError):  # the other direction ended it already
                    end.shutdown(sockets.SHUT_RDWR)

        man_in_the_middle = threading.Thread(target=hand_on, daemon=True)
        man_in_the_middle.start()
        client = context.socket(zmq.DEALER)
        client.linger = 0
        read_connect_keys(folder).secure(client)
        client.connect(f"tcp://127.0.0.1:{middle.getsockname()[1]}")
        secret = b"a prompt that nobody may read " * 10
        client.send(secret)
        assert listener.socket.poll(PATIENCE_MS)
        assert listener.socket.recv_multipart()[1] == secret
        client.close()
        man_in_the_middle.join(PATIENCE_MS / 1000)
        assert not man_in_the_middle.is_alive()
    assert len(seen) > len(secret)
    assert b"prompt" not in seen
