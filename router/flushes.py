"""Emptying the servers' KV caches, for measurements that must start cold."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable

from router.legs import Send
from router.servers import Server
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.stream.ids import ServerId


class CacheFlushes:
    """Requests under way. Owned by the cluster."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bool]] = {}

    async def flush(self, servers: Iterable[Server], timeout_s: float) -> dict[ServerId, bool]:
        """Whether each server emptied its cache; False also when it did not answer in time."""
        requests: dict[ServerId, tuple[int, asyncio.Future[bool]]] = {}
        for server in servers:
            request_id = next(self._ids)
            future = asyncio.get_running_loop().create_future()
            requests[server.server_id] = request_id, future
            self._waiting[request_id] = future
            self._send(server, r.FlushCache(request_id=request_id))
        try:
            if requests:
                await asyncio.wait([future for _, future in requests.values()], timeout=timeout_s)
        finally:
            for request_id, _ in requests.values():
                del self._waiting[request_id]
        return {name: future.done() and future.result() for name, (_, future) in requests.items()}

    def answered(self, message: s.CacheFlushed) -> None:
        """A server did it, or refused."""
        future = self._waiting.get(message.request_id)
        if future is not None and not future.done():
            future.set_result(message.ok)
