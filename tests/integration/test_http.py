"""HTTP on a real cluster, by the official client of the OpenAI API and by plain HTTP clients.

Greedy answers are those of the gRPC client, however the prompt comes in.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from websockets.asyncio.client import connect

from streamfill.api import Client
from streamfill.api.types import Result
from streamfill.models.tiny_corpus import CORPUS
from tests.support.cluster import RunningCluster

pytestmark = pytest.mark.integration

DOCS = Path(__file__).parents[2] / "docs" / "http.md"
EXAMPLES = re.findall(r"```(python|sh)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
TIMEOUT_S = 60.0
PROMPT = " ".join(CORPUS[3:9])
QUESTION = "What is it about? Ünïcode 😀."
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
NUM_TOKENS = 20


@pytest.fixture(name="model")
def model_of(cluster: RunningCluster) -> str:
    """What clients call the model."""
    return cluster.state.model_path.rpartition("/")[2]


@asynccontextmanager
async def openai_client(cluster: RunningCluster) -> AsyncIterator[AsyncOpenAI]:
    """The official client, as its users make it."""
    async with AsyncOpenAI(
        base_url=f"{cluster.http_url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0
    ) as client:
        yield client


async def by_grpc(cluster: RunningCluster, prompt: str | None, **options: Any) -> Result:
    """The greedy answer of the gRPC client."""
    async with Client(cluster.address) as client:
        return await client.complete(
            prompt, temperature=0.0, **{"max_tokens": NUM_TOKENS, **options}
        )


async def num_open(cluster: RunningCluster) -> int:
    async with Client(cluster.address) as client:
        return (await client.server_info()).num_open_streams


async def test_models(cluster: RunningCluster, model: str) -> None:
    """The client finds the one model, by its name and by its path."""
    async with openai_client(cluster) as client:
        assert [card.id async for card in client.models.list()] == [model]
        assert (await client.models.retrieve(model)).id == model
        with pytest.raises(openai.NotFoundError, match="not served here"):
            await client.models.retrieve("gpt-4")


async def test_a_chat(cluster: RunningCluster, model: str) -> None:
    """Is the answer of the gRPC client, in one piece and as events, with the same usage."""
    expected = await by_grpc(cluster, None, messages=CHAT)
    async with openai_client(cluster) as client:
        asked: dict[str, Any] = {
            "model": model,
            "messages": CHAT,
            "temperature": 0.0,
            "max_completion_tokens": NUM_TOKENS,
        }
        whole = await client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == expected.text
        assert whole.choices[0].finish_reason == expected.finish_reason
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == expected.usage.num_prompt_tokens
        assert whole.usage.completion_tokens == expected.usage.num_output_tokens
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
        ]
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == expected.text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason


async def test_a_completion(cluster: RunningCluster, model: str) -> None:
    """Of a text or of its token ids, in one piece and as events."""
    expected = await by_grpc(cluster, PROMPT)
    async with openai_client(cluster) as client:
        asked: dict[str, Any] = {"model": model, "temperature": 0.0, "max_tokens": NUM_TOKENS}
        whole = await client.completions.create(prompt=PROMPT, **asked)
        stream = await client.completions.create(prompt=PROMPT, stream=True, **asked)
        texts = [chunk.choices[0].text async for chunk in stream]
    assert whole.choices[0].text == "".join(texts) == expected.text


async def test_several_prompts_with_several_answers(cluster: RunningCluster, model: str) -> None:
    """Each has its place; the second answer to a prompt finds it in the cache of the server."""
    first = await by_grpc(cluster, CORPUS[0])
    second = await by_grpc(cluster, CORPUS[1])
    async with openai_client(cluster) as client:
        told = await client.completions.create(
            model=model, prompt=[CORPUS[0], CORPUS[1]], n=2, temperature=0.0, max_tokens=NUM_TOKENS
        )
    assert [choice.text for choice in told.choices] == [first.text] * 2 + [second.text] * 2
    assert told.usage is not None
    expected = first.usage.num_prompt_tokens + second.usage.num_prompt_tokens
    assert told.usage.prompt_tokens == expected
    assert told.usage.completion_tokens == sum(
        2 * result.usage.num_output_tokens for result in (first, second)
    )


async def test_seeds(cluster: RunningCluster, model: str) -> None:
    """Two answers to one request differ; the same request gives the same two again."""
    async with openai_client(cluster) as client:

        async def ask() -> list[str | None]:
            told = await client.chat.completions.create(
                model=model, messages=CHAT, n=2, seed=11, temperature=1.0, max_tokens=NUM_TOKENS
            )
            return [choice.message.content for choice in told.choices]

        before, after = await ask(), await ask()
    assert before == after
    assert before[0] != before[1]


async def test_log_probabilities(cluster: RunningCluster, model: str) -> None:
    """Are those that the gRPC client has, in both forms."""
    expected = await by_grpc(cluster, PROMPT, logprobs=3, max_tokens=6)
    logprobs = [token.logprob for token in expected.tokens]
    async with openai_client(cluster) as client:
        told = await client.completions.create(
            model=model, prompt=PROMPT, logprobs=3, temperature=0.0, max_tokens=6
        )
        chat = await client.chat.completions.create(
            model=model,
            messages=CHAT,
            logprobs=True,
            top_logprobs=3,
            temperature=0.0,
            max_tokens=6,
        )
    found = told.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs == pytest.approx(logprobs, abs=1e-4)
    assert found.tokens is not None
    assert found.text_offset is not None
    assert (len(found.tokens), found.text_offset[0]) == (len(logprobs), 0)
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert all(token.top_logprobs[0].logprob >= token.logprob - 1e-6 for token in content)
    assert [len(token.top_logprobs) for token in content] == [3] * len(content)
    spelled = b"".join(bytes(token.bytes or ()) for token in content).decode("utf-8", "replace")
    assert chat.choices[0].message.content is not None
    assert spelled.startswith(chat.choices[0].message.content.rstrip("�"))


async def test_a_stop_string(cluster: RunningCluster, model: str) -> None:
    """Ends the answer and is not in it."""
    whole = await by_grpc(cluster, PROMPT)
    stop = whole.text[4:7]
    async with openai_client(cluster) as client:
        told = await client.completions.create(
            model=model, prompt=PROMPT, stop=[stop], temperature=0.0, max_tokens=NUM_TOKENS
        )
    assert told.choices[0].text == whole.text[: whole.text.index(stop)]
    assert told.choices[0].finish_reason == "stop"


async def test_what_is_refused(cluster: RunningCluster, model: str) -> None:
    """Is an error of the client's own kind, with the field."""
    async with openai_client(cluster) as client:
        tools: Any = [{"type": "function"}]
        with pytest.raises(openai.BadRequestError, match="tools is") as caught:
            await client.chat.completions.create(model=model, messages=CHAT, tools=tools)
        assert caught.value.param == "tools"
        with pytest.raises(openai.BadRequestError, match="context") as caught:
            await client.completions.create(model=model, prompt="word " * 50_000)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="gpt-4", prompt="x")


