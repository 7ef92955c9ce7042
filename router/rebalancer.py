"""Carries out what `rebalance` decides: measures speeds, looks twice a second, moves streams.

Nothing is looked at but what the router knows anyway, and streams only while a server is hot. KV
is not copied from the old server: hand-offs lead from prefill to decode servers only. So the new
server computes the context from the token log; early KV on the stream's decode server stays of use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from router.cluster import Cluster
from router.interface import MoveReason
from router.placement import ServerState
from router.rebalance import (
    HotWatch,
    MovableStream,
    RebalanceLimits,
    ServerBacklog,
    plan_moves,
)
from router.servers import Server
from router.session import Session
from streamfill.messages.common import Role
from streamfill.stream.ids import ServerId

LOOK_EVERY_S = 0.5
"""Two heartbeats: what was moved in the last round has left the old server's report."""
NO_LIMIT_TOKENS = 1 << 62
NEWEST_WEIGHT = 0.5
"""Of the newest measurement of a speed."""


@dataclass(slots=True)
class _Measurement:
    num_computed_tokens: int
    at_s: float


class Speeds:
    """How fast each server computes prompts: from its own count, over times in which it always had
    something to compute. A server that was never busy is taken for as fast as the slowest known."""

    def __init__(self) -> None:
        self._anchors: dict[ServerId, _Measurement] = {}
        self._speeds: dict[ServerId, float] = {}

    def look(self, server_id: ServerId, num_computed: int, num_pending: int, now_s: float) -> None:
        """What a server last said of itself."""
        anchor = self._anchors.get(server_id)
        if num_pending <= 0:
            self._anchors.pop(server_id, None)
            return
        if anchor is None or num_computed < anchor.num_computed_tokens:
            self._anchors[server_id] = _Measurement(num_computed, now_s)
        elif num_computed > anchor.num_computed_tokens and now_s > anchor.at_s:
            # A step may take longer than the time between two looks.
            measured = (num_computed - anchor.num_computed_tokens) / (now_s - anchor.at_s)
            old = self._speeds.get(server_id, measured)
            self._speeds[server_id] = old + NEWEST_WEIGHT * (measured - old)
            self._anchors[server_id] = _Measurement(num_computed, now_s)

    def of(self, server_id: ServerId) -> float | None:
        """Tokens per second; None while nothing is known of any server."""
        return self._speeds.get(server_id) or min(self._speeds.values(), default=None)

    def keep(self, server_ids: Iterable[ServerId]) -> None:
        """Forget all others."""
        known = set(server_ids)
        self._anchors = {k: v for k, v in self._anchors.items() if k in known}
        self._speeds = {k: v for k, v in self._speeds.items() if k in known}


class Rebalancer:
    """Owned by the router's loop."""

    def __init__(
        self,
        cluster: Cluster,
        sessions: Callable[[], Iterable[Session]],
        limits: RebalanceLimits | None = None,
    ) -> None:
        """
        Args:
            sessions: all streams that have not ended, as they are when it is called.
        """
        self._cluster = cluster
        self._sessions = sessions
        self._limits = limits or RebalanceLimits()
        self._watch = HotWatch(self._limits)
        self._speeds = Speeds()
        self._look_s = 0.0

    def tick(self, now_s: float) -> None:
        """Called more often than it looks."""
        if now_s < self._look_s:
            return
        self._look_s = now_s + LOOK_EVERY_S
        alive = [
            server
            for server in self._cluster.registry
            if server.role is Role.PREFILL and server.state is ServerState.ALIVE
        ]
        self._speeds.keep(server.server_id for server in alive)
        for server in alive:
            counters = server.counters
            self._speeds.look(
                *(server.server_id, counters.num_computed_tokens),
                *(counters.num_pending_tokens, server.heard_s),
            )
        backlogs = [each for server in alive if (each := self._backlog(server)) is not None]
        # Also where there is none or one, which is not hot any more.
        hot = self._watch.look(backlogs, now_s)
        if hot:
            self._move(alive, backlogs, hot, now_s)

    def _move(
        self,
        alive: list[Server],
        backlogs: list[ServerBacklog],
        hot: frozenset[ServerId],
        now_s: float,
    ) -> None:
        sessions = {session.stream_id: session for session in self._sessions()}
        streams = [each for x in sessions.values() if (each := self._movable(x, now_s)) is not None]
        servers = {server.server_id: server for server in alive}
        for move in plan_moves(backlogs, streams, hot, self._limits):
            session = sessions[move.stream_id]
            session.move_to(servers[move.target], MoveReason.BALANCE, move.why)

    def _backlog(self, server: Server) -> ServerBacklog | None:
        speed = self._speeds.of(server.server_id)
        if speed is None:
            return None
        admission = self._cluster.room.counters(server)
        room_tokens = NO_LIMIT_TOKENS
        if admission is not None:
            room_tokens = admission.max_uncommitted_tokens - admission.num_uncommitted_tokens
            if admission.num_waiting_segments:
                room_tokens = 0
        return ServerBacklog(
            server_id=server.server_id,
            backlog_tokens=max(server.pending_tokens, server.counters.num_pending_tokens),
            tokens_per_s=speed,
            room_tokens=room_tokens,
            pool_tokens=server.facts.pool_tokens,
        )

    def _movable(self, session: Session, now_s: float) -> MovableStream | None:
        leg = session.attempts.movable_leg()
        # An operation that waits for room would have to queue anew, and might be refused there.
        if leg is None or self._cluster.room.is_waiting(session.stream_id):
            return None
        num_tokens = session.prompt.log.num_tokens
        return MovableStream(
            stream_id=session.stream_id,
            server_id=leg.server.server_id,
            num_tokens=num_tokens,
            num_computed_tokens=min(leg.num_computed_tokens, num_tokens),
            num_moves=session.prefilling.moves.num_balanced,
            rested_s=now_s - session.prefilling.moves.moved_s,
        )
