"""Where a prompt's ids come from, besides the ids themselves: its text and its chat.

A state is compared with the one before to log only what is new; a series of such changes is put
together again to the last state. Pure.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from router.recovery.records import Change, ChatChange, TextChange
from streamfill.errors import ProtocolError
from streamfill.messages.codec import pack_ids, unpack_ids
from streamfill.stream.splice import Splice, apply_splice, common_prefix_chars, token_array

Chat: TypeAlias = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class PromptState:
    """See `prompt.Prompt`."""

    base_tokens: int = 0
    has_tail: bool = False
    has_special: bool = False
    text: str = ""
    """Of the tail."""
    chat: Chat | None = None
    held: str | None = None


EMPTY = PromptState()


def change_between(
    before: PromptState, after: PromptState, ids: Sequence[int], keep_tokens: int
) -> Change:
    """What to log.

    Args:
        before: as it was logged last.
        after: as it is now.
        ids: the whole prompt, now.
        keep_tokens: how many of them are known to be as they were.
    """
    text = None
    if after.text is not before.text and after.text != before.text:
        keep = common_prefix_chars(before.text, after.text)
        text = TextChange(keep_chars=keep, new=after.text[keep:])
    chat = None
    if after.chat is not None and after.chat is not before.chat:
        chat = _chat_change(before.chat or (), after.chat)
    return Change(
        keep_tokens=keep_tokens,
        new_ids=pack_ids(ids[keep_tokens:]),
        base_tokens=after.base_tokens,
        has_tail=after.has_tail,
        has_special=after.has_special,
        text=text,
        is_chat=after.chat is not None,
        chat=chat,
        held=after.held,
    )


class PromptReplay:
    """A prompt that is put together from its changes."""

    def __init__(self) -> None:
        self.ids: array[int] = token_array()
        self.state = EMPTY

    def apply(self, change: Change) -> None:
        """The next one.

        Raises:
            ProtocolError: it does not fit to what was before.
        """
        try:
            apply_splice(self.ids, Splice(change.keep_tokens, unpack_ids(change.new_ids)))
        except ValueError as error:
            raise ProtocolError(f"a logged change does not fit: {error}") from error
        text = self.state.text
        if change.text is not None:
            text = _changed(text, change.text)
        chat = self.state.chat
        if change.chat is not None:
            chat = _changed_chat(chat or (), change.chat)
        self.state = PromptState(
            base_tokens=change.base_tokens,
            has_tail=change.has_tail,
            has_special=change.has_special,
            text=text,
            chat=chat if change.is_chat else None,
            held=change.held,
        )


def _chat_change(before: Chat, after: Chat) -> ChatChange:
    keep = 0
    while keep < min(len(before), len(after)) and before[keep] == after[keep]:
        keep += 1
    grown = None
    behind = keep
    if keep < min(len(before), len(after)):
        grown = _grown(before[keep], after[keep])
        behind += grown is not None
    new = tuple(msgspec.msgpack.encode(dict(message)) for message in after[behind:])
    return ChatChange(keep_messages=keep, grown=grown, new=new)


def _grown(before: Mapping[str, Any], after: Mapping[str, Any]) -> TextChange | None:
    old, new = before.get("content"), after.get("content")
    if not isinstance(old, str) or not isinstance(new, str):
        return None
    if {**before, "content": None} != {**after, "content": None}:
        return None
    keep = common_prefix_chars(old, new)
    return TextChange(keep_chars=keep, new=new[keep:])


def _changed(text: str, change: TextChange) -> str:
    if change.keep_chars > len(text):
        raise ProtocolError(f"a logged text keeps {change.keep_chars} characters of {len(text)}")
    return text[: change.keep_chars] + change.new


def _changed_chat(chat: Chat, change: ChatChange) -> Chat:
    keep = change.keep_messages
    if keep + (change.grown is not None) > len(chat):
        raise ProtocolError(f"a logged chat keeps {keep} messages of {len(chat)}")
    messages = list(chat[:keep])
    if change.grown is not None:
        last = chat[keep]
        messages.append({**last, "content": _changed(str(last.get("content")), change.grown)})
    messages.extend(map(_message, change.new))
    return tuple(messages)


def _message(data: bytes) -> Mapping[str, Any]:
    try:
        return msgspec.msgpack.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a logged message of {len(data)} bytes is none: {error}") from error
