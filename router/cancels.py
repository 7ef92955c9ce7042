"""Endings of streams that servers have not confirmed yet.

They outlive their stream: it is over for its client at once, while a server may still be computing,
or keep an answer that nobody needs any more.
"""

from __future__ import annotations

from router import timing
from router.legs import Send
from router.servers import Server
from streamfill.messages import router_to_server as r


class OutstandingCancels:
    """Repeats each `Cancel` and `Forget` until `Closed` comes or its server is dead."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: dict[Server, dict[int, tuple[r.Cancel | r.Forget, float]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, server: Server, stream_id: int, attempt: int, now_s: float) -> None:
        """Cancel all attempts of a stream up to this one on a server. Idempotent."""
        self._add(server, r.Cancel(stream_id=stream_id, attempt=attempt), now_s)

    def forget(self, server: Server, stream_id: int, attempt: int, now_s: float) -> None:
        """The server has done its part, up to this attempt, and may forget the stream."""
        self._add(server, r.Forget(stream_id=stream_id, attempt=attempt), now_s)

    def closed(self, server: Server, stream_id: int, attempt: int) -> None:
        """The server confirms."""
        streams = self._waiting.get(server)
        if (
            streams is not None
            and stream_id in streams
            and streams[stream_id][0].attempt <= attempt
        ):
            del streams[stream_id]
            if not streams:
                del self._waiting[server]

    def drop(self, server: Server) -> None:
        """The server is dead, and with it everything on it."""
        self._waiting.pop(server, None)

    def tick(self, now_s: float) -> None:
        """Repeat what is due."""
        for server, streams in self._waiting.items():
            for stream_id, (message, due_s) in streams.items():
                if now_s >= due_s:
                    streams[stream_id] = (message, now_s + timing.RETRANSMIT_AFTER_S)
                    self._send(server, message)

    def _add(self, server: Server, message: r.Cancel | r.Forget, now_s: float) -> None:
        if server.is_dead:
            return
        streams = self._waiting.setdefault(server, {})
        known = streams.get(message.stream_id)
        if known is not None and known[0].attempt >= message.attempt:
            return
        streams[message.stream_id] = (message, now_s + timing.RETRANSMIT_AFTER_S)
        self._send(server, message)
