"""How busy servers are, and which one is the least loaded. Pure: no sockets, no clock, no state.

Work is counted the moment it is assigned, not when a server reports it, so a burst of arrivals
spreads evenly although heartbeats come four times a second only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

from streamfill.messages.common import Role
from streamfill.stream.ids import ServerId

STREAM_WEIGHT_TOKENS = 512
"""What an open stream counts before its tokens are known: a typical segment."""


class ServerState(StrEnum):
    """How a server is."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DRAINING = "draining"
    DEAD = "dead"


PREFER_SLACK = {Role.PREFILL: 4.0 * STREAM_WEIGHT_TOKENS, Role.DECODE: 0.2}
"""By how much a server that has part of a stream may be more loaded than the best one: what
recomputing a prompt costs, and a fifth of the pool."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLoad:
    """What placement looks at, of one server."""

    server_id: ServerId
    role: Role
    state: ServerState
    num_streams: int
    """Assigned by this router and not ended."""
    pending_tokens: int
    """Assigned and not computed yet, as far as the router knows."""
    held_tokens: int
    """Of all assigned streams, computed or not."""
    reported_pending_tokens: int
    """From its last heartbeat."""
    pool_tokens: int
    spare_tokens: int | None = None
    """By how much the uncommitted contexts here may grow before a segment has to wait. None: nobody
    knows yet, so by as much as they want."""
    has_free_slot: bool = True
    """Whether it could compute one more request at once, going by its last heartbeat."""

    @property
    def waiting_tokens(self) -> int:
        """What is to be computed before a new stream, and what open streams are expected to
        bring."""
        ahead_tokens = max(self.pending_tokens, self.reported_pending_tokens)
        return ahead_tokens + STREAM_WEIGHT_TOKENS * self.num_streams

    @property
    def is_full(self) -> bool:
        """Whether what comes would wait here."""
        return not self.has_free_slot or (self.spare_tokens is not None and self.spare_tokens <= 0)


def choose_server(
    loads: Iterable[ServerLoad],
    role: Role,
    *,
    need_tokens: int = 0,
    avoid: Collection[ServerId] = (),
    prefer: ServerId | None = None,
) -> ServerId | None:
    """The least loaded living server of a role.

    Args:
        need_tokens: what its KV pool must be able to hold.
        avoid: servers that failed this stream; taken only when there is no other.
        prefer: a server that has part of the stream already; taken unless another's load is lower
            by more than that is worth.

    Returns:
        None when no server of this role is alive and large enough. A suspect is not alive: it
        either recovers with its next heartbeat or is about to be declared dead.
    """
    candidates = able_servers(loads, role, need_tokens)
    if not candidates:
        return None
    best = min(candidates, key=lambda load: _rank(load, avoid))
    for load in candidates:
        is_near = _score(load) <= _score(best) + PREFER_SLACK[role]
        if load.server_id == prefer and is_near and prefer not in avoid:
            return load.server_id
    return best.server_id


def able_servers(loads: Iterable[ServerLoad], role: Role, need_tokens: int = 0) -> list[ServerLoad]:
    """Those of a role that are alive and whose pool holds so many tokens."""
    return [
        load
        for load in loads
        if load.role is role and load.state is ServerState.ALIVE and load.pool_tokens >= need_tokens
    ]


def _rank(load: ServerLoad, avoid: Collection[ServerId]) -> tuple[bool, float, int, ServerId]:
    """Less is better; the id makes the choice the same in every run."""
    return load.server_id in avoid, _score(load), load.num_streams, load.server_id


def _score(load: ServerLoad) -> float:
    """How much there is to do: of prefill servers in tokens, of decode servers as a share of the
    pool."""
    if load.role is Role.PREFILL:
        # Computing is scarce: what is ahead of a new stream.
        return float(load.waiting_tokens)
    # Memory is scarce: how full the pool will be.
    return (load.held_tokens + STREAM_WEIGHT_TOKENS * load.num_streams) / load.pool_tokens
