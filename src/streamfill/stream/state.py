"""The state of a stream on the router.

::

    OPEN ──▶ COMMITTED ──▶ DECODING ──▶ DONE
      │          │             ├──────▶ ABORTED   the client gave up
      │          │             ├──────▶ FAILED    something of ours broke
      ├──────────┴─────────────┴──────▶ DEADLINE  its time is over
      └──────────┴────────────────────▶ REJECTED  refused before the first token

A stream only moves to the right and ends exactly once; the first ending wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from streamfill.errors import InternalError
from streamfill.stream.ids import StreamId


class StreamState(StrEnum):
    """Where a stream is in its life."""

    OPEN = "OPEN"
    COMMITTED = "COMMITTED"
    DECODING = "DECODING"
    DONE = "DONE"
    ABORTED = "ABORTED"
    REJECTED = "REJECTED"
    FAILED = "FAILED"
    DEADLINE = "DEADLINE"

    def __str__(self) -> str:
        return self.value

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can happen to the stream any more."""
        return not _NEXT[self]


_BREAKS = frozenset({StreamState.ABORTED, StreamState.FAILED, StreamState.DEADLINE})
_BREAKS_EARLY = _BREAKS | {StreamState.REJECTED}
_NONE: frozenset[StreamState] = frozenset()

_NEXT: Mapping[StreamState, frozenset[StreamState]] = MappingProxyType(
    {
        StreamState.OPEN: _BREAKS_EARLY | {StreamState.COMMITTED},
        StreamState.COMMITTED: _BREAKS_EARLY | {StreamState.DECODING},
        StreamState.DECODING: _BREAKS | {StreamState.DONE},
        StreamState.DONE: _NONE,
        StreamState.ABORTED: _NONE,
        StreamState.REJECTED: _NONE,
        StreamState.FAILED: _NONE,
        StreamState.DEADLINE: _NONE,
    }
)


class IllegalTransitionError(InternalError):
    """A stream was asked to go where it cannot go: a bug of the caller.

    Attributes:
        stream_id: the stream.
        current: the state it is in, and stays in.
        wanted: the state it was asked to enter.
    """

    def __init__(self, stream_id: StreamId, current: StreamState, wanted: StreamState) -> None:
        super().__init__(
            f"stream {stream_id} cannot go from {current} to {wanted}",
            details={"stream_id": stream_id, "current": str(current), "wanted": str(wanted)},
        )
        self.stream_id = stream_id
        self.current = current
        self.wanted = wanted


class StreamStateMachine:
    """Holds the state of one stream. Owned by the router's loop; not for use by several threads."""

    __slots__ = ("_state", "stream_id")

    def __init__(self, stream_id: StreamId) -> None:
        self.stream_id = stream_id
        self._state = StreamState.OPEN

    @property
    def state(self) -> StreamState:
        """The current state."""
        return self._state

    @property
    def is_terminal(self) -> bool:
        """Whether the stream has ended."""
        return self._state.is_terminal

    def can_enter(self, wanted: StreamState) -> bool:
        """Whether `advance(wanted)` would succeed."""
        return wanted in _NEXT[self._state]

    def advance(self, wanted: StreamState) -> None:
        """Enter `wanted`.

        Raises:
            IllegalTransitionError: not reachable from here; the state stays as it is.
        """
        if not self.can_enter(wanted):
            raise IllegalTransitionError(self.stream_id, self._state, wanted)
        self._state = wanted

    def finish(self, ending: StreamState) -> bool:
        """End the stream, unless it has ended already; the first ending stays.

        Late news about an ended stream is ordinary, so it is told by the result, not raised.

        Returns:
            True if this call ended the stream.

        Raises:
            IllegalTransitionError: `ending` is no ending, or not one of the state it is in.
        """
        if self.is_terminal and ending.is_terminal:
            return False
        if not ending.is_terminal:
            raise IllegalTransitionError(self.stream_id, self._state, ending)
        self.advance(ending)
        return True
