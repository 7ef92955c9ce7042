"""Streams on several prefill servers in virtual time, placed by a policy.

Real are the policy, what surrounds it in the router (``placer``, ``follower``) and the reports that
it follows. Made up is the server: it computes one piece after the other at a fixed rate, and keeps
blocks of prompts, the least recently used given up first. There are no decode servers, and an
answer is its first token.

1. ``open``: the policy places the stream. ``piece``: it is asked again while it may be; the piece
   goes into the server's queue.
2. The server takes the oldest piece. What of the prompt is in its cache costs nothing.
3. Reports come every ``REPORT_S``, and heartbeats say what is pending, as old as that.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from router.placement.follower import ResidencyFollower
from router.placement.loads import ServerLoad, ServerState
from router.placement.placer import Placer, StreamPlacing
from streamfill.messages.common import Role
from streamfill.messages.server_to_router import Residency
from streamfill.stream.ids import ServerId, StreamId
from streamfill.stream.prefix_blocks import BlockKey, block_keys, pack_keys

REPORT_S: Final = 0.25
"""Of heartbeats, and longer than servers take for reports of blocks."""
CACHE_BLOCK_TOKENS: Final = 32
"""Of the made up servers' caches."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One stream: its prompt after each piece, and when the piece comes; the last one commits."""

    opened_s: float
    prompts: tuple[array[int], ...]
    due_s: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of all streams under one policy."""

    num_computed_tokens: int
    least_computed_tokens: int
    """Each block of all prompts once: one server whose cache forgets nothing."""
    busy_s: tuple[float, ...]
    """Of each server."""
    ttft_s: tuple[float, ...]
    """Of each stream, from its commit, in no order."""
    num_moved: int
    """Streams that left the server of their opening when their prompt came."""

    @property
    def imbalance(self) -> float:
        """The busiest server's work over the average."""
        return max(self.busy_s) * len(self.busy_s) / sum(self.busy_s)


@dataclass(eq=False, slots=True)
class _Stream:
    reader: Reader
    placing: StreamPlacing
    server: _SimServer
    num_sent: int = 0
    num_computed: int = 0
    next_piece: int = 0


@dataclass(eq=False)
class _SimServer:
    server_id: ServerId
    max_blocks: int
    queue: deque[tuple[_Stream, int]] = field(default_factory=deque)
    streams: set[_Stream] = field(default_factory=set)
    cache: OrderedDict[BlockKey, None] = field(default_factory=OrderedDict)
    reported_tokens: int = 0
    busy_s: float = 0.0
    is_busy: bool = False
    seq: int = 0
    told: frozenset[BlockKey] = frozenset()

    @property
    def pending_tokens(self) -> int:
        return sum(stream.num_sent - stream.num_computed for stream in self.streams)

    def load(self, without: _Stream | None) -> ServerLoad:
        """As the router counts it, without one stream."""
        others = [stream for stream in self.streams if stream is not without]
        return ServerLoad(
            server_id=self.server_id,
            role=Role.PREFILL,
            state=ServerState.ALIVE,
            num_streams=len(others),
            pending_tokens=sum(each.num_sent - each.num_computed for each in others),
            held_tokens=0,
            reported_pending_tokens=self.reported_tokens,
            pool_tokens=self.max_blocks * CACHE_BLOCK_TOKENS,
        )

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """They are used now, the end of a prompt less than its beginning."""
        for key in reversed(keys):
            self.cache[key] = None
            self.cache.move_to_end(key)
        while len(self.cache) > self.max_blocks:
            self.cache.popitem(last=False)


