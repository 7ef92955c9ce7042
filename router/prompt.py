"""The growing prompt of one stream: segments of text, token ids or chat messages in, splices out.

The ids are made of a closed beginning, whose tokens are fixed, and an open text tail:

    | closed ids (`_base` of them) | ids of the tail's text |

Text grows the tail. Token ids close it: they count as they are, and text behind them is tokenised
by itself, without the special tokens of a text's beginning. A chat is one text, made by the model's
template; while its last message grows, what the template puts behind it is left off.

A change is drafted first and recorded in the token log only when all of it is accepted; a refused
draft leaves everything as it was.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from router.interface import Segment
from router.recovery.prompt_state import PromptState
from streamfill.errors import FailedPreconditionError, InvalidArgumentError
from streamfill.messages.common import StreamMode
from streamfill.stream.chat import ChatTemplate
from streamfill.stream.incremental import IncrementalTokenizer
from streamfill.stream.splice import Splice, splice_between, token_array
from streamfill.stream.token_log import LoggedSplice, TokenLog
from streamfill.stream.tokenizer import TextTokenizer, checked_text

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLimits:
    """What a prompt must keep to. One token more than the prompt has to fit, the first answer's."""

    vocab_size: int
    context_tokens: int
    pool_tokens: int | None
    """Of the smallest prefill server; None while there is none."""


@dataclass(frozen=True, slots=True)
class _Saved:
    base: int
    tail: IncrementalTokenizer | None
    tail_text: str
    chat: tuple[Mapping[str, Any], ...] | None
    held: str | None


