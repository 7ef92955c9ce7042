"""How far a soak is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from typing import TextIO

LINE_EVERY_S = 30.0
"""Where there is no terminal."""

_BAR_WIDTH = 24
_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Shows one thing after the other."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = sys.stderr if out is None else out
        self._is_terminal = self.out.isatty()
        self._shown_s = time.monotonic()

    def show(self, share: float, text: str) -> None:
        """How much of a phase is done, from 0 to 1. Call it as often as you like."""
        if self._is_terminal:
            num_full = round(_BAR_WIDTH * min(1.0, max(0.0, share)))
            bar = "━" * num_full + "╌" * (_BAR_WIDTH - num_full)
            self._write(f"{_CLEAR_LINE}{bar} {text}")
        elif time.monotonic() >= self._shown_s + LINE_EVERY_S:
            self._shown_s = time.monotonic()
            self._write(f"{100 * share:3.0f}% {text}\n")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(f"{_CLEAR_LINE if self._is_terminal else ''}{text}\n")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
