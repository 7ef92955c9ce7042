"""Prompts as token ids, for peers that are given ids; streamed ones piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from streamfill.errors import FailedPreconditionError, InvalidArgumentError
from streamfill.stream.chat import ChatTemplate
from streamfill.stream.detokenizer import IncrementalDetokenizer
from streamfill.stream.incremental import IncrementalTokenizer
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer
from streamfill.traces.format import ChatMessage
from streamfill.traces.script import Content

_NUM_CONTEXT_IDS: Final = 5
"""Ids of the prompt in front of an answer, so that its first token keeps its leading space."""


class PromptTokens:
    """The tokenizer and the chat template of one model, as the router uses them."""

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self._template = template

    @classmethod
    def load(cls, model_path: Path) -> PromptTokens:
        """Those of a model folder. Raises ``ModelError``."""
        return cls(load_tokenizer(model_path), ChatTemplate.load(model_path))

    def ids(self, prompt: Content) -> list[int]:
        """The ids of a whole prompt.

        Raises:
            InvalidArgumentError: there are none, or messages for a model without a template.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, add_special_tokens=True)
        elif prompt and isinstance(prompt[0], ChatMessage):
            if self._template is None:
                raise InvalidArgumentError("this model has no chat template")
            messages = [message_dict(each) for each in prompt]
            text = self._template.render(messages)
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = [each for each in prompt if isinstance(each, int)]
        if not ids:
            raise InvalidArgumentError("the prompt is empty (0 tokens)")
        return ids

    def text(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> str:
        """The text of an answer."""
        context = prompt_ids[-_NUM_CONTEXT_IDS:]
        detokenizer = IncrementalDetokenizer(self.tokenizer, context_ids=context)
        return detokenizer.push(output_ids) + detokenizer.flush()


class PieceTokens:
    """A prompt that comes in pieces to a server that can only append ids.

    Of a text only what lies before its last safe point is given out (`stream.cut_rule`): no later
    text changes its tokens. So the ids given out are those of the whole prompt, whatever the
    pieces. Without safe points everything is held until the end. At least one token is always
    held, since the last ids have to come with the commit.

    Invariant: the ids given out are a prefix of the ids of the whole prompt.
    """

    def __init__(self, tokens: PromptTokens) -> None:
        self._tokens = tokens
        self._given: list[int] = []
        self._held_ids: list[int] = []
        self._text: str | None = None
        self._fixed: IncrementalTokenizer | None = None
        self._num_fixed_chars = 0

    @property
    def given(self) -> Sequence[int]:
        """All ids given out so far."""
        return self._given

    def append(self, piece: Content) -> list[int]:
        """The ids that are certain now; may be empty.

        Raises:
            InvalidArgumentError: a piece of chat messages, or of another kind than the ones before.
        """
        if isinstance(piece, str):
            return self._append_text(piece)
        if any(isinstance(each, ChatMessage) for each in piece):
            raise InvalidArgumentError("chat messages cannot be streamed to this server")
        if self._text is not None:
            raise InvalidArgumentError("token ids behind streamed text")
        self._held_ids.extend(each for each in piece if isinstance(each, int))
        return self._give(self._held_ids[:-1], self._held_ids[-1:])

    def commit(self, piece: Content | None) -> list[int]:
        """The rest, with an optional last piece; never empty. Raises as `append`."""
        certain = self.append(piece) if piece is not None else []
        if self._text is not None and self._fixed is not None:
            splice = self._fixed.append(self._text[self._num_fixed_chars :])
            self._num_fixed_chars = len(self._text)
            if splice.keep_tokens < len(self._given):
                raise FailedPreconditionError("text behind the last cut changed tokens before it")
            rest = list(self._fixed.ids[len(self._given) :])
        else:
            rest = self._held_ids
        if not certain and not rest:
            raise InvalidArgumentError("the prompt is empty (0 tokens)")
        self._given.extend(rest)
        return [*certain, *rest]

    def _append_text(self, piece: str) -> list[int]:
        if self._held_ids or (self._given and self._text is None):
            raise InvalidArgumentError("text behind streamed token ids")
        text = self._text = (self._text or "") + piece
        if self._fixed is None:
            self._fixed = IncrementalTokenizer(self._tokens.tokenizer, add_special_tokens=True)
        rule = self._tokens.tokenizer.cut_rule
        affixes = self._tokens.tokenizer.affixes()
        if rule is None or affixes is None or affixes[1]:
            return []
        at = len(text) - 1
        while at > self._num_fixed_chars and not rule.can_cut(text[at - 1], text[at]):
            at -= 1
        if at <= self._num_fixed_chars:
            return []
        self._fixed.append(text[self._num_fixed_chars : at])
        self._num_fixed_chars = at
        new = list(self._fixed.ids[len(self._given) :])
        self._given.extend(new)
        return new

    def _give(self, certain: list[int], held: list[int]) -> list[int]:
        self._given.extend(certain)
        self._held_ids = held
        return certain


def message_dict(part: int | ChatMessage) -> dict[str, str]:
    """A message of a prompt that consists of messages."""
    if not isinstance(part, ChatMessage):
        raise InvalidArgumentError("a prompt mixes messages and token ids")
    return {"role": part.role, "content": part.content}
