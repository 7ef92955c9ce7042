"""What all streams of a soak have in common: pauses, in which nobody does anything, and the bursts
that follow them, in which everybody does everything at once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, kw_only=True)
class Climate:
    """How the weather changes, in seconds."""

    shortest_calm_s: float = 6.0
    longest_calm_s: float = 14.0
    longest_pause_s: float = 2.5
    burst_s: float = 1.5
    """So long after a pause the gaps between segments are left out."""


class Weather:
    """``run`` makes it, in a task of its own; the streams go by it."""

    def __init__(self, random: Random, climate: Climate) -> None:
        self.num_bursts = 0
        self._random = random
        self._climate = climate
        self._is_fair = asyncio.Event()
        self._is_fair.set()
        self._is_bursting = False

    async def run(self) -> None:
        """Until it is cancelled; then everybody goes on."""
        random, climate = self._random, self._climate
        try:
            while True:
                await asyncio.sleep(random.uniform(climate.shortest_calm_s, climate.longest_calm_s))
                self._is_fair.clear()
                await asyncio.sleep(random.uniform(0.3, 1) * climate.longest_pause_s)
                self.num_bursts += 1
                self._is_bursting = True
                self._is_fair.set()
                await asyncio.sleep(climate.burst_s)
                self._is_bursting = False
        finally:
            self._is_bursting = False
            self._is_fair.set()

    async def wait(self, gap_s: float) -> None:
        """The gap before an operation, and the pause if there is one."""
        if gap_s and not self._is_bursting:
            await asyncio.sleep(gap_s)
        await self._is_fair.wait()
