"""Which streams should move from a busy prefill server to an idle one (after Llumnix, OSDI 2024).
Pure: plain data in, moves out; no sockets, no clock.

Placement spreads work as it comes; contexts that then grow differently, or a server that was added,
leave some servers with much to compute and others with none. Before its commit a stream can move:
another server computes its context from the beginning while the old one goes on with others.

The cost model counts seconds of waiting. A server's *wait* is what is left to compute there,
divided by its measured speed: nobody there waits longer. Moving a stream of ``n`` tokens, ``c`` of
them computed, from server A to server B

- takes its ``n - c`` tokens out of A's wait, and puts all ``n`` into B's;
- costs ``c`` tokens computed twice; KV that other streams share, or that B's cache holds, is not
  counted, so the estimate errs on the side of staying;
- avoids, for the stream, the difference of A's wait before and B's wait after the move.

A move is made when

1. A's wait was far above B's (`hot_s`, and `hot_ratio` times) for `hold_s` without a break,
2. it avoids at least `min_avoided_s`, and `cost_factor` times what is computed twice,
3. B's wait afterwards is not above A's, so that nothing is ever moved back by the same rule, and no
   server's wait grows above the longest one before,
4. the stream has not moved `max_moves` times for balance, nor within `rest_s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from streamfill.stream.ids import ServerId, StreamId


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceLimits:
    """How eager to be. The values are of a policy, not of a machine: all are in seconds of waiting,
    and every machine's speed is measured."""

    hot_s: float = 1.0
    """Longer waits than elsewhere by less than that are nothing that a user would notice."""
    hot_ratio: float = 2.0
    """Twice as long, so that two busy servers do not exchange streams."""
    hold_s: float = 1.0
    """Bursts are over sooner, and heartbeats come four times a second."""
    min_avoided_s: float = 0.5
    """What a move itself costs, on the wire and in the schedulers, is far below."""
    cost_factor: float = 2.0
    """Computing twice takes time from everybody on the new server, so it has to pay well."""
    max_moves: int = 2
    """Of one stream for balance, in its life."""
    rest_s: float = 10.0
    """Between two moves of one stream."""
    max_per_round: int = 4
    """Moves decided at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerBacklog:
    """A prefill server that takes new streams."""

    server_id: ServerId
    backlog_tokens: int
    """Known there and not computed."""
    tokens_per_s: float
    """Measured speed of its prefill, above 0."""
    room_tokens: int
    """By which the uncommitted contexts there may grow."""
    pool_tokens: int
    """The longest context that it can take."""

    @property
    def wait_s(self) -> float:
        """How long the last one there waits."""
        return self.backlog_tokens / self.tokens_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class MovableStream:
    """A stream that is not committed."""

    stream_id: StreamId
    server_id: ServerId
    """Where it is."""
    num_tokens: int
    num_computed_tokens: int
    num_moves: int
    """For balance, so far."""
    rested_s: float
    """Since its last move."""

    @property
    def num_pending_tokens(self) -> int:
        """Of its context, not computed."""
        return self.num_tokens - self.num_computed_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamMove:
    """What should be done, and why."""

    stream_id: StreamId
    source: ServerId
    target: ServerId
    avoided_s: float
    """Wait that the stream is spared, at most."""
    cost_s: float
    """What is computed twice, on the target."""

    @property
    def why(self) -> str:
        """As a sentence, for the log."""
        return (
            f"{self.target} is through with it {self.avoided_s:.2f} s sooner than {self.source}, "
            f"for {self.cost_s:.2f} s of computing again"
        )


class HotWatch:
    """Since when each server has been far busier than the idlest one. The hysteresis: one look at
    which it was not, and it starts anew."""

    def __init__(self, limits: RebalanceLimits) -> None:
        self._limits = limits
        self._since_s: dict[ServerId, float] = {}

    def look(self, servers: Sequence[ServerBacklog], now_s: float) -> frozenset[ServerId]:
        """Servers that have been hot for long enough."""
        idlest_s = min((server.wait_s for server in servers), default=0.0)
        hot = {x.server_id for x in servers if is_hot(x.wait_s, idlest_s, self._limits)}
        self._since_s = {name: self._since_s.get(name, now_s) for name in hot}
        hold_s = self._limits.hold_s
        return frozenset(x for x, since_s in self._since_s.items() if now_s - since_s >= hold_s)


def is_hot(wait_s: float, idlest_s: float, limits: RebalanceLimits) -> bool:
    """Whether a server with this wait should give streams to the idlest one."""
    return wait_s >= idlest_s + limits.hot_s and wait_s >= limits.hot_ratio * idlest_s


def plan_moves(
    servers: Iterable[ServerBacklog],
    streams: Iterable[MovableStream],
    hot: Iterable[ServerId],
    limits: RebalanceLimits,
) -> list[StreamMove]:
    """The moves to make now, each decided with the ones before it taken as done.

    Args:
        servers: all that take new streams, each once.
        streams: on whatever servers, each once.
        hot: servers that may give streams away; those no longer hot give none.
    """
    known = {server.server_id: server for server in servers}
    sources = {name for name in hot if name in known}
    movable = {
        stream.stream_id: stream
        for stream in streams
        if stream.server_id in sources
        and stream.num_moves < limits.max_moves
        and stream.rested_s >= limits.rest_s
    }
    moves: list[StreamMove] = []
    while len(moves) < limits.max_per_round:
        move = _best_move(known, movable, limits)
        if move is None:
            return moves
        moves.append(move)
        stream = movable.pop(move.stream_id)
        source, target = after_move(known[move.source], known[move.target], stream)
        known |= {source.server_id: source, target.server_id: target}
    return moves


def after_move(
    source: ServerBacklog, target: ServerBacklog, stream: MovableStream
) -> tuple[ServerBacklog, ServerBacklog]:
    """Both servers once the stream has moved, by the cost model."""
    left = max(0, source.backlog_tokens - stream.num_pending_tokens)
    return (
        replace(source, backlog_tokens=left, room_tokens=source.room_tokens + stream.num_tokens),
        replace(
            target,
            backlog_tokens=target.backlog_tokens + stream.num_tokens,
            room_tokens=target.room_tokens - stream.num_tokens,
        ),
    )


def _best_move(
    servers: Mapping[ServerId, ServerBacklog],
    movable: Mapping[StreamId, MovableStream],
    limits: RebalanceLimits,
) -> StreamMove | None:
    """Of the hottest server that has one, the move that relieves it most for what it costs."""
    by_wait = sorted(servers.values(), key=lambda x: (x.wait_s, x.server_id))
    for source in reversed(by_wait):
        if not is_hot(source.wait_s, by_wait[0].wait_s, limits):
            return None
        # Less is computed twice, more is taken off; the id makes the choice the same in every run.
        here = sorted(
            (stream for stream in movable.values() if stream.server_id == source.server_id),
            key=lambda x: (x.num_computed_tokens - x.num_pending_tokens, x.stream_id),
        )
        for target in by_wait:
            if not is_hot(source.wait_s, target.wait_s, limits):
                break
            for stream in here:
                move = _judge(source, target, stream, limits)
                if move is not None:
                    return move
    return None


def _judge(
    source: ServerBacklog, target: ServerBacklog, stream: MovableStream, limits: RebalanceLimits
) -> StreamMove | None:
    num_tokens = stream.num_tokens
    fits = num_tokens <= target.room_tokens and num_tokens < target.pool_tokens
    if not fits or stream.num_pending_tokens <= 0:
        return None
    source_after, target_after = after_move(source, target, stream)
    avoided_s = source.wait_s - target_after.wait_s
    cost_s = stream.num_computed_tokens / target.tokens_per_s
    pays = avoided_s >= max(limits.min_avoided_s, limits.cost_factor * cost_s)
    if not pays or target_after.wait_s > source_after.wait_s:
        return None
    return StreamMove(
        stream_id=stream.stream_id,
        source=source.server_id,
        target=target.server_id,
        avoided_s=avoided_s,
        cost_s=cost_s,
    )
