"""Refusals are counted, by API and reason, where clients meet them: over the real servers."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import grpc.aio
import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from router import stream_call
from router.http import bodies, protocol
from router.metrics import RouterMetrics
from router.refusals import Api, Refusal
from router.service_server import SERVICE
from streamfill.api import Client
from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from streamfill.observability.metrics import Metric
from tests.support.metrics import scrape_registry
from tests.unit.router.access.keys_for_tests import TestKeys
from tests.unit.router.fake_manager import STEP_S, FakeManager, serve
from tests.unit.router.http.serving import connected, serve_http, until

MAX_BODY_BYTES = 4096


class Refusals(Counter[tuple[Api, Refusal]]):
    def note(self, api: Api, refusal: Refusal) -> None:
        self[api, refusal] += 1

    def of(self, api: Api) -> dict[Refusal, int]:
        """And forget them."""
        found = {refusal: count for (each, refusal), count in self.items() if each is api}
        assert len(found) == len(self), self
        self.clear()
        return found


@pytest.fixture
def refusals() -> Refusals:
    return Refusals()


@pytest.fixture
async def key(keys: TestKeys) -> str:
    return await keys.add("a")


@pytest.fixture
async def url(keys: TestKeys, refusals: Refusals) -> AsyncIterator[str]:
    async with serve_http(
        FakeManager(),
        keys=keys.ring,
        on_refused=refusals.note,
        max_body_bytes=MAX_BODY_BYTES,
        http_allow_origins=["https://ours.example"],
    ) as url:
        yield url


async def test_grpc(keys: TestKeys, key: str, refusals: Refusals) -> None:
    """Calls of both kinds, and an operation within a call."""
    limited = await keys.add("limited", requests_per_s=0.001)
    async with serve(FakeManager(), keys.ring, on_refused=refusals.note) as target:
        async with Client(target, api_key="sf-none") as client:
            with pytest.raises(UnauthenticatedError):
                await client.server_info()
        assert refusals.of(Api.GRPC) == {Refusal.UNAUTHENTICATED: 1}
        async with Client(target, api_key=limited) as client:
            await client.server_info()
            with pytest.raises(ResourceExhaustedError):
                await client.server_info()
        assert refusals.of(Api.GRPC) == {Refusal.LIMITED: 1}
        async with Client(target, api_key=key) as client:
            with pytest.raises(PermissionDeniedError):
                await client.flush_caches()
            assert refusals.of(Api.GRPC) == {Refusal.FORBIDDEN: 1}
            with pytest.raises(InvalidArgumentError):
                await client.complete("x", temperature=-1.0)
            assert refusals.of(Api.GRPC) == {Refusal.MALFORMED: 1}
            async with client.stream() as stream:
                await stream.append("abc")
                with pytest.raises(InvalidArgumentError):
                    await stream.append(token_ids=[-1])
                assert (await stream.commit("?").read()).text == "Hello world!"
        assert refusals.of(Api.GRPC) == {Refusal.MALFORMED: 1}


async def test_grpc_slow(refusals: Refusals, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that says nothing."""
    monkeypatch.setattr(stream_call, "FIRST_MESSAGE_S", 0.2)
    async with (
        serve(FakeManager(), on_refused=refusals.note) as target,
        grpc.aio.insecure_channel(target) as channel,
    ):
        method = f"/{SERVICE.full_name}/Stream"
        call = channel.stream_stream(method, bytes, pb.StreamEvent.FromString)(None)
        await asyncio.wait_for(call.read(), STEP_S)
        assert await asyncio.wait_for(call.code(), STEP_S) is grpc.StatusCode.ABORTED
    assert refusals.of(Api.GRPC) == {Refusal.TOO_SLOW: 1}


async def test_http(keys: TestKeys, key: str, url: str, refusals: Refusals) -> None:
    """By what is answered."""
    limited = await keys.add("limited", requests_per_s=0.001)
    path, ok = "/v1/completions", {"authorization": f"Bearer {key}"}
    scarce = {"authorization": f"Bearer {limited}"}
    async with httpx.AsyncClient(base_url=url, timeout=STEP_S) as client:
        assert (await client.get("/v1/models", headers=scarce)).status_code == 200
        for status, reason, body, headers in (
            (401, Refusal.UNAUTHENTICATED, b"{}", {}),
            (403, Refusal.FORBIDDEN, b"{}", ok | {"origin": "https://theirs.example"}),
            (400, Refusal.MALFORMED, b"{", ok),
            (413, Refusal.TOO_LARGE, b"x" * (MAX_BODY_BYTES + 1), ok),
            (429, Refusal.LIMITED, b'{"prompt": "x"}', scarce),
        ):
            reply = await client.post(path, content=body, headers=headers)
            assert reply.status_code == status
            assert refusals.of(Api.HTTP) == {reason: 1}
        reply = await client.post(path, json={"prompt": "x"}, headers=ok)
        assert reply.status_code == 200
    assert not refusals


