"""What docs/security.md promises about bad requests, on gRPC and on HTTP: each has its answer, and
the router goes on serving others."""

from __future__ import annotations

import asyncio
import time
from asyncio import constants
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest

from router import service_server, stream_call
from router.http import bodies, protocol
from router.service_server import SERVICE
from router.tls import RouterTls
from streamfill.api import Client
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.tls import TlsFiles
from tests.support.certificates import make_authority
from tests.unit.router.access.keys_for_tests import TestKeys
from tests.unit.router.fake_manager import STEP_S, FakeManager, serve
from tests.unit.router.http.serving import chat, connected, http_client, serve_http

GENERATE = f"/{SERVICE.full_name}/Generate"
STREAM = f"/{SERVICE.full_name}/Stream"


@pytest.fixture
async def key(keys: TestKeys) -> str:
    return await keys.add("a")


@pytest.fixture
async def target(keys: TestKeys, key: str) -> AsyncIterator[str]:
    """A gRPC server that asks for keys; it serves others at the end of each test."""
    async with serve(FakeManager(), keys.ring) as target:
        yield target
        async with Client(target, api_key=key) as client:
            assert (await client.complete("x")).text == "Hello world!"


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@pytest.mark.parametrize("has_key", [False, True])
async def test_grpc_oversized(target: str, key: str, has_key: bool) -> None:
    """A message above the limit is not parsed. Without a key that is what it is refused for."""
    size = service_server.MAX_MESSAGE_BYTES
    options = (("grpc.max_send_message_length", 2 * size),)
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        call = channel.unary_stream(GENERATE, bytes, bytes)
        begun = call(b"\0" * (size + 1), metadata=bearer(key) if has_key else ())
        expected = "RESOURCE_EXHAUSTED" if has_key else "UNAUTHENTICATED"
        assert (await asyncio.wait_for(begun.code(), STEP_S)).name == expected


async def test_grpc_malformed(target: str, key: str) -> None:
    """Bytes that are no message, in a call of each kind."""
    async with grpc.aio.insecure_channel(target) as channel:
        one = channel.unary_stream(GENERATE, bytes, bytes)(b"\xff" * 40, metadata=bearer(key))
        assert await one.code() is grpc.StatusCode.INVALID_ARGUMENT
        both = channel.stream_stream(STREAM, bytes, bytes)(None, metadata=bearer(key))
        await both.write(b"\xff" * 40)
        await asyncio.wait_for(both.read(), STEP_S)  # the last event, which says it too
        assert await asyncio.wait_for(both.code(), STEP_S) is grpc.StatusCode.INVALID_ARGUMENT


async def test_grpc_large_headers(target: str, key: str) -> None:
    """Are refused by gRPC itself, or answered; the connection of others is not concerned."""
    async with grpc.aio.insecure_channel(target) as channel:
        metadata = (*bearer(key), ("x-much", "y" * 100_000))
        call = StreamfillStub(channel).ServerInfo(pb.ServerInfoRequest(), metadata=metadata)
        assert await asyncio.wait_for(call.code(), STEP_S) is not grpc.StatusCode.OK


async def test_grpc_slow(keys: TestKeys, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that says nothing, or nothing that is HTTP/2, is closed in time."""
    limits = {"grpc.server_handshake_timeout_ms": 300}
    options = tuple((name, limits.get(name, value)) for name, value in service_server._OPTIONS)
    assert options != service_server._OPTIONS
    monkeypatch.setattr(service_server, "_OPTIONS", options)
    async with serve(FakeManager(), keys.ring) as target:
        port = int(target.rpartition(":")[2])
        for said in (b"", b"PRI * HT"):
            begun_s = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            await asyncio.wait_for(reader.read(-1), STEP_S)  # what gRPC says first, then the end
            assert time.monotonic() - begun_s >= 0.2
            writer.close()
        async with Client(target, api_key=key) as client:
            # Whose handshake may take longer than the limit of this test, and is begun again then.
            assert (await client.wait_ready(STEP_S)).ready


async def test_grpc_that_answers_no_pings(
    keys: TestKeys, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection whose machine is gone: it spoke HTTP/2, then nothing more."""
    wanted = {service_server.PING_INTERVAL_MS, service_server.PING_TIMEOUT_MS}
    options = tuple(
        (name, 300 if value in wanted and ("ping" in name or "keepalive" in name) else value)
        for name, value in service_server._OPTIONS
    )
    assert options != service_server._OPTIONS
    monkeypatch.setattr(service_server, "_OPTIONS", options)
    preface_and_settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    async with serve(FakeManager(), keys.ring) as target:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(target.rpartition(":")[2]))
        writer.write(preface_and_settings)
        said = await asyncio.wait_for(reader.read(-1), STEP_S)
        assert b"\0\0\x08\6\0" in said, "no PING came"
        writer.close()
        async with Client(target, api_key=key) as client:
            # As in the test before this one.
            assert (await client.wait_ready(STEP_S)).ready


