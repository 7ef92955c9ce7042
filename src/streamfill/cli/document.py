"""Texts that are to be streamed: read from files, and cut into pieces at sensible places."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Final

from streamfill.errors import ConfigError

_DEMO_DOCUMENT: Final = "demo_document.txt"
_SEAMS: Final = (re.compile(r"\n(?=#)"), re.compile(r"\n\n"), re.compile(r"\n"), re.compile(r"\s"))
"""Where a text is best cut: before a heading, behind a paragraph, a line, a word."""
_REACH: Final = 0.3
"""How far from its ideal place a cut may be, as a part of a piece's length."""


def demo_document() -> str:
    """The text of `streamfill demo`: a guide to streamfill in eight sections."""
    return files(__package__).joinpath(_DEMO_DOCUMENT).read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read, is empty or is no UTF-8; the key is ``FILE``.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        remedy = f"cannot be read ({error.strerror}); name an existing text file"
        raise ConfigError("FILE", str(path), remedy) from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = f"is no UTF-8 text (byte {error.start}); convert it, for instance with iconv"
        raise ConfigError("FILE", str(path), remedy) from error
    if not text:
        raise ConfigError("FILE", str(path), "is empty; name a file with text in it")
    return text


def split_document(text: str, num_pieces: int) -> list[str]:
    """`text` in pieces of about equal length that joined give it back. None of them is empty.

    Args:
        text: at least as many characters as pieces.
        num_pieces: how many pieces, at least 1.

    Raises:
        ConfigError: the text is too short; the key is ``--segments``.
    """
    if not 1 <= num_pieces <= len(text):
        remedy = f"must be between 1 and the document's length, {len(text)} characters"
        raise ConfigError("--segments", num_pieces, remedy)
    cuts = [0]
    for number in range(1, num_pieces):
        ideal = round(number * len(text) / num_pieces)
        # Each piece still to come needs a character at least.
        lowest, highest = cuts[-1] + 1, len(text) - (num_pieces - number)
        cuts.append(_best_cut(text, ideal, lowest, highest, len(text) / num_pieces))
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _best_cut(text: str, ideal: int, lowest: int, highest: int, piece_length: float) -> int:
    """The nearest place of the best kind of seam within reach; without any, the ideal place."""
    reach = round(piece_length * _REACH)
    start, end = max(lowest, ideal - reach), min(highest, ideal + reach)
    for seam in _SEAMS:
        places = [m.end() for m in seam.finditer(text, max(0, start - 2), end)]
        within = [place for place in places if start <= place <= end]
        if within:
            return min(within, key=lambda place: abs(place - ideal))
    return min(max(ideal, lowest), highest)
