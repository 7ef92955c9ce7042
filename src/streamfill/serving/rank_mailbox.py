"""Between the ranks of one server: transfer ports at the start, and which KV transfers have arrived
everywhere.

A transfer is carried rank by rank. It may be put into the radix trees only when every rank has its
part, and then by all ranks in the same turn: otherwise their trees would differ, and with them
their decisions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from streamfill.errors import TransportError
from streamfill.kv_transfer.codecs import NO_CODEC
from streamfill.observability.logging import log_event

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Ranks load their part of the model side by side; the slowest may be this late."""
PARTIAL_TIMEOUT_S = 60.0
"""A transfer that arrived on some ranks only is given up: its other part failed, and nobody waits
for it any more. Its parts hold staging memory."""


class _Port(msgspec.Struct, frozen=True, tag="port"):
    rank: int
    port: int


class _Arrived(msgspec.Struct, frozen=True, tag="arrived"):
    rank: int
    transfer_ids: tuple[int, ...]
    kv_codec: str


@dataclass
class _Partial:
    """A transfer that has not arrived everywhere."""

    since_s: float
    ranks: set[int] = field(default_factory=set)


class RankMailbox:
    """One per rank; rank 0 listens, the others tell. With one rank there is no socket at all."""

    def __init__(self, endpoint: str, rank: int, num_ranks: int) -> None:
        """``endpoint``: a ZeroMQ ``ipc://`` address that only this server uses."""
        digest = hashlib.blake2b(endpoint.encode(), digest_size=7).digest()
        self.shared_number = int.from_bytes(digest)
        """The same on all ranks of the server, and on no other server."""
        self.kv_codec = NO_CODEC
        """On rank 0: lossy codec by which KV came to another rank, until somebody takes note."""
        self._rank = rank
        self._num_ranks = num_ranks
        self._partial: dict[int, _Partial] = {}
        """By transfer id, the oldest first."""
        self._socket: zmq.Socket[bytes] | None = None
        self._decoder: msgspec.msgpack.Decoder[_Port | _Arrived] = msgspec.msgpack.Decoder(
            _Port | _Arrived
        )
        if num_ranks > 1:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
            self._socket = context.socket(zmq.PULL if rank == 0 else zmq.PUSH)
            self._socket.linger = 0
            if rank == 0:
                self._socket.bind(endpoint)
            else:
                self._socket.connect(endpoint)

    def exchange_ports(self, port: int) -> tuple[int, ...]:
        """Ports of all ranks, in order; on ranks other than 0 just the own one.

        Raises:
            TransportError: a rank did not report within ``START_TIMEOUT_S``.
        """
        if self._socket is None:
            return (port,)
        if self._rank != 0:
            self._socket.send(msgspec.msgpack.encode(_Port(self._rank, port)))
            return (port,)
        ports = {0: port}
        while len(ports) < self._num_ranks:
            if not self._socket.poll(round(START_TIMEOUT_S * 1000)):
                raise TransportError(
                    f"ranks {sorted(set(range(self._num_ranks)) - set(ports))} did not start"
                )
            message = self._decoder.decode(self._socket.recv())
            if isinstance(message, _Port):
                ports[message.rank] = message.port
        return tuple(ports[rank] for rank in range(self._num_ranks))

    def report(self, transfer_ids: list[int], kv_codec: str = NO_CODEC) -> None:
        """Tell rank 0 what arrived here, and the lossy codec that some KV here came by."""
        if transfer_ids and self._socket is not None:
            message = _Arrived(self._rank, tuple(transfer_ids), kv_codec)
            self._socket.send(msgspec.msgpack.encode(message))

    def complete(self, transfer_ids: list[int], now_s: float) -> list[int]:
        """On rank 0, given what arrived here: what has now arrived on every rank."""
        if self._socket is None:
            return transfer_ids
        complete = self._note(0, transfer_ids, now_s)
        while self._socket.poll(0):
            message = self._decoder.decode(self._socket.recv())
            if isinstance(message, _Arrived):
                if message.kv_codec != NO_CODEC:
                    self.kv_codec = message.kv_codec
                complete += self._note(message.rank, message.transfer_ids, now_s)
        return complete

    def give_up(self, now_s: float) -> list[int]:
        """On rank 0: what arrived on some ranks only, too long ago. Every rank is to let go of
        it, in the same turn."""
        overdue: list[int] = []
        for transfer_id, partial in self._partial.items():
            if now_s - partial.since_s < PARTIAL_TIMEOUT_S:
                break
            overdue.append(transfer_id)
        for transfer_id in overdue:
            partial = self._partial.pop(transfer_id)
            log_event(
                logger,
                "partial_transfer_dropped",
                level=logging.WARNING,
                transfer_id=transfer_id,
                ranks=sorted(partial.ranks),
            )
        return overdue

    def wake_sources(self) -> list[Any]:
        """What becomes readable when another rank reports."""
        return [] if self._socket is None else [self._socket]

    def close(self) -> None:
        """Give the socket up."""
        if self._socket is not None:
            self._socket.close()

    def _note(self, rank: int, transfer_ids: Sequence[int], now_s: float) -> list[int]:
        complete: list[int] = []
        for transfer_id in transfer_ids:
            partial = self._partial.setdefault(transfer_id, _Partial(now_s))
            partial.ranks.add(rank)
            if len(partial.ranks) == self._num_ranks:
                del self._partial[transfer_id]
                complete.append(transfer_id)
        return complete
