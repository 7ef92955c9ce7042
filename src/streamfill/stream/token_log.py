"""The truth about one stream's prompt. KV is only a cache of it.

The log keeps the current ids and the latest splices with their sequence numbers. A server that
says "I have applied everything up to n" gets what came behind n; when that is no longer known it
gets the whole prompt as one splice that keeps nothing.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass

from streamfill.stream.ids import SeqNo
from streamfill.stream.splice import Splice, apply_splice, token_array

MAX_HISTORY_SPLICES = 64
"""A server that is further behind than this is quicker served with the whole prompt."""

MAX_HISTORY_TOKENS_PER_PROMPT_TOKEN = 4
"""Bound on the tokens kept in old splices, so that many updates cannot pile up old prompts."""


@dataclass(frozen=True, slots=True)
class LoggedSplice:
    """A splice and the number under which it was recorded."""

    seq: SeqNo
    splice: Splice


class TokenLog:
    """Token ids of one stream and the way they came about. Owned by the router."""

    def __init__(self) -> None:
        self._ids = token_array()
        self._history: deque[LoggedSplice] = deque()
        self._history_tokens = 0
        self._last_seq = SeqNo(0)

    @property
    def ids(self) -> array[int]:
        """The current prompt; not to be changed by the reader."""
        return self._ids

    @property
    def num_tokens(self) -> int:
        """Length of the current prompt."""
        return len(self._ids)

    @property
    def last_seq(self) -> SeqNo:
        """Number of the latest splice; 0 before the first."""
        return self._last_seq

    def restore(self, ids: array[int]) -> None:
        """Be as another log was that had these ids, its own from now on; how they came about is not
        known. For a new object only."""
        self._ids = ids
        self._last_seq = SeqNo(1 if ids else 0)

    def record(self, splice: Splice) -> SeqNo:
        """Apply `splice` and return its number, which is one more than the one before.

        Raises:
            ValueError: the splice keeps more tokens than there are; the log is unharmed.
        """
        apply_splice(self._ids, splice)
        self._last_seq = SeqNo(self._last_seq + 1)
        self._history.append(LoggedSplice(self._last_seq, splice))
        self._history_tokens += len(splice.new_token_ids)
        self._forget_old()
        return self._last_seq

    def since(self, seq: SeqNo) -> list[LoggedSplice]:
        """What a server needs that has applied everything up to and including `seq`.

        Returns:
            the splices behind `seq`, oldest first; or, when they are not all known any more, one
            splice with the newest number that keeps nothing and holds the whole prompt.

        Raises:
            ValueError: `seq` was never given out.
        """
        if not 0 <= seq <= self._last_seq:
            raise ValueError(f"sequence number {seq} is outside 0..{self._last_seq}")
        num_missing = self._last_seq - seq
        if num_missing <= len(self._history):
            return list(self._history)[len(self._history) - num_missing :]
        return [self.whole()]

    def forget(self, seq: SeqNo) -> None:
        """Nobody will ask for what came up to and including `seq`."""
        while self._history and self._history[0].seq <= seq:
            self._history_tokens -= len(self._history.popleft().splice.new_token_ids)

    def whole(self) -> LoggedSplice:
        """The whole prompt as one splice, for a server that has nothing."""
        return LoggedSplice(self._last_seq, Splice(0, self._ids[:]))

    def _forget_old(self) -> None:
        bound_tokens = MAX_HISTORY_TOKENS_PER_PROMPT_TOKEN * len(self._ids)
        while self._history and (
            len(self._history) > MAX_HISTORY_SPLICES or self._history_tokens > bound_tokens
        ):
            self._history_tokens -= len(self._history.popleft().splice.new_token_ids)