class Prompt:
    """One stream's prompt. Not thread-safe: the stream's operations come one after the other."""

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate | None) -> None:
        self.log = TokenLog()
        self._tokenizer = tokenizer
        self._template = template
        self._base = 0
        self._tail: IncrementalTokenizer | None = None
        self._chat: tuple[Mapping[str, Any], ...] | None = None
        # White space at the open end of the last message, which the template may trim; None while
        # no visible character stands in it, since white space in front may be trimmed as well.
        self._held: str | None = None
        self._drafted_on: _Saved | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no client ever put anything in."""
        no_text = self._tail is None or not self._tail.text
        return self._chat is None and self._base == 0 and no_text

    def draft(self, mode: StreamMode, segment: Segment, limits: PromptLimits) -> list[Splice]:
        """What a segment changes: appended, or in update mode put in the place of everything.

        May take long for a long segment and may run in a thread; nothing else may use this object
        until `record` was called with the result, or `undo_draft`.

        Raises:
            InvalidArgumentError: it is not acceptable, or the prompt would outgrow a limit; names
                both numbers. The prompt is unharmed.
        """
        return self._all_or_nothing(lambda: [self._change(mode, segment, limits)], limits)

    def draft_commit(
        self, mode: StreamMode, segment: Segment | None, limits: PromptLimits
    ) -> list[Splice]:
        """What a commit changes: the final segment, then the end that a chat's template puts.

        Raises:
            InvalidArgumentError: as `draft`; or the prompt is empty.
        """

        def change() -> list[Splice]:
            splices = [] if segment is None else [self._change(mode, segment, limits)]
            if self.is_empty:
                raise InvalidArgumentError("the prompt is empty (0 tokens): nothing to commit")
            if self._chat is not None:
                assert self._template is not None
                assert self._tail is not None
                splices.append(self._tail.replace(self._template.render(self._chat)))
            return splices

        return self._all_or_nothing(change, limits)

    def record(self, splices: Sequence[Splice]) -> list[LoggedSplice]:
        """Put a draft into the log. Splices that change nothing are left out."""
        self._drafted_on = None
        logged: list[LoggedSplice] = []
        for splice in splices:
            if not splice.is_noop_on(self.log.num_tokens):
                logged.append(LoggedSplice(self.log.record(splice), splice))
        return logged

    def undo_draft(self) -> None:
        """Be as before the newest draft, which was not recorded. Costs at most as much as it."""
        if self._drafted_on is not None:
            self._restore(self._drafted_on)

    def text_state(self) -> PromptState:
        """What there is besides the ids, for the log. Not between a draft and its record."""
        tail = self._tail
        return PromptState(
            base_tokens=self._base,
            has_tail=tail is not None,
            has_special=tail is not None and tail.adds_special_tokens,
            text="" if tail is None else tail.text,
            chat=self._chat,
            held=self._held,
        )

    def restore(self, ids: array[int], state: PromptState) -> None:
        """Be as another prompt was that had these ids, its own from now on. For a new object
        only."""
        self.log.restore(ids)
        self._base, self._chat, self._held = state.base_tokens, state.chat, state.held
        if state.has_tail:
            self._tail = self._new_tail(special=state.has_special)
            self._tail.restore(state.text, ids[state.base_tokens :])

    def _change(self, mode: StreamMode, segment: Segment, limits: PromptLimits) -> Splice:
        given = [segment.text, segment.token_ids, segment.messages]
        if sum(value is not None for value in given) != 1:
            raise InvalidArgumentError(
                "a segment needs exactly one of text, token ids and messages"
            )
        appends = mode is StreamMode.APPEND
        if segment.messages is not None:
            return self._set_chat(segment.messages, appends)
        if segment.token_ids is not None:
            if self._chat is not None:
                raise InvalidArgumentError("a chat takes text or messages, no token ids")
            return self._put_ids(_checked_ids(segment.token_ids, limits.vocab_size), appends)
        assert segment.text is not None
        text = checked_text(segment.text, "segment")
        if self._chat is not None:
            return self._grow_chat(text, appends)
        return self._put_text(text, appends)

    # Plain text and ids.

    def _put_text(self, text: str, appends: bool) -> Splice:
        num_tokens = self.log.num_tokens
        if appends:
            if not text:
                return Splice(num_tokens, token_array())
            if self._tail is None:
                self._base = num_tokens
                self._tail = self._new_tail(special=num_tokens == 0)
                self._tail.append(text)
                return Splice(num_tokens, self._tail.ids[:])
            splice = self._tail.append(text)
            return Splice(self._base + splice.keep_tokens, splice.new_token_ids)
        if not text:
            self._base, self._tail = 0, None
            return Splice(0, token_array())
        if self._tail is not None and self._base == 0:
            return self._tail.replace(text)
        self._base = 0
        self._tail = self._new_tail(special=True)
        self._tail.append(text)
        return splice_between(self.log.ids, self._tail.ids)

    def _put_ids(self, token_ids: Sequence[int], appends: bool) -> Splice:
        new = token_array(token_ids)
        num_tokens = self.log.num_tokens
        if not appends:
            self._base, self._tail = len(new), None
            return splice_between(self.log.ids, new)
        if new:
            self._base, self._tail = num_tokens + len(new), None
        return Splice(num_tokens, new)

    def _new_tail(self, *, special: bool) -> IncrementalTokenizer:
        return IncrementalTokenizer(self._tokenizer, add_special_tokens=special)

    # Chats.

    def _set_chat(self, messages: Sequence[Mapping[str, Any]], appends: bool) -> Splice:
        if self._template is None:
            raise InvalidArgumentError("this model has no chat template; send text or token ids")
        if not messages:
            raise InvalidArgumentError("messages is empty: a chat needs at least one message")
        if not appends:
            return self._become_chat(tuple(messages))
        if self._chat is None and not self.is_empty:
            raise FailedPreconditionError(
                "the stream holds plain text; messages must come first or not at all"
            )
        return self._become_chat((*(self._chat or ()), *messages))

    def _grow_chat(self, text: str, appends: bool) -> Splice:
        assert self._chat is not None
        assert self._tail is not None
        *before, last = self._chat
        content = last.get("content")
        if appends and content and not isinstance(content, str):
            raise InvalidArgumentError(
                "the content of the last message is not plain text: no text can follow"
            )
        grown = {**last, "content": (content or "") + text if appends else text}
        held = self._held
        if not appends or held is None:
            return self._become_chat((*before, grown))
        # The common case, at the cost of the new text only. It forecasts that the template shows
        # the content as it is; what counts is rendered at the commit.
        self._chat = (*before, grown)
        visible = text.rstrip()
        if not visible:
            self._held = held + text
            return Splice(self.log.num_tokens, token_array())
        self._held = text[len(visible) :]
        return self._tail.append(held + visible)

    def _become_chat(self, chat: tuple[Mapping[str, Any], ...]) -> Splice:
        assert self._template is not None
        text = self._template.open_prefix(chat)
        checked_text(text, "chat")
        was_chat, self._chat = self._chat is not None, chat
        content = chat[-1].get("content")
        visible = content.rstrip() if isinstance(content, str) else ""
        shown = bool(visible) and isinstance(content, str) and text.endswith(visible)
        self._held = content[len(visible) :] if shown and isinstance(content, str) else None
        if was_chat and self._tail is not None:
            return self._tail.replace(text)
        self._base = 0
        self._tail = self._new_tail(special=False)
        self._tail.append(text)
        return splice_between(self.log.ids, self._tail.ids)

    # All or nothing.

    def _all_or_nothing(
        self, change: Callable[[], list[Splice]], limits: PromptLimits
    ) -> list[Splice]:
        saved = _Saved(
            self._base,
            self._tail,
            self._tail.text if self._tail is not None else "",
            self._chat,
            self._held,
        )
        try:
            splices = change()
            if splices:
                _check_size(splices[-1].num_tokens, limits)
        except BaseException:
            self._restore(saved)
            raise
        self._drafted_on = saved
        return splices

    def _restore(self, saved: _Saved) -> None:
        self._base, self._tail = saved.base, saved.tail
        self._chat, self._held = saved.chat, saved.held
        if self._tail is not None:
            self._tail.replace(saved.tail_text)
        self._drafted_on = None


def _check_size(num_tokens: int, limits: PromptLimits) -> None:
    for limit, name in (
        (limits.context_tokens, "the model's context"),
        (limits.pool_tokens, "the KV pool of a prefill server"),
    ):
        if limit is not None and num_tokens + 1 > limit:
            raise InvalidArgumentError(
                f"the prompt would have {num_tokens} tokens and needs room for one more; "
                f"{name} takes {limit}",
                details={"num_tokens": num_tokens, "limit_tokens": limit},
            )


def _checked_ids(token_ids: Sequence[int], vocab_size: int) -> Sequence[int]:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        bad = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise InvalidArgumentError(
            f"token id {bad} is outside the vocabulary of {vocab_size}",
            details={"token_id": bad, "vocab_size": vocab_size},
        )
    return token_ids
