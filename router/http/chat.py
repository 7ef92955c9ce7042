"""Chats: what comes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from router import request_checks as checks
from router.http.errors import not_supported
from router.http.fields import Fields
from router.http.requests import AnswerPlan, CompletionFields, plan_answers
from router.interface import ClusterInfo, Segment
from streamfill.errors import InvalidArgumentError


class ChatMessage(Fields, frozen=True, kw_only=True):
    """One message of the conversation so far."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    """Text, or parts of type text, which are put together without anything between them."""
    name: str | None = None
    # What official clients send back with an answer that they were given; with a value in it, the
    # prompt would have to be another one.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(CompletionFields, frozen=True, kw_only=True):
    """The body of a request."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    """Newer name of ``max_tokens``."""
    logprobs: bool | None = None
    top_logprobs: int | None = None


def plan_chat(request: ChatRequest, request_id: str, info: ClusterInfo) -> AnswerPlan:
    """What is to be done for ``request``. Without a limit, an answer may fill the context.

    Raises:
        StreamError: as ``requests.plan_answers``.
    """
    if request.max_completion_tokens is not None:
        if request.max_tokens not in (None, request.max_completion_tokens):
            raise checks.wrong(
                "max_tokens", request.max_tokens, "max_completion_tokens, or left out"
            )
        if request.max_completion_tokens < 1:
            raise checks.wrong("max_completion_tokens", request.max_completion_tokens, "1 or more")
    if request.top_logprobs and not request.logprobs:
        raise checks.wrong("top_logprobs", request.top_logprobs, "left out without logprobs: true")
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= checks.MAX_LOGPROBS:
        most = f"in 0 .. {checks.MAX_LOGPROBS}"
        raise checks.wrong("top_logprobs", request.top_logprobs, most)
    return plan_answers(
        request,
        [Segment(messages=conversation(request.messages))],
        request_id=request_id,
        info=info,
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        max_tokens=request.max_completion_tokens or info.context_tokens,
    )


def conversation(
    messages: Sequence[ChatMessage], *, is_open: bool = False
) -> list[Mapping[str, Any]]:
    """Messages as the core takes them.

    Args:
        messages: of the client.
        is_open: the last one may be without content, which comes later.

    Raises:
        InvalidArgumentError: names the message and the field.
    """
    if not messages:
        raise checks.wrong("messages", "empty", "at least one message")
    return [
        _message(message, f"messages[{n}]", may_be_empty=is_open and n == len(messages) - 1)
        for n, message in enumerate(messages)
    ]


def _message(message: ChatMessage, name: str, *, may_be_empty: bool) -> Mapping[str, Any]:
    if not message.role:
        raise checks.wrong(f"{name}.role", "", "a role such as user")
    for field in ("audio", "function_call", "tool_calls", "annotations"):
        if getattr(message, field):
            raise not_supported(f"{name}.{field}", getattr(message, field))
    content = message.content
    if content is None and may_be_empty:
        content = ""
    if content is None:
        raise checks.wrong(f"{name}.content", "null", "a text, or a list of parts")
    if not isinstance(content, str):
        content = "".join(_part(part, f"{name}.content[{n}]") for n, part in enumerate(content))
    named = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": content, **named}


def _part(part: Mapping[str, Any], name: str) -> str:
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        raise not_supported(f"{name}.type", kind)
    if not isinstance(text, str):
        message = f"{name}.text is no text"
        raise InvalidArgumentError(message, details={"field": f"{name}.text"})
    return text
