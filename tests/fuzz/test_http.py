"""What comes over HTTP and WebSockets: bodies, query strings and messages, well-formed or not.

No answer is a 5xx, and each that is an error has the form that docs/http.md gives.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.call_messages import Append, Commit, Open, Unreadable, Update
from router.http.bodies import TextUpload
from router.http.chat import ChatRequest
from router.http.completions import CompletionRequest
from router.http.socket_messages import client_message
from router.http.uploads import UploadQuery
from streamfill.errors import InvalidArgumentError, StreamError
from tests.fuzz.bounds import examples
from tests.fuzz.strategies import TEXTS, altered, encodable, hostile
from tests.unit.router.fake_manager import FakeManager
from tests.unit.router.http.serving import app_client

VOCAB_SIZE = 300
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ],
    "temperature": 0.5,
    "n": 2,
    "stop": ["x"],
    "logprobs": True,
    "top_logprobs": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "tools": [],
    "seed": 3,
}
COMPLETION: dict[str, Any] = {
    "prompt": ["Hello", "there"],
    "max_tokens": 3,
    "stop": "x",
    "logprobs": 1,
    "echo": False,
    "stream": False,
    "stop_token_ids": [1, 2],
    "deadline_s": 10,
    "priority": 1,
}
BODIES: dict[str, tuple[type[msgspec.Struct], list[dict[str, Any]]]] = {
    "/v1/chat/completions": (ChatRequest, [CHAT, {"messages": CHAT["messages"]}]),
    "/v1/completions": (CompletionRequest, [COMPLETION, {"prompt": [1, 2]}]),
}
SOCKET_MESSAGES: list[dict[str, Any]] = [
    {"type": "open", "mode": "update", "priority": 1, "deadline_s": 3.0, "request_id": "r"},
    {"type": "append", "seq": 1, "text": "abc", "next_in_s": 1.0},
    {"type": "update", "seq": 2, "token_ids": [1, 2]},
    {"type": "update", "seq": 2, "messages": CHAT["messages"]},
    {"type": "commit", "seq": 3, "text": "?", "max_tokens": 3, "stop": ["x"], "logprobs": 2},
    {"type": "cancel", "seq": 4, "reason": "enough"},
]


async def check_answer(method: str, url: str, **request: Any) -> None:
    """Below 500, and in the form of an error where it is one."""
    async with app_client(FakeManager()) as client:
        reply = await client.request(method, url, **request)
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert error["message"]
        assert error["type"]
        assert len(reply.content) < 20_000, "an error does not repeat what was sent"


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20.0):
            await work()

    asyncio.run(bounded())


@pytest.mark.parametrize("path", BODIES)
@given(data=st.data())
@examples(60)
def test_bodies_with_other_fields(path: str, data: st.DataObject) -> None:
    """JSON with fields of other types and values, unknown ones, and some that are missing."""
    kind, samples = BODIES[path]
    names = {field.name: None for field in msgspec.structs.fields(kind)}
    body = encodable(_json, data.draw(altered([*samples, names])))
    if body is not None:
        run(lambda: check_answer("POST", path, content=body))


@pytest.mark.parametrize("path", BODIES)
@given(data=st.data())
@examples(60)
def test_bodies_that_are_bytes(path: str, data: st.DataObject) -> None:
    """No JSON, or no more."""
    raw = data.draw(hostile([json.dumps(sample).encode() for sample in BODIES[path][1]]))
    run(lambda: check_answer("POST", path, content=raw))


@given(data=st.data())
@examples(60)
def test_query_strings(data: st.DataObject) -> None:
    """Of an upload, with names that there are and others."""
    names = [field.name for field in msgspec.structs.fields(UploadQuery)]
    pairs = data.draw(
        st.lists(
            st.tuples(
                st.one_of(st.sampled_from(names), st.text(max_size=5)),
                st.one_of(TEXTS, st.sampled_from(["1", "-1", "true", "nan", "1e400", "0x1"])),
            ),
            max_size=6,
        )
    )
    pairs = [pair for pair in pairs if encodable(str.encode, "".join(pair)) is not None]
    run(lambda: check_answer("POST", "/v1/streams", params=pairs, content=b"a text"))


@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=6))
@examples(150)
def test_uploads(data: bytes, cuts: list[int]) -> None:
    """Cut anywhere, an upload is the text of its bytes, or refused at the first that is none."""
    places = [0, *sorted(cuts), len(data)]
    chunks = [data[begin:end] for begin, end in itertools.pairwise(places)]
    read: list[str] = []

    async def collect() -> None:
        messages = iter(
            {"type": "http.request", "body": chunk, "more_body": number + 1 < len(chunks)}
            for number, chunk in enumerate(chunks)
        )

        async def receive() -> Any:
            return next(messages)

        async for piece in TextUpload(receive).pieces():
            assert piece
            read.append(piece)

    bad_offset, text = None, ""
    try:
        text = b"".join(chunks).decode()
    except UnicodeDecodeError as wrong:
        bad_offset = wrong.start
    if bad_offset is None:
        run(collect)
        assert "".join(read) == text
        return
    with pytest.raises(InvalidArgumentError) as refused:
        run(collect)
    assert refused.value.details["offset_bytes"] == bad_offset


@given(data=st.data())
@examples(150)
def test_socket_messages(data: st.DataObject) -> None:
    """An operation that can be asked of the core, or an error that is told."""
    if data.draw(st.booleans()):
        raw = data.draw(hostile([json.dumps(sample).encode() for sample in SOCKET_MESSAGES]))
        text = raw.decode("utf-8", "replace")
    else:
        encoded = encodable(_json, data.draw(altered(SOCKET_MESSAGES)))
        text = "{}" if encoded is None else encoded.decode()
    for message in (client_message(text, VOCAB_SIZE), client_message(text.encode(), VOCAB_SIZE)):
        match message.operation:
            case Open() | Append() | Update() | Commit() as operation:
                try:
                    operation.read()
                except StreamError:
                    continue
            case Unreadable(error=error):
                assert error.message


def test_depth() -> None:
    """No nesting is too deep for an answer."""
    for raw in (b"[" * 200_000, b'{"a":' * 100_000, b'{"messages":' + b"[" * 100_000):
        for path in BODIES:
            run(lambda path=path, raw=raw: check_answer("POST", path, content=raw))  # type: ignore[misc]
        assert isinstance(client_message(raw.decode(), VOCAB_SIZE).operation, Unreadable)


def _json(value: object) -> bytes:
    """As lenient clients write it, with NaN and Infinity."""
    return json.dumps(value).encode()
