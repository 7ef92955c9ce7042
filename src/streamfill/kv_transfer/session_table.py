"""Who may send to a receiver: the table of its sessions. No sockets, no clock of its own.

One session per sender rank. A ``Hello`` replaces the session its sender had, by which a sender
that restarted, or whose group broke, gets a new epoch and nothing of the old one counts any more.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

import msgspec
import torch

from streamfill.kv_transfer.group import backend_name
from streamfill.kv_transfer.inbound_lane import InboundLane
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.slices import HeadRange, HeadShare
from streamfill.messages.handoff import PROTOCOL_VERSION, Hello

MAX_SESSIONS = 1024
"""Each may hold a thread and a group; far more than a cluster has pairs for one rank."""

MAX_SUPERSEDED = 4096
"""Remembered incarnations of senders that restarted; a zombie outlives few of its successors."""


@dataclass(eq=False)
class InboundSession:
    """One sender rank's session. Current from `SessionTable.greet` until `SessionTable.end`."""

    server_id: str
    rank: int
    incarnation: int
    attempt: int
    route: bytes
    """Of the sender's socket, given by zmq."""
    epoch: int
    layout: KvLayout
    """Of what it sends."""
    heads: HeadRange
    """What it sends, counted in the whole model; all of this rank's or a part of them."""
    heard_s: float
    """When its sender, or its lane, last gave a sign of life."""
    lane: InboundLane | None = None
    """Started by the first transfer that has data."""


@dataclass(frozen=True)
class Greeting:
    """What a ``Hello`` leads to. Exactly one of ``session`` and ``refusal``, or neither when the
    ``Hello`` is older than the session and to be dropped."""

    session: InboundSession | None = None
    replaced: InboundSession | None = None
    """The session that ended for it."""
    refusal: str | None = None


class SessionTable:
    """The open sessions of one receiver. Owned by its control thread."""

    def __init__(self, layout: KvLayout, share: HeadShare, device: torch.device) -> None:
        """Args are those of the receiver; its senders must have the same, but for how many ranks
        share the KV heads."""
        self._layout = layout
        self._share = share
        self._backend = backend_name(device)
        self._by_route: dict[bytes, InboundSession] = {}
        self._by_sender: dict[tuple[str, int], InboundSession] = {}
        self._superseded: deque[tuple[str, int, int]] = deque(maxlen=MAX_SUPERSEDED)
        self._ended: OrderedDict[tuple[str, int], int] = OrderedDict()
        """Incarnations of senders without a session, until their next ``Hello``."""
        self._last_epoch = 0

    def __len__(self) -> int:
        return len(self._by_route)

    def all(self) -> list[InboundSession]:
        """The open sessions."""
        return list(self._by_route.values())

    def find(self, route: bytes, epoch: int) -> InboundSession | None:
        """The open session of this socket and epoch."""
        session = self._by_route.get(route)
        return session if session is not None and session.epoch == epoch else None

    def of(self, server_id: str, rank: int) -> InboundSession | None:
        """The open session of a sender rank."""
        return self._by_sender.get((server_id, rank))

    def knows(self, route: bytes) -> bool:
        """Whether the socket has an open session."""
        return route in self._by_route

    def is_current(self, session: InboundSession) -> bool:
        """Whether the session is still open."""
        return self._by_route.get(session.route) is session

    def greet(self, route: bytes, hello: Hello, now_s: float) -> Greeting:
        """Open a session, or find the one that this very ``Hello`` opened before."""
        current = self._by_sender.get((hello.server_id, hello.rank))
        if current is not None and current.incarnation == hello.incarnation:
            if hello.attempt < current.attempt:
                return Greeting()
            if hello.attempt == current.attempt and route == current.route:
                return Greeting(session=current)
            # Over another route: the connection broke before the answer came.
        refusal = self._refusal(hello)
        if refusal is not None:
            return Greeting(refusal=refusal)
        if current is not None:
            self.end(current)
        before = self._ended.pop((hello.server_id, hello.rank), hello.incarnation)
        if before != hello.incarnation:
            self._superseded.append((hello.server_id, hello.rank, before))
        self._last_epoch += 1
        session = InboundSession(
            server_id=hello.server_id,
            rank=hello.rank,
            incarnation=hello.incarnation,
            attempt=hello.attempt,
            route=route,
            epoch=self._last_epoch,
            layout=hello.layout,
            heads=hello.heads,
            heard_s=now_s,
        )
        self._by_route[route] = session
        self._by_sender[hello.server_id, hello.rank] = session
        return Greeting(session=session, replaced=current)

    def end(self, session: InboundSession) -> None:
        """Close a session; what its lane still reports is stale."""
        del self._by_route[session.route]
        del self._by_sender[session.server_id, session.rank]
        self._ended[session.server_id, session.rank] = session.incarnation
        if len(self._ended) > MAX_SUPERSEDED:
            self._ended.popitem(last=False)

    def _refusal(self, hello: Hello) -> str | None:
        if hello.protocol_version != PROTOCOL_VERSION:
            return f"protocol version is {PROTOCOL_VERSION} here and {hello.protocol_version} there"
        mismatch = self._mismatch(hello)
        if mismatch is not None:
            return f"KV layouts differ: {mismatch}"
        if hello.backend != self._backend:
            return f"chunks travel by {self._backend} here and by {hello.backend} there"
        if (hello.server_id, hello.rank, hello.incarnation) in self._superseded:
            return f"a newer incarnation of {hello.server_id} took over"
        if len(self._by_route) >= MAX_SESSIONS:
            return f"{len(self._by_route)} sessions are open already"
        return None

    def _mismatch(self, hello: Hello) -> str | None:
        """The number of heads is the sender's own; they have to be some of this rank's."""
        share, layout, heads = self._share, self._layout, hello.heads
        differing = []
        others = msgspec.structs.replace(hello.layout, num_kv_heads=layout.num_kv_heads)
        mismatch = layout.mismatch(others)
        if mismatch is not None:
            differing.append(mismatch)
        if hello.model_kv_heads != share.num_heads:
            differing.append(
                f"the model's KV heads are {share.num_heads} here and {hello.model_kv_heads} there"
            )
        elif share.heads.overlap(heads) != heads:
            differing.append(
                f"KV heads {heads.first} to {heads.end - 1} are offered, rank {share.rank} of "
                f"{share.tp_size} here holds {share.heads.first} to {share.heads.end - 1}"
            )
        return "; ".join(differing) or None
