"""The processes of a running cluster, and that none of them outlives it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from streamfill.api import Client
from streamfill.errors import UnavailableError
from streamfill.launcher.state import read_state
from tests.support.cluster import RunningCluster, start_cluster
from tests.support.processes import (
    HEAVY_LIBRARIES,
    assert_gone,
    cpu_s,
    family,
    mapped_files,
    pid_of,
)
from tests.support.waiting import until, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.clusters]

MODULES = {
    "router": "-m router ",
    "controller": "-m streamfill.preemption ",
    "prefill-0": "prefill-0",
    "decode-0": "decode-0",
}
"""Name of each process of a cluster of one prefill and one decode server, and what ``ps`` shows."""

SETTLE_S = 1.0
IDLE_S = 5.0
IDLE_SHARE = 0.10
"""Of one core, for all processes of an idle cluster together."""
IDLE_TRIES = 6
"""The same work takes more of a core while others make it slow."""

GONE_S = 60.0
"""For the kernel and a busy machine; the processes themselves need a second or two."""


def test_one_process_for_each_part(cluster: RunningCluster) -> None:
    """Router, prefill server, decode server and controller are one process each, children of the
    launcher; there is no other one."""
    launcher = psutil.Process(cluster.launcher.pid)
    pids = {record.name: record.pid for record in cluster.state.processes}
    assert set(pids) == set(MODULES)
    assert sorted(process.pid for process in family(launcher.pid)[1:]) == sorted(
        pid for pid in pids.values() if pid is not None
    )
    for name, shown in MODULES.items():
        process = psutil.Process(pid_of(cluster, name))
        assert process.ppid() == launcher.pid
        assert shown in " ".join(process.cmdline()), name


@pytest.mark.parametrize("name", ["router", "controller"])
def test_light_processes_load_no_engine(cluster: RunningCluster, name: str) -> None:
    """Neither torch nor sglang is mapped into the router or the controller, while a server, looked
    at in the same way, has torch."""

    def heavy(process: str) -> set[str]:
        files = mapped_files(pid_of(cluster, process))
        return {file for file in files if any(word in file for word in HEAVY_LIBRARIES)}

    assert heavy("prefill-0")
    assert heavy(name) == set()


async def test_idle_cluster_sleeps(cluster: RunningCluster) -> None:
    """After it has worked, a cluster without requests uses under a tenth of one core."""
    async with Client(cluster.address) as client:
        await client.complete("Wake up.", max_tokens=4, temperature=0.0)
    processes = family(cluster.launcher.pid)
    await asyncio.sleep(SETTLE_S)
    shares = []
    for _ in range(IDLE_TRIES):
        before_s, started_s = cpu_s(processes), time.monotonic()
        await asyncio.sleep(IDLE_S)
        shares.append((cpu_s(processes) - before_s) / (time.monotonic() - started_s))
        if shares[-1] < IDLE_SHARE:
            break
    print("idle:", *(f"{100 * share:.1f}%" for share in shares), "of a core")
    assert min(shares) < IDLE_SHARE


def test_every_process_said_that_it_is_ready(cluster: RunningCluster) -> None:
    """Each log has a READY line, the launcher tells the address, and the state says ready."""
    for record in cluster.state.processes:
        log = Path(record.log_file).read_text(encoding="utf-8", errors="replace")
        assert log.count("READY {") == 1, record.name
        assert (record.state, record.num_restarts) == ("ready", 0)
    said = (cluster.folder / "up.log").read_text(encoding="utf-8")
    assert f"Clients connect to {cluster.address}." in said
    assert cluster.state.startup_s is not None


@contextmanager
def own_cluster(folder: Path, model: Path, *settings: str) -> Iterator[RunningCluster]:
    """A cluster that the test ends by itself; what a failed test leaves is killed."""
    running = start_cluster(folder, model, "own", settings=settings)
    processes = family(running.launcher.pid)
    try:
        yield running
    finally:
        for process in processes:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
        running.launcher.wait()


def stop_by(cluster: RunningCluster, number: signal.Signals) -> int:
    """Send one signal to the launcher; its exit code, when all of its processes are gone."""
    processes = family(cluster.launcher.pid)
    cluster.launcher.send_signal(number)
    code = cluster.launcher.wait(timeout=90.0)
    assert_gone(processes, GONE_S)
    assert read_state(cluster.folder / "run" / cluster.name) is None, "the state file is left"
    return code


def test_sigterm(tmp_path: Path, tiny_model: Path) -> None:
    """SIGTERM ends an idle cluster in good order: exit code 0, no process and no state left."""
    with own_cluster(tmp_path, tiny_model, "decode.count=0") as cluster:
        assert stop_by(cluster, signal.SIGTERM) == 0
        log = cluster.folder / "run" / cluster.name / "logs" / "launcher-events.log"
        events = log.read_text(encoding="utf-8")
        assert events.count("ended with exit code 0") == 3, events
        assert "SIGKILL" not in events, "a process had to be killed"


async def test_ctrl_c_drains(tmp_path: Path, tiny_model: Path) -> None:
    """The first Ctrl-C lets an open stream finish and takes nothing new; then all is gone."""
    with own_cluster(tmp_path, tiny_model) as cluster:
        processes = family(cluster.launcher.pid)
        async with Client(cluster.address) as client, client.stream() as stream:
            await stream.append("The last one before closing time.")
            answer = stream.commit(max_tokens=600, temperature=0.0, ignore_eos=True)
            first = await anext(answer)
            cluster.launcher.send_signal(signal.SIGINT)
            await until("the router drains", lambda: drains(client), GONE_S)
            with pytest.raises(UnavailableError):
                await client.complete("One more.", max_tokens=1)
            rest = [token async for token in answer]
        assert len([first, *rest]) == 600
        assert await asyncio.to_thread(cluster.launcher.wait, 90.0) == 0
        assert_gone(processes, GONE_S)


async def drains(client: Client) -> bool:
    """Whether the router takes nothing new."""
    return not (await client.server_info()).ready


async def test_second_ctrl_c_ends_at_once(tmp_path: Path, tiny_model: Path) -> None:
    """A stream that nobody commits holds the drain up; a second Ctrl-C ends everything."""
    with own_cluster(tmp_path, tiny_model, "decode.count=0") as cluster:
        processes = family(cluster.launcher.pid)
        async with Client(cluster.address) as client, client.stream() as stream:
            await stream.append("Nobody will ever commit this.")
            cluster.launcher.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                await asyncio.to_thread(cluster.launcher.wait, 2.0)
            cluster.launcher.send_signal(signal.SIGINT)
            await asyncio.to_thread(cluster.launcher.wait, 20.0)  # of 30 that a drain may take
        assert_gone(processes, GONE_S)


def test_killed_launcher_leaves_nothing(tmp_path: Path, tiny_model: Path) -> None:
    """After ``kill -9`` of the launcher no process is left, and nothing is in the way of a new
    cluster of the same name."""
    with own_cluster(tmp_path, tiny_model, "decode.count=0") as cluster:
        processes = family(cluster.launcher.pid)
        os.kill(cluster.launcher.pid, signal.SIGKILL)
        cluster.launcher.wait()
        assert_gone(processes, GONE_S)
    interrupted_start(tmp_path, tiny_model)


def test_ctrl_c_during_the_start(tmp_path: Path, tiny_model: Path) -> None:
    """A cluster that is still starting ends as well, with exit code 130."""
    interrupted_start(tmp_path, tiny_model)


def interrupted_start(home: Path, model: Path) -> None:
    """Start a cluster, and end it as soon as all of its processes are there."""
    folder = home / "run" / "own"
    command = [
        sys.executable,
        "-m",
        "streamfill.cli.main",
        "up",
        "--name",
        "own",
        "--port",
        "0",
        "--http-port",
        "0",
    ]
    with (home / "up.log").open("wb") as log:
        launcher = subprocess.Popen(
            [*command, "--model", str(model)],
            stdout=log,
            stderr=log,
            env={**os.environ, "STREAMFILL_HOME": str(home)},
        )

    def is_starting() -> bool:
        state = read_state(folder)
        return state is not None and state.is_alive and all(p.pid for p in state.processes)

    wait_until("four processes", is_starting, 60.0)
    processes = family(launcher.pid)
    assert len(processes) == 5
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=90.0) == 130
    assert_gone(processes, GONE_S)
    assert read_state(folder) is None
