"""An OpenAI-compatible endpoint as a target, against a small server of the test."""

from __future__ import annotations

import asyncio
import json
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from streamfill.errors import (
    DeadlineExceededError,
    ErrorCode,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    StreamError,
    UnavailableError,
)
from streamfill.loadgen.request_log import RequestLog
from streamfill.loadgen.target import Ask, Reply
from streamfill.loadgen.targets import openai, sse
from streamfill.loadgen.targets.openai import SMALLEST_VOCABULARY, OpenAITarget
from streamfill.messages.common import StreamMode
from streamfill.traces.format import ChatMessage
from tests.unit.loadgen.script_builders import script

KEY = "sk-very-secret"
ASK = Ask(request_id="r", max_output_tokens=3)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Fake:
    """A server that answers as it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.answers: dict[str, Handler] = {"/v1/models": json_answer(models("m", limit=512))}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {}
        self.asked.append((request.path, body, request.headers.get("Authorization")))
        handler = self.answers.get(request.path)
        return await handler(request) if handler is not None else web.Response(status=404)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for path, body, _ in self.asked if path != "/v1/models"]


def json_answer(answer: Any, status: int = 200) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.json_response(answer, status=status)

    return handle


def text_answer(text: str, status: int) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(text=text, status=status)

    return handle


def raw_events(*parts: bytes, cut: bool = False) -> Handler:
    """Sends the bytes as they are, one write each."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0)
        if cut:
            assert request.transport is not None
            request.transport.abort()
        return response

    return handle


def events(*payloads: dict[str, Any]) -> Handler:
    return raw_events(*(data(each) for each in payloads), b"data: [DONE]\n\n")


def data(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def piece(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, **more}], "usage": None}


def usage(prompt: int, output: int, cached: int | None = None) -> dict[str, Any]:
    details = None if cached is None else {"cached_tokens": cached}
    said = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": details}
    return {"choices": [], "usage": said}


def models(name: str, limit: int | None = None) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name, "max_model_len": limit}]}


@asynccontextmanager
async def serving(fake: Fake) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def target_of(fake: Fake, **options: Any) -> AsyncIterator[OpenAITarget]:
    async with serving(fake) as url:
        target = OpenAITarget(url, **options)
        try:
            yield target
        finally:
            await target.close()


async def ask_once(handler: Handler, prompt: Any = "hi") -> Reply:
    fake = Fake()
    fake.answers["/v1/completions"] = handler
    fake.answers["/v1/chat/completions"] = handler
    async with target_of(fake) as target:
        return await target.generate(prompt, ASK)


async def test_text_goes_to_completions() -> None:
    """A text prompt is a greedy streamed completion; pieces, usage and cached tokens come back."""
    fake = Fake()
    fake.answers["/v1/completions"] = events(piece(" a"), piece(" b"), usage(7, 2, cached=4))
    async with target_of(fake, api_key=KEY) as target:
        reply = await target.generate("hello", ASK)
    assert reply.text == " a b"
    assert reply.token_ids is None
    assert len(reply.token_times_s) == 2
    assert reply.account.num_prompt_tokens == 7
    assert reply.account.num_cached_tokens == 4
    path, body, key = fake.asked[-1]
    assert path == "/v1/completions"
    assert key == f"Bearer {KEY}"
    assert body == {
        "prompt": "hello",
        "model": "m",
        "max_tokens": 3,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }


async def test_tokens_without_text_are_output_too() -> None:
    """The usage says how long an answer is; where it does not, the pieces with text do."""
    silent = (piece("a"), piece(""), piece("b"))
    for pieces, num_tokens in (((*silent, usage(7, 3)), 3), (silent, 2)):
        reply = await ask_once(events(*pieces))
        log = RequestLog(script(), index=0, zero_s=0.0, due_s=0.0)
        log.note_reply(reply, 1.0)
        assert log.record().num_output_tokens == num_tokens
        assert len(reply.token_times_s) == 2


async def test_token_ids_go_to_completions() -> None:
    """Token ids are sent as a list, and the ids of the answer are taken where they are given."""
    fake = Fake()
    fake.answers["/v1/completions"] = events(
        piece("x", token_ids=[5, 6]), piece("", token_ids=[7]), usage(2, 3)
    )
    async with target_of(fake) as target:
        reply = await target.generate((1, 2), ASK)
    assert fake.bodies[0]["prompt"] == [1, 2]
    assert reply.token_ids == (5, 6, 7)
    times = reply.token_times_s
    assert len(times) == 3
    assert times[0] == times[1] <= times[2]


