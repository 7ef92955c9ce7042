"""uvicorn's HTTP/1.1 protocol, with bounds on what a client may leave unfinished.

uvicorn bounds how long a connection may be idle between two requests. A client that never finishes
the head of a request, or goes on sending a body that was answered already, would hold its
connection for ever.
"""

from __future__ import annotations

import asyncio
import enum
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from router.refusals import Api, Note, Refusal, not_counted

HEAD_S = 10.0
"""From the connection, or the first byte of a further request, to the end of the request's head."""
REST_S = 10.0
"""For the rest of a body behind an answer that did not wait for it. The connection is not closed at
once, since that could make the client miss the answer."""


class _Wait(enum.Enum):
    HEAD = "head"
    REST = "rest"


_LIMITS_S = {_Wait.HEAD: HEAD_S, _Wait.REST: REST_S}


class BoundedH11Protocol(H11Protocol):
    """One connection. Closes it when what is being waited for takes too long."""

    on_refused: ClassVar[Note] = staticmethod(not_counted)
    """Called for what never becomes a request."""
    _wait: _Wait | None = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        self._expect(_Wait.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The client sent something. Does not give it more time."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer was sent to its end."""
        super().on_response_complete()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP, or its head is too large."""
        type(self).on_refused(Api.HTTP, Refusal.MALFORMED)
        super().send_400_response(msg)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Another protocol has the connection from now on."""
        self._expect(None)
        self._unset_keepalive_if_required()
        super().handle_websocket_upgrade(event)

    def _look(self) -> None:
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            self._expect(None)
        elif self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None:
            self._expect(_Wait.HEAD)
        elif self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            self._expect(_Wait.REST)
        else:
            self._expect(None)

    def _expect(self, wait: _Wait | None) -> None:
        if wait is self._wait:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wait = wait
        if wait is not None:
            self._timer = self.loop.call_later(_LIMITS_S[wait], self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            if self._wait is _Wait.HEAD:
                type(self).on_refused(Api.HTTP, Refusal.TOO_SLOW)
            self.transport.close()


def counting_protocol(on_refused: Note) -> type[BoundedH11Protocol]:
    """The protocol of one server; uvicorn makes the connections."""
    given = {"on_refused": staticmethod(on_refused)}
    return type("_CountingProtocol", (BoundedH11Protocol,), given)
