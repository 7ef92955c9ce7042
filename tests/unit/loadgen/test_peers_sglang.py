"""SGLang's servers as a target, against a small server of the test."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from streamfill.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    StreamError,
    UnavailableError,
)
from streamfill.loadgen.peers.limits import POOL_TOKENS, context_tokens, pool_bytes
from streamfill.loadgen.peers.sglang_target import SglangTarget
from streamfill.loadgen.target import Ask
from streamfill.loadgen.targets import openai
from streamfill.messages.common import StreamMode
from streamfill.models.tiny import make_tiny_model

ASK = Ask(request_id="r-1", max_output_tokens=3)


def event(ids: list[int], text: str, **meta: Any) -> dict[str, Any]:
    said = {"prompt_tokens": 9, "cached_tokens": 4, "finish_reason": None} | meta
    return {"text": text, "output_ids": ids, "meta_info": said}


class Fake:
    """A router of SGLang."""

    def __init__(self, *events: dict[str, Any], flush_status: int = 500) -> None:
        self.asked: list[dict[str, Any]] = []
        self._events = events
        self._flush_status = flush_status

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        response = web.StreamResponse()
        await response.prepare(request)
        for each in self._events:
            await response.write(b"data: " + json.dumps(each).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def flush(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"message": "1 failed"}, status=self._flush_status)


@asynccontextmanager
async def target_of(fake: Fake, model_path: Path = Path("m")) -> AsyncIterator[SglangTarget]:
    app = web.Application()
    app.router.add_post("/generate", fake.generate)
    app.router.add_post("/flush_cache", fake.flush)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    target = SglangTarget(url, model_path=model_path, context_tokens=64)
    try:
        yield target
    finally:
        await target.close()
        await runner.cleanup()


async def test_answer() -> None:
    """Each event holds all tokens so far; each token has the time of the first that holds it."""
    fake = Fake(event([5], " a"), event([5, 6, 7], " a b c"))
    async with target_of(fake) as target:
        reply = await target.generate((1, 2), ASK)
    assert reply.text == " a b c"
    assert reply.token_ids == (5, 6, 7)
    times = reply.token_times_s
    assert len(times) == 3
    assert times[0] <= times[1] == times[2]
    assert (reply.account.num_prompt_tokens, reply.account.num_cached_tokens) == (9, 4)
    assert fake.asked == [
        {
            "input_ids": [1, 2],
            "stream": True,
            "rid": "r-1",
            "sampling_params": {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True},
        }
    ]


async def test_text_is_sent_as_text() -> None:
    """A text is tokenised by SGLang itself."""
    fake = Fake(event([5], "a"))
    async with target_of(fake) as target:
        await target.generate("hello", ASK)
    assert fake.asked[0]["text"] == "hello"
    assert "input_ids" not in fake.asked[0]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ({"type": "abort", "status_code": 429, "message": "full"}, ResourceExhaustedError),
        ({"type": "abort", "message": "gone"}, UnavailableError),
    ],
)
async def test_aborted(reason: dict[str, Any], expected: type[StreamError]) -> None:
    """An answer that SGLang gave up is an error, not a short answer."""
    async with target_of(Fake(event([5], "a", finish_reason=reason))) as target:
        with pytest.raises(expected, match=reason["message"]):
            await target.generate("hello", ASK)


@pytest.mark.parametrize("broken", [{"text": "a"}, {"output_ids": 3, "text": "", "meta_info": {}}])
async def test_unknown_event(broken: dict[str, Any]) -> None:
    """An event of another form is UNAVAILABLE."""
    async with target_of(Fake(broken)) as target:
        with pytest.raises(UnavailableError, match="unknown event"):
            await target.generate("hello", ASK)


async def test_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches count as emptied when the router reached all servers, and only then."""
    monkeypatch.setattr(openai, "FLUSH_TIMEOUT_S", 0.0)
    async with target_of(Fake(flush_status=200)) as target:
        await target.empty_caches()
    async with target_of(Fake(flush_status=206)) as target:
        with pytest.raises(UnavailableError, match="206: 1 failed"):
            await target.empty_caches()
    async with target_of(Fake(flush_status=404)) as target:
        with pytest.raises(FailedPreconditionError):
            await target.empty_caches()


async def test_model_facts(tmp_path: Path) -> None:
    """Vocabulary and limits come from the model's folder."""
    model_path = make_tiny_model(tmp_path / "tiny", max_position=512)
    async with target_of(Fake(), model_path) as target:
        facts = await target.facts()
        with pytest.raises(InvalidArgumentError):
            target.open(StreamMode.APPEND, ASK)
    assert facts.model == "tiny"
    assert facts.context_tokens == 64
    assert facts.vocab_size > 256
    assert context_tokens(model_path) == 512
    # 2 layers, 2 KV heads of 16, key and value, float32.
    assert pool_bytes(model_path) == POOL_TOKENS * 2 * 2 * 16 * 2 * 4


async def test_no_such_call() -> None:
    """A server that is no SGLang is told apart."""
    app = web.Application()
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    target = SglangTarget(url, model_path=Path("m"), context_tokens=64)
    with pytest.raises(FailedPreconditionError):
        await target.generate("x", ASK)
    await target.close()
    await runner.cleanup()
