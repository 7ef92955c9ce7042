"""Message logs in the words of OpenAI's chat API: JSON Lines, one request each.

Each message is one segment. An assistant message at the end is the answer that was given then, and
no part of the prompt. Times inside a request come from the messages' own ``timestamp``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec

from streamfill.messages.common import StreamMode
from streamfill.traces.format import ChatMessage, Request, Segment
from streamfill.traces.importers.bad_rows import ABSENT, BadRows, Problem, each_made
from streamfill.traces.importers.interface import ImportFormat, ImportOptions, OptionName, Record
from streamfill.traces.importers.json_lines import JsonLine, read_json_lines
from streamfill.traces.importers.source_files import ReadProgress, find_files
from streamfill.traces.importers.timestamps import NS_PER_MS, TimestampParser, seconds_to_ns

_NAME: Final = "openai-messages"
_ASSISTANT: Final = "assistant"
_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Part(msgspec.Struct):
    type: str
    text: str = ""


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None
    tool_calls: msgspec.Raw = msgspec.Raw()
    timestamp: float | str | None = None
    """Seconds since any point, or ISO 8601."""


class _Usage(msgspec.Struct):
    completion_tokens: _Count | None = None


class _Line(msgspec.Struct):
    messages: list[_Message]
    timestamp: float | str | None = None
    id: str | int | None = None
    session_id: str | int | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    usage: _Usage | None = None


class _Reader:
    """Makes the requests of one pass."""

    def __init__(self, options: ImportOptions) -> None:
        self._options = options
        self._parser = TimestampParser()
        self._origin_ns: int | None = None
        self._ids: set[str] = set()
        self._num_requests = 0

    def request(self, line: JsonLine[_Line]) -> Request:
        record = line.record
        messages = record.messages
        if messages and messages[-1].role == _ASSISTANT:
            messages = messages[:-1]
        if not messages:
            raise line.error(
                Problem.NO_CONTENT, "messages", ABSENT, "has no message besides the answer"
            )
        chat = [_chat_message(line, index, each) for index, each in enumerate(messages)]
        arrival_ns, delays_ms = self._times(line, messages)
        segments = tuple(
            Segment(delay_ms=delay_ms, messages=(each,))
            for delay_ms, each in zip(delays_ms, chat, strict=True)
        )
        request_id = self._id(line)
        arrival_ms = 0.0
        if arrival_ns is not None:
            if self._origin_ns is None:
                self._origin_ns = arrival_ns
            arrival_ms = (arrival_ns - self._origin_ns) / NS_PER_MS
        self._num_requests += 1
        return Request(
            id=request_id,
            arrival_ms=arrival_ms,
            mode=StreamMode.APPEND,
            segments=segments,
            max_output_tokens=self._num_output_tokens(record),
            session_id=None if record.session_id is None else str(record.session_id),
        )

    def _times(
        self, line: JsonLine[_Line], messages: list[_Message]
    ) -> tuple[int | None, list[float]]:
        """When the request arrives, and the delay of each message."""
        line_ns = self._time_ns(line, "timestamp", line.record.timestamp)
        times = [
            self._time_ns(line, f"messages[{index}].timestamp", message.timestamp)
            for index, message in enumerate(messages)
        ]
        known = [time_ns for time_ns in (line_ns, *times) if time_ns is not None]
        if not known:
            if self._options.request_rate is None:
                raise line.error(
                    Problem.BAD_TIME,
                    "timestamp",
                    ABSENT,
                    f"is missing; {OptionName.REQUEST_RATE.value} draws arrivals instead",
                )
            return None, [0.0] * len(messages)
        first_ns = next((time_ns for time_ns in times if time_ns is not None), known[0])
        # Logs often bear the time of the answer: then the first message tells the arrival.
        arrival_ns = first_ns if line_ns is None else min(line_ns, first_ns)
        delays_ms: list[float] = []
        reached_ns = arrival_ns
        for index, time_ns in enumerate(times):
            there_ns = reached_ns if time_ns is None else time_ns
            if there_ns < reached_ns:
                raise line.error(
                    Problem.BAD_TIME,
                    f"messages[{index}].timestamp",
                    messages[index].timestamp,
                    "is before the message above it",
                )
            delays_ms.append((there_ns - reached_ns) / NS_PER_MS)
            reached_ns = there_ns
        return arrival_ns, delays_ms

    def _time_ns(self, line: JsonLine[_Line], field: str, value: float | str | None) -> int | None:
        if value is None:
            return None
        try:
            if isinstance(value, str):
                return self._parser.parse_ns(value)
            if math.isfinite(value) and value >= 0:
                return seconds_to_ns(value)
        except (ValueError, OverflowError):
            pass
        raise line.error(Problem.BAD_TIME, field, value, "must be seconds or an ISO 8601 time")

    def _id(self, line: JsonLine[_Line]) -> str:
        given = line.record.id
        request_id = f"{_NAME}-{self._num_requests}" if given is None else str(given)
        if request_id in self._ids:
            raise line.error(Problem.DUPLICATE, "id", given, "is the id of a request above")
        self._ids.add(request_id)
        return request_id

    def _num_output_tokens(self, record: _Line) -> int:
        used = None if record.usage is None else record.usage.completion_tokens
        limit = record.max_completion_tokens or record.max_tokens
        return used or limit or self._options.output_tokens


def _chat_message(line: JsonLine[_Line], index: int, message: _Message) -> ChatMessage:
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type != "text":
                raise line.error(
                    Problem.WRONG_TYPE,
                    f"messages[{index}].content[{number}].type",
                    part.type,
                    "must be text; other parts cannot be streamed",
                )
        content = "".join(part.text for part in content)
    # A call of a tool is context too, in the form in which the log has it.
    calls = bytes(message.tool_calls).decode()
    text = (content or "") + (calls if calls not in ("", "null", "[]") else "")
    if not text:
        raise line.error(
            Problem.NO_CONTENT, f"messages[{index}].content", message.content, "has no text"
        )
    return ChatMessage(role=message.role, content=text)


def read_openai_messages(
    paths: tuple[Path, ...], options: ImportOptions, bad_rows: BadRows, progress: ReadProgress
) -> Iterator[Record]:
    """One request per line; see `interface.ReadRecords`."""
    files = find_files(paths, "*.jsonl")
    progress.expect(files)
    reader = _Reader(options)
    for path in files:
        lines = read_json_lines(path, _Line, bad_rows, progress)
        yield from each_made(lines, reader.request, bad_rows)


FORMAT: Final = ImportFormat(
    name=_NAME,
    summary='message logs of OpenAI-style chats: lines {"messages": [...], "timestamp": ...}',
    source="message log",
    read=read_openai_messages,
    options=frozenset({OptionName.REQUEST_RATE, OptionName.OUTPUT_TOKENS}),
)
