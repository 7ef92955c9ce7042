"""vLLM's driver and the target in front of it, with a fake engine in vLLM's place.

The fake engine does what vLLM's own does with a ``StreamingInput`` session: it answers each input
with at most ``max_tokens`` tokens, and forgets the last of them when the next input comes.
"""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfill.errors import ErrorCode, InvalidArgumentError, StreamError, UnavailableError
from streamfill.loadgen.peers import vllm_stream_server
from streamfill.loadgen.peers.prompt_ids import PieceTokens, PromptTokens
from streamfill.loadgen.peers.vllm_stream_server import _Connections
from streamfill.loadgen.peers.vllm_target import VllmTarget
from streamfill.loadgen.target import Ask
from streamfill.messages.common import StreamMode
from streamfill.models.tiny import make_tiny_model
from streamfill.stream.chat import ChatTemplate
from streamfill.traces.format import ChatMessage

ASK = Ask(request_id="r", max_output_tokens=3)


@dataclass
class Params:
    """``SamplingParams``."""

    temperature: float
    max_tokens: int
    ignore_eos: bool
    detokenize: bool
    output_kind: str


@dataclass
class Input:
    """``StreamingInput``."""

    prompt: dict[str, list[int]]
    sampling_params: Params


@dataclass
class Engine:
    """``AsyncLLM``. The answer to a prompt is its length, its sum, and then that plus one, …"""

    cancelled: list[str] = field(default_factory=list)
    num_resets: int = 0
    is_busy: bool = False
    hold: asyncio.Event | None = None

    async def reset_prefix_cache(self) -> bool:
        self.num_resets += 1
        return not self.is_busy

    async def generate(self, prompt: Any, params: Params, request_id: str) -> AsyncIterator[Any]:
        assert (params.temperature, params.ignore_eos, params.output_kind) == (0.0, True, "delta")
        try:
            if isinstance(prompt, dict):
                if len(prompt["prompt_token_ids"]) > 100:
                    raise VLLMValidationError("too long")
                async for output in self._tokens(prompt["prompt_token_ids"], params, cached=1):
                    yield output
                return
            seen: list[int] = []
            async for each in prompt:
                seen.extend(each.prompt["prompt_token_ids"])
                async for output in self._tokens(seen, each.sampling_params, cached=None):
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request_id)
            raise

    async def _tokens(
        self, ids: list[int], params: Params, cached: int | None
    ) -> AsyncIterator[Any]:
        if self.hold is not None:
            await self.hold.wait()
        for token in answer_to(ids, params.max_tokens):
            await asyncio.sleep(0)
            part = types.SimpleNamespace(token_ids=[token])
            yield types.SimpleNamespace(outputs=[part], num_cached_tokens=cached)


class VLLMValidationError(Exception):
    """vLLM's own."""