async def test_a_client_that_stops_reading_its_answer(cluster: RunningCluster, model: str) -> None:
    """Frees its stream on all servers."""
    async with openai_client(cluster) as client:
        stream = await client.completions.create(
            model=model,
            prompt=PROMPT,
            stream=True,
            max_tokens=1000,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            break
        await stream.close()
    async with asyncio.timeout(TIMEOUT_S):
        while await num_open(cluster):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_context_over_a_websocket(cluster: RunningCluster) -> None:
    """Gives the answer of the whole prompt at once; nearly all of it is computed by then."""
    expected = await by_grpc(cluster, PROMPT + QUESTION)
    async with Client(cluster.address) as client:
        await client.flush_caches()
    url = f"{cluster.http_url.replace('http', 'ws', 1)}/v1/streams"
    async with asyncio.timeout(TIMEOUT_S), connect(url) as socket:
        await socket.send(json.dumps({"type": "open", "mode": "append"}))
        assert json.loads(await socket.recv())["type"] == "opened"
        cuts = (0, 7, 40, 41, len(PROMPT))
        for seq, (start, end) in enumerate(pairwise(cuts), 1):
            piece = PROMPT[start:end]
            await socket.send(json.dumps({"type": "append", "seq": seq, "text": piece}))
        told: dict[str, Any] = {}
        while told.get("seq") != 4 or told["num_computed_tokens"] < told["num_received_tokens"]:
            told = json.loads(await socket.recv())
        commit = {"type": "commit", "text": QUESTION, "temperature": 0, "max_tokens": NUM_TOKENS}
        await socket.send(json.dumps(commit))
        messages = [json.loads(message) async for message in socket]
    text = "".join(message["text"] for message in messages if message["type"] == "token")
    done = messages[-1]
    assert text + done["text_tail"] == expected.text
    assert done["usage"]["num_prompt_tokens"] == expected.usage.num_prompt_tokens
    assert done["usage"]["num_cached_tokens"] >= told["num_computed_tokens"] - 16


@pytest.mark.parametrize("streams", [False, True])
async def test_context_in_a_chunked_upload(cluster: RunningCluster, streams: bool) -> None:
    """Gives the answer of the whole prompt at once, wherever its bytes are cut."""
    expected = await by_grpc(cluster, PROMPT + QUESTION)
    data = (PROMPT + QUESTION).encode()
    middle = data.index("😀".encode()) + 2

    async def body() -> AsyncIterator[bytes]:
        for part in (data[:50], data[50:middle], data[middle:]):
            yield part
            await asyncio.sleep(0.1)

    url = f"{cluster.http_url}/v1/streams?temperature=0&max_tokens={NUM_TOKENS}"
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        reply = await client.post(f"{url}&stream={str(streams).lower()}", content=body())
    assert reply.status_code == 200, reply.text
    if streams:
        lines = [line for line in reply.text.splitlines() if line]
        assert lines.pop() == "data: [DONE]"
        parts = [json.loads(line.removeprefix("data: ")) for line in lines]
        text = "".join(part["choices"][0]["text"] for part in parts)
    else:
        text = reply.json()["choices"][0]["text"]
        usage = reply.json()["usage"]
        assert usage["prompt_tokens"] == expected.usage.num_prompt_tokens
    assert text == expected.text


async def test_a_chat_in_a_chunked_upload(cluster: RunningCluster) -> None:
    """Is the chat with the body as what the user says."""
    expected = await by_grpc(cluster, None, messages=CHAT)
    url = f"{cluster.http_url}/v1/streams?chat=true&system=Be+brief.&temperature=0"
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        reply = await client.put(f"{url}&max_tokens={NUM_TOKENS}", content=PROMPT.encode())
    assert reply.json()["choices"][0]["text"] == expected.text


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_status_page_shows_a_life(cluster: RunningCluster) -> None:
    """A stream that went through a real cluster: its segments, what was computed when and why, the
    hand-off and the answer, in their order."""
    async with Client(cluster.address) as client, client.stream(request_id="watched") as stream:
        await stream.append(f"Only this test asks: {PROMPT}")
        await asyncio.sleep(0.5)
        async for _ in stream.commit(QUESTION, max_tokens=NUM_TOKENS, temperature=0.0):
            pass
    url = f"{cluster.http_url}/status/events?search=watched"
    async with (
        httpx.AsyncClient(timeout=TIMEOUT_S) as http,
        http.stream("GET", url) as reply,
        asyncio.timeout(TIMEOUT_S),
    ):
        lines = reply.aiter_lines()
        assert await anext(lines) == "event: snapshot"
        frame = json.loads((await anext(lines)).removeprefix("data: "))
    assert {server["role"] for server in frame["servers"]} == {"prefill", "decode"}
    (shown,) = frame["streams"]
    facts, moments = shown["facts"], shown["moments"]
    assert (facts["state"], facts["num_output_tokens"]) == ("DONE", NUM_TOKENS)
    assert facts["handoff"] == "done"
    assert len(shown["segments"]) == 2
    assert sum(tokens for _, _, _, tokens, _ in shown["runs"]) >= facts["num_known_tokens"] - 1
    assert shown["runs"][-1][4].startswith("commit")
    assert facts["opened_ms"] <= shown["segments"][0][1] <= moments["commit_ms"]
    assert moments["commit_ms"] <= moments["first_token_ms"] <= moments["newest_token_ms"]
    assert moments["newest_token_ms"] <= facts["ended_ms"]


@pytest.mark.parametrize(
    ("language", "code"),
    [
        pytest.param(language, code, id=f"{language}-{number}")
        for number, (language, code) in enumerate(EXAMPLES)
        if "bench_serving" not in code and "vllm bench" not in code
    ],
)
async def test_the_examples_of_the_documentation(
    cluster: RunningCluster, tmp_path: Path, language: str, code: str
) -> None:
    """Run as they stand there, but for the port, and print an answer."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"This is {name}. ")
    host = cluster.http_url.removeprefix("http://")
    command = (sys.executable, "-c") if language == "python" else ("bash", "-c")
    process = await asyncio.create_subprocess_exec(
        *command,
        code.replace("127.0.0.1:8000", host),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=tmp_path,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    finally:
        if process.returncode is None:  # its answers would keep the cluster busy
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    assert output.strip()
    assert b'"error"' not in output
