"""The supervisor, with small scripts in the place of router and servers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from streamfill.config import LauncherSection
from streamfill.launcher import managed_process
from streamfill.launcher.errors import LaunchError
from streamfill.launcher.managed_process import ProcessState, ProcessStatus
from streamfill.launcher.plan import ClusterPlan, ProcessKind, ProcessSpec
from streamfill.launcher.restart_policy import RestartPolicy
from streamfill.launcher.state import start_ticks
from streamfill.launcher.supervisor import Supervisor
from tests.support.shifted_time import shifted_time

FIXTURES = Path(__file__).parents[2] / "fixtures" / "launcher"
WAIT_S = 20.0
"""Far more than anything here takes, also on a busy machine."""
QUICK = RestartPolicy(max_restarts=2, first_delay_s=0.01, max_delay_s=0.02)


class Cluster:
    """A supervisor of fake processes, and what was seen of it."""

    def __init__(self, run_dir: Path, settings: LauncherSection, **options: str) -> None:
        self.journal_file = run_dir / "journal"
        self.history: list[tuple[str, ProcessState]] = []
        processes = tuple(
            self._spec(run_dir, name.replace("_", "-"), extra) for name, extra in options.items()
        )
        self.supervisor = Supervisor(
            ClusterPlan(name="test", address="127.0.0.1:1", processes=processes),
            run_dir=run_dir,
            settings=settings,
            policy=QUICK,
            on_change=self._note,
        )

    def _spec(self, run_dir: Path, name: str, options: str) -> ProcessSpec:
        fake = str(FIXTURES / "fake_process.py")
        arguments = ("--journal", str(self.journal_file), "--name", name, *options.split())
        return ProcessSpec(
            name=name,
            kind=ProcessKind(name.partition("-")[0]),
            argv=(sys.executable, fake, *arguments),
            env={},
            config_file=run_dir / "config" / f"{name}.json",
            config_json=b"{}",
        )

    def _note(self, statuses: Sequence[ProcessStatus]) -> None:
        self.history.extend((status.name, status.state) for status in statuses)

    def journal(self) -> list[list[str]]:
        """Lines of name, event, pid."""
        if not self.journal_file.exists():
            return []
        return [line.split() for line in self.journal_file.read_text().splitlines()]

    def pids(self) -> set[int]:
        """All that were ever started."""
        found = {int(line[2]) for line in self.journal()}
        children = (line[1] for line in self.journal() if line[1].startswith("child="))
        return found | {int(event.partition("=")[2]) for event in children}

    async def until(self, name: str, state: ProcessState) -> None:
        """Returns when the process is in that state."""
        deadline = time.monotonic() + WAIT_S
        while not any(s.name == name and s.state is state for s in self.supervisor.statuses):
            assert time.monotonic() < deadline, self.supervisor.statuses
            await asyncio.sleep(0.01)

    async def until_said(self, name: str) -> None:
        """Returns when the process has written a line."""
        log = self.journal_file.parent / "logs" / f"{name}.log"
        deadline = time.monotonic() + WAIT_S
        while not (log.exists() and "\n" in log.read_text()):
            assert time.monotonic() < deadline, f"{name} says nothing"
            await asyncio.sleep(0.01)


def wait_gone(pids: set[int]) -> None:
    """Fails unless all of them end."""
    deadline = time.monotonic() + WAIT_S
    while alive := {pid for pid in pids if start_ticks(pid) is not None}:
        assert time.monotonic() < deadline, f"left behind: {alive}"
        time.sleep(0.02)


async def test_start_and_drain_in_order(tmp_path: Path) -> None:
    """All become ready; the router ends first, then the servers, then the controller."""
    cluster = Cluster(tmp_path, LauncherSection(), router="", controller="", prefill_0="")
    await cluster.supervisor.start()
    assert {s.state for s in cluster.supervisor.statuses} == {ProcessState.READY}
    await cluster.supervisor.drain()
    ends = [(line[0], line[1]) for line in cluster.journal() if line[1] in ("sigterm", "end")]
    assert ends == [
        (name, event)
        for name in ("router", "prefill-0", "controller")
        for event in ("sigterm", "end")
    ]
    assert {s.state for s in cluster.supervisor.statuses} == {ProcessState.STOPPED}
    wait_gone(cluster.pids())


async def test_dead_process_is_restarted(tmp_path: Path) -> None:
    """A server that dies twice after it was ready comes back each time, with a log per life."""
    cluster = Cluster(tmp_path, LauncherSection(), router="", prefill_0="--die-in-lives 2")
    await cluster.supervisor.start()
    deadline = time.monotonic() + WAIT_S
    while sum(line[:2] == ["prefill-0", "start"] for line in cluster.journal()) < 3:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    await cluster.until("prefill-0", ProcessState.READY)
    assert ("prefill-0", ProcessState.BACKING_OFF) in cluster.history
    assert [s.num_restarts for s in cluster.supervisor.statuses] == [0, 2]
    with pytest.raises(LaunchError, match="prefill-0 ended with exit code 7"):
        cluster.supervisor.raise_death()
    await cluster.supervisor.drain()
    logs = sorted(path.name for path in (tmp_path / "logs").glob("prefill-0*"))
    assert logs == ["prefill-0.1.log", "prefill-0.2.log", "prefill-0.log"]


async def test_restarts_are_bounded(tmp_path: Path) -> None:
    """A prefill server that dies again and again is given up, and with it the cluster."""
    cluster = Cluster(tmp_path, LauncherSection(), router="", prefill_0="--die-in-lives 99")
    await cluster.supervisor.start()
    error = await asyncio.wait_for(cluster.supervisor.wait_hopeless(), WAIT_S)
    assert error.process == "prefill-0"
    assert "exit code 7, 3 times in a row" in str(error)
    await cluster.supervisor.drain()
    assert sum(line[1] == "start" for line in cluster.journal() if line[0] == "prefill-0") == 3
    wait_gone(cluster.pids())


async def test_cluster_survives_a_failed_decode_server(tmp_path: Path) -> None:
    """With the only decode server given up, the cluster goes on: the prefill server decodes."""
    options = {"router": "", "prefill_0": "", "decode_0": "--die-in-lives 99"}
    cluster = Cluster(tmp_path, LauncherSection(), **options)
    await cluster.supervisor.start()
    hopeless = asyncio.create_task(cluster.supervisor.wait_hopeless())
    await cluster.until("decode-0", ProcessState.FAILED)
    await asyncio.sleep(0)
    assert not hopeless.done()
    hopeless.cancel()
    await cluster.supervisor.drain()


async def test_death_before_readiness_stops_the_start(tmp_path: Path) -> None:
    """A process that ends before it was ever ready is not restarted; its last words are shown."""
    cluster = Cluster(tmp_path, LauncherSection(), router="", prefill_0="--die-before-ready")
    with pytest.raises(LaunchError, match="exit code 2") as caught:
        await cluster.supervisor.start()
    assert caught.value.log_tail[-1] == "error: model = 'nowhere': no such folder"
    await cluster.supervisor.drain()
    wait_gone(cluster.pids())


async def test_ready_timeout_shows_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that never says READY stops the start with its last log lines, and is killed."""
    clock = shifted_time(monkeypatch, managed_process)
    settings = LauncherSection(ready_timeout_s=600.5)
    cluster = Cluster(tmp_path, settings, router="", prefill_0="--never-ready")
    starting = asyncio.create_task(cluster.supervisor.start())
    await cluster.until("router", ProcessState.READY)
    await cluster.until_said("prefill-0")
    clock.shift_s += 601.0
    with pytest.raises(LaunchError, match=r"prefill-0 was not ready within 600\.5 s") as caught:
        await starting
    assert caught.value.log_tail == ("hello from prefill-0",)
    assert "hello from prefill-0" in str(caught.value)
    await cluster.supervisor.drain()
    wait_gone(cluster.pids())


