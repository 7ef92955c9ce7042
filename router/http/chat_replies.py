"""Chats: what goes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from router.http.logprobs import ChatLogprobs, LogprobWriter
from router.http.replies import ChoiceText, ReplyHead, stop_reason
from router.http.usage import UsageReply
from router.interface import DoneEvent, TokenEvent


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What the model says."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    """``stop`` or ``length``."""
    stop_reason: str | int | None
    """The stop string or token that ended it."""


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReply
    object: Literal["chat.completion"] = "chat.completion"


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    """In the last piece only."""


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of an answer that is streamed."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: UsageReply | UnsetType | None = UNSET


class ChatForm:
    """See ``replies.ReplyForm``."""

    def __init__(self, head: ReplyHead, logprobs: LogprobWriter) -> None:
        self._head = head
        self._logprobs = logprobs

    def begin(self, index: int) -> ChatChunk:
        """See ``ReplyForm``."""
        return self._chunk(index, Delta(role="assistant", content=""))

    def token(self, index: int, event: TokenEvent) -> ChatChunk | None:
        """See ``ReplyForm``."""
        if not event.text and event.logprob is None:
            return None
        return self._chunk(index, Delta(content=event.text), self._logprobs.chat([event]))

    def done(self, index: int, event: DoneEvent) -> ChatChunk:
        """See ``ReplyForm``."""
        choice = ChatChunkChoice(
            index=index,
            delta=Delta(content=event.text_tail) if event.text_tail else Delta(),
            finish_reason=event.finish_reason,
            stop_reason=stop_reason(event),
        )
        return self._with([choice], None)

    def usage(self, usage: UsageReply) -> ChatChunk:
        """See ``ReplyForm``."""
        return self._with([], usage)

    def whole(self, choices: Sequence[ChoiceText], usage: UsageReply) -> ChatReply:
        """See ``ReplyForm``."""
        return ChatReply(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            choices=[self._choice(n, choice) for n, choice in enumerate(choices)],
            usage=usage,
        )

    def _choice(self, index: int, choice: ChoiceText) -> ChatChoice:
        assert choice.done is not None
        return ChatChoice(
            index=index,
            message=AnswerMessage(content=choice.text),
            logprobs=self._logprobs.chat(choice.tokens),
            finish_reason=choice.done.finish_reason,
            stop_reason=stop_reason(choice.done),
        )

    def _chunk(self, index: int, delta: Delta, logprobs: ChatLogprobs | None = None) -> ChatChunk:
        return self._with([ChatChunkChoice(index=index, delta=delta, logprobs=logprobs)], None)

    def _with(self, choices: list[ChatChunkChoice], usage: UsageReply | None) -> ChatChunk:
        return ChatChunk(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            choices=choices,
            usage=usage if self._head.includes_usage else UNSET,
        )
