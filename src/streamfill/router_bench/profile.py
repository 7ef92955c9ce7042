"""What takes a router's time, from the stacks that py-spy sees. Pure, but for running py-spy.

py-spy looks at a running process a few hundred times a second from outside. Each look at the main
thread counts for the innermost function of this project on its stack: what a library does counts
for who called it.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamfill.errors import UnavailableError
from streamfill.router_bench.processes import process_on_core

LOOKS_PER_S: Final = 200
SLACK_S: Final = 20.0
"""For py-spy to start and to write its file."""
_FRAME: Final = re.compile(r"(?P<function>.+) \((?P<path>[^()]+?)(?::\d+)?\)$")
_OURS: Final = re.compile(r"(?:^|/)((?:router|streamfill)/[\w/]+\.py)$")
_MAIN: Final = "router/__main__.py"
"""On every stack of the main thread."""
LIBRARIES: Final = "asyncio, gRPC and ZeroMQ between the callbacks"


@dataclass(frozen=True, slots=True)
class Row:
    """One function, or one module."""

    name: str
    share: float
    """Of the looks at the main thread at work."""


async def stacks(py_spy: Path, pid: int, seconds: float, core: int, folder: Path) -> list[str]:
    """Collapsed stacks of a process, one a line, each with its count.

    Raises:
        UnavailableError: py-spy may not look at it, or failed.
    """
    found, log = folder / "stacks.txt", folder / "py-spy.log"
    found.unlink(missing_ok=True)
    program = (
        *(str(py_spy), "record", "--format", "raw", "--output", str(found)),
        *("--rate", str(LOOKS_PER_S), "--duration", str(max(1, round(seconds)))),
        *("--pid", str(pid)),
    )
    async with process_on_core(program, core, log=log) as process:
        try:
            async with asyncio.timeout(seconds + SLACK_S):
                await process.communicate()
        except TimeoutError as error:
            raise UnavailableError(f"py-spy did not end (log: {log})") from error
    if not found.is_file():
        raise UnavailableError(f"py-spy could not look at the router (log: {log})")
    return found.read_text(encoding="utf-8").splitlines()


def by_function(lines: Iterable[str]) -> list[Row]:
    """Shares of our functions, the largest first."""
    return _rows(lines, whole_modules=False)


def by_module(lines: Iterable[str]) -> list[Row]:
    """Shares of our modules, the largest first."""
    return _rows(lines, whole_modules=True)


def _rows(lines: Iterable[str], *, whole_modules: bool) -> list[Row]:
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if any(_MAIN in frame for frame in frames):
            counts[_charged(frames, whole_modules)] += int(count)
    total = counts.total()
    return [Row(name, count / total) for name, count in counts.most_common()]


def _charged(frames: list[str], whole_modules: bool) -> str:
    for frame in reversed(frames):
        parts = _FRAME.match(frame)
        ours = parts and _OURS.search(parts["path"])
        if parts and ours and not ours[1].endswith("/__main__.py"):
            module = ours[1]
            return module if whole_modules else f"{module}: {parts['function']}"
    return LIBRARIES
