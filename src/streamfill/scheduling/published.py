"""The policies of Stream2LLM (MLSys 2026, arXiv 2604.16395), as published.

===========  ====================================  ==========================  =================
policy       tiers                                 order within a tier         gives up memory
===========  ====================================  ==========================  =================
``default``  none                                  arrival                     newest arrival
``fcfs``     committed before uncommitted          arrival                     last in turn
``lcas``     committed before uncommitted          arrival of the last chunk   last in turn
``mcps``     none                                  most computed tokens first  last in turn
===========  ====================================  ==========================  =================

Higher priority goes first within a tier; where all are equal, as in the publication, it changes
nothing. ``default`` is vLLM's own order, with its LIFO victim. Of ``lcas`` two readings exist: the
published code takes the stream first whose last chunk is oldest, its docstring the newest; the
option ``order`` has both.

Starvation: ``default`` and ``fcfs`` starve nobody, since only streams that arrived earlier go
before one. Under ``lcas(order=newest)`` and ``mcps`` a stream may wait for as long as others keep
coming; that is theirs.
"""

from __future__ import annotations

from streamfill.scheduling.policy import PolicyContext
from streamfill.scheduling.snapshot import Experience, StreamView
from streamfill.scheduling.turn_policy import TurnPolicy
from streamfill.scheduling.turn_queue import Key


class DefaultPolicy(TurnPolicy):
    """Arrival order, whether committed or not."""

    is_tiered = False
    victim_reason = "the newest arrival"

    def commit_key(self, view: StreamView, experience: Experience) -> Key:
        return self.context_key(view, experience)

    def context_key(self, view: StreamView, experience: Experience) -> Key:
        del experience
        return -view.priority, view.arrival_s

    def victim_key(self, view: StreamView, experience: Experience) -> Key:
        del experience
        return view.priority, -view.arrival_s


class FcfsPolicy(TurnPolicy):
    """Committed streams by arrival, then the others by arrival."""

    def commit_key(self, view: StreamView, experience: Experience) -> Key:
        del experience
        return -view.priority, view.arrival_s

    def context_key(self, view: StreamView, experience: Experience) -> Key:
        return self.commit_key(view, experience)

    def victim_key(self, view: StreamView, experience: Experience) -> Key:
        del experience
        return _tier(view) + view.priority, -view.arrival_s


class LcasPolicy(TurnPolicy):
    """Committed streams by the arrival of their last chunk, then the others by theirs."""

    def __init__(self, context: PolicyContext | None = None) -> None:
        order = (context or PolicyContext()).choice("order", "oldest", "newest")
        self._sign = 1.0 if order == "oldest" else -1.0
        super().__init__(context)

    def commit_key(self, view: StreamView, experience: Experience) -> Key:
        del experience
        return -view.priority, self._sign * view.last_segment_s

    def context_key(self, view: StreamView, experience: Experience) -> Key:
        return self.commit_key(view, experience)

    def victim_key(self, view: StreamView, experience: Experience) -> Key:
        del experience
        return _tier(view) + view.priority, -self._sign * view.last_segment_s


class McpsPolicy(TurnPolicy):
    """Most computed tokens first, committed or not; of equals the earlier arrival."""

    is_tiered = False
    victim_reason = "fewest computed tokens"

    def commit_key(self, view: StreamView, experience: Experience) -> Key:
        return self.context_key(view, experience)

    def context_key(self, view: StreamView, experience: Experience) -> Key:
        del experience
        return -view.num_computed_tokens - _PRIORITY_STEP * view.priority, view.arrival_s

    def victim_key(self, view: StreamView, experience: Experience) -> Key:
        del experience
        return view.num_computed_tokens + _PRIORITY_STEP * view.priority, -view.arrival_s


_PRIORITY_STEP = float(1 << 40)
"""More than any number of tokens."""


def _tier(view: StreamView) -> float:
    return 0.0 if view.committed_s is None else _PRIORITY_STEP
