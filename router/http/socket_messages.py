"""What a client says on a WebSocket, as ``call_messages``.

Each is a JSON object with a ``type``. The names and their meanings are those of
``streamfill.proto``; ids of streams are strings, since JavaScript's numbers are too small for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec

from router import request_checks as checks
from router.call_messages import (
    Append,
    Cancel,
    ClientMessage,
    Commit,
    Open,
    Operation,
    Resume,
    Unreadable,
    Update,
)
from router.http.chat import ChatMessage, conversation
from router.http.fields import Fields, SamplingFields, convert
from router.http.sampling import commit_options, open_options
from router.interface import CommitOptions, OpenOptions, ResumePoint, Segment
from streamfill.errors import InvalidArgumentError, StreamError
from streamfill.messages.common import StreamMode

T = TypeVar("T")

MAX_SEQ = 2**63 - 1
MAX_SEQ_DIGITS = len(str(MAX_SEQ))
"""Python makes no number of thousands of digits."""


class OpenFields(Fields, frozen=True, kw_only=True):
    """``open``: the first message. See ``fields.OpeningFields``."""

    priority: int | None = None
    request_id: str | None = None
    deadline_s: float | None = None
    ttft_slo_ms: float | None = None
    mode: Literal["append", "update"] = "append"
    messages: list[ChatMessage] | None = None
    """First messages of a chat, the last one open."""


class ResumeFields(Fields, frozen=True, kw_only=True):
    """``resume``: the first message of a client that comes back. See ``Resume`` in the proto."""

    stream_id: str
    next_token_index: int = 0
    next_seq: int | None = None
    refused_seqs: tuple[int, ...] = ()


class SegmentFields(Fields, frozen=True, kw_only=True):
    """``append`` and ``update``: one of text, token ids and messages."""

    text: str | None = None
    token_ids: list[int] | None = None
    messages: list[ChatMessage] | None = None
    next_in_s: float | None = None
    """When the next piece is to be expected."""


class CommitFields(SamplingFields, frozen=True, kw_only=True):
    """``commit``: with a last piece or without."""

    text: str | None = None
    token_ids: list[int] | None = None
    messages: list[ChatMessage] | None = None
    logprobs: int | None = None


class CancelFields(Fields, frozen=True, kw_only=True):
    """``cancel``"""

    reason: str = ""


def client_message(data: str | bytes, vocab_size: int) -> ClientMessage:
    """What a message asks for. Its fields are checked when it is applied."""
    try:
        fields = msgspec.json.decode(data)
        if isinstance(data, bytes) or not isinstance(fields, dict):
            raise InvalidArgumentError("a message is a JSON object, sent as text")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        return ClientMessage(None, Unreadable(InvalidArgumentError(f"no JSON: {error}")))
    except StreamError as error:
        return ClientMessage(None, Unreadable(error))
    kind, seq = fields.pop("type", None), fields.pop("seq", None)
    if seq is not None and (type(seq) is not int or not 1 <= seq <= MAX_SEQ):
        bad = checks.wrong("seq", repr(seq)[:40], "a number from 1 on")
        return ClientMessage(None, Unreadable(bad))
    return ClientMessage(seq, _operation(kind, fields, vocab_size))


def _operation(kind: object, fields: dict[str, Any], vocab_size: int) -> Operation:
    match kind:
        case "open":
            return Open(_reader(OpenFields, fields, _opening))
        case "resume":
            return Resume(_reader(ResumeFields, fields, _resume_point))
        case "append":
            return Append(_reader(SegmentFields, fields, partial(_segment, vocab_size)))
        case "update":
            return Update(_reader(SegmentFields, fields, partial(_segment, vocab_size)))
        case "commit":
            return Commit(_reader(CommitFields, fields, partial(_commit, vocab_size)))
        case "cancel":
            try:
                return Cancel(convert(CancelFields, fields).reason)
            except StreamError as error:
                return Unreadable(error)
    known = "open, resume, append, update, commit or cancel"
    return Unreadable(checks.wrong("type", repr(kind)[:40], known))


def _reader(
    kind: type[Fields], fields: dict[str, Any], make: Callable[[Any], T]
) -> Callable[[], T]:
    return lambda: make(convert(kind, fields))


def _opening(fields: OpenFields) -> OpenOptions:
    options = open_options(fields, "", StreamMode(fields.mode))
    if fields.messages is None:
        return options
    return replace(options, messages=conversation(fields.messages, is_open=True))


def _resume_point(fields: ResumeFields) -> tuple[int, ResumePoint]:
    text = fields.stream_id
    is_number = text.isascii() and text.isdigit() and len(text) <= MAX_SEQ_DIGITS
    if not (is_number and int(text) <= MAX_SEQ):
        raise checks.wrong("stream_id", text[:40], "the digits that came with opened")
    numbers = {"next_token_index": fields.next_token_index, "next_seq": fields.next_seq or 0}
    numbers |= {f"refused_seqs[{n}]": seq for n, seq in enumerate(fields.refused_seqs)}
    for name, value in numbers.items():
        if not 0 <= value <= MAX_SEQ:
            raise checks.wrong(name, value, f"from 0 to {MAX_SEQ}")
    return int(text), ResumePoint(
        next_token_index=fields.next_token_index,
        next_seq=fields.next_seq,
        refused_seqs=fields.refused_seqs,
    )


def _segment(vocab_size: int, fields: SegmentFields) -> Segment:
    segment = _content(fields, vocab_size)
    if segment is None:
        raise InvalidArgumentError(
            "the message has no content: one of text, token_ids, messages is needed"
        )
    if fields.next_in_s is None:
        return segment
    return replace(segment, next_in_s=checks.checked_next_in_s(fields.next_in_s, "next_in_s"))


def _commit(vocab_size: int, fields: CommitFields) -> CommitOptions:
    return commit_options(
        fields,
        vocab_size=vocab_size,
        num_logprobs=fields.logprobs,
        final_segment=_content(fields, vocab_size),
    )


def _content(fields: SegmentFields | CommitFields, vocab_size: int) -> Segment | None:
    names = [n for n in ("text", "token_ids", "messages") if getattr(fields, n) is not None]
    if len(names) > 1:
        raise InvalidArgumentError(f"the message has {' and '.join(names)}; give one of them")
    if fields.text is not None:
        return Segment(text=fields.text)
    if fields.token_ids is not None:
        checks.check_token_ids(fields.token_ids, vocab_size, "token_ids")
        return Segment(token_ids=fields.token_ids)
    if fields.messages is not None:
        return Segment(messages=conversation(fields.messages, is_open=True))
    return None
