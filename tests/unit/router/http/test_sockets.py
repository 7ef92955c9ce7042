"""``GET /v1/streams`` as a WebSocket, message by message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from router import stream_call
from router.http import sockets
from router.service import CLIENT_GONE
from streamfill.errors import DeadlineExceededError
from tests.unit.router.fake_manager import STEP_S, FakeManager, FakeStream
from tests.unit.router.http.serving import serve_http, until


@asynccontextmanager
async def socket_of(url: str, **options: Any) -> AsyncIterator[ClientConnection]:
    """A connection to the service at ``url``."""
    async with connect(f"{url.replace('http', 'ws', 1)}/v1/streams", **options) as socket:
        yield socket


async def say(socket: ClientConnection, kind: str, **fields: Any) -> None:
    await socket.send(json.dumps({"type": kind, **fields}))


async def read(socket: ClientConnection, kind: str) -> dict[str, Any]:
    """The next message of this kind; acknowledgements may come at any time."""
    while True:
        message: dict[str, Any] = json.loads(await asyncio.wait_for(socket.recv(), STEP_S))
        if message["type"] == kind:
            return message
        assert message["type"] == "acknowledged", message


async def code_of(socket: ClientConnection) -> int:
    """With which code the server closes."""
    async with asyncio.timeout(STEP_S):
        with suppress(ConnectionClosedError):
            async for _ in socket:
                pass
        await socket.wait_closed()
    assert socket.close_code is not None
    return socket.close_code


@asynccontextmanager
async def opened(
    manager: FakeManager, **fields: Any
) -> AsyncIterator[tuple[ClientConnection, FakeStream]]:
    """An open stream."""
    async with serve_http(manager) as url, socket_of(url) as socket:
        await say(socket, "open", **fields)
        stream_id = (await read(socket, "opened"))["stream_id"]
        yield socket, manager.streams[int(stream_id)]


async def test_a_stream_is_opened_filled_committed_and_answered() -> None:
    """Open, append, commit; opened, acknowledged, tokens, done, and the connection is closed."""
    async with opened(FakeManager(), priority=3, request_id="r", deadline_s=9) as (socket, stream):
        await say(socket, "append", seq=1, text="abc", next_in_s=2.5)
        assert await read(socket, "acknowledged") == {
            "type": "acknowledged",
            "seq": 1,
            "num_received_tokens": 3,
            "num_computed_tokens": 0,
            "num_invalidated_tokens": 0,
        }
        await say(socket, "append", seq=2, token_ids=[7, 8])
        await say(socket, "commit", seq=3, text="?", max_tokens=5, logprobs=1, stop="X", keep_s=4)
        tokens = [await read(socket, "token") for _ in range(3)]
        assert [token["text"] for token in tokens] == ["Hello", " ", "world"]
        assert (tokens[1]["index"], tokens[1]["token_id"]) == (1, 1)
        assert tokens[1]["logprob"] == -0.5
        assert tokens[1]["top_logprobs"][1] == {"token_id": 9, "logprob": -2.0}
        done = await read(socket, "done")
        assert (done["finish_reason"], done["text_tail"], done["matched_stop"]) == (
            *("stop", "!", "END"),
        )
        assert done["usage"]["num_prompt_tokens"] == 6
        assert done["metadata"]["stream_id"] == str(stream.stream_id)
        assert await code_of(socket) == sockets.CLOSE_DONE
    assert stream.committed is not None
    assert stream.committed.sampling.max_new_tokens == 5
    assert (stream.committed.stop, stream.committed.keep_s) == (("X",), 4.0)
    assert (stream.options.priority, stream.options.request_id) == (3, "r")
    assert stream.cancelled_because is None


async def test_an_update_replaces_the_context() -> None:
    """And says what it invalidated."""
    async with opened(FakeManager(), mode="update") as (socket, stream):
        await say(socket, "update", seq=1, text="abcdef")
        await read(socket, "acknowledged")
        stream.compute()
        while not (await read(socket, "acknowledged"))["num_computed_tokens"]:
            pass
        await say(socket, "update", seq=2, text="abX")
        while (told := await read(socket, "acknowledged"))["seq"] < 2:
            pass
        assert (told["num_received_tokens"], told["num_invalidated_tokens"]) == (3, 4)


async def test_a_chat_whose_last_message_grows() -> None:
    """Is opened with its messages."""
    messages = [{"role": "system", "content": "S"}, {"role": "user"}]
    async with opened(FakeManager(), messages=messages) as (socket, stream):
        await say(socket, "append", text="abc")
        await read(socket, "acknowledged")
    assert stream.options.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": ""},
    ]


@pytest.mark.parametrize(
    ("message", "seq", "param", "words"),
    [
        ("{", 0, None, "no JSON"),
        ("[]", 0, None, "JSON object"),
        (b'{"type": "append", "text": "x"}', 0, None, "sent as text"),
        ('{"text": "x"}', 0, "type", "open, resume, append"),
        ('{"type": "nonsense"}', 0, "type", "open, resume, append"),
        ('{"type": "append", "seq": 0, "text": "x"}', 0, "seq", "from 1 on"),
        ('{"type": "append", "seq": true, "text": "x"}', 0, "seq", "from 1 on"),
        ('{"type": "append", "seq": 1}', 1, None, "no content"),
        ('{"type": "append", "seq": 1, "text": "x", "token_ids": [1]}', 1, None, "one of them"),
        ('{"type": "append", "seq": 1, "text": 5}', 1, "text", "expected str"),
        ('{"type": "append", "seq": 1, "txt": "x"}', 1, "txt", "no known field"),
        ('{"type": "append", "seq": 1, "token_ids": [1000]}', 1, "token_ids[0]", "vocabulary"),
        ('{"type": "append", "seq": 1, "messages": []}', 1, "messages", "at least one"),
        ('{"type": "append", "seq": 1, "text": "x", "next_in_s": -1}', 1, "next_in_s", "0 or"),
        ('{"type": "update", "seq": 1, "text": "x"}', 1, None, "append mode"),
        ('{"type": "open", "seq": 1}', 1, None, "already open"),
        ('{"type": "commit", "seq": 1}', 1, None, "empty prompt"),
        ('{"type": "commit", "seq": 1, "text": "x", "top_p": 2}', 1, "top_p", "(0, 1]"),
        ('{"type": "commit", "seq": 1, "text": "x", "tools": [1]}', 1, "tools", "not supported"),
    ],
)
async def test_a_refused_operation(
    message: str | bytes, seq: int, param: str | None, words: str
) -> None:
    """Is answered with its number; the stream goes on, unharmed."""
    async with opened(FakeManager()) as (socket, stream):
        await socket.send(message)
        told = await read(socket, "error")
        assert told["seq"] == seq
        assert words in told["error"]["message"]
        assert told["error"]["param"] == param
        await say(socket, "commit", text="abc")
        await read(socket, "token")
    assert len(stream.tokens) == 3


@pytest.mark.parametrize(
    ("first", "code", "words"),
    [
        ('{"type": "append", "text": "x"}', 4409, "the first message of a call is open"),
        ('{"type": "open", "mode": "other"}', 4400, "mode is wrong"),
        ('{"type": "open", "deadline_s": 0}', 4400, "deadline_s"),
        ("nonsense", 4400, "no JSON"),
        ('{"type": "resume", "stream_id": "' + "1" * 5000 + '"}', 4400, "stream_id is 111"),
    ],
)
async def test_a_first_message_that_does_not_open(first: str, code: int, words: str) -> None:
    """Ends the connection with what was wrong and a code that says the same."""
    manager = FakeManager()
    async with serve_http(manager) as url, socket_of(url) as socket:
        await socket.send(first)
        assert words in (await read(socket, "failed"))["error"]["message"]
        assert await code_of(socket) == code
    assert not manager.streams


async def test_no_server_is_alive() -> None:
    """The code is that of the HTTP status."""
    async with serve_http(FakeManager(ready=False)) as url, socket_of(url) as socket:
        await say(socket, "open")
        assert (await read(socket, "failed"))["error"]["code"] == "unavailable"
        assert await code_of(socket) == 4503


async def test_nothing_is_said_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that opens no stream is closed in time."""
    monkeypatch.setattr(stream_call, "FIRST_MESSAGE_S", 0.2)
    async with serve_http(FakeManager()) as url, socket_of(url) as socket:
        assert "no message within" in (await read(socket, "failed"))["error"]["message"]
        assert await code_of(socket) == 4408


