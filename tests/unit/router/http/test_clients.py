"""Clients that go away, read slowly, or send slowly, on real connections."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import repeat

import pytest

from router.http import bodies, protocol, server
from router.service import CLIENT_GONE
from tests.unit.router.fake_manager import STEP_S, FakeManager
from tests.unit.router.http.serving import chat, connected, http_client, serve_http, until

COMPLETION = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


def endless() -> Iterator[str]:
    """An answer that never ends, as fast as it is taken."""
    return repeat("x" * 1000)


async def is_closed(reader: asyncio.StreamReader) -> bytes:
    """Everything that comes until the server closes."""
    try:
        return await asyncio.wait_for(reader.read(), STEP_S)
    except ConnectionResetError:  # what was sent at that moment was not read any more
        return b""


def with_length(body: bytes) -> bytes:
    """A request for a completion."""
    return COMPLETION + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"prompt": ["a", "b"]}])
async def test_a_client_that_goes_away_cancels_its_streams(fields: dict[str, object]) -> None:
    """All of them, while it waits for the first token."""
    manager = FakeManager(hold_answer=True)
    body = {"prompt": "abc", **fields}
    async with http_client(manager) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: manager.streams and all(s.committed for s in manager.streams.values()))
        asking.cancel()
        await until(lambda: all(s.cancelled_because for s in manager.streams.values()))
    assert {s.cancelled_because for s in manager.streams.values()} == {CLIENT_GONE}
    assert len(manager.streams) == (2 if "prompt" in fields else 1)


async def test_a_client_that_stops_in_the_middle_of_its_answer_cancels_the_stream() -> None:
    """Although its answer would go on for ever."""
    manager = FakeManager(answer=endless)
    async with serve_http(manager) as url, connected(url) as (reader, writer):
        writer.write(with_length(b'{"prompt": "abc", "stream": true}'))
        await asyncio.wait_for(reader.readuntil(b"xxx"), STEP_S)
        writer.close()
        (stream,) = manager.streams.values()
        await until(lambda: stream.cancelled_because)
    assert stream.cancelled_because == CLIENT_GONE


async def test_a_client_that_reads_nothing_is_waited_for() -> None:
    """What is fetched of its answer is bounded by the buffers of the connection."""
    manager = FakeManager(answer=endless)
    async with serve_http(manager) as url, connected(url) as (_, writer):
        writer.write(with_length(b'{"prompt": "abc", "stream": true}'))
        await until(lambda: manager.streams)
        (stream,) = manager.streams.values()
        await until(lambda: stream.num_fetched_events)
        before = -1
        while before != stream.num_fetched_events:
            before = stream.num_fetched_events
            await asyncio.sleep(0.3)
        assert 0 < before < 20_000


async def test_a_client_that_takes_nothing_for_long_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TCP says so, and its stream is cancelled."""

    monkeypatch.setattr(server, "UNREAD_S", 1)
    manager = FakeManager(answer=endless)
    async with serve_http(manager) as url, connected(url) as (_, writer):
        writer.write(with_length(b'{"prompt": "abc", "stream": true}'))
        await until(lambda: manager.streams)
        (stream,) = manager.streams.values()
        await until(lambda: stream.cancelled_because)


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHos", COMPLETION + b"X-A: b\r\n"]
)
async def test_a_head_that_never_ends(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """Closes the connection in time, though its client goes on byte by byte."""
    monkeypatch.setitem(protocol._LIMITS_S, protocol._Wait.HEAD, 0.4)
    async with serve_http(FakeManager()) as url, connected(url) as (reader, writer):
        writer.write(sent)
        closed = asyncio.create_task(is_closed(reader))
        while not closed.done():
            if sent:
                writer.write(b"x")
            await asyncio.sleep(0.1)
        assert closed.result() == b""


async def test_a_second_head_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is bounded like the first one; a connection that only rests is not."""
    monkeypatch.setitem(protocol._LIMITS_S, protocol._Wait.HEAD, 0.4)
    async with serve_http(FakeManager()) as url, connected(url) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"{}"), STEP_S)
        await asyncio.sleep(0.8)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"{}"), STEP_S)
        writer.write(b"GET /hea")
        assert await is_closed(reader) == b""


async def test_a_body_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is given up with 408, which names how much came."""
    monkeypatch.setattr(bodies, "BODY_SILENCE_S", 0.2)
    async with serve_http(FakeManager()) as url, connected(url) as (reader, writer):
        writer.write(COMPLETION + b"Content-Length: 100\r\n\r\n{")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), STEP_S)
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"1 bytes are here" in await asyncio.wait_for(reader.read(1000), STEP_S)


async def test_a_body_that_comes_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has no more time than any other."""
    monkeypatch.setattr(bodies, "BODY_TOTAL_S", 0.4)
    async with serve_http(FakeManager()) as url, connected(url) as (reader, writer):
        writer.write(COMPLETION + b"Content-Length: 100\r\n\r\n")
        reading = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        while not reading.done():
            writer.write(b" ")
            await asyncio.sleep(0.05)
        assert reading.result().startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_goes_on_behind_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is read for a while, so that its client sees the answer, and then cut off."""
    monkeypatch.setitem(protocol._LIMITS_S, protocol._Wait.REST, 0.4)
    async with (
        serve_http(FakeManager(), max_body_bytes=2000) as url,
        connected(url) as (reader, writer),
    ):
        writer.write(COMPLETION + b"Content-Length: 100000000\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), STEP_S)
        assert head.startswith(b"HTTP/1.1 413 ")
        closed = asyncio.create_task(is_closed(reader))
        while not closed.done():
            writer.write(b"x" * 1000)
            await asyncio.sleep(0.05)


async def test_an_answer_does_not_close_the_connection() -> None:
    """The next request uses it again."""
    async with http_client(FakeManager()) as client:
        for _ in range(3):
            reply = await client.post("/v1/chat/completions", json=chat())
            assert reply.status_code == 200
            assert "connection" not in reply.headers
