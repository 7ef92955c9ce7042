"""Changes the scheduling policy again and again, while everything goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from streamfill.api import Client
from streamfill.errors import StreamError
from tests.chaos.judge import Rule, Violation

POLICIES: Final[tuple[tuple[str, Mapping[str, str]], ...]] = (
    ("default", {}),
    ("fcfs", {}),
    ("lcas", {}),
    ("lcas", {"order": "newest"}),
    ("mcps", {}),
    ("laps", {}),
    ("edf", {}),
    ("adaptive", {"preemption": "recompute"}),
    ("adaptive", {"preemption": "swap"}),
    ("adaptive", {"preemption": "none"}),
    ("adaptive", {}),
)
"""In this order, over and over."""

ANSWER_WITHIN_S = 60.0
"""A server changes its policy between two forward passes; this is the most that can be asked."""


class PolicySwitcher:
    """``run`` switches, in a task of its own.

    Attributes:
        num_switches: that every prefill server made.
        seen: the policies that came into force, in the servers' words.
        violations: switches that were not made.
    """

    def __init__(self, client: Client, every_s: float) -> None:
        self.num_switches = 0
        self.seen: set[str] = set()
        self.violations: list[Violation] = []
        self._client = client
        self._every_s = every_s

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            for name, options in POLICIES:
                await self.switch(name, options)
                await asyncio.sleep(self._every_s)

    async def switch(self, name: str, options: Mapping[str, str]) -> None:
        """Once."""
        try:
            results = await self._client.set_policy(name, options, timeout_s=ANSWER_WITHIN_S)
        except StreamError as error:
            self._failed(f"{name} {dict(options)}: {error}")
            return
        for server, result in results.items():
            if not result.ok or not result.policy.startswith(name):
                self._failed(
                    f"{name} {dict(options)} on {server}: {result.reason or result.policy}"
                )
                return
            self.seen.add(result.policy)
        self.num_switches += 1

    def _failed(self, text: str) -> None:
        self.violations.append(Violation(rule=Rule.POLICY, text=text))
