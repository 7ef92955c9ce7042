"""Processes of a measurement: started on a core of their own, watched through ``/proc``, ended."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streamfill.errors import StreamfillError
from streamfill.launcher import guard
from streamfill.launcher.child_process import end_process, read_ready
from streamfill.launcher.log_files import last_lines

READY_TIMEOUT_S: Final = 60.0
END_TIMEOUT_S: Final = 10.0
RESULT: Final = b"RESULT "

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PIN: Final = (
    "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core runs what. On two cores the fake servers and the load share one."""

    router: int
    servers: int
    load: int

    @classmethod
    def here(cls) -> Cores:
        """Of those that this process may use."""
        cores = sorted(os.sched_getaffinity(0))
        return cls(router=cores[0], servers=cores[1 % len(cores)], load=cores[-1])


@dataclass(frozen=True, slots=True)
class Child:
    """A process that runs and has said that it is ready."""

    pid: int
    ready: Mapping[str, Any]
    ready_s: float
    """From its start to its line ``READY``."""


@asynccontextmanager
async def process_on_core(
    program: Sequence[str], core: int, *, log: Path, variables: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process as long as the block lasts; its standard output is a pipe.

    Args:
        program: with its arguments.
        core: that it, and all its threads, run on.
        log: gets what it writes on its standard error.
        variables: its whole environment; None: that of this process.
    """
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", guard.__file__, str(os.getpid())),
            *(sys.executable, "-I", "-S", "-c", _PIN, str(core), *program),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=variables,
            start_new_session=True,  # Ctrl-C is for the one that measures
        )
    try:
        yield process
    finally:
        await end_process(process, END_TIMEOUT_S)


@asynccontextmanager
async def child(arguments: Sequence[str], core: int, *, log: Path) -> AsyncIterator[Child]:
    """A Python process as long as the block lasts, ready. ``arguments`` stand behind the
    interpreter.

    Raises:
        UnavailableError: it ended, or was not ready in time.
    """
    started_s = time.monotonic()
    async with process_on_core((sys.executable, *arguments), core, log=log) as process:
        name = f"{' '.join(arguments[:2])} (log: {log})"
        ready = await read_ready(process, name, READY_TIMEOUT_S)
        ready_s = time.monotonic() - started_s
        reader = asyncio.create_task(read_away(process))
        try:
            yield Child(process.pid, ready, ready_s)
        finally:
            await end_process(process, END_TIMEOUT_S)
            await reader


async def run_to_result(
    arguments: Sequence[str], core: int, *, log: Path, timeout_s: float, given: bytes = b""
) -> dict[str, Any]:
    """The ``RESULT`` line of a Python program that runs to its end.

    Args:
        arguments: behind the interpreter.
        given: to its standard input.

    Raises:
        StreamfillError: it failed, or took too long.
    """
    program = (sys.executable, *arguments)
    try:
        async with asyncio.timeout(timeout_s), process_on_core(program, core, log=log) as process:
            output, _ = await process.communicate(given)
    except TimeoutError as error:
        text = f"{' '.join(arguments[:2])} took more than {timeout_s:g} s (log: {log})"
        raise StreamfillError(text) from error
    for line in output.splitlines():
        if line.startswith(RESULT):
            found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
            return found
    said = (last_lines(log, 1) or ["it said nothing"])[-1]
    raise StreamfillError(f"{' '.join(arguments[:2])} failed: {said}")


def cpu_s(pid: int) -> float:
    """CPU seconds of a process with all its threads, user and system."""
    return _cpu_s(Path(f"/proc/{pid}/stat"))


def thread_cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds of the router's threads: the main one, ZeroMQ's, and the rest, which is gRPC's
    but for some that are hardly ever awake."""
    found = {"main": 0.0, "zeromq": 0.0, "grpc": 0.0}
    for task in Path(f"/proc/{pid}/task").iterdir():
        name = (task / "comm").read_text(encoding="utf-8")
        other = "zeromq" if name.startswith("ZMQ") else "grpc"
        found["main" if task.name == str(pid) else other] += _cpu_s(task / "stat")
    return found


def rss_bytes(pid: int) -> int:
    """Memory of a process, resident."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cpu_s(stat: Path) -> float:
    """Of proc(5): fields 14 and 15."""
    fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


async def read_away(process: asyncio.subprocess.Process) -> None:
    """What it writes on its standard output, so that a full pipe does not stop it."""
    assert process.stdout is not None
    while await process.stdout.read(65536):
        pass
