"""What the operating system says about a cluster's processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import psutil

from tests.support.cluster import RunningCluster
from tests.support.waiting import wait_until

HEAVY_LIBRARIES = ("libtorch", "sglang", "sgl_kernel", "transformers", "torchvision", "triton")
"""Parts of paths that are mapped into a process with an engine."""


def family(pid: int) -> list[psutil.Process]:
    """The process and all that descend from it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def assert_gone(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    """None of these processes is left after ``timeout_s``; psutil tells a reused id apart."""
    for process in processes:
        wait_until(f"the end of {process}", partial(_is_gone, process), timeout_s)


def cpu_s(processes: Iterable[psutil.Process]) -> float:
    """CPU time that the processes have used, in seconds."""
    times = [process.cpu_times() for process in processes]
    return float(sum(each.user + each.system for each in times))


def mapped_files(pid: int) -> set[str]:
    """Files mapped into a process's memory; every loaded shared library is among them."""
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    return {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}


def pid_of(cluster: RunningCluster, name: str) -> int:
    """Process id of one of the cluster's processes, which lives."""
    pid = cluster.process(name).pid
    assert pid is not None, f"{name} does not run"
    return pid


def kill(cluster: RunningCluster, name: str) -> int:
    """``kill -9`` of one of the cluster's processes; returns its id."""
    pid = pid_of(cluster, name)
    os.kill(pid, signal.SIGKILL)
    return pid


def listening_ports(pid: int) -> list[int]:
    """TCP ports that a process listens on."""
    connections = psutil.Process(pid).net_connections("tcp")
    return sorted({c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN})


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
