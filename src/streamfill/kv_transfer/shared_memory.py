"""The data path of one pair of ranks on the same machine: shared memory.

There are two ways, and the head of each transfer says which it takes:

* *pages*: the sender's pool lies in memory that the receiver maps (``shared_buffers``). It says
  which pages, and the receiver copies them into its staging, so that every byte is copied once;
* *ring*: the sender copies each part of a chunk into a ring (``rings``), the receiver out of it,
  both at once. This is how KV goes between two processes on one GPU as well, which NCCL refuses to
  connect by anything but TCP.

What tells them when is a Unix socket: of a ring one byte for each part that is there, and one for
each that was taken; of pages one for each chunk that was read. Its end is the end of the peer,
which is noticed at once: a receiver that reads pages of a sender that gave up cannot say so any
more, and its transfer fails, whatever it has read.

How the two find out that they share a machine (entries of the pair's store):

1. The receiver listens at an abstract address nobody can guess, and puts it under ``shared``;
   nothing where it does not want to.
   Where its KV is on a GPU, the address ends with the name of that GPU.
2. The sender connects, hands over the ring, and puts ``yes`` under ``shared_answer``; or ``no``
   where nobody listens there: it is on another machine, or in a container with a network of its
   own; where another user's process listens; or where it is on another GPU: between GPUs NCCL knows
   the better way.

The ring belongs to one session. A sender that was given up and writes late writes to memory that
nobody reads any more. A receiver never writes to memory of its sender's: it maps pages for reading.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from streamfill.errors import TransportError
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.page_copies import Rows
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.rings import CannotShareError, GpuRing, HostRing, Ring, gpu_name
from streamfill.kv_transfer.shared_buffers import SharedBuffers, map_layers
from streamfill.kv_transfer.source import KvSource, PagedKv
from streamfill.kv_transfer.timeouts import TransportTimeouts

_ADDRESS, _ANSWER = "shared", "shared_answer"
_PREFIX = b"\0streamfill-kv-"
"""Of the addresses, so that nobody can have a sender connect to anything else."""
_CREDENTIALS = struct.Struct("3i")
_TOKEN = b"\0"
_HEAD = struct.Struct("=qq?")
"""Of a transfer: number of pages, which follow as int64, 0 for the ring; number of slots of the
pool, and whether its file comes first."""


class SharedMemoryPair:
    """A `group.Pair`; used by one thread of each side, like any."""

    def __init__(
        self, connection: socket.socket, ring: Ring, chunk_s: float, layout: KvLayout
    ) -> None:
        """
        Args:
            connection: to the other side; owned from now on, like the ring.
            chunk_s: how long a wait for the other side may take.
            layout: of the KV on both sides.
        """
        connection.settimeout(chunk_s)
        self._connection = connection
        self._chunk_s = chunk_s
        self._layout = layout
        self._ring = ring
        self._num_parts = len(ring.parts)
        self._part_bytes = ring.parts[0].numel()
        self._position = 0
        self._num_there = 0
        """Sender: parts that the other side has not taken. Receiver: parts to be taken."""
        self._failure: str | None = None
        self._known: SharedBuffers | None = None
        """Sender: what the receiver has mapped."""
        self._mapped: list[Rows] = []
        """Receiver: the sender's pool."""
        self._pages: PagedKv | None = None
        """Receiver: where the current transfer is to be read. None: it comes through the ring."""

    def prepare(self, kv: KvSource, end: int) -> None:
        """See `group.Pair.prepare`."""
        del kv, end

    def send(self, kv: KvSource, begin: int, end: int) -> None:
        """See `group.Pair.send`."""
        with self._operation("send", end - begin):
            buffers = kv.buffers if isinstance(kv, PagedKv) else None
            if begin == 0:
                self._send_head(kv, buffers)
            if buffers is not None:
                self._take_tokens(1)
                return
            for at in range(begin, end, self._part_bytes):
                while self._num_there == self._num_parts:
                    self._num_there -= self._take_tokens(self._num_parts)
                kv.read(at, self._next_part(min(self._part_bytes, end - at)))
                self._ring.settle()
                self._connection.sendall(_TOKEN)
                self._num_there += 1

    def recv(self, into: Tensor, begin: int, end: int, cuts: Sequence[int] = ()) -> None:
        """See `group.Pair.recv`."""
        del cuts
        with self._operation("recv", end - begin):
            if begin == 0:
                self._receive_head(into.numel())
            if self._pages is not None:
                self._pages.read(begin, into[begin:end])
                self._say_read()
                return
            for at in range(begin, end, self._part_bytes):
                while not self._num_there:
                    self._num_there += self._take_tokens(self._num_parts)
                part = into[at : min(at + self._part_bytes, end)]
                part.copy_(self._next_part(part.numel()))
                self._ring.settle()
                self._connection.sendall(_TOKEN)
                self._num_there -= 1

    def flush(self, num_left: int = 0) -> None:
        """See `group.Pair.flush`."""
        del num_left

    def close(self) -> None:
        """See `group.Pair.close`."""
        self._failure = self._failure or "it was closed"
        self._connection.close()
        self._ring.close()
        self._mapped = []
        self._pages = None

    def _send_head(self, kv: KvSource, buffers: SharedBuffers | None) -> None:
        while self._num_there:  # or what tells of parts could pass for what tells of pages
            self._num_there -= self._take_tokens(self._num_parts)
        if buffers is None or not isinstance(kv, PagedKv):
            self._connection.sendall(_HEAD.pack(0, 0, 0))
            return
        is_new = buffers is not self._known
        pages = kv.pages.tobytes()
        self._connection.sendall(
            _HEAD.pack(len(kv.pages), buffers.num_slots if is_new else 0, is_new)
        )
        if is_new:
            socket.send_fds(self._connection, [_TOKEN], [buffers.file])
            self._known = buffers
        self._connection.sendall(pages)

    def _receive_head(self, num_bytes: int) -> None:
        num_pages, num_slots, is_new = _HEAD.unpack(self._receive_exactly(_HEAD.size))
        self._pages = None
        if not num_pages:
            return
        page_bytes = self._layout.page_size * self._layout.bytes_per_token
        if num_pages * page_bytes != num_bytes:
            raise ConnectionError(f"{num_pages} pages are no transfer of {num_bytes} bytes")
        if is_new:
            _, files, _, _ = socket.recv_fds(self._connection, 1, 1)
            try:
                if len(files) != 1:
                    raise ConnectionError("the KV buffers did not come")
                self._mapped = map_layers(files[0], self._layout, num_slots)
            finally:
                for file in files:
                    os.close(file)
        pages = np.frombuffer(self._receive_exactly(num_pages * 8), dtype=np.int64)
        try:
            self._pages = PagedKv(self._mapped, pages)
        except (IndexError, ValueError) as error:
            raise ConnectionError(f"the sender named wrong pages: {error}") from error

    def _say_read(self) -> None:
        """That a chunk was read. Fails where the sender gave up meanwhile: its pages may hold
        something else by then."""
        self._connection.sendall(_TOKEN)

    def _next_part(self, num_bytes: int) -> Tensor:
        part = self._ring.parts[self._position % self._num_parts]
        self._position += 1
        return part[:num_bytes]

    def _take_tokens(self, at_most: int) -> int:
        """How many bytes the other side sent; waits for the first."""
        tokens = self._connection.recv(at_most)
        if not tokens:
            raise ConnectionError("the other side is gone")
        return len(tokens)

    def _receive_exactly(self, num_bytes: int) -> bytes:
        received = bytearray()
        while len(received) < num_bytes:
            some = self._connection.recv(num_bytes - len(received))
            if not some:
                raise ConnectionError("the other side is gone")
            received += some
        return bytes(received)

    @contextlib.contextmanager
    def _operation(self, name: str, num_bytes: int) -> Iterator[None]:
        if self._failure is not None:
            raise TransportError(f"{name} by shared memory: {self._failure}")
        try:
            yield
        except TimeoutError as error:
            self._failure = f"Timed out, the other side did nothing for {self._chunk_s} s"
            raise TransportError(f"{name} of {num_bytes} bytes failed: {self._failure}") from error
        except OSError as error:
            self._failure = str(error)
            raise TransportError(f"{name} of {num_bytes} bytes failed: {error}") from error


