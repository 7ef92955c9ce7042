"""What goes wrong, as a client sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from streamfill.errors import (
    DeadlineExceededError,
    ErrorCode,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    StreamError,
    UnavailableError,
)
from tests.unit.router.fake_manager import FakeManager
from tests.unit.router.http.serving import app_client, chat, events_of, http_client, until

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (UnavailableError("x"), 503, "service_unavailable_error", "unavailable"),
        (ResourceExhaustedError("x"), 429, "rate_limit_error", "resource_exhausted"),
        (DeadlineExceededError("x"), 504, "timeout_error", "deadline_exceeded"),
        (InternalError("x"), 500, "internal_error", "internal"),
        (StreamError("x", code=ErrorCode.ABORTED), 408, "timeout_error", "aborted"),
        (
            InvalidArgumentError("x", details={"num_tokens": 9, "limit_tokens": 8}),
            *(400, "invalid_request_error", "context_length_exceeded"),
        ),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
async def test_a_request_that_fails_before_its_answer_begins(
    error: StreamError, status: int, kind: str, code: str, streams: bool
) -> None:
    """Has a status of its own, also where the answer would be streamed."""
    async with app_client(FakeManager(open_error=error)) as client:
        reply = await client.post(CHAT, json=chat(stream=streams))
    assert reply.status_code == status
    told = reply.json()["error"]
    assert (told["message"], told["type"], told["code"]) == ("x", kind, code)
    assert told["details"] == dict(error.details)
    assert reply.headers.get("retry-after") == ("1" if status in (429, 503) else None)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_stream_that_fails_before_its_first_token(streams: bool) -> None:
    """As well: nothing is sent before there is something to send."""
    manager = FakeManager(hold_answer=True)
    async with app_client(manager) as client:
        asking = asyncio.create_task(client.post(CHAT, json=chat(stream=streams)))
        await until(lambda: manager.streams)
        (stream,) = manager.streams.values()
        await manager.any_commit.wait()
        stream.fail(DeadlineExceededError("too late"))
        assert (await asking).status_code == 504


async def test_a_stream_that_fails_in_the_middle_of_its_answer() -> None:
    """Ends with an error as its last event, and without [DONE]."""

    def answer() -> Iterator[str]:
        yield "Hello"
        (stream,) = manager.streams.values()
        stream.fail(UnavailableError("all gone"))
        yield "never"

    manager = FakeManager(answer=answer)
    async with app_client(manager) as client:
        reply = await client.post(CHAT, json=chat(stream=True))
    assert reply.status_code == 200
    *chunks, last = events_of(reply.text)
    assert chunks[-1]["choices"][0]["delta"] == {"content": "Hello"}
    assert last["error"]["message"] == "all gone"


async def test_one_answer_of_several_that_fails_ends_all() -> None:
    """There is no answer then, since a choice is missing in it."""

    def answer() -> Iterator[str]:
        yield "x"
        if len(manager.streams) == 3:
            list(manager.streams.values())[-1].fail(UnavailableError("gone"))
            yield "never"

    manager = FakeManager(answer=answer)
    async with app_client(manager) as client:
        reply = await client.post(CHAT, json=chat(n=3))
    assert reply.status_code == 503


async def test_a_bug_is_no_silence() -> None:
    """An error that nobody expected is 500, in the same form."""
    async with app_client(FakeManager(open_error=ZeroDivisionError("oops"))) as client:
        reply = await client.post(CHAT, json=chat())
    assert reply.status_code == 500
    assert "oops" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/nowhere", 404, "there is no GET /nowhere"),
        ("GET", CHAT, 405, f"there is no GET {CHAT}"),
        ("DELETE", "/v1/models", 405, "there is no DELETE"),
        ("GET", "/v1/models/gpt-4", 404, "model 'gpt-4' is not served here"),
        ("GET", "/v1/streams", 426, "WebSocket"),
    ],
)
async def test_what_is_not_there(method: str, path: str, status: int, words: str) -> None:
    """Is said in the same form as everything else."""
    async with app_client(FakeManager()) as client:
        reply = await client.request(method, path)
    assert reply.status_code == status
    assert words in reply.json()["error"]["message"]


async def test_another_model() -> None:
    """Is not found, with the code that clients of the OpenAI API look for."""
    async with app_client(FakeManager()) as client:
        reply = await client.post(CHAT, json=chat(model="gpt-4"))
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff",
        b"[" * 50_000,
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800 "}',
        b'{"seed": ' + b"9" * 6000 + b"}",
        b'{"temperature": NaN}',
        json.dumps({"prompt": "x", "n": 10**18}).encode(),
    ],
)
async def test_bodies_that_are_no_request(body: bytes) -> None:
    """Are refused with 400; the message says what is wrong with them."""
    async with app_client(FakeManager()) as client:
        reply = await client.post("/v1/completions", content=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"]


async def test_a_body_that_says_that_it_is_too_large() -> None:
    """Is refused before it is sent: the limit is named and nothing is read."""
    async with http_client(FakeManager(), max_body_bytes=2000) as client:
        reply = await client.post(CHAT, json=chat("x" * 3000))
    assert reply.status_code == 413
    assert "at most 2000" in reply.json()["error"]["message"]


async def test_a_body_that_turns_out_to_be_too_large() -> None:
    """Is refused as soon as it is, whoever goes on sending."""

    async def chunks() -> Any:
        for _ in range(100):
            yield b"x" * 1000

    async with http_client(FakeManager(), max_body_bytes=2000) as client:
        reply = await client.post(CHAT, content=chunks())
    assert reply.status_code == 413


async def test_a_large_body_is_parsed_beside_the_loop() -> None:
    """The refusal is the core's own, which counts tokens."""
    manager = FakeManager()
    async with app_client(manager, max_body_bytes=10_000_000) as client:
        reply = await client.post("/v1/completions", json={"prompt": "x" * 1_000_000})
    assert reply.status_code == 400
    assert "1000000 tokens" in reply.json()["error"]["message"]
    (stream,) = manager.streams.values()
    assert stream.cancelled_because is not None
    assert "1000000 tokens" in stream.cancelled_because
