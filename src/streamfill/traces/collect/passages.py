"""Cuts texts into passages, and shortens them. Pure.

A token count is an estimate here, ``TOKENS_PER_WORD`` for each word: collecting needs no model's
vocabulary, and the trace holds text, which any tokenizer counts exactly.
"""

from __future__ import annotations

import math
from typing import Final

TOKENS_PER_WORD: Final = 4 / 3
"""The usual rule of thumb for English prose."""
_AIM_WORDS: Final = 60
_MOST_WORDS: Final = 120


def passages_of(text: str) -> list[str]:
    """Passages of about a paragraph, 60 to 120 words: short blocks are joined, long ones cut.

    Args:
        text: a block (paragraph, list item, line of code) per line.
    """
    passages: list[str] = []
    lines: list[str] = []
    num_words = 0
    for line in filter(None, (each.rstrip() for each in text.splitlines())):
        for piece in _pieces(line):
            length = len(piece.split())
            if lines and num_words + length > _MOST_WORDS:
                passages.append("\n".join(lines))
                lines, num_words = [], 0
            lines.append(piece)
            num_words += length
            if num_words >= _AIM_WORDS:
                passages.append("\n".join(lines))
                lines, num_words = [], 0
    if lines:
        passages.append("\n".join(lines))
    return passages


def _pieces(line: str) -> list[str]:
    words = line.split()
    if len(words) <= _MOST_WORDS:
        return [line]
    return [" ".join(words[n : n + _MOST_WORDS]) for n in range(0, len(words), _MOST_WORDS)]


def scaled(text: str, scale: float) -> str:
    """The beginning of a text with its number of words times ``scale``, at least one word."""
    if scale >= 1.0:
        return text
    return first_words(text, max(1, math.ceil(len(text.split()) * scale)))


def first_words(text: str, num_words: int) -> str:
    """At most so many words from the beginning; white space between them is kept."""
    kept: list[str] = []
    for line in text.split("\n"):
        words = line.split()
        if len(words) > num_words:
            if num_words:
                kept.append(" ".join(words[:num_words]))
            break
        kept.append(line)
        num_words -= len(words)
    return "\n".join(kept).rstrip()


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return math.ceil(len(text.split()) * TOKENS_PER_WORD)


def words_of_tokens(num_tokens: int) -> int:
    """About how many words fit in so many tokens; at least one."""
    return max(1, math.floor(num_tokens / TOKENS_PER_WORD))
