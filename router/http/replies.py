"""What is common to the answers of all endpoints: how one is put together from events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from router.http.usage import UsageReply
from router.interface import DoneEvent, TokenEvent


@dataclass(frozen=True, kw_only=True)
class ReplyHead:
    """What is the same in every part of one answer."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    includes_usage: bool = False
    """Chunks have a field for it, null in all but the last one."""


def new_head(prefix: str, model: str, *, includes_usage: bool = False) -> ReplyHead:
    """The head of an answer that begins now.

    Args:
        prefix: of the id, such as ``chatcmpl``.
        model: as the client named it.
        includes_usage: see ``ReplyHead``.
    """
    return ReplyHead(
        id=f"{prefix}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        includes_usage=includes_usage,
    )


@dataclass
class ChoiceText:
    """One choice as far as it has come."""

    tokens: list[TokenEvent] = field(default_factory=list)
    done: DoneEvent | None = None

    @property
    def text(self) -> str:
        """All of it."""
        tail = "" if self.done is None else self.done.text_tail
        return "".join(event.text for event in self.tokens) + tail


class ReplyForm(Protocol):
    """How an endpoint writes its answers. One for each request; chunks come in order."""

    def begin(self, index: int) -> msgspec.Struct | None:
        """The chunk before the first token of a choice."""

    def token(self, index: int, event: TokenEvent) -> msgspec.Struct | None:
        """The chunk of a token; None when there is nothing to tell yet."""

    def done(self, index: int, event: DoneEvent) -> msgspec.Struct:
        """The last chunk of a choice."""

    def usage(self, usage: UsageReply) -> msgspec.Struct:
        """The chunk behind all choices."""

    def whole(self, choices: Sequence[ChoiceText], usage: UsageReply) -> msgspec.Struct:
        """The answer in one piece."""


def stop_reason(event: DoneEvent) -> str | int | None:
    """What ended the answer, when a client asked for it to be the end."""
    return event.matched_stop if event.finish_reason == "stop" else None
