"""A stream on its way from one prefill server to another, before its commit.

1. The new server gets the whole prompt as a new attempt. The old attempt goes on meanwhile: it gets
   what the client adds, and what its server says of it is not passed on.
2. The new server has the prompt: the old attempt is cancelled.
3. Or the new server is lost before that: the old attempt goes on as if nothing had been.

A commit and the end of the stream settle it early: the new attempt stays.
"""

from __future__ import annotations

from collections.abc import Callable

from router.cluster import StreamMessage
from router.interface import MoveReason
from router.legs import PrefillLeg
from router.servers import Server
from streamfill.messages import server_to_router as s
from streamfill.stream.token_log import LoggedSplice


class Moves:
    """The moves of one stream. Owned by `prefilling`."""

    __slots__ = ("_cancel", "_num_invalidated", "_old", "moved_s", "num_balanced")

    def __init__(self, cancel: Callable[[PrefillLeg], None]) -> None:
        """
        Args:
            cancel: tells the server of an old attempt that it is over, where that is found out
                here.
        """
        self.num_balanced = 0
        """Moves for the sake of balance so far."""
        self.moved_s = float("-inf")
        """When it last began to move, for whatever reason."""
        self._cancel = cancel
        self._old: PrefillLeg | None = None
        self._num_invalidated = 0

    @property
    def num_invalidated_tokens(self) -> int:
        """Of the attempts that were moved away from."""
        return self._num_invalidated + (
            0 if self._old is None else self._old.num_invalidated_tokens
        )

    @property
    def is_under_way(self) -> bool:
        """Whether two servers have the stream."""
        return self._old is not None

    def begin(self, old: PrefillLeg, reason: MoveReason, now_s: float) -> None:
        """`old` is no longer the newest attempt."""
        self._old = old
        self.moved_s = now_s
        self.num_balanced += reason is MoveReason.BALANCE

    def splice(self, logged: LoggedSplice, now_s: float) -> None:
        """The client changed the prompt meanwhile."""
        if self._old is not None:
            self._old.splice(logged, now_s, commit_follows=False)

    def heard(self, server: Server, message: StreamMessage, now_s: float) -> bool:
        """Whether the message is of the old attempt."""
        old = self._old
        if old is None or old.server is not server or old.attempt != message.attempt:
            return False
        match message:
            case s.Received(seq=seq):
                old.acknowledge(seq, now_s)
            case s.Progress():
                old.acknowledge(message.seq, now_s)
                old.progress(message)
            case s.ResyncRequest(have_seq=have_seq) if have_seq >= 0:
                if not old.resync(have_seq, now_s):  # the log does not reach back far enough
                    self._forget(old)
                    self._cancel(old)
            case s.StreamFailed() | s.ResyncRequest():
                self._forget(old)
            case _:
                pass
        return True

    def lost(self, server: Server) -> None:
        """Nothing that was on this server is there any more."""
        if self._old is not None and self._old.server is server:
            self._forget(self._old)

    def settle(self) -> PrefillLeg | None:
        """The new attempt stays; returns the old one, which is to be cancelled."""
        old = self._old
        if old is not None:
            self._forget(old)
        return old

    def go_back(self) -> PrefillLeg | None:
        """The new attempt is lost; returns the old one, which goes on."""
        old, self._old = self._old, None
        return old

    def _forget(self, old: PrefillLeg) -> None:
        old.load.release()
        self._num_invalidated += old.num_invalidated_tokens
        self._old = None
