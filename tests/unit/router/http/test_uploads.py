"""``POST /v1/streams``: context that is uploaded bit by bit, on real connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from router.service import CLIENT_GONE
from streamfill.errors import ErrorCode, StreamError
from tests.unit.router.fake_manager import STEP_S, FakeManager, FakeStream
from tests.unit.router.http.serving import connected, events_of, http_client, serve_http, until

PATH = "/v1/streams"


async def in_parts(*parts: bytes, pause_s: float = 0.02) -> AsyncIterator[bytes]:
    """A chunked body."""
    for part in parts:
        yield part
        await asyncio.sleep(pause_s)


def text_of(stream: FakeStream) -> str:
    """What the stream holds; the fake core has a token for each character."""
    return "".join(chr(token) for token in stream.tokens)


async def test_context_is_put_in_while_it_arrives() -> None:
    """Before the end of the body, which is the commit."""
    manager = FakeManager()
    go_on = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"abc"
        await go_on.wait()
        yield b"def"

    async with http_client(manager) as client:
        asking = asyncio.create_task(client.post(f"{PATH}?max_tokens=7", content=body()))
        await until(lambda: manager.streams and next(iter(manager.streams.values())).tokens)
        (stream,) = manager.streams.values()
        assert (text_of(stream), stream.committed) == ("abc", None)
        go_on.set()
        reply = await asking
    assert reply.status_code == 200
    told = reply.json()
    assert told["id"].startswith("stream-")
    assert told["choices"][0]["text"] == "Hello world!"
    assert told["usage"]["prompt_tokens"] == 6
    assert text_of(stream) == "abcdef"
    assert stream.committed is not None
    assert stream.committed.sampling.max_new_tokens == 7
    assert stream.cancelled_because is None


@pytest.mark.parametrize(
    "parts",
    [
        (b"caf\xc3", b"\xa9 ok"),
        (b"\xe2", b"\x82", b"\xac"),
        ("😀 x".encode()[:1], "😀 x".encode()[1:3], "😀 x".encode()[3:]),
        (b"a", b"b"),
    ],
)
async def test_a_cut_inside_a_character(parts: Sequence[bytes]) -> None:
    """Changes nothing: the text is that of the whole body."""
    manager = FakeManager()
    async with http_client(manager) as client:
        reply = await client.post(PATH, content=in_parts(*parts))
        assert reply.status_code == 200, reply.text
    (stream,) = manager.streams.values()
    whole = b"".join(parts).decode()
    assert stream.tokens == [ord(character) % 1000 for character in whole]


@pytest.mark.parametrize(
    ("parts", "offset", "byte"),
    [
        ((b"abc\xff",), 3, "0xff"),
        ((b"ab", b"c\xff"), 3, "0xff"),
        ((b"ab\xc3", b"x"), 2, "0xc3"),
        ((b"ab\xe2\x82",), 2, "0xe2"),
    ],
)
async def test_a_body_that_is_not_utf8(parts: Sequence[bytes], offset: int, byte: str) -> None:
    """Is refused; the byte and its place in the whole body are named; the stream is cancelled."""
    manager = FakeManager()
    async with http_client(manager) as client:
        reply = await client.post(PATH, content=in_parts(*parts))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "body"
    assert (error["details"]["offset_bytes"], error["details"]["byte"]) == (offset, byte)
    (stream,) = manager.streams.values()
    assert stream.cancelled_because is not None
    assert "not UTF-8" in stream.cancelled_because


async def test_an_answer_as_events() -> None:
    """In the form of a completion's, with usage when it is wanted."""
    async with http_client(FakeManager()) as client:
        url = f"{PATH}?stream=true&include_usage=1"
        *chunks, usage, end = events_of((await client.put(url, content=in_parts(b"abc"))).text)
    assert [c["choices"][0]["text"] for c in chunks] == ["Hello", " ", "world", "!"]
    assert (usage["usage"]["prompt_tokens"], end) == (3, "[DONE]")


