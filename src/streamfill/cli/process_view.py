"""The processes of a cluster while they start and run: a live table, or lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol, TextIO

from streamfill.launcher.managed_process import ProcessState, ProcessStatus

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_STYLES: Final = {
    ProcessState.READY: "green",
    ProcessState.STARTING: "yellow",
    ProcessState.BACKING_OFF: "red",
    ProcessState.FAILED: "bold red",
}


class ProcessView(Protocol):
    """Shows the processes and messages of the launcher. Used in its event loop only."""

    def show(self, statuses: Sequence[ProcessStatus]) -> None:
        """The processes are like this now."""

    def say(self, text: str) -> None:
        """One line that stays."""


@contextmanager
def process_view(stream: TextIO | None = None) -> Iterator[ProcessView]:
    """A view on `stream`, the standard output by default; a table where it is a terminal."""
    out = sys.stdout if stream is None else stream
    if not out.isatty():
        yield LineView(out)
        return
    from rich.console import Console
    from rich.live import Live

    # No thread that redraws: an idle cluster should cost nothing.
    with Live(console=Console(file=out), auto_refresh=False) as live:
        yield TableView(live, out)


def _fall_silent(out: TextIO) -> None:
    """Nobody reads what is written there any more: the terminal was closed, or the pipe's reader
    has ended. The cluster goes on, and stops in order all the same."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, out.fileno())
    os.close(nowhere)


class LineView:
    """A line each time that a process changes its state."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._started = time.monotonic()
        self._shown: dict[str, tuple[ProcessState, int | None]] = {}

    def show(self, statuses: Sequence[ProcessStatus]) -> None:
        for status in statuses:
            now = (status.state, status.pid)
            if self._shown.get(status.name) == now or status.state is ProcessState.NEW:
                continue
            self._shown[status.name] = now
            pid = f" (pid {status.pid})" if status.pid is not None else ""
            detail = f": {status.detail}" if status.detail else ""
            self.say(f"{status.name} {status.state.value}{pid}{detail}")

    def say(self, text: str) -> None:
        try:
            print(f"[{time.monotonic() - self._started:6.1f} s] {text}", file=self._out, flush=True)
        except OSError:
            _fall_silent(self._out)


class TableView:
    """A table that is redrawn in place."""

    def __init__(self, live: Live, out: TextIO) -> None:
        self._live = live
        self._out = out

    def show(self, statuses: Sequence[ProcessStatus]) -> None:
        try:
            self._live.update(process_table(statuses), refresh=True)
        except OSError:
            _fall_silent(self._out)

    def say(self, text: str) -> None:
        try:
            self._live.console.print(text, markup=False, highlight=False)
        except OSError:
            _fall_silent(self._out)


def process_table(statuses: Sequence[ProcessStatus]) -> Table:
    """The processes as a rich table."""
    from rich.table import Table
    from rich.text import Text

    table = Table("process", "state", "pid", "ready after", "restarts", "", box=None)
    for status in statuses:
        after = f"{status.ready_after_s:.1f} s" if status.ready_after_s is not None else ""
        table.add_row(
            status.name,
            Text(status.state.value, style=_STYLES.get(status.state, "")),
            str(status.pid or ""),
            after,
            str(status.num_restarts or ""),
            Text(status.detail),
        )
    return table
