"""The data path of one pair of ranks: shared memory, or a torch.distributed group of two.

This is the border at which errors of torch.distributed become `TransportError`.

Gloo carries CPU tensors, NCCL carries CUDA tensors.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import math
import os
import socket
import threading
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from streamfill.errors import TransportError
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.shared_memory import offer_shared_memory, take_shared_memory
from streamfill.kv_transfer.source import KvSource
from streamfill.kv_transfer.timeouts import TransportTimeouts

# torch's stubs lag behind these classes (no `send`, no options), so they are typed here instead.
_dist: Any = torch.distributed

SENDER_RANK = 0
RECEIVER_RANK = 1
_GROUP_SIZE = 2

MAX_SENT = 2
"""Chunks that Gloo has to send at the same time: one is on its way while the next is made ready.
Those to be received it has all from the beginning: whoever asks for one while another comes in
keeps Gloo's own thread, which polls, from reading."""

NCCL_POLL_S = 0.0002
"""NCCL waits block no host thread, so completion is polled; a chunk takes longer than this."""

NCCL_ENVIRONMENT = {
    # No watchdog thread: where a peer dies it ends the whole process (seen), and it is not needed,
    # since whoever waits here looks for errors.
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    # One operation at a time is what a lane is.
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
}
"""What torch reads when it makes a group. Only for groups of ours: those of SGLang's own ranks wait
on the device and not on the host."""

_environment_lock = threading.Lock()


class _Work(Protocol):
    def wait(self, timeout: timedelta = ...) -> bool: ...
    def is_completed(self) -> bool: ...


class _Backend(Protocol):
    def send(self, tensors: list[Tensor], rank: int, tag: int) -> _Work: ...
    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> _Work: ...
    def abort(self) -> None: ...


class Pair(Protocol):
    """One sender and one receiver rank. Used by one thread only, which issues `send` (sender) or
    `recv` (receiver) in the order that both sides agreed on by ``Offer`` and ``Accept``, and
    `flush` at the end of each transfer. Once an operation failed, it is never used again: a new one
    has a new epoch."""

    def prepare(self, kv: KvSource, end: int) -> None:
        """Make the first chunk of the next transfer ready, bytes ``[0, end)``, before `send` is
        called with the same. Nothing is under way. What is prepared and then not sent, since the
        transfer is refused, is forgotten when the next one is prepared."""
        ...

    def send(self, kv: KvSource, begin: int, end: int) -> None:
        """Send bytes ``[begin, end)``; may return before they are read. The chunks of a transfer
        come in order, from 0 on, and are the same on both sides.

        Raises:
            TransportError: the peer is gone, or did not take a chunk within ``chunk_s``.
        """
        ...

    def recv(self, into: Tensor, begin: int, end: int, cuts: Sequence[int] = ()) -> None:
        """Fill bytes ``[begin, end)`` of a contiguous tensor, which is the whole transfer, with
        what the other side sends; may return before they are there.

        Args:
            into: of all chunks.
            begin: of this one.
            end: of this one.
            cuts: those of the sender's `KvSource`.

        Raises:
            TransportError: the peer is gone, or sent nothing within ``chunk_s``. The content of
                ``into`` is undefined, and nothing will write to it later.
        """
        ...

    def flush(self, num_left: int = 0) -> None:
        """Returns when all chunks but ``num_left`` are sent and may be changed again, or are there.

        Raises:
            TransportError: as above.
        """
        ...

    def close(self) -> None:
        """Drop connections, threads and memory. Only its own thread may do this."""
        ...


def make_pair(
    *,
    rank: int,
    store: RendezvousStore,
    local_host: str,
    device: torch.device,
    timeouts: TransportTimeouts,
    layout: KvLayout,
    same_host: bool,
) -> Pair:
    """Meet the other side. Args and errors as `PairGroup`; with ``same_host`` on both sides, and
    both on one machine, they share memory; on GPUs, where it is the same one. ``layout`` is the one
    of both."""
    store.adopt()
    meet = take_shared_memory if rank == SENDER_RANK else offer_shared_memory
    shared = meet(store, timeouts, layout, device, wanted=same_host)
    if shared is not None:
        return shared
    return PairGroup(
        rank=rank, store=store, local_host=local_host, device=device, timeouts=timeouts
    )


