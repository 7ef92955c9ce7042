"""The border between those who look and the router's core: who calls what, and how often."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from router.interface import ClusterInfo, ServerStreams
from router.watch.frames import StreamFacts, ToMs
from streamfill.observability.lifetime import Lifetime
from streamfill.stream.ids import ServerId


class WatchedStream(Protocol):
    """One stream, looked at between two other things that the router's loop does."""

    @property
    def lifetime(self) -> Lifetime: ...

    def facts(self, to_ms: ToMs) -> StreamFacts:
        """How it is now. Called some times a second while somebody looks, so it is cheap."""
        ...


class WatchSource(Protocol):
    """What is looked at. Called in the router's loop, only while somebody looks."""

    def info(self) -> ClusterInfo:
        """See `interface.StreamManager`."""
        ...

    async def describe_streams(
        self, stream_id: int | None, timeout_s: float
    ) -> Mapping[ServerId, ServerStreams]:
        """See `interface.StreamManager`. One call at a time."""
        ...

    def open_streams(self) -> Sequence[WatchedStream]:
        """All that have not ended, as they are now; a copy."""
        ...

    def newest_ended(self) -> Iterator[WatchedStream]:
        """Those that ended lately, the last one first. Used up before anything else happens."""
        ...
