"""How much memory running answers will need at their worst, and whether one more fits beside them.

After Past-Future (ASPLOS 2025): an answer's length is predicted from those of answers that ended
lately, given how long it is already; and memory is compared at the moment when it will be highest,
not with the sum of all lengths, since answers that end earlier give theirs back before. Admitting
by that means that an answer waits at its beginning, where waiting is cheap, instead of being taken
out of the batch in the middle. Pure, and the same on every rank.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

NUM_LENGTHS_KEPT: Final = 1000
"""Answers whose lengths are remembered: long enough to know the tail, short enough to follow a
change of the workload."""
QUANTILE: Final = 0.8
"""Of the lengths that are still possible. The mean would be too low for half of all answers."""
_FEW: Final = 16
"""With fewer lengths above the present one nothing is known, and the limit is taken."""


class Holding(NamedTuple):
    """One answer."""

    num_tokens: int
    """Whose KV it holds now, or will when it starts: prompt and answer so far."""
    num_left: int
    """Predicted to come."""


class AnswerLengths:
    """Lengths of the answers that ended lately."""

    def __init__(self) -> None:
        self._newest: deque[int] = deque()
        self._sorted: list[int] = []

    def note(self, length: int) -> None:
        """An answer ended with so many tokens."""
        self._newest.append(length)
        insort(self._sorted, length)
        if len(self._newest) > NUM_LENGTHS_KEPT:
            oldest = self._newest.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]

    def predict_left(self, length: int, limit: int) -> int:
        """How many tokens are still to come of an answer that has ``length``, and may have
        ``limit``."""
        first = bisect_right(self._sorted, length)
        num_longer = len(self._sorted) - first
        if num_longer < _FEW:
            return max(0, limit - length)
        predicted = self._sorted[first + int(QUANTILE * (num_longer - 1))]
        return max(0, min(predicted, limit) - length)


def peak_tokens(holdings: Iterable[Holding]) -> int:
    """The most tokens that the answers hold together at any time from now on, if each gains a token
    a step and gives all back when it ends."""
    peak = num_held = 0
    # When an answer with r left ends, those with as much or more left have gained r each.
    for number, holding in enumerate(sorted(holdings, key=lambda each: -each.num_left), start=1):
        num_held += holding.num_tokens
        peak = max(peak, num_held + number * holding.num_left)
    return peak