@dataclass
class _Chunk:
    """What Gloo has of one chunk."""

    operation: str
    messages: list[tuple[Tensor, _Work]] = field(default_factory=list)
    """In their order."""


def _messages(begin: int, end: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of each message of a chunk ``[begin, end)``."""
    within = cuts[bisect_right(cuts, begin) : bisect_left(cuts, end)]
    return itertools.pairwise((begin, *within, end))


class _State(enum.Enum):
    OPEN = "open"
    FAILED = "failed"
    CLOSED = "closed"


def backend_name(device: torch.device) -> str:
    """What carries tensors of ``device``: ``gloo`` or ``nccl``."""
    return "nccl" if device.type == "cuda" else "gloo"


def local_address_towards(host: str, port: int) -> str:
    """The address of this machine from which ``host`` is reached. Sends nothing.

    Raises:
        TransportError: there is no route, or no such name.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise TransportError(f"no route to {host}:{port}: {error}") from error


class PairGroup:
    """A `Pair` as a group of torch.distributed, beside any other group of the process."""

    def __init__(
        self,
        *,
        rank: int,
        store: RendezvousStore,
        local_host: str,
        device: torch.device,
        timeouts: TransportTimeouts,
    ) -> None:
        """Meet the other side; waits for it at most ``timeouts.group_setup_s``.

        Args:
            rank: `SENDER_RANK` or `RECEIVER_RANK`.
            store: connected to that of the other side.
            local_host: address of this machine on which Gloo listens.
            device: of the tensors; chooses Gloo or NCCL.
            timeouts: of the endpoint.

        Raises:
            TransportError: the other side did not come, or cannot be reached.
        """
        self._peer = RECEIVER_RANK if rank == SENDER_RANK else SENDER_RANK
        self._device = device
        self._chunk_s = timeouts.chunk_s
        self._state = _State.OPEN
        self._under_way: deque[_Chunk] = deque()
        """Of Gloo; the oldest first."""
        self._buffers = deque(torch.empty(0, dtype=torch.uint8) for _ in range(MAX_SENT))
        self._prepared: list[Tensor] | None = None
        """The messages of the first chunk of the next transfer."""
        store.adopt()
        try:
            self._backend: _Backend = (
                _nccl_backend(store, rank, device, timeouts.group_setup_s)
                if device.type == "cuda"
                else _gloo_backend(store, rank, local_host, timeouts.group_setup_s)
            )
        except RuntimeError as error:
            raise TransportError(f"the group was not set up: {error}") from error
        if device.type == "cuda":
            # NCCL connects at the first operation, half a second that no transfer should pay.
            operation = "send" if rank == SENDER_RANK else "recv"
            self._issue(_Chunk(operation), torch.zeros(1, dtype=torch.uint8, device=device))

    def prepare(self, kv: KvSource, end: int) -> None:
        """See `Pair.prepare`."""
        self._prepared = self._pieces(kv, 0, end)

    def send(self, kv: KvSource, begin: int, end: int) -> None:
        """See `Pair.send`."""
        self._finish(MAX_SENT - 1)
        prepared, self._prepared = self._prepared, None
        # Unless that was done before, gathered while the chunk before is under way.
        pieces = self._pieces(kv, begin, end) if begin or prepared is None else prepared
        chunk = self._next_chunk("send")
        for piece in pieces:
            self._issue(chunk, piece)

    def recv(self, into: Tensor, begin: int, end: int, cuts: Sequence[int] = ()) -> None:
        """See `Pair.recv`."""
        chunk = self._next_chunk("recv")
        for at, until in _messages(begin, end, cuts):
            self._issue(chunk, into[at:until])

    def flush(self, num_left: int = 0) -> None:
        """See `Pair.flush`."""
        self._finish(num_left)

    def close(self) -> None:
        """See `Pair.close`."""
        if self._state is _State.CLOSED:
            return
        if self._device.type == "cuda":
            self._backend.abort()
        del self._backend
        self._under_way.clear()
        self._buffers.clear()
        self._prepared = None
        self._state = _State.CLOSED

    def _finish(self, num_left: int) -> None:
        while len(self._under_way) > num_left:
            chunk = self._under_way.popleft()
            # The last one ends last, so this thread is woken once.
            for message, work in reversed(chunk.messages):
                with self._failing(chunk.operation, message.numel()):
                    work.wait(timedelta(seconds=self._chunk_s))

    def _next_chunk(self, operation: str) -> _Chunk:
        chunk = _Chunk(operation)
        if self._device.type != "cuda":
            self._under_way.append(chunk)
        return chunk

    def _pieces(self, kv: KvSource, begin: int, end: int) -> list[Tensor]:
        """The messages of a chunk to be sent. Not more than one other may be under way."""
        self._buffers.rotate(1)
        pieces: list[Tensor] = []
        for at, until in _messages(begin, end, kv.cuts):
            piece = kv.piece(at, until)
            if piece is None:
                piece = self._buffer(end - begin)[at - begin : until - begin]
                kv.read(at, piece)
            pieces.append(piece)
        return pieces

    def _buffer(self, num_bytes: int) -> Tensor:
        """Memory that is at least so long, of the chunk that is made ready."""
        if self._buffers[0].numel() < num_bytes:
            self._buffers[0] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._buffers[0]

    def _issue(self, chunk: _Chunk, message: Tensor) -> None:
        with self._failing(chunk.operation, message.numel()):
            if self._device.type == "cuda":
                self._run_nccl(chunk.operation, message)
            else:
                chunk.messages.append((message, self._start(chunk.operation, message)))

    @contextlib.contextmanager
    def _failing(self, operation: str, num_bytes: int) -> Iterator[None]:
        if self._state is not _State.OPEN:
            raise TransportError(f"{operation} on a group that is {self._state.value}")
        try:
            yield
        except RuntimeError as error:
            self._state = _State.FAILED
            raise TransportError(f"{operation} of {num_bytes} bytes failed: {error}") from error

    def _run_nccl(self, operation: str, chunk: Tensor) -> None:
        with torch.cuda.device(self._device):
            work = self._start(operation, chunk)
            deadline_s = time.monotonic() + self._chunk_s
            while not work.is_completed():
                if time.monotonic() >= deadline_s:
                    # Returns only when the kernel that touches ``chunk`` is gone.
                    self._backend.abort()
                    raise RuntimeError(f"no completion within {self._chunk_s} s")
                time.sleep(NCCL_POLL_S)
            work.wait()

    def _start(self, operation: str, chunk: Tensor) -> _Work:
        if operation == "send":
            return self._backend.send([chunk], self._peer, 0)
        return self._backend.recv([chunk], self._peer, 0)


def _gloo_backend(store: RendezvousStore, rank: int, local_host: str, timeout_s: float) -> _Backend:
    options = _dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    # Without a device of ours Gloo listens on whatever the machine's name resolves to.
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=local_host)]
    options._threads = 1
    backend: _Backend = _dist.ProcessGroupGloo(store, rank, _GROUP_SIZE, options)
    return backend


def _nccl_backend(
    store: RendezvousStore, rank: int, device: torch.device, timeout_s: float
) -> _Backend:
    options = _dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    # Setting up and every operation return at once, and torch polls them up to a time-out: a peer
    # that vanishes while it sets up would else be waited for without end (seen). Torch reads the
    # time-out once in the life of a process; only groups like ours heed it.
    options.config.blocking = 0
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(math.ceil(timeout_s)))
    with torch.cuda.device(device):
        with _environment_lock, _set_environment(NCCL_ENVIRONMENT):
            backend = _dist.ProcessGroupNCCL(store, rank, _GROUP_SIZE, options)
        # Waits for the other side, which must not keep other pairs of this process waiting.
        backend.eager_connect_single_device(device)
    made: _Backend = backend
    return made


@contextlib.contextmanager
def _set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set, for a while."""
    unset = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)
