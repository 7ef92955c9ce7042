"""Cancellations that servers have not confirmed yet.

They outlive their stream: it is over for its client at once, while a server may still be computing.
"""

from __future__ import annotations

from router import timing
from router.legs import Send
from router.servers import Server
from streamfill.messages import router_to_server as r


class OutstandingCancels:
    """Repeats each `Cancel` until `Closed` comes or its server is dead."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: dict[Server, dict[int, tuple[int, float]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, server: Server, stream_id: int, attempt: int, now_s: float) -> None:
        """Cancel all attempts of a stream up to this one on a server. Idempotent."""
        if server.is_dead:
            return
        streams = self._waiting.setdefault(server, {})
        if stream_id in streams and streams[stream_id][0] >= attempt:
            return
        streams[stream_id] = (attempt, now_s + timing.RETRANSMIT_AFTER_S)
        self._send(server, r.Cancel(stream_id=stream_id, attempt=attempt))

    def closed(self, server: Server, stream_id: int, attempt: int) -> None:
        """The server confirms."""
        streams = self._waiting.get(server)
        if streams is not None and stream_id in streams and streams[stream_id][0] <= attempt:
            del streams[stream_id]
            if not streams:
                del self._waiting[server]

    def drop(self, server: Server) -> None:
        """The server is dead, and with it everything on it."""
        self._waiting.pop(server, None)

    def tick(self, now_s: float) -> None:
        """Repeat what is due."""
        for server, streams in self._waiting.items():
            for stream_id, (attempt, due_s) in streams.items():
                if now_s >= due_s:
                    streams[stream_id] = (attempt, now_s + timing.RETRANSMIT_AFTER_S)
                    self._send(server, r.Cancel(stream_id=stream_id, attempt=attempt))
