"""How far a run is, on one line of a terminal.

Written by hand: redrawing a bar of `rich` takes milliseconds of the event loop that sends requests
on time, this takes microseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO

from streamfill.loadgen.runner import RunProgress

_BAR_WIDTH: Final = 24
_CLEAR_LINE: Final = "\r\x1b[K"


@contextmanager
def run_progress(
    title: str = "", stream: TextIO | None = None
) -> Iterator[Callable[[RunProgress], None] | None]:
    """For ``runner.replay``; None where there is no terminal.

    Args:
        title: of the run.
        stream: where to; the standard error by default.
    """
    out = sys.stderr if stream is None else stream
    if not out.isatty():
        yield None
        return

    def show(progress: RunProgress) -> None:
        out.write(f"{_CLEAR_LINE}{progress_line(title, progress)}")
        out.flush()

    try:
        yield show
    finally:
        out.write(_CLEAR_LINE)
        out.flush()


def progress_line(title: str, progress: RunProgress) -> str:
    """The bar and the numbers."""
    num_full = _BAR_WIDTH * progress.num_done // max(1, progress.num_total)
    bar = "━" * num_full + "╌" * (_BAR_WIDTH - num_full)
    return (
        f"{title} {bar} {progress.num_done} of {progress.num_total} done, "
        f"{progress.num_failed} failed, {progress.num_in_flight} in flight"
    ).lstrip()
