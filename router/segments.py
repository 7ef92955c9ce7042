"""Which of a stream's segments were sent, and which are computed."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from streamfill.observability.lifetime import Lifetime, LifetimeEvent


class _Sent(NamedTuple):
    number: int
    log_seq: int
    num_tokens: int


class SegmentRecord:
    """Writes a stream's segment events. Segments are numbered from 0 in the order they came."""

    def __init__(self, lifetime: Lifetime) -> None:
        self._lifetime = lifetime
        self._num_segments = 0
        self._waiting: deque[_Sent] = deque()

    def received(self, at_s: float | None = None) -> int:
        """A segment came, now or at this moment; returns its number."""
        number = self._num_segments
        self._num_segments += 1
        self._lifetime.record(LifetimeEvent.SEGMENT_RECEIVED, segment=number, at_s=at_s)
        return number

    def tokenised(self, number: int) -> None:
        """Its ids are known."""
        self._lifetime.record(LifetimeEvent.SEGMENT_TOKENISED, segment=number)

    def sent(self, number: int, log_seq: int, num_tokens: int) -> None:
        """It is on its way. `num_tokens` is the length of the prompt with it."""
        self._lifetime.record(LifetimeEvent.SEGMENT_SENT, segment=number)
        self._waiting.append(_Sent(number, log_seq, num_tokens))

    def computed(self, log_seq: int, num_tokens: int) -> None:
        """Everything up to these is computed."""
        while self._waiting:
            first = self._waiting[0]
            if first.log_seq > log_seq or first.num_tokens > num_tokens:
                return
            self._waiting.popleft()
            self._lifetime.record(LifetimeEvent.SEGMENT_COMPUTED, segment=first.number)
