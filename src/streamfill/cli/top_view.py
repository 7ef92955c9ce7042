"""Where `streamfill top` draws: a screen that is redrawn, or frames one below the other.

On a terminal the alternate screen is used, and keys are read one by one without being shown. Both
are given back however the block ends.
"""

from __future__ import annotations

import asyncio
import os
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from streamfill.cli.tables import Table, show, table_lines
from streamfill.cli.top_frame import CACHED, FREE, MISSING, USED

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

QUIT_KEYS: Final = frozenset("qQ\x03\x04")
"""Ctrl-C and Ctrl-D among them, should the terminal send them as characters."""
HINT: Final = "q ends"
_MIN_ROWS: Final = 3

Parts = Sequence[str | Table]


class FrameView(Protocol):
    """Shows frames. Used in one event loop."""

    def draw(self, make: Callable[[int], Parts], rows_in_a_file: int) -> None:
        """Show the frame that `make` makes for a number of streams: so many as fit, or
        `rows_in_a_file` where there is no height."""

    async def wait_for_quit(self) -> None:
        """Returns when the user has asked for the end by a key; never where there are no keys."""


@contextmanager
def frame_view(*, is_live: bool) -> Iterator[FrameView]:
    """A view on the standard output: a screen where it is a terminal and live, else plain text."""
    if not is_live or not sys.stdout.isatty():
        yield TextView(is_live)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        yield ScreenView(console, live, keys)


class TextView:
    """Frames as text, one below the other; with the time where there may be several."""

    def __init__(self, has_time: bool) -> None:
        self._has_time = has_time

    def draw(self, make: Callable[[int], Parts], rows_in_a_file: int) -> None:
        if self._has_time:
            print(time.strftime("=== %Y-%m-%d %H:%M:%S", time.localtime()))
        show(make(rows_in_a_file))
        if self._has_time:
            print(flush=True)

    async def wait_for_quit(self) -> None:
        await asyncio.Event().wait()


class ScreenView:
    """A frame that fills the terminal and is replaced by the next."""

    def __init__(self, console: Console, live: Live, keys: int | None) -> None:
        self._console = console
        self._live = live
        self._keys = keys

    def draw(self, make: Callable[[int], Parts], rows_in_a_file: int) -> None:
        del rows_in_a_file
        height = self._console.size.height
        # What is not a stream takes as much room as it does without any.
        rest = sum(_height(part) for part in make(0))
        parts = make(max(_MIN_ROWS, height - rest - 2))
        self._live.update(_rendered([*parts, HINT]), refresh=True)

    async def wait_for_quit(self) -> None:
        pressed = asyncio.Event()
        if self._keys is None:
            await pressed.wait()
            return
        loop, descriptor = asyncio.get_running_loop(), self._keys

        def read() -> None:
            text = os.read(descriptor, 64).decode(errors="replace")
            if not text:  # the terminal is gone; a signal says so too
                loop.remove_reader(descriptor)
            if not text or QUIT_KEYS & set(text):
                pressed.set()

        loop.add_reader(descriptor, read)
        try:
            await pressed.wait()
        finally:
            loop.remove_reader(descriptor)


@contextmanager
def _keys() -> Iterator[int | None]:
    """The descriptor of the keyboard, one key at a time; None where there is none."""
    if not sys.stdin.isatty():
        yield None
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _height(part: str | Table) -> int:
    return 1 if isinstance(part, str) else len(table_lines(part))


def _rendered(parts: Parts) -> RenderableType:
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    def cell(text: str) -> Text:
        # As Text: what servers say may contain brackets, which rich would take for markup.
        shown = Text(text, no_wrap=True, overflow="ellipsis")
        if text and set(text) <= {USED, CACHED, FREE, MISSING}:
            for sign, style in ((USED, "green"), (CACHED, "blue"), (FREE, "dim"), (MISSING, "dim")):
                shown.highlight_regex(f"[{sign}]+", style)
        return shown

    rendered: list[RenderableType] = []
    for part in parts:
        if isinstance(part, str):
            is_loud = part.startswith("NOT ")
            rendered.append(Text(part, style="bold red" if is_loud else "", no_wrap=True))
            continue
        table = RichTable(box=None, pad_edge=False, header_style="bold")
        for column in part.columns:
            table.add_column(column, justify="left" if column in part.left else "right")
        for number, row in enumerate(part.rows):
            style = "red" if number in part.alarms else None
            table.add_row(*(cell(text) for text in row), style=style)
        rendered.append(table)
    return Group(*rendered)
