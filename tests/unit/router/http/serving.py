"""The real HTTP service over a fake core, and what tests of it share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from router.access.key_ring import KeyRing
from router.http.app import make_app
from router.http.server import HttpServer
from router.refusals import Note, not_counted
from router.tls import RouterTls
from streamfill.config import RouterConfig
from tests.unit.router.fake_manager import STEP_S, FakeManager

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def serve_http(
    manager: FakeManager,
    *,
    keys: KeyRing | None = None,
    tls: RouterTls | None = None,
    on_refused: Note = not_counted,
    **config: Any,
) -> AsyncIterator[str]:
    """Gives the URL."""
    values = {"host": "127.0.0.1", "grpc_port": 0, "zmq_port": 0, "http_port": 0, **config}
    server = HttpServer(
        *(manager, RouterConfig(model_path="fake", **values)),
        keys=keys,
        tls=tls,
        on_refused=on_refused,
    )
    port = await server.start()
    try:
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{port}"
    finally:
        await server.stop(0.2)


@asynccontextmanager
async def http_client(manager: FakeManager, **config: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of ``serve_http``."""
    async with (
        serve_http(manager, **config) as url,
        httpx.AsyncClient(base_url=url, timeout=STEP_S) as client,
    ):
        yield client


@asynccontextmanager
async def app_client(
    manager: FakeManager, max_body_bytes: int = 2**20, allow_origins: Sequence[str] = ("*",)
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application alone: no sockets, so that many such tests are fast."""
    app = make_app(manager, max_body_bytes, allow_origins)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        yield client


def events_of(body: str) -> list[Any]:
    """The data of server-sent events, checked to be framed as such; ``[DONE]`` as it is."""
    *events, rest = body.split("\n\n")
    assert rest == ""
    found = []
    for event in events:
        assert event.startswith("data: ")
        assert "\n" not in event
        data = event.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


def chat(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    """The body of a chat."""
    return {"messages": [{"role": "user", "content": text}], **fields}


async def until(condition: Callable[[], object]) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(STEP_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    """A plain connection to the service at ``url``."""
    parsed = httpx.URL(url)
    reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
    try:
        yield reader, writer
    finally:
        writer.close()