async def test_messages_go_to_chat() -> None:
    """Chat messages use the chat path; an event without text is no token."""
    fake = Fake()
    fake.answers["/v1/chat/completions"] = events(
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "yes"}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    )
    async with target_of(fake) as target:
        reply = await target.generate((ChatMessage(role="user", content="?"),), ASK)
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "?"}]
    assert reply.text == "yes"
    assert len(reply.token_times_s) == 1


async def test_logprobs_count_tokens() -> None:
    """An event with log probabilities counts as many tokens as it names."""
    reply = await ask_once(events(piece("a b", logprobs={"tokens": ["a", " b"]})))
    assert len(reply.token_times_s) == 2
    assert reply.token_ids is None


async def test_events_cut_anywhere() -> None:
    """Events are put together from any pieces of bytes; comments and other fields are skipped."""
    whole = b": hello\r\nevent: x\r\n" + data(piece("a\u00e9")).replace(b"\n", b"\r\n")
    whole += b'data: {"choices":\ndata: [{"text": "b"}]}\n\ndata: [DONE]\n\n'
    reply = await ask_once(raw_events(*(bytes([each]) for each in whole)))
    assert reply.text == "a\u00e9b"


@pytest.mark.parametrize("field", ["ignore_eos", "return_token_ids", "stream_options"])
async def test_refused_field_is_left_out(field: str) -> None:
    """A server that refuses a field by name is asked again without it, and never with it again."""
    fake = Fake()

    async def handle(request: web.Request) -> web.StreamResponse:
        if field in fake.bodies[-1]:
            error = {"error": {"message": f"Unrecognized request argument supplied: {field}"}}
            return web.json_response(error, status=400)
        return await events(piece("a"))(request)

    fake.answers["/v1/completions"] = handle
    async with target_of(fake) as target:
        assert (await target.generate("x", ASK)).text == "a"
        assert (await target.generate("x", ASK)).text == "a"
        assert target.left_out == (field,)
    assert [field in body for body in fake.bodies] == [True, False, False]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, InvalidArgumentError),
        (404, FailedPreconditionError),
        (413, InvalidArgumentError),
        (429, ResourceExhaustedError),
        (500, UnavailableError),
        (503, UnavailableError),
        (504, DeadlineExceededError),
    ],
)
async def test_status_is_translated(status: int, expected: type[StreamError]) -> None:
    """Each HTTP status is the error of this project that says the same, with the server's words."""
    with pytest.raises(expected, match="too much"):
        await ask_once(json_answer({"error": {"message": "too much"}}, status))


async def test_wrong_key() -> None:
    """A refused key has the code for it."""
    with pytest.raises(StreamError) as caught:
        await ask_once(json_answer({"error": {"message": "bad key"}}, 401))
    assert caught.value.code is ErrorCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("<html>\n  gateway  broke</html>", "<html> gateway broke</html>"),
        ('{"detail": "no room"}', "no room"),
        ('{"error": "plain"}', "plain"),
        ('["odd"]', '["odd"]'),
        ("", "no reason given"),
        ("x" * 5000, "x" * 300),
    ],
)
async def test_error_bodies_of_any_form(body: str, shown: str) -> None:
    """The reason of an error is one short line whatever the body is."""
    with pytest.raises(UnavailableError) as caught:
        await ask_once(text_answer(body, 502))
    assert caught.value.message.endswith(f"answered 502: {shown}")


async def test_error_inside_an_answer() -> None:
    """An error in the middle of a stream is translated by its own code."""
    error = {"error": {"message": "queue is full", "code": 429}}
    with pytest.raises(ResourceExhaustedError, match="queue is full"):
        await ask_once(events(piece("a"), error))


@pytest.mark.parametrize("cut", [True, False])
async def test_answer_that_breaks_off(cut: bool) -> None:
    """A connection that ends before the answer's end is UNAVAILABLE, dropped or closed."""
    with pytest.raises(UnavailableError):
        await ask_once(raw_events(data(piece("a")), cut=cut))


