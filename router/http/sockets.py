"""``GET /v1/streams``, upgraded to a WebSocket: one stream, in both directions.

The operations and events are those of a gRPC ``Stream`` call, see ``stream_call``. The server
closes the connection behind ``done``; behind ``failed`` it does so with the close code 4000 plus
the HTTP status of the error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.websockets import WebSocket, WebSocketDisconnect

from router.call_messages import CallEvent, ClientMessage, Unreadable
from router.http.bodies import while_connected
from router.http.errors import status_of
from router.http.socket_events import server_message
from router.http.socket_messages import client_message
from router.interface import StreamManager
from router.service import CLIENT_GONE
from router.stream_call import StreamCall
from streamfill.errors import ErrorCode, InternalError, StreamError

FIRST_MESSAGE_S = 10.0
"""A client that connects has something to say; the core looks after streams that are open."""
CLOSE_DONE = 1000
CLOSE_FAILED = 4000
"""Plus the HTTP status: codes from here on are for applications (RFC 6455, 7.4.2)."""


async def serve_socket(socket: WebSocket, manager: StreamManager) -> None:
    """Serves one connection to its end."""
    await socket.accept()
    run = _Connection(socket, manager)
    await while_connected(run.gone.wait(), run.serve())


class _Connection:
    def __init__(self, socket: WebSocket, manager: StreamManager) -> None:
        self.gone = asyncio.Event()
        self._socket = socket
        self._vocab_size = manager.info().vocab_size
        self._call = StreamCall(manager, self._messages(), self._write)

    async def serve(self) -> None:
        code = CLOSE_DONE
        try:
            await self._call.run()
        except StreamError as error:
            code = CLOSE_FAILED + status_of(error)
        except WebSocketDisconnect:
            self.gone.set()
            return
        except Exception:
            await self._close(CLOSE_FAILED + status_of(InternalError("")))
            raise
        finally:
            if self._call.handle is not None and not self._call.is_over:
                await self._call.handle.cancel(CLIENT_GONE)
        await self._close(code)

    async def _messages(self) -> AsyncIterator[ClientMessage]:
        try:
            async with asyncio.timeout(FIRST_MESSAGE_S):
                first = await self._receive()
        except TimeoutError:
            message = f"no message within {FIRST_MESSAGE_S:g} s of the connection"
            yield ClientMessage(None, Unreadable(StreamError(message, code=ErrorCode.ABORTED)))
            return
        yield client_message(first, self._vocab_size)
        while True:
            yield client_message(await self._receive(), self._vocab_size)

    async def _receive(self) -> str | bytes:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            self.gone.set()
            # Who waits for ``gone`` cancels this task; nothing else may come of a client that left.
            await asyncio.Event().wait()
        text = message.get("text")
        return message.get("bytes", b"") if text is None else str(text)

    async def _write(self, event: CallEvent) -> None:
        stream_id = 0 if self._call.handle is None else self._call.handle.stream_id
        await self._socket.send_text(server_message(event, stream_id).decode())

    async def _close(self, code: int) -> None:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # the client was faster
            await self._socket.close(code)
