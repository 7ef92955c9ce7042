"""Log probabilities in the two forms of the OpenAI API."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from router.interface import TokenEvent
from streamfill.messages.common import TokenLogprob


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token that could have been the next one."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token of the answer."""

    token: str
    """Its text; a part of a character is shown as U+FFFD."""
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Of a chat."""

    content: list[ContentLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Of a completion: four lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    """The token itself is always among them. A part of a character is written as its bytes,
    ``bytes:\\xe2``, and what has no text as its id, ``token_id:7``."""
    text_offset: list[int]
    """Characters of the answer's text before the token."""


class LogprobWriter:
    """Names tokens. One for each request."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        """Args:
        token_bytes: as ``StreamManager.token_bytes``.
        """
        self._token_bytes = token_bytes

    def chat(self, events: Sequence[TokenEvent]) -> ChatLogprobs | None:
        """Of some tokens of a chat's answer. None: the client did not ask."""
        found = [event.logprob for event in events if event.logprob is not None]
        return ChatLogprobs(content=[self._content(each) for each in found]) if found else None

    def completion(
        self, events: Sequence[TokenEvent], num_chars_before: int
    ) -> CompletionLogprobs | None:
        """Of some tokens of a completion. None: the client did not ask.

        Args:
            events: tokens that follow each other.
            num_chars_before: of the answer's text before them.
        """
        written = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for event in events:
            if event.logprob is not None:
                shown = self._shown(event.logprob.token_id)
                written.tokens.append(shown)
                written.token_logprobs.append(event.logprob.logprob)
                written.top_logprobs.append(self._top(event.logprob))
                written.text_offset.append(num_chars_before)
            num_chars_before += len(event.text)
        return written if written.tokens else None

    def _content(self, logprob: TokenLogprob) -> ContentLogprob:
        named = self._named(logprob.token_id, logprob.logprob)
        return ContentLogprob(
            token=named.token,
            logprob=named.logprob,
            bytes=named.bytes,
            top_logprobs=[self._named(token_id, value) for token_id, value in logprob.top],
        )

    def _named(self, token_id: int, logprob: float) -> TopLogprob:
        data = self._token_bytes(token_id)
        return TopLogprob(token=data.decode("utf-8", "replace"), logprob=logprob, bytes=list(data))

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """Of several tokens that are written alike, the token itself stays, or the likeliest."""
        top = {self._shown(logprob.token_id): logprob.logprob}
        for token_id, value in sorted(logprob.top, key=lambda pair: -pair[1]):
            top.setdefault(self._shown(token_id), value)
        return top

    def _shown(self, token_id: int) -> str:
        """Keys of an object must differ, so a part of a character is shown by its bytes, and what
        has no text, since the model alone knows it, by its id."""
        data = self._token_bytes(token_id)
        if not data:
            return f"token_id:{token_id}"
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
