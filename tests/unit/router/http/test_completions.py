"""``/v1/completions``, on top of a fake core."""

from __future__ import annotations

from typing import Any

import pytest

from router.interface import Segment
from tests.unit.router.fake_manager import FakeManager
from tests.unit.router.http.serving import app_client, events_of

PATH = "/v1/completions"


def prompts_of(manager: FakeManager) -> list[Segment | None]:
    """What each stream was committed with, in the order of opening."""
    commits = [stream.committed for stream in manager.streams.values()]
    return [None if commit is None else commit.final_segment for commit in commits]


async def test_an_answer_in_one_piece() -> None:
    """With the default length of the OpenAI API."""
    manager = FakeManager()
    async with app_client(manager) as client:
        told = (await client.post(PATH, json={"prompt": "abc", "best_of": 1})).json()
    assert told["id"].startswith("cmpl-")
    assert (told["object"], told["model"]) == ("text_completion", "fake")
    (choice,) = told["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hello world!", "stop")
    assert told["usage"]["prompt_tokens"] == 3
    (stream,) = manager.streams.values()
    assert stream.committed is not None
    assert stream.committed.sampling.max_new_tokens == 16


async def test_an_answer_as_events() -> None:
    """Each token is told as soon as it is there, the tail with the end, then usage, then [DONE]."""
    body = {"prompt": "abc", "stream": True, "stream_options": {"include_usage": True}}
    async with app_client(FakeManager()) as client:
        *chunks, usage, end = events_of((await client.post(PATH, json=body)).text)
    assert [c["choices"][0]["text"] for c in chunks] == ["Hello", " ", "world", "!"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "stop"]
    assert (usage["choices"], usage["usage"]["completion_tokens"], end) == ([], 3, "[DONE]")


async def test_a_token_without_text_is_not_told() -> None:
    """Half of a character is no news."""
    manager = FakeManager(answer=lambda: iter(("", "é")))
    async with app_client(manager) as client:
        reply = await client.post(PATH, json={"prompt": "abc", "stream": True})
        *chunks, _ = events_of(reply.text)
    assert [c["choices"][0]["text"] for c in chunks] == ["é", "!"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [Segment(text="ab")]),
        ([5, 6], [Segment(token_ids=[5, 6])]),
        (["a", "b"], [Segment(text="a"), Segment(text="b")]),
        ([[5], [6, 7]], [Segment(token_ids=[5]), Segment(token_ids=[6, 7])]),
    ],
)
async def test_forms_of_the_prompt(prompt: Any, expected: list[Segment]) -> None:
    """A text, token ids, or a list of either, each with an answer of its own."""
    manager = FakeManager()
    async with app_client(manager) as client:
        told = (await client.post(PATH, json={"prompt": prompt})).json()
    assert [choice["index"] for choice in told["choices"]] == list(range(len(expected)))
    assert prompts_of(manager) == expected


async def test_several_answers_to_several_prompts() -> None:
    """All of the first prompt, then all of the second; each prompt is counted once."""
    manager = FakeManager(answer=lambda: iter("x"))
    async with app_client(manager) as client:
        told = (await client.post(PATH, json={"prompt": ["a", "bcd"], "n": 2})).json()
    assert len(told["choices"]) == 4
    assert told["usage"]["prompt_tokens"] == 4
    assert told["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("streams", [False, True])
async def test_log_probabilities(streams: bool) -> None:
    """Four lists of one length; the token itself is among the others; offsets are of the text."""
    body = {"prompt": "abc", "logprobs": 1, "stream": streams}
    async with app_client(FakeManager()) as client:
        reply = await client.post(PATH, json=body)
        if streams:
            choices = [c["choices"][0] for c in events_of(reply.text) if c != "[DONE]"]
            parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
            told = {key: [value for part in parts for value in part[key]] for key in parts[0]}
        else:
            told = reply.json()["choices"][0]["logprobs"]
    assert told == {
        "tokens": ["<0>", "<1>", "<2>"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{f"<{n}>": -0.5, "<9>": -2.0} for n in (0, 1, 2)],
        "text_offset": [0, 5, 6],
    }


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "not empty"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": ["a", ""]}, "prompt[1]", "not empty"),
        ({"prompt": [[1], []]}, "prompt[1]", "empty list"),
        ({"prompt": [1, "a"]}, "prompt", "mixes"),
        ({"prompt": [1, 1000]}, "prompt[1]", "outside the vocabulary of 1000"),
        ({"prompt": [[1], [-1]]}, "prompt[1][0]", "outside the vocabulary"),
        ({"prompt": 5}, "prompt", "expected"),
        ({"prompt": None}, "prompt", "expected"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "at most 128 answers in all"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"logprobs": 21}, "logprobs", "0 .. 20"),
        ({"logprobs": True}, "logprobs", "expected int"),
        ({"messages": []}, "messages", "no known field"),
    ],
)
async def test_what_is_refused(fields: dict[str, Any], param: str, words: str) -> None:
    """With 400, the name of the field and its value; nothing is opened."""
    manager = FakeManager()
    async with app_client(manager) as client:
        reply = await client.post(PATH, json={"prompt": "x", **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert words in error["message"]
    assert error["param"] == param
    assert not manager.streams


async def test_a_prompt_that_is_missing() -> None:
    """Is named."""
    async with app_client(FakeManager()) as client:
        error = (await client.post(PATH, json={})).json()["error"]
    assert (error["param"], error["message"]) == ("prompt", "prompt is missing")
