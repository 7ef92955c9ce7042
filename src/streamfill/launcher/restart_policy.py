"""What follows when a process of a running cluster dies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_MAX_DOUBLINGS: Final = 62
"""Beyond any pause; a float does not hold the doublings of a process that is never given up."""


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """Restart after a pause that doubles each time, a limited number of times in a row."""

    max_restarts: int
    first_delay_s: float = 1.0
    max_delay_s: float = 30.0
    healthy_after_s: float = 60.0
    """A process that ran for so long had started well; its death begins a new row."""

    def next_row(self, num_in_a_row: int, ran_s: float) -> int:
        """How many deaths there were in a row, with one more after `ran_s` of running."""
        return 1 if ran_s >= self.healthy_after_s else num_in_a_row + 1

    def delay_s(self, num_in_a_row: int) -> float | None:
        """The pause after that many deaths in a row, or None to give the process up."""
        if num_in_a_row > self.max_restarts:
            return None
        num_doublings = min(num_in_a_row - 1, _MAX_DOUBLINGS)
        return float(min(self.max_delay_s, self.first_delay_s * 2**num_doublings))
