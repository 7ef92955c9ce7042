"""Refusals on HTTP, counted by what is answered; `sockets` counts what comes on a WebSocket."""

from __future__ import annotations

from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.refusals import Api, Note, note_status


class RefusalCounter:
    """ASGI middleware around all others."""

    def __init__(self, app: ASGIApp, note: Note) -> None:
        self._app = app
        self._note = note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        api = Api.HTTP if scope["type"] == "http" else Api.WEBSOCKET
        is_accepted = False

        async def noting_send(message: Message) -> None:
            nonlocal is_accepted
            match message["type"]:
                case "http.response.start" | "websocket.http.response.start":
                    note_status(self._note, api, message["status"])
                case "websocket.accept":
                    is_accepted = True
                case "websocket.close" if not is_accepted:  # which servers answer with 403
                    note_status(self._note, api, HTTPStatus.FORBIDDEN)
            await send(message)

        await self._app(scope, receive, noting_send)
