"""Tokenisation of a text that grows and changes, at the cost of what is new.

The text is encoded in chunks that begin at *safe points*: places where the tokenizer's `CutRule`
says that any text may be cut between these two characters. The ids of the chunks, put together, are
the ids of the whole text, so after a change

1. the common beginning of old and new text is found (one comparison of memory),
2. the last safe point inside it is looked up,
3. the new text is encoded from there on, with one character of context,
4. the splice is the difference to the old ids behind that point.

Cost: an append encodes the new text and what lies behind the last safe point, usually one word. A
text without any safe point, such as ten thousand letters without a space, is encoded again as a
whole with each append. So is every text of a tokenizer without a `CutRule`.
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_right
from itertools import pairwise

from streamfill.stream.splice import Splice, common_prefix_chars, lcp, token_array
from streamfill.stream.tokenizer import TextTokenizer, checked_text

_log = logging.getLogger(__name__)

CHUNK_CHARS = 512
"""Least distance of safe points inside one encoded text. Smaller: more calls of the tokenizer.
Larger: an update re-encodes more in front of the first changed character."""

_MAX_CACHED_CONTEXTS = 4096


class IncrementalTokenizer:
    """The text and the ids of one stream.

    Invariant: `ids` equals ``tokenizer.encode(text, add_special_tokens=…)`` after every call; a
    call that raises leaves text and ids as they were.
    """

    def __init__(self, tokenizer: TextTokenizer, *, add_special_tokens: bool = False) -> None:
        """Args:
        tokenizer: shared with other streams.
        add_special_tokens: with what the tokenizer puts before and behind a text. Not for
            texts from a chat template, which contain these tokens already.
        """
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens
        affixes = tokenizer.affixes() if add_special_tokens else ([], [])
        self._rule = tokenizer.cut_rule if affixes is not None else None
        self._prefix, self._suffix = affixes if affixes is not None else ([], [])
        self._text = ""
        self._ids = token_array(self._encode_whole(""))
        # Safe points: character position and number of tokens before it, without `_prefix`.
        self._cuts: list[int] = []
        self._cut_tokens: list[int] = []
        self._cuts_are_known = True
        self._context_ids: dict[str, list[int]] = {}

    @property
    def text(self) -> str:
        """The whole text."""
        return self._text

    @property
    def ids(self) -> array[int]:
        """The ids of the whole text; not to be changed by the reader."""
        return self._ids

    @property
    def is_incremental(self) -> bool:
        """Whether the cost of a change follows the change; otherwise it follows the text."""
        return self._rule is not None

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the ids begin as those of a text do."""
        return self._add_special_tokens

    def restore(self, text: str, ids: array[int]) -> None:
        """Be as another object was that had this text and its ids; nothing is tokenised. No safe
        point inside the text is known then, so its next change costs as much as the whole text."""
        self._text, self._ids = text, ids
        self._cuts.clear()
        self._cut_tokens.clear()
        self._cuts_are_known = False

    def append(self, text: str) -> Splice:
        """Put `text` behind the text.

        Raises:
            InvalidArgumentError: lone surrogates.
        """
        checked_text(text, "appended text")
        if not text:
            return Splice(len(self._ids), token_array())
        return self._become(self._text + text, num_common_chars=len(self._text))

    def replace(self, text: str) -> Splice:
        """Let `text` be the whole text from now on.

        Raises:
            InvalidArgumentError: lone surrogates.
        """
        checked_text(text, "new text")
        return self._become(text, num_common_chars=common_prefix_chars(self._text, text))

    def _become(self, text: str, num_common_chars: int) -> Splice:
        if len(text) == len(self._text) == num_common_chars:
            return Splice(len(self._ids), token_array())
        if self._rule is None:
            return self._set_ids(text, 0, self._encode_whole(text))
        # A safe point rests on the characters on both its sides: both must be common.
        num_kept_cuts = bisect_right(self._cuts, num_common_chars - 1)
        start = self._cuts[num_kept_cuts - 1] if num_kept_cuts else 0
        num_kept = self._cut_tokens[num_kept_cuts - 1] if num_kept_cuts else 0
        # Between the last safe point and the old end there is none, so none is looked for there.
        is_append = num_common_chars == len(self._text)
        known_until = len(self._text) if is_append and self._cuts_are_known else start
        cuts = self._safe_points(text, start, known_until)
        ids: list[int] = []
        new_cuts: list[tuple[int, int]] = []
        for begin, end in pairwise([start, *cuts, len(text)]):
            if begin > start:
                new_cuts.append((begin, num_kept + len(ids)))
            chunk = self._encode_chunk(text, begin, end)
            if chunk is None:
                return self._give_up(text)
            ids.extend(chunk)
        self._cuts_are_known = True
        del self._cuts[num_kept_cuts:], self._cut_tokens[num_kept_cuts:]
        self._cuts.extend(cut for cut, _ in new_cuts)
        self._cut_tokens.extend(num_tokens for _, num_tokens in new_cuts)
        num_fixed = len(self._prefix) + num_kept
        return self._set_ids(text, num_fixed, [*ids, *self._suffix])

    def _set_ids(self, text: str, num_fixed: int, tail: list[int]) -> Splice:
        """Keep the first `num_fixed` ids and put `tail` behind them."""
        new_tail = token_array(tail)
        keep = lcp(self._ids[num_fixed:], new_tail)
        splice = Splice(num_fixed + keep, new_tail[keep:])
        del self._ids[splice.keep_tokens :]
        self._ids.extend(splice.new_token_ids)
        self._text = text
        return splice

    def _safe_points(self, text: str, start: int, known_until: int) -> list[int]:
        """Safe points behind `start`, about `CHUNK_CHARS` apart, and the last one of the text.

        There is none between `start` and `known_until`.
        """
        assert self._rule is not None
        can_cut = self._rule.can_cut
        first = max(start + 1, known_until)
        last = len(text) - 1
        while last >= first and not can_cut(text[last - 1], text[last]):
            last -= 1
        cuts: list[int] = []
        at = max(first, start + CHUNK_CHARS)
        while at < last:
            if can_cut(text[at - 1], text[at]):
                cuts.append(at)
                at += CHUNK_CHARS
            else:
                at += 1
        if last >= max(first, 1):
            cuts.append(last)
        return cuts

    def _encode_chunk(self, text: str, begin: int, end: int) -> list[int] | None:
        """Ids of text[begin:end] in its context; None if the rule proves wrong."""
        if begin == 0:
            return self._tokenizer.encode(text[:end], add_special_tokens=False)
        context = text[begin - 1]
        context_ids = self._context_ids.get(context)
        if context_ids is None:
            if len(self._context_ids) >= _MAX_CACHED_CONTEXTS:
                self._context_ids.clear()
            context_ids = self._tokenizer.encode(context, add_special_tokens=False)
            self._context_ids[context] = context_ids
        ids = self._tokenizer.encode(text[begin - 1 : end], add_special_tokens=False)
        num_context = len(context_ids)
        return ids[num_context:] if ids[:num_context] == context_ids else None

    def _encode_whole(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=self._add_special_tokens)

    def _give_up(self, text: str) -> Splice:
        _log.error("cut rule refuted by a text; this stream is tokenised whole from now on")
        self._rule = None
        self._cuts.clear()
        self._cut_tokens.clear()
        return self._set_ids(text, 0, self._encode_whole(text))