async def test_tls_handshake_that_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP closes such a connection after asyncio's time, gRPC after its own."""
    assert constants.SSL_HANDSHAKE_TIMEOUT == 60.0  # as docs/security.md says
    monkeypatch.setattr("asyncio.constants.SSL_HANDSHAKE_TIMEOUT", 0.3)
    limits = {"grpc.server_handshake_timeout_ms": 300}
    options = tuple((name, limits.get(name, value)) for name, value in service_server._OPTIONS)
    monkeypatch.setattr(service_server, "_OPTIONS", options)
    authority = await asyncio.to_thread(make_authority, tmp_path)
    cert, key_file = await asyncio.to_thread(authority.certificate, "router", "IP:127.0.0.1")
    tls = RouterTls(TlsFiles(cert_file=cert, key_file=key_file))
    async with serve(FakeManager(), tls=tls) as target, serve_http(FakeManager(), tls=tls) as url:
        for port in (int(target.rpartition(":")[2]), httpx.URL(url).port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await asyncio.wait_for(reader.read(-1), STEP_S) == b""
            writer.close()


async def test_grpc_call_that_says_nothing(
    target: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``Stream`` call whose first message does not come is ended, with the reason."""
    monkeypatch.setattr(stream_call, "FIRST_MESSAGE_S", 0.2)
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.stream_stream(STREAM, bytes, pb.StreamEvent.FromString)(
            None, metadata=bearer(key)
        )
        event = await asyncio.wait_for(call.read(), STEP_S)
        assert isinstance(event, pb.StreamEvent)
        assert "no message within" in event.failed.message
        assert await call.code() is grpc.StatusCode.ABORTED


@pytest.mark.parametrize("has_key", [False, True])
async def test_http_oversized(keys: TestKeys, key: str, has_key: bool) -> None:
    """A body above the limit is refused before it is read; without a key, for that reason."""
    headers = dict(bearer(key)) if has_key else {}
    async with http_client(FakeManager(), keys=keys.ring, max_body_bytes=2048) as client:
        reply = await client.post("/v1/completions", content=b"x" * 4096, headers=headers)
        assert reply.status_code == (413 if has_key else 401)
        reply = await client.get("/health", headers={"x-much": "y" * 200_000})
        assert reply.status_code in (400, 431)


async def test_http_malformed(keys: TestKeys, key: str) -> None:
    """JSON that is none, and a request that is none."""
    async with serve_http(FakeManager(), keys=keys.ring) as url:
        async with httpx.AsyncClient(base_url=url, timeout=STEP_S) as client:
            headers = dict(bearer(key))
            reply = await client.post("/v1/completions", content=b"{", headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_argument")
        async with connected(url) as (reader, writer):
            writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
            assert b" 400 " in await asyncio.wait_for(reader.read(), STEP_S)


@pytest.mark.parametrize("has_key", [False, True])
async def test_http_slow(
    keys: TestKeys, key: str, has_key: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that does not end closes the connection; a body that does not is answered with 408,
    and without a key at once with 401."""
    async with serve_http(FakeManager(), keys=keys.ring) as url:
        with monkeypatch.context() as limits:
            limits.setitem(protocol._LIMITS_S, protocol._Wait.HEAD, 0.2)
            async with connected(url) as (reader, writer):
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
                assert await asyncio.wait_for(reader.read(), STEP_S) == b""
        monkeypatch.setitem(protocol._LIMITS_S, protocol._Wait.REST, 0.2)
        monkeypatch.setattr(bodies, "BODY_SILENCE_S", 0.2)
        async with connected(url) as (reader, writer):
            line = f"authorization: Bearer {key}\r\n" if has_key else ""
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{line}Content-Length: 99\r\n\r\n{{"
            writer.write(head.encode())
            status = await asyncio.wait_for(reader.readline(), STEP_S)
            assert status.split()[1] == (b"408" if has_key else b"401")
            await asyncio.wait_for(reader.read(), STEP_S)  # the connection ends too
        async with httpx.AsyncClient(base_url=url, timeout=STEP_S) as client:
            reply = await client.post(
                "/v1/chat/completions", json=chat(), headers=dict(bearer(key))
            )
            assert reply.status_code == 200
