"""A sorted list of streams whose old entries are dropped late."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import TypeAlias

from streamfill.stream.ids import StreamId

Key: TypeAlias = tuple[float, float]
"""Smaller goes first. It may depend on a stream and on experience, never on the time: what ages
does so at the same pace for all, and their order stays. Having lost KV must not move a stream
forward, or two that do not fit together take each other's for ever."""

Entry: TypeAlias = tuple[float, float, StreamId]


class TurnQueue:
    """Ids in the order of their keys; of equal keys the older id first."""

    __slots__ = ("_entries", "_live")

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._live: dict[StreamId, Entry] = {}

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

    def key_of(self, stream_id: StreamId) -> Entry | None:
        """As compared with others'. None: it is not in."""
        return self._live.get(stream_id)

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
