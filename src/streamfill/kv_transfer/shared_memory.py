"""The data path of one pair of ranks on the same machine: a ring in shared memory.

The sender copies each part of a chunk into the ring, the receiver out of it, both at once; the ring
is small enough to stay in the processor's cache. What tells them when is a Unix socket: one byte
for each part that is there, one for each that was taken. Its end is the end of the peer, which
is noticed at once.

How the two find out that they share a machine (entries of the pair's store):

1. The receiver listens at an abstract address nobody can guess, and puts it under ``shared``;
   nothing where it does not want to.
2. The sender connects, hands over the ring as an anonymous file, and puts ``yes`` under
   ``shared_answer``; or ``no`` where nobody listens there: it is on another machine, or in a
   container with a network of its own.

The ring belongs to one session. A sender that was given up and writes late writes to memory that
nobody reads any more.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from streamfill.errors import TransportError
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.timeouts import TransportTimeouts

PART_BYTES = 1 << 20
"""Some 0.1 ms of copying, several times what waking the other side takes."""
NUM_PARTS = 8
_RING_BYTES = PART_BYTES * NUM_PARTS

_ADDRESS, _ANSWER = "shared", "shared_answer"
_PREFIX = b"\0streamfill-kv-"
"""Of the addresses, so that nobody can have a sender connect to anything else."""
_CREDENTIALS = struct.Struct("3i")


class SharedMemoryPair:
    """A `group.Pair`; used by one thread of each side, like any."""

    def __init__(self, connection: socket.socket, ring_file: int, chunk_s: float) -> None:
        """
        Args:
            connection: to the other side; owned from now on.
            ring_file: descriptor of `_RING_BYTES` shared bytes; the caller closes it.
            chunk_s: how long a wait for the other side may take.
        """
        connection.settimeout(chunk_s)
        self._connection = connection
        self._chunk_s = chunk_s
        memory = torch.frombuffer(mmap.mmap(ring_file, _RING_BYTES), dtype=torch.uint8)
        self._parts = memory.split(PART_BYTES)  # type: ignore[no-untyped-call]
        self._position = 0
        self._num_there = 0
        """Sender: parts that the other side has not taken. Receiver: parts to be taken."""
        self._failure: str | None = None

    def send(self, chunk: Tensor) -> None:
        """See `group.Pair.send`."""
        with self._operation("send", chunk):
            for part in chunk.split(PART_BYTES):  # type: ignore[no-untyped-call]
                while self._num_there == NUM_PARTS:
                    self._num_there -= self._tokens()
                self._next_part(part.numel()).copy_(part)
                self._connection.sendall(b"\0")
                self._num_there += 1

    def recv(self, chunk: Tensor) -> None:
        """See `group.Pair.recv`."""
        with self._operation("recv", chunk):
            for part in chunk.split(PART_BYTES):  # type: ignore[no-untyped-call]
                while not self._num_there:
                    self._num_there += self._tokens()
                part.copy_(self._next_part(part.numel()))
                self._connection.sendall(b"\0")
                self._num_there -= 1

    def close(self) -> None:
        """See `group.Pair.close`."""
        self._failure = self._failure or "it was closed"
        self._connection.close()
        self._parts = ()

    def _next_part(self, num_bytes: int) -> Tensor:
        part: Tensor = self._parts[self._position % NUM_PARTS]
        self._position += 1
        return part[:num_bytes]

    def _tokens(self) -> int:
        """How many bytes the other side sent; waits for the first."""
        tokens = self._connection.recv(NUM_PARTS)
        if not tokens:
            raise ConnectionError("the other side is gone")
        return len(tokens)

    @contextlib.contextmanager
    def _operation(self, name: str, chunk: Tensor) -> Iterator[None]:
        if self._failure is not None:
            raise TransportError(f"{name} on a ring of shared memory: {self._failure}")
        try:
            yield
        except TimeoutError as error:
            self._failure = f"Timed out, the other side did nothing for {self._chunk_s} s"
            raise TransportError(
                f"{name} of {chunk.numel()} bytes failed: {self._failure}"
            ) from error
        except OSError as error:
            self._failure = str(error)
            raise TransportError(f"{name} of {chunk.numel()} bytes failed: {error}") from error


def offer_shared_memory(
    store: RendezvousStore, timeouts: TransportTimeouts, *, wanted: bool
) -> SharedMemoryPair | None:
    """The receiver's half of the meeting. None: there will be no ring.

    Raises:
        TransportError: the sender did not come.
    """
    if not wanted:
        store.set(_ADDRESS, b"")
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        address = _PREFIX + secrets.token_hex(16).encode()
        listener.bind(address)
        listener.listen(1)
        listener.settimeout(timeouts.group_setup_s)
        store.set(_ADDRESS, address)
        if store.get(_ANSWER) != b"yes":
            return None
        try:
            connection, _ = listener.accept()
        except OSError as error:
            raise TransportError(f"the ring of shared memory was not set up: {error}") from error
    files: list[int] = []
    try:
        connection.settimeout(timeouts.group_setup_s)
        credentials = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        if _CREDENTIALS.unpack(credentials)[1] != os.getuid():
            raise ConnectionError("another user's process connected")
        _, files, _, _ = socket.recv_fds(connection, 1, 1)
        if len(files) != 1 or os.fstat(files[0]).st_size != _RING_BYTES:
            raise ConnectionError(f"not a ring of {_RING_BYTES} bytes")
        return SharedMemoryPair(connection, files[0], timeouts.chunk_s)
    except OSError as error:
        connection.close()
        raise TransportError(f"the ring of shared memory was not set up: {error}") from error
    finally:
        for file in files:
            os.close(file)


def take_shared_memory(
    store: RendezvousStore, timeouts: TransportTimeouts, *, wanted: bool
) -> SharedMemoryPair | None:
    """The sender's half of the meeting. None: there will be no ring.

    Raises:
        TransportError: the receiver did not come.
    """
    address = store.get(_ADDRESS)
    if not address:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not wanted or not address.startswith(_PREFIX):
            raise ConnectionRefusedError
        connection.settimeout(timeouts.group_setup_s)
        connection.connect(address)
        file = os.memfd_create("streamfill-kv")
        try:
            os.ftruncate(file, _RING_BYTES)
            socket.send_fds(connection, [b"\0"], [file])
            pair = SharedMemoryPair(connection, file, timeouts.chunk_s)
        finally:
            os.close(file)
    except OSError:
        connection.close()
        store.set(_ANSWER, b"no")
        return None
    try:
        store.set(_ANSWER, b"yes")
    except TransportError:
        pair.close()
        raise
    return pair
