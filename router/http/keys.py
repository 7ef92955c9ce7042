"""API keys on HTTP: what comes without a good one is refused before its body is read.

Behind the check of origins and behind CORS: a browser asks beforehand without a key, and must be
able to read a refusal.
"""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from router.access.account import CALLER
from router.access.key_ring import HEADER, KeyRing
from router.http.errors import error_response
from router.http.status import PAGE_PATH
from streamfill.errors import StreamError, UnauthenticatedError
from streamfill.observability.logging import RateLimited, log_event

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", PAGE_PATH})
"""Probes of orchestrators carry no keys. The status page holds no data, and asks for a key
itself."""


class KeyGuard:
    """ASGI middleware that lets requests and WebSockets through that carry a key, and notes whose
    they are."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys
        self._refusals = RateLimited()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or (
            scope["type"] == "http" and scope["path"] in OPEN_PATHS
        ):
            await self._app(scope, receive, send)
            return
        try:
            account = self._keys.authenticate(Headers(scope=scope).getlist(HEADER))
            account.take_request()
        except StreamError as error:
            self._note(error, scope)
            # On a WebSocket this is the answer to the request for the upgrade.
            await error_response(error)(scope, receive, send)
            return
        CALLER.set(account)
        await self._app(scope, receive, send)

    def _note(self, error: StreamError, scope: Scope) -> None:
        if not isinstance(error, UnauthenticatedError) or not self._refusals.allow():
            return
        client = scope.get("client")
        log_event(
            *(logger, "unauthenticated"),
            level=logging.WARNING,
            call=str(scope["path"])[:100],
            peer="unknown" if client is None else client[0],
            reason=error.message,
            num_suppressed=self._refusals.num_suppressed,
        )
