"""How long work shows its progress: a bar on a terminal, one line per tenth elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TextIO


class Progress(Protocol):
    """Told by a long piece of work how far it is.

    Called from the thread that does the work, some hundred times at most; it must return at once
    and must not raise.
    """

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` units are finished; `done` never shrinks."""


_LINE_STEP: Final = 10
"""A log gets a line each time so many per cent are passed."""


def no_progress(done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def show_progress(title: str, stream: TextIO | None = None) -> Iterator[Progress]:
    """Shows `title` and how far the work in the block is.

    Args:
        title: what is being done, e.g. "Converting SmolLM2".
        stream: where to; the standard error by default.
    """
    out = sys.stderr if stream is None else stream
    if out.isatty():
        with _bar(title, out) as bar:
            yield bar
    else:
        yield _Lines(title, out)


@contextmanager
def _bar(title: str, out: TextIO) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(file=out)) as rich_progress:
        task = rich_progress.add_task(title, total=None)

        def show(done: int, total: int) -> None:
            rich_progress.update(task, completed=done, total=total)

        yield show


class _Lines:
    """Progress for a log file: no control characters, few lines."""

    def __init__(self, title: str, out: TextIO) -> None:
        self._title = title
        self._out = out
        self._next_percent = 0

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // total if total else 100
        if percent < self._next_percent:
            return
        self._next_percent = percent - percent % _LINE_STEP + _LINE_STEP
        self._out.write(f"{self._title}: {percent}%\n")
        self._out.flush()
