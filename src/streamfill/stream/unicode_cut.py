"""Characters between which a text may be cut without any Unicode algorithm noticing.

A cut between `a` and `b` is *plain* when no normalisation form composes or reorders across it and
no grapheme cluster spans it (Unicode Standard Annexes 15 and 29). Both follow here from properties
of the two characters alone, which is what lets a cut be judged without looking at the rest of the
text. Rare characters are refused rather than argued about: a refused cut costs a few more
characters of work, a wrong one costs a wrong prompt.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

_PLAIN_CONTROLS = frozenset(" \n\t")
_PLAIN_CATEGORIES = frozenset("LNPS")
_LAST_DECOMPOSING = 0x2FFFF
# Conjoining Hangul, regional indicators and emoji modifiers take part in grapheme clusters although
# their general category is that of an ordinary letter or symbol.
_CLUSTER_RANGES = (
    (0x1100, 0x11FF),
    (0xA960, 0xA97F),
    (0xD7B0, 0xD7FF),
    (0x1F1E6, 0x1F1FF),
    (0x1F3FB, 0x1F3FF),
)


@lru_cache(maxsize=65536)
def is_plain(char: str) -> bool:
    """Whether a cut may have `char` on either side, as far as Unicode is concerned."""
    if char in _PLAIN_CONTROLS:
        return True
    code = ord(char)
    if 0x21 <= code <= 0x7E:
        return True
    if unicodedata.category(char)[0] not in _PLAIN_CATEGORIES:
        return False
    return _starts_alone(char)


def is_stable(char: str, form: str) -> bool:
    """Whether normalisation `form` ("NFC", "NFD", "NFKC" or "NFKD") leaves `char` as it is."""
    if form not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"unknown normalisation form {form!r}")
    return unicodedata.normalize(form, char) == char  # type: ignore[arg-type]


def _starts_alone(char: str) -> bool:
    """Nothing that `char` decomposes to attaches to what stands before it."""
    first = unicodedata.normalize("NFKD", char)[0]
    if unicodedata.combining(first) != 0 or unicodedata.category(first)[0] == "M":
        return False
    if any(low <= ord(part) <= high for part in (char, first) for low, high in _CLUSTER_RANGES):
        return _is_hangul_syllable(char)
    return first not in _second_parts()


def _is_hangul_syllable(char: str) -> bool:
    """A precomposed syllable; it joins only with conjoining jamo, which are refused themselves."""
    return 0xAC00 <= ord(char) <= 0xD7A3


@lru_cache(maxsize=1)
def _second_parts() -> frozenset[str]:
    """Characters that canonical composition can merge into the one before them."""
    seconds: set[str] = set()
    for code in range(_LAST_DECOMPOSING + 1):
        mapping = unicodedata.decomposition(chr(code))
        if mapping and not mapping.startswith("<"):
            parts = mapping.split()
            seconds.update(chr(int(part, 16)) for part in parts[1:])
    return frozenset(seconds)
