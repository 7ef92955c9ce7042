"""Kills each server of a cluster once, spread over a run, while it has something to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from streamfill.api import Client
from streamfill.errors import StreamfillError
from tests.support.cluster import RunningCluster
from tests.support.processes import kill

ALIVE_WITHIN_S = 90.0
"""From the death of a server until the launcher has it back; ten seconds on two quiet cores."""
_SERVER_KINDS = ("prefill", "decode")
_BUSY_STREAMS = 2
_BUSY_WITHIN_S = 5.0
"""So long a server is watched until it has so many streams; then it is killed with fewer."""
_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One server's death."""

    server_id: str
    at_s: float
    """By the monotonic clock."""
    num_streams: int
    """That it had."""

    @property
    def role(self) -> str:
        """``prefill`` or ``decode``."""
        return self.server_id.partition("-")[0]


class Killer:
    """``run`` kills, in a task of its own; the load waits for ``begins`` before each stream, so
    that each death falls into the load, with some of it left behind it."""

    def __init__(
        self, cluster: RunningCluster, client: Client, server_ids: Sequence[str], num_streams: int
    ) -> None:
        self.kills: list[Kill] = []
        self.problems: list[str] = []
        self._cluster = cluster
        self._client = client
        self._server_ids = server_ids
        # The first after a tenth, the last with a quarter left.
        spacing = 0.65 * num_streams / max(1, len(server_ids) - 1)
        self._begins_at = [int(0.1 * num_streams + n * spacing) for n in range(len(server_ids))]
        self._slack = max(1, int(0.08 * num_streams))
        self._num_begun = 0
        self._num_ready = 0
        """Kills that were made, and one that only waits for its victim to be busy."""
        self._changed = asyncio.Event()
        self._killed_pids: set[int] = set()

    async def begins(self, place: int) -> None:
        """A stream begins, after so many others. Returns when the kills are not behind the load."""
        self._num_begun = place + 1
        self._wake()
        num_due = sum(place >= begins_at + self._slack for begins_at in self._begins_at)
        while self._num_ready < num_due and not self.problems:
            await self._next_change()

    async def run(self) -> None:
        """Kill them all, one after the other, each when all servers are alive."""
        for server_id, begins_at in zip(self._server_ids, self._begins_at, strict=True):
            while self._num_begun < begins_at:
                await self._next_change()
            if not await self.all_alive():
                self.problems.append(f"not all servers were back, so {server_id} was not killed")
                self._wake()
                return
            self._num_ready += 1
            self._wake()
            num_streams = await self._busy(server_id)
            at_s = time.monotonic()
            self._killed_pids.add(kill(self._cluster, server_id))
            self.kills.append(Kill(server_id=server_id, at_s=at_s, num_streams=num_streams))
        if not await self.all_alive():
            self.problems.append("the last one that was killed did not come back")

    async def all_alive(self) -> bool:
        """Wait until the router sees all servers alive; False when it does not in time. A cluster
        is ready with one of each kind, so not all need have been there before."""
        end_s = time.monotonic() + ALIVE_WITHIN_S
        while time.monotonic() < end_s:
            try:
                servers = (await self._client.server_info()).servers
            except StreamfillError:
                servers = ()
            records = self._cluster.state.processes
            pids = {each.name: each.pid for each in records if each.kind in _SERVER_KINDS}
            alive = {each.server_id: each.pid for each in servers if each.state == "alive"}
            # What was just killed counts for a moment as alive, for the launcher as well.
            if pids == alive and self._killed_pids.isdisjoint(pids.values()):
                return True
            await asyncio.sleep(_POLL_S)
        return False

    async def _busy(self, server_id: str) -> int:
        """Wait until a server has some streams; how many."""
        end_s = time.monotonic() + _BUSY_WITHIN_S
        while True:
            servers = (await self._client.server_info()).servers
            num_streams = next(x.num_assigned_streams for x in servers if x.server_id == server_id)
            if num_streams >= _BUSY_STREAMS or time.monotonic() >= end_s:
                return num_streams
            await asyncio.sleep(_POLL_S)

    def _wake(self) -> None:
        self._changed.set()

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