async def test_http_that_never_becomes_a_request(
    key: str, url: str, refusals: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are no HTTP, a head that does not end, a body that does not."""
    async with connected(url) as (reader, writer):
        writer.write(b"\x16\x03\x01\r\n\r\n")
        await asyncio.wait_for(reader.read(), STEP_S)
    assert refusals.of(Api.HTTP) == {Refusal.MALFORMED: 1}
    with monkeypatch.context() as limits:
        limits.setitem(protocol._LIMITS_S, protocol._Wait.HEAD, 0.2)
        async with connected(url) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            await asyncio.wait_for(reader.read(), STEP_S)
    assert refusals.of(Api.HTTP) == {Refusal.TOO_SLOW: 1}
    monkeypatch.setattr(bodies, "BODY_SILENCE_S", 0.2)
    async with connected(url) as (reader, writer):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nauthorization: Bearer {key}\r\n"
        writer.write(f"{head}Content-Length: 9\r\n\r\n{{".encode())
        assert b"408" in await asyncio.wait_for(reader.readline(), STEP_S)
    assert refusals.of(Api.HTTP) == {Refusal.TOO_SLOW: 1}


@asynccontextmanager
async def socket_of(url: str, key: str = "", **options: str) -> AsyncIterator[ClientConnection]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    address = f"{url.replace('http', 'ws', 1)}/v1/streams"
    async with connect(address, additional_headers=headers | options) as socket:
        yield socket


async def close_code_of(socket: ClientConnection) -> int:
    async with asyncio.timeout(STEP_S):
        with suppress(ConnectionClosed):
            while True:
                await socket.recv()
    assert socket.close_code is not None
    return socket.close_code


async def test_websockets(
    key: str, url: str, refusals: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the upgrade by the status of the answer; then as docs/security.md says."""
    for options, status in (({}, 401), ({"key": key, "origin": "https://theirs.example"}, 403)):
        with pytest.raises(InvalidStatus) as caught:
            async with socket_of(url, **options):
                pass
        assert caught.value.response.status_code == status
        wanted = Refusal.UNAUTHENTICATED if status == 401 else Refusal.FORBIDDEN
        assert refusals.of(Api.WEBSOCKET) == {wanted: 1}
    async with socket_of(url, key) as socket:
        await socket.send("{")
        assert await close_code_of(socket) == 4400
    assert refusals.of(Api.WEBSOCKET) == {Refusal.MALFORMED: 1}
    async with socket_of(url, key) as socket:
        await socket.send(json.dumps({"type": "open"}))
        await socket.send(json.dumps({"type": "append", "text": 3}))
        while json.loads(await asyncio.wait_for(socket.recv(), STEP_S))["type"] != "error":
            pass
        assert refusals.of(Api.WEBSOCKET) == {Refusal.MALFORMED: 1}
        await socket.send("x" * (MAX_BODY_BYTES + 1))
        assert await close_code_of(socket) == 1009
    await until(lambda: refusals)
    assert refusals.of(Api.WEBSOCKET) == {Refusal.TOO_LARGE: 1}
    monkeypatch.setattr(stream_call, "FIRST_MESSAGE_S", 0.2)
    async with socket_of(url, key) as socket:
        assert await close_code_of(socket) == 4408
    assert refusals.of(Api.WEBSOCKET) == {Refusal.TOO_SLOW: 1}


def test_every_kind_is_there_from_the_start() -> None:
    """So that a rate can be drawn before the first one."""
    metrics = RouterMetrics()
    metrics.count_refusal(Api.HTTP, Refusal.LIMITED)
    page = scrape_registry(metrics.set.registry)
    counts = {
        (api, reason): page.value(Metric.REFUSALS, api=api.value, reason=reason.value)
        for api in Api
        for reason in Refusal
    }
    assert counts.pop((Api.HTTP, Refusal.LIMITED)) == 1
    assert set(counts.values()) == {0}
