"""``/v1/chat/completions``, on top of a fake core."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.router.fake_manager import CONTEXT_TOKENS, FakeManager
from tests.unit.router.http.serving import app_client, chat, events_of

PATH = "/v1/chat/completions"


async def test_an_answer_in_one_piece() -> None:
    """Text, finish reason and usage are those of the core's events."""
    manager = FakeManager()
    async with app_client(manager) as client:
        reply = await client.post(PATH, json=chat("Hello", model="fake", max_tokens=5))
        assert reply.status_code == 200
        told = reply.json()
        assert reply.headers["x-request-id"] == told["id"]
    assert told["id"].startswith("chatcmpl-")
    assert (told["object"], told["model"]) == ("chat.completion", "fake")
    (choice,) = told["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello world!", "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert (choice["stop_reason"], choice["logprobs"]) == ("END", None)
    assert told["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    (stream,) = manager.streams.values()
    assert stream.cancelled_because is None
    assert stream.options.request_id == told["id"]


async def test_an_answer_as_events() -> None:
    """First the role, then a chunk for each token, then the reason of the end, then [DONE]."""
    async with app_client(FakeManager()) as client:
        reply = await client.post(PATH, json=chat(stream=True))
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-cache"
        *chunks, end = events_of(reply.text)
    assert end == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        *({"content": text} for text in ("Hello", " ", "world", "!")),
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, None, "stop"]
    assert not any("usage" in chunk for chunk in chunks)


async def test_usage_comes_last_when_it_is_wanted() -> None:
    """In a chunk without choices; all others have the field, and null in it."""
    body = chat(stream=True, stream_options={"include_usage": True})
    async with app_client(FakeManager()) as client:
        *chunks, last, end = events_of((await client.post(PATH, json=body)).text)
    assert end == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 5


async def test_several_answers() -> None:
    """Each is a stream of its own with a seed of its own; the prompt is counted once."""
    manager = FakeManager()
    async with app_client(manager) as client:
        told = (await client.post(PATH, json=chat(n=3, seed=7))).json()
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in told["choices"]} == {"Hello world!"}
    usage = told["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 9)
    commits = [stream.committed for stream in manager.streams.values()]
    assert [commit.sampling.seed for commit in commits if commit] == [7, 8, 9]


async def test_siblings_wait_for_the_first_token_of_the_first_answer() -> None:
    """Until then no other stream is open, so that no server computes the prompt twice."""
    num_open: list[int] = []

    def answer() -> Any:
        num_open.append(len(manager.streams))
        yield "x"

    manager = FakeManager(answer=answer)
    async with app_client(manager) as client:
        reply = await client.post(PATH, json=chat(n=4))
        assert reply.status_code == 200
    assert num_open[0] == 1
    assert len(manager.streams) == 4


async def test_events_of_several_answers_are_told_apart() -> None:
    """By their index, each in its own order and with an end of its own."""
    async with app_client(FakeManager()) as client:
        reply = await client.post(PATH, json=chat(n=2, stream=True))
        *chunks, _ = events_of(reply.text)
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == "Hello world!"
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("streams", [False, True])
async def test_log_probabilities(streams: bool) -> None:
    """Of each token: its text and bytes, and as many others as were asked for."""
    body = chat(logprobs=True, top_logprobs=2, stream=streams)
    manager = FakeManager()
    async with app_client(manager) as client:
        reply = await client.post(PATH, json=body)
        if streams:
            chunks = [c for c in events_of(reply.text) if c != "[DONE]"]
            found = [c["choices"][0]["logprobs"] for c in chunks]
            content = [token for each in found if each for token in each["content"]]
        else:
            content = reply.json()["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == ["<0>", "<1>", "<2>"]
    assert content[0] == {
        "token": "<0>",
        "logprob": -0.5,
        "bytes": list(b"<0>"),
        "top_logprobs": [
            {"token": "<0>", "logprob": -0.5, "bytes": list(b"<0>")},
            {"token": "<9>", "logprob": -2.0, "bytes": list(b"<9>")},
        ],
    }
    (stream,) = manager.streams.values()
    assert stream.committed is not None
    assert stream.committed.sampling.num_logprobs == 2


async def test_everything_that_is_said_reaches_the_core() -> None:
    """Sampling, stop strings, hints, and the conversation as the template takes it."""
    manager = FakeManager()
    body: dict[str, Any] = {
        "model": "default",
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "assistant", "content": "A", "refusal": None, "tool_calls": None},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": t} for t in "ab"]},
        ],
        "user": "u",
        "metadata": {"a": "b"},
        "tools": [],
        "response_format": {"type": "text"},
    }
    body |= {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": 3}
    body |= {"frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.5}
    body |= {"max_completion_tokens": 9, "min_tokens": 2, "stop": "END", "stop_token_ids": [4, 5]}
    body |= {"ignore_eos": True, "skip_special_tokens": False, "keep_s": 6.0}
    body |= {"priority": -2, "deadline_s": 30, "ttft_slo_ms": 250.0}
    async with app_client(manager) as client:
        reply = await client.post(PATH, json=body, headers={"x-request-id": "mine"})
        assert reply.status_code == 200, reply.text
    (stream,) = manager.streams.values()
    commit, opening = stream.committed, stream.options
    assert commit is not None
    assert commit.final_segment is not None
    assert commit.final_segment.messages == [
        {"role": "system", "content": "S"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "name": "Ann", "content": "ab"},
    ]
    sampling = commit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
    assert (sampling.min_p, sampling.seed, sampling.repetition_penalty) == (0.125, 3, 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.5)
    assert (sampling.max_new_tokens, sampling.min_new_tokens) == (9, 2)
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((4, 5), True)
    assert (commit.stop, commit.skip_special_tokens, commit.keep_s) == (("END",), False, 6.0)
    assert (opening.priority, opening.deadline_s, opening.ttft_slo_s) == (-2, 30.0, 0.25)
    assert opening.request_id == "mine"


async def test_without_a_limit_an_answer_may_fill_the_context() -> None:
    """As in the OpenAI API; temperature and the like have its defaults."""
    manager = FakeManager()
    async with app_client(manager) as client:
        await client.post(PATH, json=chat(max_tokens=None, temperature=None))
    (stream,) = manager.streams.values()
    assert stream.committed is not None
    assert stream.committed.sampling.max_new_tokens == CONTEXT_TOKENS
    assert stream.committed.sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"stream_options": {"continuous_usage_stats": True}}, None, "continuous_usage_stats"),
        ({"nonsense": 1}, "nonsense", "no known field; known here: best_of"),
        ({"temperature": -1}, "temperature", "temperature is -1.0; it must be in [0, 1000000]"),
        ({"temperature": 1e38}, "temperature", "it must be in [0, 1000000]"),
        ({"top_k": 2**31}, "top_k", "top_k is 2147483648; it must be in 1 .. 2147483647"),
        ({"repetition_penalty": 1e-39}, "repetition_penalty", "it must be in [0.000001, 2]"),
        ({"temperature": "hot"}, "temperature", "expected float"),
        ({"top_p": 0}, "top_p", "in (0, 1]"),
        ({"n": 0}, "n", "between 1 and 128"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "1 or more"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "left out"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "at most max_tokens"),
        ({"seed": 2**63}, "seed", "at most"),
        ({"top_logprobs": 3}, "top_logprobs", "without logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 .. 20"),
        ({"stop": ["a", ""]}, "stop[1]", "not empty"),
        ({"stop_token_ids": [1000]}, "stop_token_ids[0]", "vocabulary"),
        ({"priority": 2**31}, "priority", "between"),
        ({"deadline_s": 0}, "deadline_s", "greater than 0"),
        ({"request_id": "x" * 257}, "request_id", "256 characters"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role", "a role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "null"),
        ({"messages": [{"content": "x"}]}, None, "is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
            "no text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "not supported",
        ),
    ],
)
async def test_what_is_refused(fields: dict[str, Any], param: str | None, words: str) -> None:
    """With 400, the name of the field and its value; nothing is opened."""
    manager = FakeManager()
    async with app_client(manager) as client:
        reply = await client.post(PATH, json={**chat(), **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert not manager.streams
