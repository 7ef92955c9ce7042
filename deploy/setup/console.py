"""How the set-up shows its steps and runs their commands; standard library only."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Final, TextIO

_KEPT_LINES: Final = 25
"""So much of a failed command's output is shown."""
_REDRAW_S: Final = 0.1
"""A terminal line is drawn at most this often; faster only flickers."""
_PIP_PROGRESS: Final = ("Collecting ", "Requirement already satisfied: ", "Processing ")
"""pip prints one line that starts so for each requirement."""


class StepError(Exception):
    """A command ended with an error.

    Attributes:
        tail: the last lines of its output.
    """

    def __init__(self, tail: Sequence[str]) -> None:
        super().__init__("\n".join(tail))
        self.tail = tuple(tail)


class Console:
    """Numbered steps: one line that moves on a terminal, plain lines elsewhere."""

    def __init__(self, num_steps: int, out: TextIO | None = None) -> None:
        self._num_steps = num_steps
        self._step = 0
        self._title = ""
        self._out = sys.stdout if out is None else out
        self._is_terminal = self._out.isatty()
        self._started_s = 0.0
        self._drawn_s = 0.0

    def begin(self, title: str) -> None:
        """Starts the next step."""
        self._step += 1
        self._title = title
        self._started_s = time.monotonic()
        if not self._is_terminal:
            self._line(f"[{self._step}/{self._num_steps}] {title}")

    def end(self, remark: str = "") -> None:
        """Finishes the step; `remark` says what was found or chosen."""
        took_s = time.monotonic() - self._started_s
        text = f"{remark}, {took_s:.0f} s" if remark else f"{took_s:.0f} s"
        if self._is_terminal:
            self._clear()
            self._line(f"[{self._step}/{self._num_steps}] {self._title}: {text}")
        else:
            self._line(f"      done: {text}")

    def say(self, text: str) -> None:
        """Writes a line of its own."""
        self._clear()
        self._line(text)

    def run(self, command: Sequence[str], num_items: int = 0) -> None:
        """Runs `command` to its end and shows how far it is.

        Args:
            command: program and arguments; its output is read, not shown.
            num_items: how many requirements pip will name, where it is pip.

        Raises:
            StepError: it cannot be started or ends with an error.
        """
        tail: deque[str] = deque(maxlen=_KEPT_LINES)
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                close_fds=False,  # the lock of the set-up goes along, see installer.py
            )
        except OSError as error:
            raise StepError([f"{command[0]}: {error.strerror}"]) from error
        with process:
            assert process.stdout is not None
            num_seen = 0
            try:
                for line in process.stdout:
                    text = line.rstrip()
                    if not text or text.startswith("WARNING: Location "):
                        continue
                    tail.append(text)
                    num_seen += text.startswith(_PIP_PROGRESS)
                    self._draw(text, min(num_seen, num_items), num_items)
            except KeyboardInterrupt:
                process.terminate()
                raise
        if process.returncode:
            raise StepError([*tail, f"(exit code {process.returncode}: {' '.join(command)})"])

    def _draw(self, text: str, num_done: int, num_items: int) -> None:
        now_s = time.monotonic()
        if not self._is_terminal or now_s - self._drawn_s < _REDRAW_S:
            return
        self._drawn_s = now_s
        bar = ""
        if num_items:
            filled = 20 * num_done // num_items
            bar = f" [{'#' * filled}{'.' * (20 - filled)}] {num_done}/{num_items}"
        elapsed_s = now_s - self._started_s
        head = f"[{self._step}/{self._num_steps}] {self._title}{bar} {elapsed_s:.0f} s  "
        width = shutil.get_terminal_size().columns - 1
        self._clear()
        self._out.write((head + text.strip())[:width])
        self._out.flush()

    def _clear(self) -> None:
        if self._is_terminal:
            self._out.write("\r\033[K")

    def _line(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()
