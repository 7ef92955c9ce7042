"""A whole cluster as a block of code, with scripts in the place of its processes."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

from streamfill.cli.cluster_options import with_changes
from streamfill.cli.process_view import process_view
from streamfill.config import ClusterConfig, RouterSection
from streamfill.errors import ConfigError
from streamfill.launcher import cluster as cluster_module
from streamfill.launcher.cluster import RunningCluster, StoppedError, running_cluster
from streamfill.launcher.errors import LaunchError
from streamfill.launcher.managed_process import ProcessStatus
from streamfill.launcher.plan import ClusterPlan, ProcessKind, ProcessSpec
from streamfill.launcher.signals import StopRequest
from streamfill.launcher.state import ClusterPhase, find_cluster, start_ticks
from streamfill.launcher.supervisor import Supervisor

FAKE = Path(__file__).parents[2] / "fixtures" / "launcher" / "fake_process.py"
CONFIG = ClusterConfig(name="t", router=RouterSection(grpc_port=0, http_port=0))


class Bench:
    """Replaces the plan by two scripts, and registration by what a test sets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stop = StopRequest()
        self.router_options: tuple[str, ...] = ()
        self.is_registered = True
        self.on_change: Callable[[Sequence[ProcessStatus]], None] = lambda statuses: None
        self.registering = asyncio.Event()

    def plan(self, config: ClusterConfig, **rest: Any) -> ClusterPlan:
        """Stands in for `plan_cluster`."""
        journal = str(self.folder / "journal")
        kinds = {"router": ProcessKind.ROUTER, "prefill-0": ProcessKind.PREFILL}
        options = {"router": self.router_options, "prefill-0": ()}
        specs = tuple(
            ProcessSpec(
                name=name,
                kind=kind,
                argv=(sys.executable, str(FAKE), "--journal", journal, "--name", name)
                + options[name],
                env={},
                config_file=self.folder / "config" / f"{name}.json",
                config_json=b"{}",
            )
            for name, kind in kinds.items()
        )
        return ClusterPlan(name=config.name, address="127.0.0.1:7", processes=specs)

    async def wait_registered(
        self, address: str, config: ClusterConfig, supervisor: Supervisor
    ) -> None:
        """Stands in for `_wait_registered`."""
        self.registering.set()
        while not self.is_registered:
            supervisor.raise_death()
            await asyncio.sleep(0.01)

    def running(
        self, config: ClusterConfig = CONFIG, state_dir: Path | None = None
    ) -> AbstractAsyncContextManager[RunningCluster]:
        """The cluster of this test."""
        return running_cluster(
            config,
            model_path=Path("/m"),
            state_dir=state_dir or self.folder,
            run_dir=self.folder,
            stop=self.stop,
            on_change=self.on_change,
        )

    def log_files(self) -> list[Path]:
        """Of all processes."""
        return list((self.folder / "logs").iterdir())

    def pids(self) -> list[int]:
        """Of all processes that were started so far."""
        journal = self.folder / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [int(line.split()[2]) for line in lines]


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """A bench, and afterwards a look for processes that were left behind."""
    made = Bench(tmp_path)
    monkeypatch.setattr(cluster_module, "plan_cluster", made.plan)
    monkeypatch.setattr(cluster_module, "_wait_registered", made.wait_registered)
    yield made
    assert not [pid for pid in made.pids() if start_ticks(pid) is not None]


async def test_state_file_follows_the_cluster(bench: Bench) -> None:
    """The state file says who runs where while the cluster is ready, and is gone afterwards."""
    async with bench.running() as cluster:
        state = find_cluster(bench.folder)
        assert state is not None
        assert (state.address, state.phase) == ("127.0.0.1:7", ClusterPhase.READY)
        assert state.launcher_pid == os.getpid()
        assert state.startup_s == cluster.startup_s
        assert {p.name: p.pid for p in state.processes} == {
            status.name: status.pid for status in cluster.supervisor.statuses
        }
        logs = {process.log_file for process in state.processes}
        assert logs == {str(path) for path in bench.log_files()}
    assert find_cluster(bench.folder) is None


async def test_second_cluster_of_the_same_name(bench: Bench) -> None:
    """A second start of the same name is refused and leaves the first one alone."""
    async with bench.running():
        with pytest.raises(ConfigError, match=f"run by process {os.getpid()}"):
            async with bench.running():
                pass
        state = find_cluster(bench.folder)
        assert state is not None
        assert state.phase is ClusterPhase.READY


