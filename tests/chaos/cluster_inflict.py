"""Carries a plan of faults out against a running cluster, and sees that each really happens."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from streamfill.launcher.log_files import log_file
from streamfill.launcher.plan import ROUTER_LOG
from tests.chaos.cluster_evidence import shifts_s
from tests.chaos.cluster_plan import ChaosPlan, FaultKind, PlannedFault
from tests.support.cluster import RunningCluster
from tests.support.wall_clock import WallClock

_DOOMED_CLIENT = Path(__file__).parents[1] / "support" / "doomed_client.py"
_DOOMED_STREAMS = 4
_PROCESS_WITHIN_S = 20.0
"""So long a fault waits for a process that is just being restarted."""
_POLL_S = 0.02
_SEEN_WITHIN_S = 2.0
_JUMP_SEEN_WITHIN_S = 15.0
"""The router may stand still, or be dead, just then."""
_DISK_WITHIN_S = 10.0
"""So long it takes at most until the log is written beyond its limit, with the load that there
is."""
_DISK_ROOM_BYTES = 32 * 1024
_CLOCK_SLACK_S = 20.0
"""Less than any jump, more than a line is old."""


@dataclass(frozen=True, kw_only=True)
class Inflicted:
    """What was done. Times are of the monotonic clock."""

    fault: PlannedFault
    began_s: float
    ended_s: float
    is_real: bool
    """The operating system, or the victim, showed that it happened."""
    pid: int | None = None
    """Of the process that it happened to."""


class Inflictor:
    """``run`` does it all, in a task of its own; ``calm`` undoes whatever still lasts."""

    def __init__(self, cluster: RunningCluster, plan: ChaosPlan, clock: WallClock) -> None:
        self.inflicted: list[Inflicted] = []
        self._cluster = cluster
        self._plan = plan
        self._clock = clock
        self._stopped: set[int] = set()

    async def run(self) -> None:
        """All faults, each at its time."""
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in self._plan.faults:
                group.create_task(self._at_its_time(fault, began_s))

    def calm(self) -> None:
        """Whatever stands still goes on; links and transfers are in order again."""
        for pid in list(self._stopped):
            self._signal(pid, signal.SIGCONT)
        for kind in (FaultKind.LINKS, FaultKind.KV):
            gate_of(self._cluster.folder, kind).unlink(missing_ok=True)

    async def _at_its_time(self, fault: PlannedFault, began_s: float) -> None:
        await asyncio.sleep(max(0.0, began_s + fault.at_s - time.monotonic()))
        match fault.kind:
            case FaultKind.KILL:
                await self._kill(fault)
            case FaultKind.PAUSE:
                await self._pause(fault)
            case FaultKind.LINKS | FaultKind.KV:
                await self._open_gate(fault)
            case FaultKind.CLOCK:
                await self._jump(fault)
            case FaultKind.VANISH:
                await self._vanish(fault)
            case FaultKind.DISK:
                await self._fill_disk(fault)

    async def _kill(self, fault: PlannedFault) -> None:
        pid = await self._pid_of(fault.target)
        process = psutil.Process(pid)
        at_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self._note(fault, at_s, await _seen(lambda: not _lives(process)), pid)

    async def _pause(self, fault: PlannedFault) -> None:
        pid = await self._pid_of(fault.target)
        process = psutil.Process(pid)
        at_s = time.monotonic()
        self._stopped.add(pid)
        self._signal(pid, signal.SIGSTOP)
        try:
            is_real = await _seen(lambda: process.status() == psutil.STATUS_STOPPED)
            await asyncio.sleep(max(0.0, at_s + fault.lasts_s - time.monotonic()))
        finally:
            self._signal(pid, signal.SIGCONT)
            self._stopped.discard(pid)
        self._note(fault, at_s, is_real, pid)

    async def _open_gate(self, fault: PlannedFault) -> None:
        gate = gate_of(self._cluster.folder, fault.kind)
        at_s = time.monotonic()
        gate.touch()
        try:
            await asyncio.sleep(fault.lasts_s)
        finally:
            gate.unlink(missing_ok=True)
        self._note(fault, at_s)

    async def _jump(self, fault: PlannedFault) -> None:
        """The router logs every stream, so soon a line has the new time."""
        log = log_file(Path(self._cluster.state.run_dir) / "logs", "router")
        position, at_s = log.stat().st_size, time.monotonic()
        self._clock.jump(fault.jump_s)
        shift_s = self._clock.shift_s

        def is_shifted() -> bool:
            return any(abs(each - shift_s) < _CLOCK_SLACK_S for each in shifts_s(log, position))

        self._note(fault, at_s, await _seen(is_shifted, _JUMP_SEEN_WITHIN_S))

    async def _fill_disk(self, fault: PlannedFault) -> None:
        """No file of the router may grow any more, until it gives its log of streams up. SQLite
        writes its file over and over, so the limit is where the router can just write what it
        says."""
        process = psutil.Process(await self._pid_of(fault.target))
        folder = Path(self._cluster.state.run_dir)
        at_s = time.monotonic()
        before = process.rlimit(psutil.RLIMIT_FSIZE)
        most_bytes = log_file(folder / "logs", "router").stat().st_size + _DISK_ROOM_BYTES
        process.rlimit(psutil.RLIMIT_FSIZE, (most_bytes, before[1]))
        try:
            is_real = await _seen(lambda: not _logs_of(folder), _DISK_WITHIN_S)
        finally:
            process.rlimit(psutil.RLIMIT_FSIZE, before)
        self._note(fault, at_s, is_real, process.pid)

    async def _vanish(self, fault: PlannedFault) -> None:
        client = await asyncio.create_subprocess_exec(
            sys.executable,
            str(_DOOMED_CLIENT),
            self._cluster.address,
            str(_DOOMED_STREAMS),
            str(self._plan.seed),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        at_s = time.monotonic()
        assert client.stdout is not None
        try:
            line = await asyncio.wait_for(client.stdout.readline(), _PROCESS_WITHIN_S)
            await asyncio.sleep(fault.lasts_s)
        except TimeoutError:
            line = b""
        finally:
            if client.returncode is None:
                client.kill()
            await client.wait()
        was_there = line.strip() == b"open" and client.returncode == -signal.SIGKILL
        self._note(fault, at_s, was_there, client.pid)

    async def _pid_of(self, name: str) -> int:
        """Of a process that is up, or will soon be again."""
        end_s = time.monotonic() + _PROCESS_WITHIN_S
        while True:
            record = self._cluster.process(name)
            if record.pid is not None and record.state == "ready":
                return record.pid
            assert time.monotonic() < end_s, f"{name} is not up: {record.state}"
            await asyncio.sleep(_POLL_S)

    def _signal(self, pid: int, number: signal.Signals) -> None:
        # A server has processes of its own below it, in one group.
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            self._stopped.discard(pid)

    def _note(
        self, fault: PlannedFault, at_s: float, is_real: bool = True, pid: int | None = None
    ) -> None:
        self.inflicted.append(
            Inflicted(fault=fault, began_s=at_s, ended_s=time.monotonic(), is_real=is_real, pid=pid)
        )


def gate_of(folder: Path, kind: FaultKind) -> Path:
    """The file while which there is, faults of this kind happen."""
    return folder / f"{kind.value}-go-wrong"


def _logs_of(folder: Path) -> list[Path]:
    """The files of the router's log of streams."""
    return list(folder.glob(f"{ROUTER_LOG}*"))


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def _seen(condition: Callable[[], bool], within_s: float = _SEEN_WITHIN_S) -> bool:
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        if condition():
            return True
        await asyncio.sleep(_POLL_S)
    return False
