"""The answer of one stream as far as it has come: token ids, text, and its end at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from router.interface import TokenEvent
from streamfill.messages.common import TokenLogprob
from streamfill.stream.detokenizer import IncrementalDetokenizer, StopMatcher
from streamfill.stream.splice import token_array
from streamfill.stream.tokenizer import TextTokenizer

CONTEXT_TOKENS = 5
"""Tokens of the prompt that the detokeniser sees first, so that an answer's leading space is kept;
as many as SGLang gives (``INIT_INCREMENTAL_DETOKENIZATION_OFFSET``)."""


class Answer:
    """Grows by one token at a time. Indices count from 0 over all servers that took part."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        skip_special_tokens: bool,
    ) -> None:
        self.token_ids = token_array()
        # A model may know ids that its tokenizer does not, as padding. They have no text.
        self._num_texts = tokenizer.vocab_size
        context_ids = [i for i in prompt_ids[-CONTEXT_TOKENS:] if i < self._num_texts]
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens, context_ids=context_ids
        )
        self._matcher = StopMatcher(stop) if stop else None

    @property
    def num_tokens(self) -> int:
        """Also the index of the next token."""
        return len(self.token_ids)

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.matched if self._matcher is not None else None

    def push(self, token_id: int, logprob: TokenLogprob | None, *, silent: bool) -> TokenEvent:
        """Take one more token.

        Args:
            silent: a stop token, which ends the answer and shows no text.
        """
        has_text = not silent and token_id < self._num_texts
        text = self._detokenizer.push((token_id,)) if has_text else ""
        if self._matcher is not None and text:
            text = self._matcher.push(text).text
        index = len(self.token_ids)
        self.token_ids.append(token_id)
        return TokenEvent(index=index, token_id=token_id, text=text, logprob=logprob)

    def flush(self) -> str:
        """Text that was held back, when nothing follows any more."""
        tail = self._detokenizer.flush()
        if self._matcher is None:
            return tail
        if self._matcher.matched is not None:
            return ""
        return self._matcher.push(tail).text + self._matcher.flush()