class Simulation:
    """One run. ``run`` is called once."""

    def __init__(
        self, placer: Placer, *, num_servers: int, tokens_per_s: float, cache_tokens: int
    ) -> None:
        self._placer = placer
        self._rate = tokens_per_s
        self._servers = {
            name: _SimServer(name, cache_tokens // CACHE_BLOCK_TOKENS)
            for name in (ServerId(f"prefill-{n:02}") for n in range(num_servers))
        }
        self._follower = ResidencyFollower(placer, lambda server_id, block_tokens: None)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._ids = itertools.count()
        self._num_left = 0
        self._num_computed = self._num_moved = 0
        self._ttft_s: list[float] = []

    def run(self, readers: Sequence[Reader]) -> Outcome:
        """All streams to their end."""
        self._num_left = len(readers)
        for reader in readers:
            self._at(reader.opened_s, partial(self._open, reader))
        for server in self._servers.values():
            self._follower.follow(server.server_id, 0.0)
            self._at(0.0, partial(self._report, server))
        while self._num_left:
            now_s, _, act = heapq.heappop(self._events)
            act(now_s)
        distinct = {
            key
            for reader in readers
            for prompt in reader.prompts
            for key in block_keys(prompt, CACHE_BLOCK_TOKENS)
        }
        return Outcome(
            num_computed_tokens=self._num_computed,
            least_computed_tokens=len(distinct) * CACHE_BLOCK_TOKENS,
            busy_s=tuple(server.busy_s for server in self._servers.values()),
            ttft_s=tuple(self._ttft_s),
            num_moved=self._num_moved,
        )

    def _at(self, at_s: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._ids), act))

    def _choose(
        self, placing: StreamPlacing, prompt: Sequence[int], now_s: float, stream: _Stream | None
    ) -> _SimServer:
        is_complete = stream is not None and stream.next_piece + 1 == len(stream.reader.prompts)
        chosen = self._placer.choose(
            placing.request(prompt, now_s, is_complete=is_complete),
            [server.load(stream) for server in self._servers.values()],
            need_tokens=len(prompt) + 1,
            avoid=(),
        )
        if chosen is None:
            raise ValueError(f"a prompt of {len(prompt)} tokens is larger than the cache")
        return self._servers[chosen]

    def _open(self, reader: Reader, now_s: float) -> None:
        placing = StreamPlacing(self._placer, StreamId(next(self._ids)))
        stream = _Stream(reader, placing, self._choose(placing, (), now_s, None))
        stream.server.streams.add(stream)
        for due_s in reader.due_s:
            self._at(due_s, partial(self._piece, stream))

    def _piece(self, stream: _Stream, now_s: float) -> None:
        prompt = stream.reader.prompts[stream.next_piece]
        if stream.placing.is_open(stream.num_sent):
            server = self._choose(stream.placing, prompt, now_s, stream)
            if server is not stream.server:
                self._num_moved += 1
                stream.server.streams.discard(stream)
                server.streams.add(stream)
                stream.server, stream.num_computed = server, 0
        server = stream.server
        stream.placing.sent(server.server_id, 0, prompt, now_s)
        stream.num_sent = len(prompt)
        stream.num_computed = min(stream.num_computed, stream.num_sent)
        server.queue.append((stream, stream.next_piece))
        stream.next_piece += 1
        self._next(server, now_s)

    def _next(self, server: _SimServer, now_s: float) -> None:
        if server.is_busy or not server.queue:
            return
        stream, number = server.queue.popleft()
        prompt = stream.reader.prompts[number]
        keys = block_keys(prompt, CACHE_BLOCK_TOKENS)
        num_cached = next((n for n, key in enumerate(keys) if key not in server.cache), len(keys))
        # The last token is always computed: it is the one that is sampled behind.
        num_new = max(1, len(prompt) - num_cached * CACHE_BLOCK_TOKENS)
        server.touch(keys[:num_cached])
        took_s = num_new / self._rate
        server.busy_s += took_s
        self._num_computed += num_new
        server.is_busy = True
        self._at(now_s + took_s, partial(self._computed, server, stream, number, keys))

    def _computed(
        self,
        server: _SimServer,
        stream: _Stream,
        number: int,
        keys: Sequence[BlockKey],
        now_s: float,
    ) -> None:
        server.touch(keys)
        server.is_busy = False
        stream.num_computed = min(len(stream.reader.prompts[number]), stream.num_sent)
        if number + 1 == len(stream.reader.prompts):
            self._ttft_s.append(now_s - stream.reader.due_s[-1])
            server.streams.discard(stream)
            self._num_left -= 1
        self._next(server, now_s)

    def _report(self, server: _SimServer, now_s: float) -> None:
        server.reported_tokens = server.pending_tokens
        held = frozenset(server.cache)
        if self._placer.policy.block_tokens and (held != server.told or not server.seq):
            server.seq += 1
            report = Residency(
                block_tokens=CACHE_BLOCK_TOKENS,
                after_seq=server.seq - 1,
                seq=server.seq,
                is_complete=server.seq == 1,
                stored=pack_keys(held - server.told),
                removed=pack_keys(server.told - held),
            )
            self._follower.heard(server.server_id, report, now_s)
            server.told = held
        self._at(now_s + REPORT_S, partial(self._report, server))
