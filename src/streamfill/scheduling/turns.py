"""Streams in the order of their turn, kept up to date at the cost of what changed.

``TurnIndex`` keeps three queues for a policy, after the snapshot's log of changes. What they hold
is a function of the snapshot alone: an index that is new, or that has missed too much, starts from
all its streams. While all streams are of one tenant the queues are plain ones (``turn_queue``);
with the first stream of another, tenants share them (``fair_queue``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from streamfill.scheduling.fair_queue import FairQueue
from streamfill.scheduling.snapshot import Experience, Snapshot, StreamView
from streamfill.scheduling.turn_queue import Key, TurnQueue
from streamfill.stream.ids import StreamId

KeyOf: TypeAlias = Callable[[StreamView, Experience], Key]

Queue: TypeAlias = TurnQueue | FairQueue


class TurnIndex:
    """A policy's order of the streams that have something to compute.

    Attributes:
        commits: committed streams.
        context: uncommitted streams with new context.
        recompute: uncommitted streams that lack only what was taken from them.
        blocked: committed streams whose run waits for memory in the engine.
        num_context_tokens: that the streams of ``context`` lack, all together.
    """

    def __init__(self, commit_key: KeyOf, context_key: KeyOf, *, is_tiered: bool) -> None:
        """
        Args:
            commit_key: order of committed streams.
            context_key: order of the others.
            is_tiered: False puts both into ``context``, by ``context_key``.
        """
        self._commit_key = commit_key
        self._context_key = context_key
        self._is_tiered = is_tiered
        self._is_shared = False
        """There were streams of several tenants."""
        self.context: Queue = TurnQueue()
        self.commits: Queue = TurnQueue() if is_tiered else self.context
        self._key_of_commit = commit_key if is_tiered else context_key
        self.recompute = TurnQueue()
        self.blocked: set[StreamId] = set()
        self.num_context_tokens = 0
        self._lacking: dict[StreamId, int] = {}
        self._log: object = None
        self._position = 0
        self._experience: Experience | None = None
        self._page_size = 0
        self._queue_of: dict[StreamId, Queue] = {}

    def follow(self, snapshot: Snapshot) -> None:
        """Catch up with the changes up to this snapshot."""
        if self._is_shared:
            self._show(snapshot)
        is_same_story = (
            snapshot.log is self._log
            and snapshot.experience is self._experience
            and snapshot.memory.page_size == self._page_size
        )
        if is_same_story:
            if snapshot.position == self._position:
                return
            changed = snapshot.log.since(self._position)
            if changed is not None:
                self._position = snapshot.position
                streams = snapshot.streams
                for stream_id in changed if len(changed) < 2 else dict.fromkeys(changed):
                    view = streams.get(stream_id)
                    if view is None:
                        self._remove(stream_id)
                    elif view.tenant and not self._is_shared:
                        self._start_over(snapshot)
                        return
                    else:
                        self._place(view)
                return
        self._start_over(snapshot)

    @property
    def unfinished(self) -> StreamId | None:
        """See ``FairQueue.unfinished``."""
        return self.commits.unfinished if isinstance(self.commits, FairQueue) else None

    def _start_over(self, snapshot: Snapshot) -> None:
        self._log, self._experience = snapshot.log, snapshot.experience
        self._page_size, self._position = snapshot.memory.page_size, snapshot.position
        is_shared = any(view.tenant for view in snapshot.streams.values())
        if is_shared != self._is_shared:
            self._is_shared = is_shared
            self.context = FairQueue() if is_shared else TurnQueue()
            self.commits = self.context
            if self._is_tiered:
                self.commits = FairQueue() if is_shared else TurnQueue()
        if is_shared:
            self._show(snapshot)
        for queue in (self.commits, self.context, self.recompute):
            queue.clear()
        self._queue_of.clear()
        self._lacking.clear()
        self.num_context_tokens = 0
        self.blocked.clear()
        for view in snapshot.streams.values():
            self._place(view)

    def _show(self, snapshot: Snapshot) -> None:
        for queue in (self.commits, self.context):
            if isinstance(queue, FairQueue):
                queue.streams, queue.served = snapshot.streams, snapshot.served
                queue.pool_tokens = snapshot.memory.num_total_tokens

    def _remove(self, stream_id: StreamId) -> None:
        queue = self._queue_of.pop(stream_id, None)
        if queue is not None:
            queue.discard(stream_id)
            self.num_context_tokens -= self._lacking.pop(stream_id, 0)
        self.blocked.discard(stream_id)

    def _place(self, view: StreamView) -> None:
        stream_id, experience, page = view.stream_id, self._experience, self._page_size
        assert experience is not None
        is_committed = view.committed_s is not None
        if is_committed and view.in_flight and view.waiting_on_memory:
            self.blocked.add(stream_id)
        elif self.blocked:
            self.blocked.discard(stream_id)
        queue: Queue | None = None
        if view.in_flight:
            pass
        elif is_committed:
            queue, key = self.commits, self._key_of_commit(view, experience)
        elif not view.awaits_commit:
            num_pages = view.num_known_tokens // page
            if num_pages > view.num_kept_tokens // page:
                is_new = num_pages > view.num_reached_tokens // page
                queue = self.context if is_new else self.recompute
                key = self._context_key(view, experience)
        old = self._queue_of.get(stream_id)
        if old is not None:
            self.num_context_tokens -= self._lacking.pop(stream_id, 0)
            if old is not queue:
                old.discard(stream_id)
                if queue is None:
                    del self._queue_of[stream_id]
        if queue is not None:
            queue.put(stream_id, key)
            self._queue_of[stream_id] = queue
            if queue is self.context:
                num_lacking = view.num_known_tokens - view.num_kept_tokens
                self._lacking[stream_id] = num_lacking
                self.num_context_tokens += num_lacking


class RankIndex:
    """All streams that hold KV which could be taken, first to give first. Followed only while
    memory is short."""

    def __init__(self, key: KeyOf) -> None:
        self._key = key
        self._queue = TurnQueue()
        self._log: object = None
        self._position = 0
        self._experience: Experience | None = None

    def follow(self, snapshot: Snapshot) -> TurnQueue:
        """The order as of this snapshot."""
        streams = snapshot.streams
        changed = None
        if snapshot.log is self._log and snapshot.experience is self._experience:
            changed = snapshot.log.since(self._position)
        if changed is None:
            self._log, self._experience = snapshot.log, snapshot.experience
            self._queue.clear()
            changed = list(streams)
        self._position = snapshot.position
        for stream_id in dict.fromkeys(changed):
            view = streams.get(stream_id)
            if view is not None and view.num_evictable_tokens and not view.in_flight:
                self._queue.put(stream_id, self._key(view, snapshot.experience))
            else:
                self._queue.discard(stream_id)
        return self._queue
