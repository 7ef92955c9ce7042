"""A token bucket: how much may be used over time. Pure but for the clock that it is given."""

from __future__ import annotations

from collections.abc import Callable


class Bucket:
    """Holds up to ``capacity`` units and gets ``per_s`` of them each second; full at first."""

    def __init__(self, *, per_s: float, capacity: float, clock: Callable[[], float]) -> None:
        """Args:
        per_s: above 0.
        capacity: above 0; what may be used at once after a pause.
        clock: seconds, never backwards.
        """
        self._per_s = per_s
        self._capacity = capacity
        self._clock = clock
        self._level = capacity
        self._at_s = clock()

    def take(self, units: float) -> float:
        """Takes ``units`` and returns 0, or takes nothing and returns the seconds until they would
        be there; ``units`` is at most the capacity."""
        missing = units - self._refilled()
        if missing > 0:
            return missing / self._per_s
        self._level -= units
        return 0.0

    def owe(self, units: float) -> None:
        """Takes ``units`` that are used already, whether they are there or not."""
        self._level = self._refilled() - units

    def wait_s(self) -> float:
        """Seconds until nothing is owed any more; 0 while that is so."""
        return max(0.0, -self._refilled() / self._per_s)

    def _refilled(self) -> float:
        now_s = self._clock()
        self._level = min(self._capacity, self._level + self._per_s * (now_s - self._at_s))
        self._at_s = now_s
        return self._level
