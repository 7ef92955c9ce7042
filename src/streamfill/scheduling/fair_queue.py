"""The turns of several tenants' streams: tenants by what they had, streams of one by the policy.

1. Each tenant has a queue of its own, in the policy's order.
2. The tenant goes first whose next tokens start at the earliest virtual time (``shares``). What its
   stream takes is added to it, and the next turn is given away, within the same step.
3. A prompt of which a part was computed is gone on with, unless the stream whose turn it is goes
   before it in the policy's own order too, or its tenant had a pool of tokens more by now.
   Otherwise two prompts that do not fit into memory together would take it from each other for
   ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heapreplace

from streamfill.scheduling.shares import NOTHING_SERVED, Served
from streamfill.scheduling.snapshot import StreamView
from streamfill.scheduling.step import num_lacking_tokens
from streamfill.scheduling.turn_queue import Key, TurnQueue
from streamfill.stream.ids import StreamId


class FairQueue:
    """Used as ``TurnQueue``."""

    __slots__ = ("_queues", "_tenants", "pool_tokens", "served", "streams")

    def __init__(self) -> None:
        self.streams: Mapping[StreamId, StreamView] = {}
        """Of the snapshot that is followed; all in the queue are there, as what they are."""
        self.served: Served = NOTHING_SERVED
        """Likewise."""
        self.pool_tokens = 0
        """Likewise; of the KV pool."""
        self._queues: dict[int, TurnQueue] = {}
        """By tenant; none is empty."""
        self._tenants: dict[StreamId, int] = {}

    def __len__(self) -> int:
        return len(self._tenants)

    def __contains__(self, stream_id: object) -> bool:
        return stream_id in self._tenants

    @property
    def unfinished(self) -> StreamId | None:
        """A stream that is to be gone on with (rule 3). None: there is none, or no other tenant
        waits."""
        if len(self._queues) > 1:
            for stream_id in self.served.unfinished:
                if stream_id in self._tenants:
                    return stream_id
        return None

    def put(self, stream_id: StreamId, key: Key) -> None:
        """Insert it, or move it."""
        tenant = self.streams[stream_id].tenant
        if self._tenants.get(stream_id, tenant) != tenant:
            self.discard(stream_id)
        queue = self._queues.get(tenant)
        if queue is None:
            queue = self._queues[tenant] = TurnQueue()
        self._tenants[stream_id] = tenant
        queue.put(stream_id, key)

    def discard(self, stream_id: StreamId) -> None:
        """Take it out, if it is in."""
        tenant = self._tenants.pop(stream_id, None)
        if tenant is not None:
            queue = self._queues[tenant]
            queue.discard(stream_id)
            if not len(queue):
                del self._queues[tenant]

    def clear(self) -> None:
        """Take all out."""
        self._queues.clear()
        self._tenants.clear()

    def __iter__(self) -> Iterator[StreamId]:
        """In order. Nothing may be put in meanwhile."""
        queues, streams, served = self._queues, self.streams, self.served
        if len(queues) == 1:
            yield from next(iter(queues.values()))
            return
        turns = [(served.start_of(tenant), tenant) for tenant in queues]
        heapify(turns)
        rests = {tenant: iter(queue) for tenant, queue in queues.items()}
        unfinished = self.unfinished
        while turns:
            start, tenant = turns[0]
            stream_id = next(rests[tenant], None)
            if stream_id is None:
                heappop(turns)
                continue
            if unfinished is not None:
                first, unfinished = unfinished, None
                if stream_id != first and not self._goes_before(stream_id, first):
                    yield first
                    rests[tenant] = _chain(stream_id, rests[tenant])
                    own = self._tenants[first]
                    rests[own] = _without(first, rests[own])
                    turns = [
                        (at + self._cost(streams[first]) if each == own else at, each)
                        for at, each in turns
                    ]
                    heapify(turns)
                    continue
            yield stream_id
            heapreplace(turns, (start + self._cost(streams[stream_id]), tenant))

    def _goes_before(self, stream_id: StreamId, other: StreamId) -> bool:
        """In the order of the policy, whosever they are, or because the other one's tenant is far
        ahead."""
        tenant, served = self._tenants[other], self.served
        lead = served.start_of(tenant) - served.start_of(self._tenants[stream_id])
        if lead > self.pool_tokens / self.streams[other].weight:
            return True
        entries = [self._queues[self._tenants[each]].key_of(each) for each in (stream_id, other)]
        return entries[0] is not None and entries[1] is not None and entries[0] < entries[1]

    @staticmethod
    def _cost(view: StreamView) -> float:
        return num_lacking_tokens(view) / view.weight


def _chain(first: StreamId, rest: Iterator[StreamId]) -> Iterator[StreamId]:
    yield first
    yield from rest


def _without(stream_id: StreamId, rest: Iterator[StreamId]) -> Iterator[StreamId]:
    return (each for each in rest if each != stream_id)