def offer_shared_memory(
    store: RendezvousStore,
    timeouts: TransportTimeouts,
    layout: KvLayout,
    device: torch.device,
    *,
    wanted: bool,
) -> SharedMemoryPair | None:
    """The receiver's half of the meeting. None: there will be no ring.

    Args:
        device: of the staging.

    Raises:
        TransportError: the sender did not come.
    """
    if not wanted:
        store.set(_ADDRESS, b"")
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        address = _PREFIX + secrets.token_hex(16).encode() + _suffix(device)
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
    try:
        connection.settimeout(timeouts.group_setup_s)
        if not _is_of_own_user(connection):
            raise ConnectionError("another user's process connected")
        ring = _take(connection, device)
        return SharedMemoryPair(connection, ring, timeouts.chunk_s, layout)
    except CannotShareError:
        connection.close()  # the sender was told, and goes on without
        return None
    except OSError as error:
        connection.close()
        raise TransportError(f"the ring of shared memory was not set up: {error}") from error


def take_shared_memory(
    store: RendezvousStore,
    timeouts: TransportTimeouts,
    layout: KvLayout,
    device: torch.device,
    *,
    wanted: bool,
) -> SharedMemoryPair | None:
    """The sender's half of the meeting. None: there will be no ring.

    Args:
        device: of the KV.

    Raises:
        TransportError: the receiver did not come.
    """
    address = store.get(_ADDRESS)
    if not address:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not (wanted and address.startswith(_PREFIX) and address.endswith(_suffix(device))):
            raise ConnectionRefusedError
        connection.settimeout(timeouts.group_setup_s)
        connection.connect(address)
        if not _is_of_own_user(connection):
            raise ConnectionRefusedError
        ring = _hand_over(connection, device)
    except OSError:
        connection.close()
        store.set(_ANSWER, b"no")
        return None
    try:
        store.set(_ANSWER, b"yes")
        if ring.was_taken(connection):
            return SharedMemoryPair(connection, ring, timeouts.chunk_s, layout)
    except OSError as error:
        ring.close()
        connection.close()
        raise TransportError(f"the ring of shared memory was not set up: {error}") from error
    except TransportError:
        ring.close()
        connection.close()
        raise
    ring.close()
    connection.close()
    return None


def _is_of_own_user(connection: socket.socket) -> bool:
    """Whether the process at the other end is, by the kernel's word: SO_PEERCRED, unix(7)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(credentials)[1]
    return user == os.getuid()


def _hand_over(connection: socket.socket, device: torch.device) -> Ring:
    if device.type == "cuda":
        return GpuRing.hand_over(connection, device)
    return HostRing.hand_over(connection)


def _take(connection: socket.socket, device: torch.device) -> Ring:
    if device.type == "cuda":
        return GpuRing.take(connection, device)
    return HostRing.take(connection)


def _suffix(device: torch.device) -> bytes:
    return b"" if device.type == "cpu" else b"-" + gpu_name(device).encode()
