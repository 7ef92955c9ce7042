"""Where a text may be cut so that its two parts can be tokenised apart.

The theorem that incremental tokenisation rests on: if `can_cut(a, b)`, then for every text in which
`a` is directly followed by `b`, the ids of the whole are the ids of the part that ends with `a`,
followed by those of the part that begins with `b` *in its context*; and one character of context,
`a` itself, is context enough. So

    ids(x + a + b + y) == ids(x + a) + ids(a + b + y)[len(ids(a)):]

without special tokens at the ends. The rule looks at the two characters only, so what stands behind
or before them can never make it wrong. How it follows from the parts of a tokenizer is argued where
each part is judged: `hf_cut_rule`, `sentencepiece_cut_rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

METASPACE = "▁"
"""What sentencepiece writes for a space (U+2581)."""

_MAX_CACHED_PAIRS = 1 << 16


class CutRule(Protocol):
    """Asked by `IncrementalTokenizer` for pairs of neighbouring characters, very often."""

    def can_cut(self, before: str, after: str) -> bool:
        """Whether every text may be cut between these two characters."""


class UnprovableError(Exception):
    """A tokenizer has a part about which nothing can be proved; the text says which."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A piece of text that is one token wherever it stands, found before all else.

    Attributes:
        content: the text.
        normalized: it is looked for in the normalised text, not in the raw one.
        lstrip, rstrip: it swallows the white space before, or behind it.
        single_word: it counts only where no letter stands next to it.
    """

    content: str
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class CachedPairs:
    """Remembers the answers of a slow rule; texts use few different pairs."""

    def __init__(self, decide: Callable[[str, str], bool]) -> None:
        self._decide = decide
        self._known: dict[str, bool] = {}

    def can_cut(self, before: str, after: str) -> bool:
        """Whether every text may be cut between these two characters."""
        pair = before + after
        answer = self._known.get(pair)
        if answer is None:
            if len(self._known) >= _MAX_CACHED_PAIRS:
                self._known.clear()
            answer = self._known[pair] = self._decide(before, after)
        return answer


def inner_pairs(texts: Iterable[str]) -> set[str]:
    """All pairs of neighbouring characters inside the given texts."""
    pairs: set[str] = set()
    for text in texts:
        pairs.update(map(str.__add__, text, text[1:]))
    return pairs


class AddedTokenPairs:
    """Which cuts the search for added tokens cannot notice.

    The search takes the leftmost longest token, again and again. No token spans a cut whose pair is
    inside none, so the search goes on behind the cut as from a fresh start. Tokens that look at
    their neighbours must not stand next to the cut. Where a tokenizer treats the beginning of the
    text between two added tokens in its own way (`section_effects`: a dummy prefix, stripping), the
    cut must not lie at such a beginning either.
    """

    def __init__(
        self,
        tokens: Iterable[AddedToken],
        *,
        section_effects: bool,
        normalize: Callable[[str], str],
    ) -> None:
        tokens = [token for token in tokens if token.content]
        contents = {token.content for token in tokens}
        contents |= {normalize(token.content) for token in tokens if token.normalized}
        self._inside = inner_pairs(contents)
        self._strips_spaces = any(token.lstrip or token.rstrip for token in tokens)
        touchy = [
            token
            for token in tokens
            if section_effects or token.lstrip or token.rstrip or token.single_word
        ]
        touchy_texts = {token.content for token in touchy}
        touchy_texts |= {normalize(token.content) for token in touchy if token.normalized}
        self._firsts = {text[0] for text in touchy_texts if text}
        self._lasts = {text[-1] for text in touchy_texts if text}

    def can_cut(self, before: str, after: str) -> bool:
        """Whether no added token spans or watches the cut. Raw and normalised pairs are asked."""
        if self._strips_spaces and before.isspace() and after.isspace():
            return False
        return (
            before + after not in self._inside
            and after not in self._firsts
            and before not in self._lasts
        )
