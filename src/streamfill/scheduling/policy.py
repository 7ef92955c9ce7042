"""What every scheduling policy is."""

from __future__ import annotations

from typing import Protocol

from streamfill.scheduling.plan import StepPlan
from streamfill.scheduling.snapshot import Snapshot


class Policy(Protocol):
    """Chooses what runs next."""

    def decide(self, snapshot: Snapshot) -> StepPlan:
        """The next step.

        Called by the prefill server's loop whenever the engine can take work and something changed;
        takes tens of microseconds. A pure function: the same snapshot gives the same plan on every
        tensor-parallel rank.
        """
        ...
