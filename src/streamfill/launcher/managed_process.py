"""One process of the cluster, over all its lives.

::

    NEW ─▶ STARTING ─▶ READY ─▶ BACKING_OFF ─▶ STARTING …
               │         │           └────────▶ STOPPED
               ├─────────┴─▶ STOPPING ────────▶ STOPPED
               └─▶ FAILED    it died before it was ready for the first time, for which the
                             configuration or the machine is to blame, or too often later

It leads a process group of its own: Ctrl-C in the terminal reaches the launcher alone, which stops
the cluster in order, and what a dead process left behind is killed with its group.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streamfill.launcher import guard
from streamfill.launcher.errors import LaunchError
from streamfill.launcher.log_files import last_lines, log_file, open_log
from streamfill.launcher.plan import ProcessKind, ProcessSpec
from streamfill.launcher.ready_line import ReadyLineScanner
from streamfill.launcher.restart_policy import RestartPolicy

logger = logging.getLogger(__name__)

_READY_POLL_S: Final = 0.05
"""How often a starting process's log is looked at; nothing polls once it is ready."""
_NUM_TAIL_LINES: Final = 12


class ProcessState(enum.Enum):
    """Where a process stands; see the head of this module."""

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    BACKING_OFF = "restarting soon"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


_NEXT: Final[Mapping[ProcessState, frozenset[ProcessState]]] = {
    ProcessState.NEW: frozenset({ProcessState.STARTING, ProcessState.STOPPED, ProcessState.FAILED}),
    ProcessState.STARTING: frozenset(
        {
            ProcessState.READY,
            ProcessState.BACKING_OFF,
            ProcessState.STOPPING,
            ProcessState.STOPPED,
            ProcessState.FAILED,
        }
    ),
    ProcessState.READY: frozenset(
        {
            ProcessState.BACKING_OFF,
            ProcessState.STOPPING,
            ProcessState.STOPPED,
            ProcessState.FAILED,
        }
    ),
    ProcessState.BACKING_OFF: frozenset(
        {ProcessState.STARTING, ProcessState.STOPPED, ProcessState.FAILED}
    ),
    ProcessState.STOPPING: frozenset({ProcessState.STOPPED}),
    ProcessState.STOPPED: frozenset(),
    ProcessState.FAILED: frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class ProcessStatus:
    """One process at one moment, for tables and the state file."""

    name: str
    kind: ProcessKind
    state: ProcessState
    pid: int | None
    num_restarts: int
    ready_after_s: float | None
    """From the start of its present life to readiness."""
    detail: str
    """Why it is in this state, where there is something to say."""
    log_file: Path
    metrics_address: str | None = None
    """As of its `ProcessSpec`."""


class ManagedProcess:
    """Starts a process, waits for its readiness, restarts it, stops it.

    Owned by the `Supervisor`, used in its event loop only, which must be that of the main thread
    (see `guard`).
    """

    def __init__(
        self,
        spec: ProcessSpec,
        *,
        run_dir: Path,
        ready_timeout_s: float,
        policy: RestartPolicy,
        on_change: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.failure: LaunchError | None = None
        """Why it is FAILED."""
        self.last_death: LaunchError | None = None
        """How its last life ended that nobody had asked to end."""
        self.last_end = ""
        """How its last life ended, whoever asked for it; empty before the first end."""
        self.ready = asyncio.Event()
        """Set for good when the process was ready for the first time."""
        self._run_dir = run_dir
        self._ready_timeout_s = ready_timeout_s
        self._policy = policy
        self._on_change = on_change
        self._state = ProcessState.NEW
        self._process: asyncio.subprocess.Process | None = None
        self._stop_requested = asyncio.Event()
        self._num_lives = 0
        self._ready_after_s: float | None = None
        self._detail = ""

    @property
    def status(self) -> ProcessStatus:
        """The process as it is now."""
        return ProcessStatus(
            name=self.spec.name,
            kind=self.spec.kind,
            state=self._state,
            pid=self._process.pid if self._process is not None else None,
            num_restarts=max(0, self._num_lives - 1),
            ready_after_s=self._ready_after_s,
            detail=self._detail,
            log_file=self._log_file,
            metrics_address=self.spec.metrics_address,
        )

    async def run(self) -> None:
        """Keeps the process running until `stop`, or until it is given up. Call it once."""
        num_deaths_in_a_row = 0
        while not self._stop_requested.is_set():
            try:
                ran_s, cause = await self._live()
            except OSError as error:
                self._give_up(f"cannot be started: {error}")
                return
            self.last_end = cause
            if self._stop_requested.is_set():
                break
            self.last_death = self._describe(cause)
            if not self.ready.is_set():
                self._give_up(cause)
                return
            num_deaths_in_a_row = self._policy.next_row(num_deaths_in_a_row, ran_s)
            delay_s = self._policy.delay_s(num_deaths_in_a_row)
            if delay_s is None:
                self._give_up(f"{cause}, {num_deaths_in_a_row} times in a row")
                return
            self._enter(ProcessState.BACKING_OFF, f"{cause}; restart in {delay_s:g} s")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop_requested.wait(), delay_s)
        self._enter(ProcessState.STOPPED, "")

    def request_stop(self) -> None:
        """Asks the process to drain and end (SIGTERM), and never restarts it. Idempotent."""
        if self._stop_requested.is_set():
            return
        self._stop_requested.set()
        if self._process is not None:
            self._enter(ProcessState.STOPPING, "")
            with contextlib.suppress(ProcessLookupError):  # it just ended by itself
                self._process.terminate()

    def kill(self) -> None:
        """Ends the process and all of its group at once, and never restarts it. Idempotent."""
        self._stop_requested.set()
        if self._process is not None:
            _kill_group(self._process.pid)

    @property
    def _log_file(self) -> Path:
        return log_file(self._run_dir / "logs", self.spec.name)

    async def _live(self) -> tuple[float, str]:
        """One life: seconds that it lasted, and how it ended."""
        started = time.monotonic()
        process = await self._spawn()
        pid = process.pid
        self._process = process
        self._num_lives += 1
        self._ready_after_s = None
        self._enter(ProcessState.STARTING, "")
        if self._stop_requested.is_set():  # while it was being spawned
            _kill_group(pid)
        ended = asyncio.create_task(process.wait())
        try:
            if await self._becomes_ready(ended):
                self._ready_after_s = time.monotonic() - started
                self.ready.set()
                if not self._stop_requested.is_set():
                    self._enter(ProcessState.READY, "")
                returncode = await ended
                cause = _describe_end(returncode)
            elif ended.done():
                cause = f"{_describe_end(ended.result())} before it was ready"
            else:
                cause = f"was not ready within {self._ready_timeout_s:g} s"
        finally:
            _kill_group(pid)
            await ended
            self._process = None
        ran_s = time.monotonic() - started
        logger.info(
            "process ended name=%s pid=%d ran_s=%.1f: %s", self.spec.name, pid, ran_s, cause
        )
        return ran_s, cause

    async def _spawn(self) -> asyncio.subprocess.Process:
        guarded = (sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *self.spec.argv)
        with open_log(self._run_dir / "logs", self.spec.name) as log:
            return await asyncio.create_subprocess_exec(
                *guarded,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._run_dir,  # so that no file of the user's folder is imported by accident
                env={**os.environ, **self.spec.env},
                start_new_session=True,
            )

    async def _becomes_ready(self, ended: asyncio.Task[int]) -> bool:
        """False when the process ended, or the time is over."""
        scanner = ReadyLineScanner(self._log_file)
        deadline = time.monotonic() + self._ready_timeout_s
        info: Mapping[str, Any] | None = None
        while info is None and not ended.done() and time.monotonic() < deadline:
            await asyncio.wait({ended}, timeout=_READY_POLL_S)
            info = scanner.scan()
        if info is None:
            return False
        logger.info("process ready name=%s %s", self.spec.name, dict(info))
        return True

    def _give_up(self, cause: str) -> None:
        self.failure = self._describe(cause)
        self._enter(ProcessState.FAILED, cause)

    def _describe(self, cause: str) -> LaunchError:
        tail = last_lines(self._log_file, _NUM_TAIL_LINES)
        return LaunchError(self.spec.name, f"{cause} (log: {self._log_file})", tail)

    def _enter(self, state: ProcessState, detail: str) -> None:
        if state not in _NEXT[self._state]:
            raise RuntimeError(f"{self.spec.name}: {self._state.name} -> {state.name}")
        self._state = state
        self._detail = detail
        self._on_change()


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
        os.killpg(pid, signal.SIGKILL)


def _describe_end(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    return f"was ended by {signal.Signals(-returncode).name}"