def answer_to(ids: list[int], num_tokens: int) -> list[int]:
    """What the fake engine says."""
    return [len(ids) % 50 + 5, *(sum(ids) % 40 + 5 + i for i in range(num_tokens - 1))][:num_tokens]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def tokens(model_path: Path) -> PromptTokens:
    return PromptTokens.load(model_path)


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of vLLM that the driver imports."""
    params = types.ModuleType("vllm.sampling_params")
    params.SamplingParams = Params  # type: ignore[attr-defined]
    kinds = types.SimpleNamespace(DELTA="delta")
    params.RequestOutputKind = kinds  # type: ignore[attr-defined]
    protocol = types.ModuleType("vllm.engine.protocol")
    protocol.StreamingInput = Input  # type: ignore[attr-defined]
    for module in (params, protocol, *map(types.ModuleType, ("vllm", "vllm.engine"))):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@asynccontextmanager
async def target_of(engine: Engine, model_path: Path, tmp_path: Path) -> AsyncIterator[VllmTarget]:
    connections = _Connections(engine, {"context_tokens": 77, "version": "x"})
    handling: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling.add(asyncio.ensure_future(connections.handle(reader, writer)))

    server = await asyncio.start_unix_server(handle, str(tmp_path / "s"))
    target = VllmTarget(tmp_path / "s", model_path=model_path)
    try:
        yield target
    finally:
        await target.close()
        server.close()
        await asyncio.wait_for(asyncio.gather(*handling), 60)


async def test_whole_prompts(model_path: Path, tokens: PromptTokens, tmp_path: Path) -> None:
    """Ids, text and messages are answered, with a time for each token and the cached tokens."""
    async with target_of(Engine(), model_path, tmp_path) as target:
        facts = await target.facts()
        assert facts.context_tokens == 77
        assert facts.vocab_size == tokens.tokenizer.vocab_size
        reply = await target.generate((300, 301), ASK)
        assert reply.token_ids == tuple(answer_to([300, 301], 3))
        assert len(reply.token_times_s) == 3
        assert reply.text == tokens.text([300, 301], reply.token_ids)
        assert reply.account.num_prompt_tokens == 2
        assert reply.account.num_cached_tokens == 1
        texts = await target.generate("good day", ASK)
        assert texts.token_ids == tuple(answer_to(tokens.ids("good day"), 3))


async def test_streamed_equals_whole(
    model_path: Path, tokens: PromptTokens, tmp_path: Path
) -> None:
    """A prompt in pieces has the answer of the whole prompt; tokens between pieces are dropped."""
    async with target_of(Engine(), model_path, tmp_path) as target:
        async with target.open(StreamMode.APPEND, ASK) as stream:
            for piece in ((7, 8), (9,), (10, 11, 12)):
                await stream.send(piece)
            reply = await stream.commit((13,))
        assert reply.token_ids == tuple(answer_to([7, 8, 9, 10, 11, 12, 13], 3))
        async with target.open(StreamMode.APPEND, ASK) as stream:
            for text in ("good d", "ay to", " all of you"):
                await stream.send(text)
            reply = await stream.commit(None)
        assert reply.token_ids == tuple(answer_to(tokens.ids("good day to all of you"), 3))
        assert len(reply.token_times_s) == 3


async def test_slow_engine_and_early_commit(model_path: Path, tmp_path: Path) -> None:
    """Pieces and commit may all be there before the engine answers the first of them."""
    engine = Engine(hold=asyncio.Event())
    assert engine.hold is not None
    async with (
        target_of(engine, model_path, tmp_path) as target,
        target.open(StreamMode.APPEND, ASK) as stream,
    ):
        for piece in ((7, 8), (9, 10)):
            await stream.send(piece)
        answering = asyncio.create_task(stream.commit((13,)))
        await asyncio.sleep(0.02)
        assert not answering.done()
        engine.hold.set()
        reply = await answering
    assert reply.token_ids == tuple(answer_to([7, 8, 9, 10, 13], 3))


async def test_leaving_cancels(model_path: Path, tmp_path: Path) -> None:
    """A stream that is left before its answer is ended in the engine."""
    engine = Engine()
    async with target_of(engine, model_path, tmp_path) as target:
        async with target.open(StreamMode.APPEND, Ask(request_id="gone", max_output_tokens=2)) as s:
            await s.send((7, 8, 9))
        for _ in range(200):
            if engine.cancelled:
                break
            await asyncio.sleep(0.01)
    assert engine.cancelled == ["gone"]


async def test_refusals(model_path: Path, tmp_path: Path) -> None:
    """Updates, chats in pieces, empty prompts and what vLLM refuses are INVALID_ARGUMENT."""
    message = ChatMessage(role="user", content="?")
    async with target_of(Engine(), model_path, tmp_path) as target:
        with pytest.raises(InvalidArgumentError, match="only append"):
            await target.open(StreamMode.UPDATE, ASK).__aenter__()
        with pytest.raises(InvalidArgumentError, match="too long"):
            await target.generate(tuple(range(5, 200)), ASK)
        for prompt in ("", ()):
            with pytest.raises(InvalidArgumentError, match="empty"):
                await target.generate(prompt, ASK)
        async with target.open(StreamMode.APPEND, ASK) as stream:
            with pytest.raises(InvalidArgumentError, match="chat"):
                await stream.send((message,))
            with pytest.raises(InvalidArgumentError, match="empty"):
                await stream.commit(None)


async def test_caches(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are emptied, or it is said that they could not be."""
    monkeypatch.setattr(vllm_stream_server, "FLUSH_TIMEOUT_S", 0.05)
    engine = Engine()
    async with target_of(engine, model_path, tmp_path) as target:
        await target.empty_caches()
        assert engine.num_resets == 1
        engine.is_busy = True
        with pytest.raises(UnavailableError, match="did not empty"):
            await target.empty_caches()


async def test_driver_that_is_gone(model_path: Path, tmp_path: Path) -> None:
    """Without a driver, or with one that ends in the middle, the error is UNAVAILABLE."""
    target = VllmTarget(tmp_path / "none", model_path=model_path)
    with pytest.raises(UnavailableError, match="does not answer"):
        await target.facts()

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b'{"ids": [5]}\n')
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_unix_server(hang_up, str(tmp_path / "h")):
        with pytest.raises(StreamError) as caught:
            await VllmTarget(tmp_path / "h", model_path=model_path).generate((5,), ASK)
    assert caught.value.code is ErrorCode.UNAVAILABLE


@given(
    text=st.text(st.sampled_from("ab cd\n.,é漢 '1"), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    is_last_sent=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_pieces_of_text(
    text: str, cuts: list[int], is_last_sent: bool, tokens: PromptTokens
) -> None:
    """However a text is cut into pieces, the ids given out are those of the whole text, and some
    are left for the commit."""
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    stream = PieceTokens(tokens)
    given_out: list[int] = []
    for piece in pieces[: None if is_last_sent else -1]:
        given_out += stream.append(piece)
    last = stream.commit(None if is_last_sent else pieces[-1])
    assert last
    assert given_out + last == tokens.ids(text) == list(stream.given)


def test_text_is_not_held_for_long(tokens: PromptTokens) -> None:
    """Most of a streamed text is given out before the commit."""
    stream = PieceTokens(tokens)
    text = "the quick brown fox jumps over the lazy dog " * 5
    assert len(stream.append(text)) > 0.8 * len(tokens.ids(text))


def test_kinds_do_not_mix(tokens: PromptTokens) -> None:
    """Text and ids in one stream are refused."""
    for first, second in (("a b c", (5, 6)), ((5, 6), "a b c")):
        stream = PieceTokens(tokens)
        stream.append(first)
        with pytest.raises(InvalidArgumentError):
            stream.append(second)


def test_messages_need_a_template(tokens: PromptTokens) -> None:
    """Messages are put through the model's template; without one they are refused."""
    message = ChatMessage(role="user", content="hello")
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    with_template = PromptTokens(tokens.tokenizer, template)
    expected = tokens.tokenizer.encode("<user>hello", add_special_tokens=False)
    assert with_template.ids((message,)) == expected
    with pytest.raises(InvalidArgumentError, match="template"):
        PromptTokens(tokens.tokenizer, None).ids((message,))
