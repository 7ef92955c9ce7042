"""Asks a cluster a small question again and again, so that it is known when it serves."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from streamfill.api import Client
from streamfill.errors import StreamError

PROBE_EVERY_S = 0.4
GIVE_UP_S = 15.0
"""One that takes longer says no more."""
_PRIORITY = 10
"""Before the load, so that what is measured is the service and not its queue."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One question. Times are of the monotonic clock."""

    began_s: float
    ended_s: float
    is_ok: bool
    detail: str = ""


class Prober:
    """``run`` asks, in a task of its own. Each question has a connection of its own, as a client
    has that comes new."""

    def __init__(self, address: str) -> None:
        self.probes: list[Probe] = []
        self._address = address

    async def run(self) -> None:
        """Until it is cancelled; questions that are on their way then do not count."""
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(self._ask())
                await asyncio.sleep(PROBE_EVERY_S)

    async def _ask(self) -> None:
        began_s = time.monotonic()
        is_ok, detail = False, ""
        try:
            async with asyncio.timeout(GIVE_UP_S), Client(self._address) as client:
                answer = client.generate(
                    "Is anybody there?",
                    priority=_PRIORITY,
                    max_tokens=3,
                    temperature=0.0,
                    ignore_eos=True,
                )
                is_ok = len((await answer.read()).tokens) == 3
        except StreamError as error:
            detail = str(error)
        except TimeoutError:
            detail = f"no answer within {GIVE_UP_S:g} s"
        self.probes.append(
            Probe(began_s=began_s, ended_s=time.monotonic(), is_ok=is_ok, detail=detail)
        )
