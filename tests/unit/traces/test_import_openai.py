"""The importer of message logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamfill.traces.format import ChatMessage
from streamfill.traces.importers.bad_rows import BadRowError, Problem
from streamfill.traces.importers.interface import ImportOptions
from tests.unit.traces.import_builders import import_files, write_json

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def test_each_message_is_a_segment_and_the_answer_is_none(tmp_path: Path) -> None:
    """Parts of text are joined, and the assistant's last message is no part of the prompt."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path = write_json(
        tmp_path / "log.jsonl",
        {
            "messages": [
                {"role": "system", "content": "brief"},
                {"role": "user", "content": parts},
                ANSWER,
                {"role": "user", "content": "more", "name": "kim"},
                ANSWER,
            ],
            "timestamp": 10,
            "id": "call-1",
            "session_id": 8,
            "model": "any",
        },
    )
    imported = import_files("openai-messages", path, options=ImportOptions(output_tokens=17))
    (request,), (script,) = imported.requests, imported.scripts
    assert len(request.segments) == 4
    assert script.prompt == (
        ChatMessage(role="system", content="brief"),
        ChatMessage(role="user", content="ab"),
        ChatMessage(role="assistant", content="hello"),
        ChatMessage(role="user", content="more"),
    )
    assert (request.id, request.session_id, request.max_output_tokens) == ("call-1", "8", 17)


@pytest.mark.parametrize(
    ("fields", "num_output_tokens"),
    [
        ({"usage": {"completion_tokens": 5, "prompt_tokens": 9}, "max_tokens": 99}, 5),
        ({"usage": {"completion_tokens": 0}, "max_tokens": 99}, 99),
        ({"usage": None, "max_completion_tokens": 40}, 40),
        ({}, 64),
    ],
)
def test_the_answer_is_as_long_as_the_log_says(
    tmp_path: Path, fields: dict[str, Any], num_output_tokens: int
) -> None:
    """What was generated counts before what was allowed, and that before the option."""
    path = write_json(tmp_path / "log.jsonl", {"messages": [USER], "timestamp": 0} | fields)
    (request,) = import_files("openai-messages", path).requests
    assert request.max_output_tokens == num_output_tokens


def test_times_of_messages_are_delays_inside_the_request(tmp_path: Path) -> None:
    """A line that bears the time of the answer arrives with its first message; a message without a
    time comes with the one before it."""
    path = write_json(
        tmp_path / "log.jsonl",
        {
            "messages": [
                {**USER, "timestamp": "2024-05-01T10:00:00Z"},
                {"role": "tool", "content": "x", "timestamp": "2024-05-01T10:00:02.5Z"},
                USER,
                {**ANSWER, "timestamp": "2024-05-01T10:00:09Z"},
            ],
            "timestamp": "2024-05-01T10:00:10Z",
        },
        {"messages": [USER], "timestamp": "2024-05-01T12:00:04+02:00"},
    )
    imported = import_files("openai-messages", path)
    assert [request.arrival_ms for request in imported.requests] == [0.0, 4000.0]
    assert [segment.delay_ms for segment in imported.requests[0].segments] == [0.0, 2500.0, 0.0]


def test_a_call_of_a_tool_stays_in_the_context(tmp_path: Path) -> None:
    """The message has no content; the call is written as the log has it."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}
    tool = {"role": "tool", "content": "42", "tool_call_id": "c"}
    path = write_json(tmp_path / "log.jsonl", {"messages": [USER, call, tool], "timestamp": 1})
    (script,) = import_files("openai-messages", path).scripts
    assert script.prompt[1] == ChatMessage(role="assistant", content='[{"id": "c"}]')


def test_arrivals_are_drawn_for_logs_without_times(tmp_path: Path) -> None:
    """A rate must be given; the delays between messages stay."""
    slow = [{**USER, "timestamp": 5}, {**USER, "timestamp": 7}]
    path = write_json(tmp_path / "log.jsonl", {"messages": [USER]}, {"messages": slow})
    with pytest.raises(BadRowError, match=r"line 1, timestamp: is missing; --request-rate draws"):
        import_files("openai-messages", path)
    imported = import_files("openai-messages", path, options=ImportOptions(request_rate=2.0))
    assert imported.header.drawn["arrival_ms"] == "Poisson process, 2 per second"
    assert imported.requests[1].arrival_ms > 0
    assert [segment.delay_ms for segment in imported.requests[1].segments] == [0.0, 2000.0]


@pytest.mark.parametrize(
    ("line", "problem", "text"),
    [
        ({"messages": [ANSWER]}, Problem.NO_CONTENT, "messages: has no message besides the"),
        ({"messages": []}, Problem.NO_CONTENT, "messages: has no message besides the"),
        ({}, Problem.MISSING, "messages: is missing"),
        ({"messages": [{"role": "user"}]}, Problem.NO_CONTENT, "messages[0].content = None: has"),
        ({"messages": [{"content": "x"}]}, Problem.MISSING, "messages[0].role: is missing"),
        ({"messages": [USER, 5]}, Problem.WRONG_TYPE, "messages[1] = 5: Expected `object`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            Problem.WRONG_TYPE,
            "messages[0].content[0].type = 'image_url': must be text",
        ),
        (
            {"messages": [USER], "timestamp": "noon"},
            Problem.BAD_TIME,
            "timestamp = 'noon': must be seconds or an ISO 8601 time",
        ),
        (
            {"messages": [USER], "timestamp": 1e300},
            Problem.BAD_TIME,
            "timestamp = 1e+300: must be seconds or an ISO 8601 time",
        ),
        (
            {"messages": [{**USER, "timestamp": 9}, {**USER, "timestamp": 8}]},
            Problem.BAD_TIME,
            "messages[1].timestamp = 8.0: is before the message above it",
        ),
        (
            {"messages": [USER], "max_tokens": -1},
            Problem.OUT_OF_RANGE,
            "max_tokens = -1: ",
        ),
        ({"messages": [USER], "id": "first"}, Problem.DUPLICATE, "id = 'first': is the id of"),
    ],
)
def test_a_bad_line_names_its_field(
    tmp_path: Path, line: dict[str, Any], problem: Problem, text: str
) -> None:
    """File, line, field, value and what is right."""
    good = {"messages": [USER], "timestamp": 1, "id": "first"}
    path = write_json(tmp_path / "log.jsonl", good, {"timestamp": 2} | line)
    with pytest.raises(BadRowError) as caught:
        import_files("openai-messages", path)
    assert caught.value.problem is problem
    assert str(caught.value).startswith(f"{path}, line 2, {text}")
    imported = import_files("openai-messages", path, skip_bad=True)
    assert imported.bad_rows.counts == {problem: 1}