@pytest.mark.parametrize(
    "broken", [b"data: {nope\n\n", b"data: [1]\n\n", b'data: {"choices": 3}\n\n']
)
async def test_broken_events(broken: bytes) -> None:
    """An event that is no JSON or of another form is UNAVAILABLE."""
    with pytest.raises(UnavailableError, match="the server sent"):
        await ask_once(raw_events(broken, b"data: [DONE]\n\n"))


async def test_endless_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event without an end does not fill the memory."""
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    with pytest.raises(UnavailableError, match="more than 1000 bytes"):
        await ask_once(raw_events(b"data: " + b"x" * 2000))


async def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says nothing more is DEADLINE_EXCEEDED."""
    monkeypatch.setattr(sse, "SILENCE_TIMEOUT_S", 0.1)

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(data(piece("a")))
        await asyncio.sleep(60)
        return response

    with pytest.raises(DeadlineExceededError):
        await ask_once(handle)


async def test_nobody_there() -> None:
    """A refused connection is UNAVAILABLE and names the address, not the key."""
    with socket.socket() as deaf:  # it is held, so that nobody else listens there
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        target = OpenAITarget(f"http://127.0.0.1:{port}/v1", api_key=KEY)
        with pytest.raises(UnavailableError, match=str(port)) as caught:
            await target.facts()
        await target.close()
    shown = "".join(traceback.format_exception(caught.value)) + repr(target) + repr(vars(target))
    assert KEY not in shown


async def test_facts() -> None:
    """Facts are the server's, with a vocabulary that every model has."""
    async with target_of(Fake()) as target:
        facts = await target.facts()
    assert (facts.model, facts.context_tokens, facts.vocab_size) == ("m", 512, SMALLEST_VOCABULARY)


@pytest.mark.parametrize("answer", [{"data": []}, {"data": 3}, [1], "html"])
async def test_no_list_of_models(answer: Any) -> None:
    """A server without a list of models is UNAVAILABLE."""
    fake = Fake()
    fake.answers["/v1/models"] = json_answer(answer)
    async with target_of(fake) as target:
        with pytest.raises(UnavailableError):
            await target.facts()


@pytest.mark.parametrize("path", ["/flush_cache", "/reset_prefix_cache"])
async def test_caches_are_emptied(path: str) -> None:
    """The call of the server at hand is found."""
    fake = Fake()
    fake.answers[path] = text_answer("done", 200)
    async with target_of(fake) as target:
        await target.empty_caches()
    assert fake.asked[-1][0] == path


async def test_caches_of_a_busy_server() -> None:
    """A server that is still busy for a moment is asked again."""
    fake = Fake()

    async def handle(request: web.Request) -> web.StreamResponse:
        status = 206 if len(fake.asked) < 2 else 200
        return web.json_response({"message": "1 succeeded, 1 failed"}, status=status)

    fake.answers["/flush_cache"] = handle
    async with target_of(fake) as target:
        await target.empty_caches()
    assert len(fake.asked) == 2


async def test_caches_that_cannot_be_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without such a call is told apart from one that refuses it."""
    monkeypatch.setattr(openai, "FLUSH_TIMEOUT_S", 0.0)
    fake = Fake()
    async with target_of(fake) as target:
        with pytest.raises(FailedPreconditionError, match="no call that empties"):
            await target.empty_caches()
        fake.answers["/flush_cache"] = text_answer("requests are running", 400)
        with pytest.raises(UnavailableError, match="requests are running"):
            await target.empty_caches()


async def test_has_no_streams() -> None:
    """A stream is refused at once."""
    target = OpenAITarget("http://127.0.0.1:1")
    assert not target.has_streams
    with pytest.raises(InvalidArgumentError):
        target.open(StreamMode.APPEND, ASK)


async def test_many_at_the_same_time() -> None:
    """More requests than an ordinary connector allows are open at the same moment."""
    fake, num_requests, num_open = Fake(), 150, 0
    all_open = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal num_open
        num_open += 1
        if num_open == num_requests:
            all_open.set()
        await all_open.wait()
        return await events(piece("a"))(request)

    fake.answers["/v1/completions"] = handle
    async with target_of(fake, model="m") as target:
        replies = await asyncio.gather(*(target.generate("x", ASK) for _ in range(num_requests)))
    assert [reply.text for reply in replies] == ["a"] * num_requests
