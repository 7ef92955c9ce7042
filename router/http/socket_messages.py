"""The messages on a WebSocket, as those of ``stream_call``, and back.

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
from router.http.chat import ChatMessage, conversation
from router.http.errors import ErrorObject, error_object
from router.http.fields import Fields, SamplingFields, convert
from router.http.sampling import commit_options, open_options
from router.interface import (
    Acknowledged,
    CommitOptions,
    DoneEvent,
    OpenOptions,
    Segment,
    TokenEvent,
)
from router.stream_call import (
    Append,
    CallEvent,
    Cancel,
    ClientMessage,
    Commit,
    Failed,
    Open,
    Opened,
    Operation,
    Refused,
    Unreadable,
    Update,
)
from streamfill.errors import InvalidArgumentError, StreamError
from streamfill.messages.common import StreamMode

T = TypeVar("T")

MAX_SEQ = 2**63 - 1


class OpenFields(Fields, frozen=True, kw_only=True):
    """``open``: the first message. See ``fields.OpeningFields``."""

    priority: int | None = None
    request_id: str | None = None
    deadline_s: float | None = None
    ttft_slo_ms: float | None = None
    mode: Literal["append", "update"] = "append"
    messages: list[ChatMessage] | None = None
    """First messages of a chat, the last one open."""


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
    known = "open, append, update, commit or cancel"
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


class ErrorMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """An operation was refused; the stream goes on."""

    seq: int
    error: ErrorObject


class FailedMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="failed"):
    """The stream ended badly. The last message."""

    error: ErrorObject


def server_message(event: CallEvent, stream_id: int) -> bytes:
    """What the client is told, as JSON.

    Args:
        stream_id: of the call's stream; of no meaning before it is open.
    """
    match event:
        case Refused():
            return msgspec.json.encode(ErrorMessage(seq=event.seq, error=error_object(event.error)))
        case Failed():
            return msgspec.json.encode(FailedMessage(error=error_object(event.error)))
        case Opened():
            return msgspec.json.encode({"type": "opened", "stream_id": str(event.stream_id)})
        case Acknowledged():
            return msgspec.json.encode(_acknowledged(event))
        case TokenEvent():
            return msgspec.json.encode(_token(event))
        case DoneEvent():
            return msgspec.json.encode(_done(event, stream_id))


def _acknowledged(event: Acknowledged) -> dict[str, object]:
    return {
        "type": "acknowledged",
        "seq": event.client_seq,
        "num_received_tokens": event.num_received_tokens,
        "num_computed_tokens": event.num_computed_tokens,
        "num_invalidated_tokens": event.num_invalidated_tokens,
    }


def _token(event: TokenEvent) -> dict[str, object]:
    told: dict[str, object] = {
        "type": "token",
        "index": event.index,
        "token_id": event.token_id,
        "text": event.text,
    }
    if event.logprob is not None:
        top = [{"token_id": token_id, "logprob": value} for token_id, value in event.logprob.top]
        told |= {"logprob": event.logprob.logprob, "top_logprobs": top}
    return told


def _done(event: DoneEvent, stream_id: int) -> dict[str, object]:
    usage = event.usage
    return {
        "type": "done",
        "finish_reason": event.finish_reason,
        "matched_stop": event.matched_stop,
        "text_tail": event.text_tail,
        "usage": {
            "num_prompt_tokens": usage.num_prompt_tokens,
            "num_output_tokens": usage.num_output_tokens,
            "num_cached_tokens": usage.num_cached_tokens,
            "num_computed_tokens": usage.num_computed_tokens,
            "num_recomputed_tokens": usage.num_recomputed_tokens,
            "num_reused_tokens": usage.num_reused_tokens,
            "num_invalidated_tokens": usage.num_invalidated_tokens,
        },
        "metadata": {
            "stream_id": str(stream_id),
            "prefill_server": event.prefill_server,
            "decode_server": event.decode_server,
            "decoded_by_prefill": event.decoded_by_prefill,
            "handoff": event.handoff,
            "num_attempts": event.num_attempts,
        },
    }
