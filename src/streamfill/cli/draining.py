"""A server of a cluster is drained, and watched until it is empty. For `drain` and `remove`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from streamfill.api import Client, Server

POLL_S: Final = 0.2
SAY_EVERY_S: Final = 1.0
"""A line for each change of the number, but no more."""
GRACE_S: Final = 15.0
"""For what is moved when the time for answers is over; the router tries every second."""


@dataclass(frozen=True, kw_only=True)
class DrainResult:
    """How a drain ended."""

    num_left: int
    """Streams that are still there."""
    is_gone: bool
    """The server has ended meanwhile, and everything with it."""

    @property
    def is_empty(self) -> bool:
        """Nothing is there any more."""
        return self.num_left == 0 or self.is_gone


async def drain_and_wait(
    connection: Client,
    server_id: str,
    timeout_s: float,
    *,
    force: bool,
    tell: Callable[[str], None],
) -> DrainResult:
    """Drain a server, and return when it is empty or will not become so.

    Args:
        connection: a client of the cluster, to be opened.
        server_id: a living server.
        timeout_s: answers are moved after so long; infinity: never, and they are waited for.
        force: also the last prefill server that takes streams.
        tell: called with each line about how far it is.

    Raises:
        StreamError: as ``Client.drain_server``.
    """
    async with connection as client:
        after_s = None if math.isinf(timeout_s) else timeout_s
        drained = await client.drain_server(server_id, move_answers_after_s=after_s, force=force)
        tell(f"{server_id} takes nothing new; {_left(drained.num_assigned_streams)}")
        deadline_s = time.monotonic() + timeout_s + GRACE_S
        said, said_s = drained.num_assigned_streams, time.monotonic()
        while True:
            server = await _server(client, server_id)
            now_s = time.monotonic()
            if server is None or server.state == "dead":
                tell(f"{server_id} has ended")
                return DrainResult(num_left=0, is_gone=True)
            if server.state != "draining":
                tell(f"{server_id} is {server.state}: somebody took the drain back")
                return DrainResult(num_left=max(1, server.num_assigned_streams), is_gone=False)
            num_left = server.num_assigned_streams
            if num_left == 0:
                tell(f"{server_id} is empty")
                return DrainResult(num_left=0, is_gone=False)
            if num_left != said and now_s >= said_s + SAY_EVERY_S:
                tell(f"{server_id}: {_left(num_left)}")
                said, said_s = num_left, now_s
            if now_s > deadline_s:
                tell(
                    f"{server_id}: {_left(num_left)} that no other server can take; still draining"
                )
                return DrainResult(num_left=num_left, is_gone=False)
            await asyncio.sleep(POLL_S)


def _left(num_streams: int) -> str:
    return f"{num_streams} stream{'' if num_streams == 1 else 's'} left"


async def _server(client: Client, server_id: str) -> Server | None:
    servers = (await client.server_info()).servers
    return next((each for each in servers if each.server_id == server_id), None)
