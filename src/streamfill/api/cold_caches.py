"""Makes a cluster cold, for measurements that start from nothing."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from streamfill.api.client import Client
from streamfill.errors import UnavailableError

RETRY_S: Final = 0.2
FLUSH_TIMEOUT_S: Final = 20.0
"""Servers forget a stream that has ended within a second or so; a loaded machine may take more."""


async def empty_caches(client: Client, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
    """Makes all servers forget what they computed. A server that still has streams is asked again.

    Raises:
        UnavailableError: one of them does not.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        flushed = await client.flush_caches()
        if flushed and all(flushed.values()):
            return
        if time.monotonic() > end_s:
            kept = ", ".join(name for name, done in flushed.items() if not done) or "all servers"
            raise UnavailableError(f"the KV cache was not emptied: {kept}")
        await asyncio.sleep(RETRY_S)
