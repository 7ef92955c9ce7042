"""Completions and uploads: what goes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from router.http.logprobs import CompletionLogprobs, LogprobWriter
from router.http.replies import ChoiceText, ReplyHead, stop_reason
from router.http.usage import UsageReply
from router.interface import DoneEvent, TokenEvent


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    """``stop`` or ``length``; null before the end."""
    stop_reason: str | int | UnsetType | None = UNSET
    """The stop string or token that ended it."""


class CompletionReply(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer, or one event of an answer that is streamed."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: UsageReply | UnsetType | None = UNSET


class CompletionForm:
    """See ``replies.ReplyForm``."""

    def __init__(self, head: ReplyHead, logprobs: LogprobWriter) -> None:
        self._head = head
        self._logprobs = logprobs
        self._num_chars: Counter[int] = Counter()
        """Told so far, by choice."""

    def begin(self, index: int) -> None:
        """See ``ReplyForm``: nothing comes before the text."""

    def token(self, index: int, event: TokenEvent) -> CompletionReply | None:
        """See ``ReplyForm``."""
        if not event.text and event.logprob is None:
            return None
        logprobs = self._logprobs.completion([event], self._num_chars[index])
        self._num_chars[index] += len(event.text)
        return self._reply(
            [CompletionChoice(index=index, text=event.text, logprobs=logprobs)], UNSET
        )

    def done(self, index: int, event: DoneEvent) -> CompletionReply:
        """See ``ReplyForm``."""
        choice = CompletionChoice(
            index=index,
            text=event.text_tail,
            finish_reason=event.finish_reason,
            stop_reason=stop_reason(event),
        )
        return self._reply([choice], UNSET)

    def usage(self, usage: UsageReply) -> CompletionReply:
        """See ``ReplyForm``."""
        return self._reply([], usage)

    def whole(self, choices: Sequence[ChoiceText], usage: UsageReply) -> CompletionReply:
        """See ``ReplyForm``."""
        return self._reply([self._choice(n, choice) for n, choice in enumerate(choices)], usage)

    def _choice(self, index: int, choice: ChoiceText) -> CompletionChoice:
        assert choice.done is not None
        return CompletionChoice(
            index=index,
            text=choice.text,
            logprobs=self._logprobs.completion(choice.tokens, 0),
            finish_reason=choice.done.finish_reason,
            stop_reason=stop_reason(choice.done),
        )

    def _reply(
        self, choices: list[CompletionChoice], usage: UsageReply | UnsetType
    ) -> CompletionReply:
        if usage is UNSET and self._head.includes_usage:
            told: UsageReply | UnsetType | None = None
        else:
            told = usage
        return CompletionReply(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            choices=choices,
            usage=told,
        )