async def test_two_clusters_have_folders_of_their_own(bench: Bench, tmp_path: Path) -> None:
    """Or a process that is restarted would come back with the configuration of the other one."""
    async with bench.running():
        written = (bench.folder / "config" / "router.json").stat()
        with pytest.raises(ConfigError, match="another cluster that runs") as caught:
            async with bench.running(state_dir=tmp_path / "other"):
                pass
        assert caught.value.key == "launcher.run_dir"
        assert (bench.folder / "config" / "router.json").stat() == written
        assert len(bench.pids()) == 2
    async with bench.running(state_dir=tmp_path / "other"):
        pass


async def test_a_folder_that_is_there_and_cannot_be_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named by its key, as one that cannot be made is."""
    monkeypatch.setattr(
        "streamfill.launcher.cluster.os.access", lambda path, mode: path != bench.folder / "logs"
    )
    with pytest.raises(ConfigError, match="can be written to") as caught:
        async with bench.running():
            pass
    assert (caught.value.key, caught.value.value) == (
        "launcher.run_dir",
        str(bench.folder / "logs"),
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cluster.lock", "STREAMFILL_HOME"),
        ("processes.lock", "launcher.run_dir"),
        (".prometheus.json.part", "launcher.run_dir"),
        ("prefill-0.json", "launcher.run_dir"),
    ],
)
async def test_a_full_disk_stops_the_start_in_a_line(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, key: str
) -> None:
    """Whichever file it is that there is no room for; nothing was started."""
    opened = Path.open

    def open_while_there_is_room(path: Path, *args: Any, **rest: Any) -> Any:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, *args, **rest)

    monkeypatch.setattr(Path, "open", open_while_there_is_room)
    with pytest.raises(ConfigError, match=r"No space left on device.*make room") as caught:
        async with bench.running():
            pass
    assert (caught.value.key, caught.value.value) == (key, str(bench.folder))
    assert not bench.pids()
    assert find_cluster(bench.folder) is None


async def test_signal_during_the_start(bench: Bench) -> None:
    """A signal ends a start that is still waiting, and every process of it."""
    bench.is_registered = False
    start = asyncio.create_task(bench.running().__aenter__())
    await bench.registering.wait()
    assert len(bench.pids()) == 2
    bench.stop.note()
    with pytest.raises(StoppedError):
        await start


async def test_death_while_servers_register(bench: Bench) -> None:
    """A process that dies right after it was ready stops the start; nobody waits for restarts."""
    bench.is_registered = False
    bench.router_options = ("--die-in-lives", "99")
    with pytest.raises(LaunchError, match="router ended with exit code 7"):
        async with bench.running():
            pass


async def test_error_inside_the_block(bench: Bench) -> None:
    """An error of whoever uses the cluster goes on after everything was stopped."""
    with pytest.raises(ZeroDivisionError):
        async with bench.running():
            raise ZeroDivisionError


class _Reader:
    """Reads what is written to a terminal or a pipe, until it ends."""

    def __init__(self, read_end: int) -> None:
        self._read_end = read_end
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ends.set()
        self._thread.join()
        os.close(self._read_end)

    def _run(self) -> None:
        with suppress(OSError):  # nobody writes any more
            while not self._ends.is_set():
                if select.select([self._read_end], [], [], 0.01)[0]:
                    os.read(self._read_end, 65536)


@pytest.mark.parametrize("is_terminal", [False, True])
async def test_it_stops_in_order_when_nobody_reads_what_is_said(
    bench: Bench, *, is_terminal: bool
) -> None:
    """Ctrl-C ends the `tee` behind a pipe before the cluster; a terminal may have been closed."""
    read_end, write_end = os.openpty() if is_terminal else os.pipe()
    reader = _Reader(read_end)
    with os.fdopen(write_end, "w") as out, process_view(out) as view:
        bench.on_change = view.show
        async with bench.running():
            reader.end()
            view.say("Draining")
    journal = (bench.folder / "journal").read_text()
    assert [journal.count(event) for event in ("sigterm", "end")] == [2, 2]


async def test_files_are_found_in_whatever_folder_a_process_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their names were said in the folder of who started the cluster."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "api.jsonl").touch()
    (tmp_path / "token").write_text("t" * 64)
    files = {"router.api_keys_file": "api.jsonl", "metrics_token_file": "token"}
    asked: list[ClusterConfig] = []

    def plan(config: ClusterConfig, **rest: Any) -> ClusterPlan:
        asked.append(config)
        return bench.plan(config, **rest)

    monkeypatch.setattr(cluster_module, "plan_cluster", plan)
    async with bench.running(with_changes(CONFIG, files)):
        (config,) = asked
    assert config.router.api_keys_file == str(tmp_path / "api.jsonl")
    assert config.metrics_token_file == str(tmp_path / "token")
    assert config.zmq_keys_dir is None