async def test_the_query_says_how_the_answer_is_made() -> None:
    """Numbers and lists are read from text; a name that is given twice is a list."""
    manager = FakeManager()
    query = (
        "temperature=0.5&top_k=3&seed=9&stop=END&stop=%0A%0A&stop_token_ids=4&ignore_eos=true"
        "&logprobs=1&keep_s=5&priority=2&deadline_s=60&request_id=mine&model=fake&final_text=Q"
    )
    async with http_client(manager) as client:
        reply = await client.post(f"{PATH}?{query}", content=in_parts(b"abc"))
        assert reply.status_code == 200, reply.text
    (stream,) = manager.streams.values()
    commit = stream.committed
    assert commit is not None
    sampling = commit.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 3, 9)
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((4,), True)
    assert (sampling.num_logprobs, commit.stop) == (1, ("END", "\n\n"))
    assert text_of(stream) == "abcQ"
    assert (stream.options.priority, stream.options.request_id) == (2, "mine")
    assert reply.json()["choices"][0]["logprobs"]["tokens"] == ["<0>", "<1>", "<2>"]


async def test_a_chat() -> None:
    """The body is what the user says, behind what the system says."""
    manager = FakeManager()
    async with http_client(manager) as client:
        url = f"{PATH}?chat=true&system=Be+brief."
        assert (await client.post(url, content=in_parts(b"abc"))).status_code == 200
    (stream,) = manager.streams.values()
    assert stream.options.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ""},
    ]


@pytest.mark.parametrize(
    ("query", "param", "words"),
    [
        ("max_tokens=x", "max_tokens", "expected"),
        ("max_tokens=0", "max_tokens", "1 or more"),
        ("max_tokens=1&max_tokens=2", "max_tokens", "expected"),
        ("nonsense=1", "nonsense", "no known field"),
        ("tools=x", "tools", "not supported"),
        ("system=x", "system", "without chat=true"),
        ("model=gpt-4", "model", "not served here"),
    ],
)
async def test_what_is_refused(query: str, param: str, words: str) -> None:
    """Before anything of the body is read."""
    manager = FakeManager()
    async with http_client(manager) as client:
        reply = await client.post(f"{PATH}?{query}", content=in_parts(b"abc"))
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (404 if param == "model" else 400, param)
    assert words in error["message"]
    assert not manager.streams


async def test_an_empty_body() -> None:
    """Has nothing to commit."""
    async with http_client(FakeManager()) as client:
        reply = await client.post(PATH, content=b"")
    assert reply.status_code == 400
    assert "empty prompt" in reply.json()["error"]["message"]


async def test_a_client_that_goes_away_before_the_end() -> None:
    """Cancels its stream, though the body did not say that it was over."""
    manager = FakeManager()
    async with http_client(manager) as client:
        body = in_parts(b"abc", b"def", pause_s=30.0)
        asking = asyncio.create_task(client.post(PATH, content=body))
        await until(lambda: manager.streams and next(iter(manager.streams.values())).tokens)
        asking.cancel()
        (stream,) = manager.streams.values()
        await until(lambda: stream.cancelled_because)
    assert stream.committed is None


async def test_a_client_that_goes_away_after_the_end() -> None:
    """As well, while it waits for its answer."""
    manager = FakeManager(hold_answer=True)
    async with http_client(manager) as client:
        asking = asyncio.create_task(client.post(PATH, content=in_parts(b"abc")))
        await manager.any_commit.wait()
        (stream,) = manager.streams.values()
        asking.cancel()
        await until(lambda: stream.cancelled_because)
    assert stream.cancelled_because == CLIENT_GONE


async def test_a_stream_that_ends_while_its_body_is_silent() -> None:
    """Is answered at once: the core gives up who says nothing for too long."""
    manager = FakeManager()
    async with serve_http(manager) as url, connected(url) as (reader, writer):
        writer.write(b"PUT /v1/streams HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
        await until(lambda: manager.streams and next(iter(manager.streams.values())).tokens)
        (stream,) = manager.streams.values()
        stream.fail(StreamError("not touched for 3600 s", code=ErrorCode.ABORTED))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), STEP_S)
    assert head.startswith(b"HTTP/1.1 408 ")
