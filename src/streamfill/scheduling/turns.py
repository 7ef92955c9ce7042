"""Streams in the order of their turn, kept up to date at the cost of what changed.

``TurnQueue`` is a sorted list whose old entries are dropped late. ``TurnIndex`` keeps three of them
for a policy, after the snapshot's log of changes. What they hold is a function of the snapshot
alone: an index that is new, or that has missed too much, starts from all its streams.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from typing import TypeAlias

from streamfill.scheduling.snapshot import Experience, Snapshot, StreamView
from streamfill.stream.ids import StreamId

Key: TypeAlias = tuple[float, float]
"""Smaller goes first. It may depend on a stream and on experience, never on the time: what ages
does so at the same pace for all, and their order stays. Having lost KV must not move a stream
forward, or two that do not fit together take each other's for ever."""
KeyOf: TypeAlias = Callable[[StreamView, Experience], Key]

_Entry: TypeAlias = tuple[float, float, StreamId]


class TurnQueue:
    """Ids in the order of their keys; of equal keys the older id first."""

    __slots__ = ("_entries", "_live")

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._live: dict[StreamId, _Entry] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, stream_id: object) -> bool:
        return stream_id in self._live

    def put(self, stream_id: StreamId, key: Key) -> None:
        """Insert it, or move it."""
        entry = (key[0], key[1], stream_id)
        if self._live.get(stream_id) == entry:
            return
        self._live[stream_id] = entry
        insort(self._entries, entry)
        if len(self._entries) > 32 + 2 * len(self._live):
            self._entries = sorted(self._live.values())

    def discard(self, stream_id: StreamId) -> None:
        """Take it out, if it is in."""
        self._live.pop(stream_id, None)

    def clear(self) -> None:
        """Take all out."""
        self._entries.clear()
        self._live.clear()

    def __iter__(self) -> Iterator[StreamId]:
        """In order. Nothing may be put in meanwhile."""
        live, entries = self._live, self._entries
        num_gone = 0
        for entry in entries:
            if live.get(entry[2]) is entry:
                break
            num_gone += 1
        if num_gone:
            del entries[:num_gone]
        for entry in entries:
            if live.get(entry[2]) is entry:
                yield entry[2]


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
        self.context = TurnQueue()
        self.commits = TurnQueue() if is_tiered else self.context
        self._key_of_commit = commit_key if is_tiered else context_key
        self.recompute = TurnQueue()
        self.blocked: set[StreamId] = set()
        self.num_context_tokens = 0
        self._lacking: dict[StreamId, int] = {}
        self._log: object = None
        self._position = 0
        self._experience: Experience | None = None
        self._page_size = 0
        self._queue_of: dict[StreamId, TurnQueue] = {}

    def follow(self, snapshot: Snapshot) -> None:
        """Catch up with the changes up to this snapshot."""
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
                    else:
                        self._place(view)
                return
        self._start_over(snapshot)

    def _start_over(self, snapshot: Snapshot) -> None:
        self._log, self._experience = snapshot.log, snapshot.experience
        self._page_size, self._position = snapshot.memory.page_size, snapshot.position
        for queue in (self.commits, self.context, self.recompute):
            queue.clear()
        self._queue_of.clear()
        self._lacking.clear()
        self.num_context_tokens = 0
        self.blocked.clear()
        for view in snapshot.streams.values():
            self._place(view)

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
        queue: TurnQueue | None = None
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
