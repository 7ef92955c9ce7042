"""Cuts texts at word boundaries so that they have a wanted number of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from streamfill.stream.tokenizer import TextTokenizer

_WORD_END: Final = re.compile(r"(?<=\S)(?=\s)")
_NEXT_WORD: Final = "The"
_ELLIPSIS: Final = " ..."
_CHARS_PER_TOKEN: Final = 6
"""More than a token of English has: a first guess at how much text is needed."""


def count_tokens(tokenizer: TextTokenizer, text: str, *, goes_on: bool = False) -> int:
    """Tokens of a text, without what begins and ends a prompt.

    Args:
        goes_on: whether a word comes behind it; a tokenizer takes white space apart only then.
    """
    if not goes_on:
        return len(tokenizer.encode(text, add_special_tokens=False))
    with_next = tokenizer.encode(text + _NEXT_WORD, add_special_tokens=False)
    return len(with_next) - len(tokenizer.encode(_NEXT_WORD, add_special_tokens=False))


def fitted(
    tokenizer: TextTokenizer,
    source: Callable[[int], str],
    num_tokens: int,
    *,
    tail: str = "",
) -> str:
    """The beginning of a text whose number of tokens, ``tail`` included, is nearest to the wanted.

    The cut is behind a word, or behind a word and an ellipsis. So the number is off by at most
    half of the tokens of the word at the cut. There is at least one word.

    Args:
        source: gives the text, with at least so many characters.
        tail: stands behind the result later, before another word, and is not part of the result.
    """
    num_chars = _CHARS_PER_TOKEN * (num_tokens + 2)
    text = source(num_chars)
    ids = tokenizer.encode(text, add_special_tokens=False)
    while len(ids) <= num_tokens + 2:
        num_chars *= 2
        text = source(num_chars)
        ids = tokenizer.encode(text, add_special_tokens=False)
    guess = len(tokenizer.decode(ids[:num_tokens], skip_special_tokens=False))
    ends = [match.start() for match in _WORD_END.finditer(text, 0, min(2 * guess + 80, len(text)))]

    def num_with(cut: str) -> int:
        return count_tokens(tokenizer, cut + tail, goes_on=True)

    index = min((abs(end - guess), n) for n, end in enumerate(ends))[1]
    while index > 0 and num_with(text[: ends[index]]) > num_tokens:
        index -= 1
    while index + 2 < len(ends) and num_with(text[: ends[index + 1]]) <= num_tokens:
        index += 1
    shorter, longer = text[: ends[index]], text[: ends[index + 1]]
    cuts = (shorter, longer, shorter + _ELLIPSIS)
    return min(cuts, key=lambda cut: abs(num_with(cut) - num_tokens))
