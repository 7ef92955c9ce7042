"""Which web pages may use the cluster.

A browser sends the origin of the page with each request that is not the page's own. Where no API
keys are asked for, any page that a user of this network visits could use the cluster. CORS alone
does not keep pages from sending requests, nor from opening WebSockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from router.http.errors import ErrorObject, ErrorReply

POLICY_VIOLATION = 1008


class OriginGuard:
    """ASGI middleware that refuses pages of other origins. Programs send no origin."""

    def __init__(self, app: ASGIApp, allow_origins: Sequence[str]) -> None:
        self._app = app
        self._allowed = frozenset(allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._may_pass(Headers(scope=scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose(POLICY_VIOLATION)(scope, receive, send)
        else:
            message = "pages of this origin are not allowed; see router.http_allow_origins"
            found = ErrorObject(message=message, type="invalid_request_error", code="forbidden")
            reply = msgspec.json.encode(ErrorReply(error=found))
            await Response(reply, 403, media_type="application/json")(scope, receive, send)

    def _may_pass(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None or "*" in self._allowed or origin in self._allowed:
            return True
        try:
            return urlsplit(origin).netloc == headers.get("host")
        except ValueError:  # brackets that hold no address
            return False
