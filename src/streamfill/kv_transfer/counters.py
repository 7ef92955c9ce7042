"""Counters that several threads add to."""

from __future__ import annotations

import enum
import threading
from typing import Generic, TypeVar


class SenderCount(enum.Enum):
    """What a sender counts since its start."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    FAILED = "failed"
    SESSIONS = "sessions"
    SHARED = "shared"
    MALFORMED_FRAMES = "malformed_frames"
    STALE_FRAMES = "stale_frames"
    BYTES_DELIVERED = "bytes_delivered"


class ReceiverCount(enum.Enum):
    """What a receiver counts since its start."""

    COMPLETED = "completed"
    REFUSED = "refused"
    ABORTED = "aborted"
    FAILED = "failed"
    REFUSED_HANDSHAKES = "refused_handshakes"
    MALFORMED_FRAMES = "malformed_frames"
    STALE_FRAMES = "stale_frames"
    LATE_WRITES = "late_writes"
    DUPLICATES = "duplicates"
    BYTES_RECEIVED = "bytes_received"


E = TypeVar("E", bound=enum.Enum)


class Counters(Generic[E]):
    """One number per member of an enum. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[E, int] = {}

    def add(self, what: E, amount: int = 1) -> None:
        """Count ``amount`` more of ``what``."""
        with self._lock:
            self._numbers[what] = self._numbers.get(what, 0) + amount

    def get(self, what: E) -> int:
        """How many so far."""
        with self._lock:
            return self._numbers.get(what, 0)
