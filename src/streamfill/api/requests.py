"""What a user of the client says, as protobuf messages.

Only what cannot be put on the wire is refused here; all other values are judged by the router, so
that every client gets the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

from google.protobuf.message import Message

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.types import Mode, SamplingOptions
from streamfill.errors import InvalidArgumentError

MessageT = TypeVar("MessageT", bound=Message)

_MODES = {"append": pb.STREAM_MODE_APPEND, "update": pb.STREAM_MODE_UPDATE}


@contextmanager
def sendable(what: str = "") -> Iterator[None]:
    """Messages are made inside the block. protobuf has its own errors for values that they cannot
    hold.

    Raises:
        InvalidArgumentError: it is such a value; begins with ``what``.
    """
    try:
        yield
    except ValueError as error:
        raise InvalidArgumentError(f"{what} cannot be sent: {error}".lstrip()) from error


def typed(kind: type[MessageT], fields: Mapping[str, Any]) -> MessageT:
    """The message with these fields.

    Raises:
        TypeError: a value has another type than its field; protobuf's own error does not say which.
        ValueError: as of protobuf.
    """
    try:
        return kind(**fields)
    except TypeError as error:
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except TypeError:
                got = type(value).__name__
                raise TypeError(f"{name} has a wrong type, or holds one: {got}") from error
        raise


def open_message(
    *,
    mode: Mode,
    priority: int,
    request_id: str,
    deadline_s: float | None,
    ttft_slo_ms: float | None,
    messages: Sequence[Mapping[str, str]] | None,
) -> pb.Open:
    """The first message of a stream.

    Raises:
        InvalidArgumentError: a value that no stream can have.
    """
    if mode not in _MODES:
        known = " or ".join(repr(name) for name in get_args(Mode))
        raise InvalidArgumentError(f"mode is {mode!r}; it must be {known}")
    with sendable():
        fields = {
            "mode": _MODES[mode],
            "priority": priority,
            "request_id": request_id,
            "deadline_s": deadline_s,
            "ttft_slo_ms": ttft_slo_ms,
            "messages": None if messages is None else [chat_message(one) for one in messages],
        }
        return typed(pb.Open, fields)


def segment(
    text: str | bytes | None,
    token_ids: Sequence[int] | None,
    messages: Sequence[Mapping[str, str]] | None,
    next_in_s: float | None = None,
) -> pb.Segment:
    """A piece of context; exactly one of the first three arguments is not None.

    Raises:
        InvalidArgumentError: none or several are given, or the value cannot be sent.
        TypeError: it has a wrong type.
    """
    given = {"text": text, "token_ids": token_ids, "messages": messages}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        got = " and ".join(names) or "none"
        raise InvalidArgumentError(f"exactly one of text, token_ids, messages is needed, not {got}")
    try:
        if isinstance(text, bytes):
            return typed(pb.Segment, {"text_utf8": text, "next_in_s": next_in_s})
        if text is not None:
            return typed(pb.Segment, {"text": text, "next_in_s": next_in_s})
        if token_ids is not None:
            ids = typed(pb.TokenIds, {"ids": token_ids})
            return typed(pb.Segment, {"token_ids": ids, "next_in_s": next_in_s})
        chat = [chat_message(one) for one in messages or ()]
        spoken = pb.ChatMessages(messages=chat)
        return typed(pb.Segment, {"messages": spoken, "next_in_s": next_in_s})
    except UnicodeEncodeError as error:
        raise _surrogate(error) from error
    except ValueError as error:
        raise InvalidArgumentError(f"{names[0]} cannot be sent: {error}") from error


def optional_segment(
    text: str | bytes | None,
    token_ids: Sequence[int] | None,
    messages: Sequence[Mapping[str, str]] | None,
) -> pb.Segment | None:
    """As ``segment``, where nothing at all may be given too."""
    if text is None and token_ids is None and messages is None:
        return None
    return segment(text, token_ids, messages)


def chat_message(message: Mapping[str, str]) -> pb.ChatMessage:
    """A message with the keys ``role`` and ``content`` and no others.

    Raises:
        InvalidArgumentError: a key is missing or unknown.
    """
    if set(message) != {"role", "content"}:
        keys = ", ".join(sorted(message)) or "none"
        raise InvalidArgumentError(f"a chat message has the keys role and content, not {keys}")
    return typed(pb.ChatMessage, message)


def sampling(options: SamplingOptions) -> pb.Sampling:
    """How the answer is sampled.

    Raises:
        TypeError: there is no such option, or the value has the wrong type.
        InvalidArgumentError: a number is too large for the wire.
    """
    unknown = set(options) - set(SamplingOptions.__annotations__)
    if unknown:
        raise TypeError(f"unknown sampling options: {', '.join(sorted(unknown))}")
    if isinstance(options.get("stop"), str):
        raise TypeError("stop must be a sequence of strings, not one string")
    given = {name: value for name, value in options.items() if value is not None}
    with sendable("a sampling option"):
        return typed(pb.Sampling, given)


def _surrogate(error: UnicodeEncodeError) -> InvalidArgumentError:
    character = error.object[error.start]
    return InvalidArgumentError(
        f"text has no UTF-8 form: {character!r} at offset {error.start} is half a surrogate pair"
    )
