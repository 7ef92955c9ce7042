"""``/status``: a page that draws what happens in the cluster, and the events that it lives on.

The page is one document of this folder's files, put together at the start. It holds no data and
asks nobody for a key; the events do, as every other path. Its policy lets a browser run just this
script, and speak with just this router.

Events are server-sent: ``snapshot``, which is all of it, then ``delta``, which is what changed
(``watch.frames.Frame``), some times a second, and ``end`` with an error. A reader gets the next one
when it took the one before; who takes none for `SLOW_S` is dropped.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router import request_checks as checks
from router.http.bodies import until_gone, while_connected
from router.http.errors import ErrorReply, error_object
from router.http.fields import Fields, convert
from router.interface import StreamManager
from router.watch.frames import Frame
from router.watch.wish import DEFAULT_LIMIT, MAX_LIMIT, MAX_SEARCH_CHARS, Show, Sort, WatchWish
from streamfill.errors import StreamError
from streamfill.observability.logging import log_event

logger = logging.getLogger(__name__)

PAGE_PATH: Final = "/status"
EVENTS_PATH: Final = "/status/events"
SLOW_S: Final = 20.0
"""Forty samples. A browser in the background still reads."""

_FOLDER: Final = Path(__file__).with_name("status_page")
_SCRIPTS: Final = (
    *("format.js", "model.js", "events.js", "theme.js", "drawing.js"),
    *("servers.js", "details.js", "streams.js", "main.js"),
)
"""In this order, one script: what is used at the top level stands before."""
_HEADERS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would collect events before it passes them on
    "x-content-type-options": "nosniff",
}


class StatusQuery(Fields, frozen=True, kw_only=True):
    """The query string of the events."""

    show: str = Show.ALL.value
    """Streams in which states: `watch.wish.Show`."""
    sort: str = Sort.NEWEST.value
    """What comes first: `watch.wish.Sort`."""
    search: str = ""
    """In ids, request ids and names of tenants and servers."""
    limit: int = DEFAULT_LIMIT
    """Streams shown at most, from 1 to 500."""


class StatusPage:
    """The document with its headers."""

    def __init__(self) -> None:
        style = _read("style.css")
        script = "\n".join(_read(name) for name in _SCRIPTS)
        page = _read("page.html").replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
        policy = (
            *("default-src 'none'", "connect-src 'self'", "img-src data:"),
            *(f"script-src {_hash(script)}", f"style-src {_hash(style)}"),
            *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
            *("require-trusted-types-for 'script'", "trusted-types 'none'"),
        )
        self._body = page.encode()
        self._headers = {
            "content-security-policy": "; ".join(policy),
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
        }

    def response(self) -> Response:
        """The same for everybody."""
        return Response(self._body, headers=self._headers, media_type="text/html")


def status_events(request: Request, manager: StreamManager) -> StatusEvents | Response:
    """What answers a request for the events.

    Raises:
        InvalidArgumentError: names the field of the query string and its value.
    """
    wish = _wish(convert(StatusQuery, dict(request.query_params), strict=False))
    if request.method == "HEAD":
        return Response(headers=_HEADERS)
    return StatusEvents(manager.watch(wish))


@dataclass(frozen=True)
class StatusEvents:
    """An ASGI application that sends frames until its reader is gone. Raises ``StreamError`` while
    nothing is sent."""

    frames: AsyncGenerator[Frame, None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(until_gone(receive), self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        num_sent = 0
        last = b""
        async with aclosing(self.frames) as frames:
            try:
                async for frame in frames:
                    if not num_sent:
                        await send(_start())
                    kind = "delta" if num_sent else "snapshot"
                    data = msgspec.json.encode(frame)
                    num_sent += 1
                    async with asyncio.timeout(SLOW_S):
                        await send(_body(_event(kind, data), more=True))
            except TimeoutError:
                log_event(logger, "status_reader_dropped", num_frames=num_sent, slow_s=SLOW_S)
                return
            except StreamError as error:
                if not num_sent:
                    raise
                last = _event("end", msgspec.json.encode(ErrorReply(error=error_object(error))))
        await send(_body(last, more=False))


def _wish(query: StatusQuery) -> WatchWish:
    if not 1 <= query.limit <= MAX_LIMIT:
        raise checks.wrong("limit", query.limit, f"from 1 to {MAX_LIMIT}")
    if len(query.search) > MAX_SEARCH_CHARS:
        shown = f"{query.search[:20]}… of {len(query.search)} characters"
        raise checks.wrong("search", shown, f"at most {MAX_SEARCH_CHARS} characters")
    if query.show not in set(Show):
        raise checks.wrong("show", query.show, f"one of {', '.join(Show)}")
    if query.sort not in set(Sort):
        raise checks.wrong("sort", query.sort, f"one of {', '.join(Sort)}")
    return WatchWish(
        show=Show(query.show),
        sort=Sort(query.sort),
        search=query.search.strip(),
        limit=query.limit,
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _event(kind: str, data: bytes) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _start() -> dict[str, object]:
    headers = [(key.encode(), value.encode("latin-1")) for key, value in _HEADERS.items()]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _body(data: bytes, *, more: bool) -> dict[str, object]:
    return {"type": "http.response.body", "body": data, "more_body": more}