async def test_a_stream_that_ends_badly() -> None:
    """Is told by the last message and the code of the close."""
    async with opened(FakeManager()) as (socket, stream):
        stream.fail(DeadlineExceededError("too late"))
        assert (await read(socket, "failed"))["error"]["message"] == "too late"
        assert await code_of(socket) == 4504


async def test_a_cancellation() -> None:
    """Ends the stream with the client's reason."""
    async with opened(FakeManager()) as (socket, stream):
        await say(socket, "cancel", reason="enough")
        await read(socket, "failed")
        assert await code_of(socket) == 4499
    assert stream.cancelled_because == "enough"


@pytest.mark.parametrize("is_committed", [False, True])
async def test_a_client_that_goes_away(is_committed: bool) -> None:
    """Has given its stream up, before the commit and behind it."""
    async with opened(FakeManager(hold_answer=True)) as (socket, stream):
        await say(socket, "append", text="abc")
        await read(socket, "acknowledged")
        if is_committed:
            await say(socket, "commit")
            await until(lambda: stream.committed)
        await socket.close()
        await until(lambda: stream.cancelled_because)
    assert stream.cancelled_because == CLIENT_GONE


async def test_a_connection_that_breaks() -> None:
    """Is the same as one that is closed."""
    async with opened(FakeManager()) as (socket, stream):
        socket.transport.abort()
        await until(lambda: stream.cancelled_because)


async def test_a_message_that_is_too_large() -> None:
    """Ends the connection with the code that WebSocket has for it."""
    manager = FakeManager()
    async with serve_http(manager, max_body_bytes=2000) as url, socket_of(url) as socket:
        await say(socket, "open")
        await read(socket, "opened")
        await say(socket, "append", text="x" * 3000)
        assert await code_of(socket) == 1009
        (stream,) = manager.streams.values()
        await until(lambda: stream.cancelled_because)


async def test_pages_of_other_origins() -> None:
    """Are refused where they are not allowed; a page of the router itself always is allowed."""
    async with serve_http(FakeManager(), http_allow_origins=["https://a.example"]) as url:
        with pytest.raises(InvalidStatus, match="403"):
            async with socket_of(url, origin="https://b.example"):
                pass
        for origin in ("https://a.example", url, None):
            async with socket_of(url, origin=origin) as socket:
                await say(socket, "open")
                await read(socket, "opened")
