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

from router.call_messages import CallEvent, ClientMessage, Failed, Refused
from router.http.bodies import while_connected
from router.http.errors import status_of
from router.http.socket_events import server_message
from router.http.socket_messages import client_message
from router.interface import StreamManager
from router.refusals import Api, Note, Refusal, note_error
from router.service import CLIENT_GONE
from router.stream_call import StreamCall
from streamfill.errors import InternalError, StreamError

CLOSE_DONE = 1000
CLOSE_TOO_LARGE = 1009
"""Said by uvicorn of a message above ``router.max_body_bytes``."""
CLOSE_FAILED = 4000
"""Plus the HTTP status: codes from here on are for applications (RFC 6455, 7.4.2)."""


async def serve_socket(socket: WebSocket, manager: StreamManager, on_refused: Note) -> None:
    """Serves one connection to its end. ``on_refused`` is called for each refusal."""
    await socket.accept()
    run = _Connection(socket, manager, on_refused)
    await while_connected(run.gone.wait(), run.serve())


class _Connection:
    def __init__(self, socket: WebSocket, manager: StreamManager, on_refused: Note) -> None:
        self._on_refused = on_refused
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
        while True:
            yield client_message(await self._receive(), self._vocab_size)

    async def _receive(self) -> str | bytes:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            self.gone.set()
            if message.get("code") == CLOSE_TOO_LARGE:
                self._on_refused(Api.WEBSOCKET, Refusal.TOO_LARGE)
            # Who waits for ``gone`` cancels this task; nothing else may come of a client that left.
            await asyncio.Event().wait()
        text = message.get("text")
        return message.get("bytes", b"") if text is None else str(text)

    async def _write(self, event: CallEvent) -> None:
        if isinstance(event, Refused | Failed):
            note_error(self._on_refused, Api.WEBSOCKET, event.error)
        stream_id = 0 if self._call.handle is None else self._call.handle.stream_id
        await self._socket.send_text(server_message(event, stream_id).decode())

    async def _close(self, code: int) -> None:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # the client was faster
            await self._socket.close(code)