async def test_program_that_cannot_be_started(tmp_path: Path) -> None:
    """A run folder that cannot hold logs is reported as the process's failure to start."""
    (tmp_path / "logs").write_text("in the way")
    cluster = Cluster(tmp_path, LauncherSection(), router="")
    with pytest.raises(LaunchError, match="router cannot be started"):
        await cluster.supervisor.start()
    await cluster.supervisor.drain()


async def test_deaf_process_is_killed_with_its_children(tmp_path: Path) -> None:
    """Who ignores SIGTERM is killed after the drain time-out, and so are its own children."""
    settings = LauncherSection(drain_timeout_s=0.3)
    options = {"router": "--ignore-sigterm --with-child", "prefill_0": "--with-child"}
    cluster = Cluster(tmp_path, settings, **options)
    await cluster.supervisor.start()
    await cluster.supervisor.drain()
    assert len(cluster.pids()) == 4
    wait_gone(cluster.pids())


async def test_second_signal_ends_the_drain(tmp_path: Path) -> None:
    """Killing everything while a deaf router is being drained ends the drain at once."""
    cluster = Cluster(tmp_path, LauncherSection(drain_timeout_s=600), router="--ignore-sigterm")
    await cluster.supervisor.start()
    draining = asyncio.create_task(cluster.supervisor.drain())
    await cluster.until("router", ProcessState.STOPPING)
    cluster.supervisor.kill_all()
    await asyncio.wait_for(draining, WAIT_S)
    wait_gone(cluster.pids())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_launcher_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    """However the launcher ends, no process of the cluster is left; SIGTERM and Ctrl-C drain."""
    journal = tmp_path / "journal"
    script = str(FIXTURES / "run_supervisor.py")
    command = [sys.executable, script, str(tmp_path), str(journal)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "UP\n"
        pids = {int(line.split()[2]) for line in journal.read_text().splitlines()}
        assert len(pids) == 2
        os.kill(launcher.pid, number)
        output = launcher.stdout.read()
        assert launcher.wait(WAIT_S) == (-number if number == signal.SIGKILL else 0)
    wait_gone(pids)
    if number != signal.SIGKILL:
        assert output == "DOWN\n"
        assert journal.read_text().count("end") == 2
