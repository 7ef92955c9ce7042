"""Servers are added to and removed from a running cluster, with scripts in the place of processes
and a router that says what the test wants; by the control socket, as `streamfill servers` does."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from router.interface import ClusterInfo
from streamfill import api
from streamfill.config import ClusterConfig, LauncherSection
from streamfill.launcher import managed_process, roster
from streamfill.launcher.control_client import ask_launcher
from streamfill.launcher.control_messages import (
    CONTROL_SOCKET,
    MAX_LINE_BYTES,
    AddServer,
    RemoveServer,
    Request,
    ServerAdded,
    ServerRemoved,
)
from streamfill.launcher.control_server import control_socket, short_path
from streamfill.launcher.errors import LaunchError
from streamfill.launcher.managed_process import ProcessState
from streamfill.launcher.more_servers import ServerPlanner
from streamfill.launcher.plan import ClusterPlan, ProcessKind, ProcessSpec
from streamfill.launcher.ports import Ports
from streamfill.launcher.restart_policy import RestartPolicy
from streamfill.launcher.roster import Roster
from streamfill.launcher.state import (
    ClusterPhase,
    ClusterState,
    own_start_ticks,
    start_ticks,
)
from streamfill.launcher.supervisor import Supervisor
from streamfill.messages.common import Role
from tests.support.shifted_time import shifted_time
from tests.unit.router.fake_manager import FakeManager, serve

FAKE = Path(__file__).parents[2] / "fixtures" / "launcher" / "fake_process.py"
WAIT_S = 20.0
"""Far more than anything here takes, also on a busy machine."""
READY_S = 600.0
"""Time-out that no process meets, unless a test sets a clock forward."""


@dataclass
class FakeRouter(FakeManager):
    """Knows the servers that the test names."""

    states: dict[str, str] = field(default_factory=dict)
    registers: bool = True
    """New servers come to it."""

    def info(self) -> ClusterInfo:
        info = super().info()
        (server,) = info.servers
        servers = [
            replace(server, server_id=name, role=Role(name.partition("-")[0]), state=state)
            for name, state in self.states.items()
        ]
        return replace(info, servers=servers)


@dataclass(frozen=True, kw_only=True)
class FakePlanner(ServerPlanner):
    """Plans scripts; the options are what is given as settings."""

    router: FakeRouter

    def plan(
        self,
        role: Role,
        settings: Mapping[str, Any],
        taken_ids: Collection[str],
        running: Sequence[ProcessSpec],
    ) -> ProcessSpec:
        number = sum(name.startswith(role.value) for name in taken_ids)
        name = f"{role.value}-{number}"
        if self.router.registers:
            self.router.states[name] = "alive"
        return script(self.run_dir, name, *settings.get("options", ()))


def script(run_dir: Path, name: str, *options: str) -> ProcessSpec:
    arguments = ("--journal", str(run_dir / "journal"), "--name", name, *options)
    return ProcessSpec(
        name=name,
        kind=ProcessKind(name.partition("-")[0]),
        argv=(sys.executable, str(FAKE), *arguments),
        env={},
        config_file=run_dir / "config" / f"{name}.json",
        config_json=b"{}",
    )


class Cluster:
    """A launcher with a router and one prefill server, and its control socket in a deep folder."""

    def __init__(
        self,
        run_dir: Path,
        folder: Path,
        router: FakeRouter,
        address: str,
        drain_timeout_s: float,
    ) -> None:
        self.run_dir, self.folder, self.router = run_dir, folder, router
        settings = LauncherSection(ready_timeout_s=READY_S, drain_timeout_s=drain_timeout_s)
        specs = (script(run_dir, "router"), script(run_dir, "prefill-0"))
        self.supervisor = Supervisor(
            ClusterPlan(name="t", address=address, processes=specs),
            run_dir=run_dir,
            settings=settings,
            policy=RestartPolicy(max_restarts=5, first_delay_s=0.01, max_delay_s=0.02),
        )
        planner = FakePlanner(
            config=ClusterConfig(launcher=settings),
            model_path=Path("/m"),
            ports=Ports(router_grpc=1, router_zmq=2, controller_zmq=3),
            num_cores=2,
            run_dir=run_dir,
            router=router,
        )
        self.num_changes = 0
        self.roster = Roster(planner, self.supervisor, address, self._changed)
        self.said: list[str] = []

    def _changed(self) -> None:
        self.num_changes += 1

    @property
    def state(self) -> ClusterState:
        return ClusterState(
            name="t",
            address="",
            model_path="",
            phase=ClusterPhase.READY,
            launcher_pid=os.getpid(),
            launcher_start_ticks=own_start_ticks(),
            run_dir=str(self.run_dir),
            startup_s=None,
            processes=(),
        )

    async def ask(self, request: Request) -> ServerAdded | ServerRemoved:
        """As a command does, in a thread of its own."""
        return await asyncio.to_thread(
            ask_launcher, self.state, self.folder, request, self.said.append
        )

    async def talk(self, *sent: bytes) -> bytes:
        """Raw bytes to the socket, and all that comes back."""

        def run() -> bytes:
            with socket.socket(socket.AF_UNIX) as connection, short_path(self.folder) as path:
                connection.settimeout(WAIT_S)
                connection.connect(path)
                for part in sent:
                    connection.sendall(part)
                received = b""
                while part := connection.recv(4096):
                    received += part
                return received

        return await asyncio.to_thread(run)

    def states(self) -> dict[str, ProcessState]:
        return {status.name: status.state for status in self.supervisor.statuses}

    def journal(self) -> list[list[str]]:
        """Lines of name, event, pid."""
        return [line.split() for line in (self.run_dir / "journal").read_text().splitlines()]

    def events(self, name: str) -> list[str]:
        return [line[1] for line in self.journal() if line[0] == name]


@asynccontextmanager
async def running_cluster(folder: Path, drain_timeout_s: float = WAIT_S) -> AsyncIterator[Cluster]:
    deep = folder / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True)
    router = FakeRouter(states={"prefill-0": "alive"})
    async with serve(router) as address:
        cluster = Cluster(folder, deep, router, address, drain_timeout_s)
        await cluster.supervisor.start()
        try:
            async with control_socket(deep, cluster.roster):
                yield cluster
        finally:
            await cluster.supervisor.drain()
    left = {int(line[2]) for line in cluster.journal() if start_ticks(int(line[2])) is not None}
    assert not left
    assert not (deep / CONTROL_SOCKET).exists()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tmp_path) as started:
        yield started


async def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        await asyncio.sleep(0.01)


async def test_a_server_is_added(cluster: Cluster) -> None:
    """It runs, is said to be there, and is looked after like the others."""
    added = await cluster.ask(AddServer(role=Role.PREFILL))
    assert isinstance(added, ServerAdded)
    assert added.server_id == "prefill-1"
    assert start_ticks(added.pid) is not None
    assert cluster.states()["prefill-1"] is ProcessState.READY
    assert cluster.said == [
        "starting prefill-1",
        "prefill-1 is ready; waiting for the router to take it in",
    ]
    assert cluster.num_changes == 1
    os.kill(added.pid, 9)
    await until(lambda: cluster.events("prefill-1").count("start") == 2)


async def test_a_server_is_removed(cluster: Cluster) -> None:
    """It ends in order, is not started again, and its id is not used again."""
    await cluster.ask(AddServer(role=Role.PREFILL))
    removed = await cluster.ask(RemoveServer(server_id="prefill-0"))
    assert removed == ServerRemoved(server_id="prefill-0", ended="ended with exit code 0")
    assert cluster.events("prefill-0") == ["start", "sigterm", "end"]
    assert set(cluster.states()) == {"router", "prefill-1"}
    del cluster.router.states["prefill-0"]
    added = await cluster.ask(AddServer(role=Role.PREFILL))
    assert added.server_id == "prefill-2"
    assert cluster.events("prefill-0") == ["start", "sigterm", "end"]


async def test_a_server_that_does_not_end_is_killed(tmp_path: Path) -> None:
    """After the launcher's drain time-out."""
    settings = {"options": ["--ignore-sigterm"]}
    async with running_cluster(tmp_path, drain_timeout_s=0.5) as cluster:
        await cluster.ask(AddServer(role=Role.DECODE, settings=settings))
        removed = await cluster.ask(RemoveServer(server_id="decode-0"))
    assert removed == ServerRemoved(server_id="decode-0", ended="was ended by SIGKILL")


async def test_the_last_prefill_server_stays(cluster: Cluster) -> None:
    """Others that drain or are dead do not count; force ends it."""
    await cluster.ask(AddServer(role=Role.PREFILL))
    cluster.router.states |= {"prefill-1": "draining", "prefill-9": "dead", "decode-0": "alive"}
    with pytest.raises(LaunchError, match=r"'prefill-0'.*last prefill server.*servers add prefill"):
        await cluster.ask(RemoveServer(server_id="prefill-0"))
    assert cluster.events("prefill-0") == ["start"]
    await cluster.ask(RemoveServer(server_id="prefill-0", force=True))
    cluster.router.states |= {"prefill-of-another-machine": "alive"}
    await cluster.ask(RemoveServer(server_id="prefill-1"))
    assert set(cluster.states()) == {"router"}


@pytest.mark.parametrize("name", ["nobody", "router"])
async def test_what_is_no_server_is_not_removed(cluster: Cluster, name: str) -> None:
    """The answer says which there are."""
    with pytest.raises(LaunchError, match=f"'{name}'.*no such server; its servers are: prefill-0"):
        await cluster.ask(RemoveServer(server_id=name))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--die-before-ready", "decode-0 ended with exit code 2 before it was ready.*nowhere"),
        ("--never-ready", "decode-0 was not ready within 600 s"),
    ],
)
async def test_a_server_that_does_not_get_ready_is_gone_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, option: str, words: str
) -> None:
    """The reason is told, and the cluster is as before."""
    clock = shifted_time(monkeypatch, managed_process)
    request = AddServer(role=Role.DECODE, settings={"options": [option]})
    asking = asyncio.ensure_future(cluster.ask(request))
    await until(lambda: cluster.events("decode-0"))
    if option == "--never-ready":
        clock.shift_s += READY_S
    with pytest.raises(LaunchError, match=f"(?s){words}"):
        await asking
    assert set(cluster.states()) == {"router", "prefill-0"}
    assert cluster.events("decode-0") == ["start"]


@pytest.mark.parametrize("dies", [True, False])
async def test_a_server_that_the_router_does_not_take_in(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """It is ended again, and the reason is told: its own, if it died of it."""
    clock = shifted_time(monkeypatch, roster)
    cluster.router.registers = False
    options = ["--die-in-lives", "99"] if dies else []
    words = "decode-0 ended with exit code 7" if dies else "after 600 s the router has not got it"
    request = AddServer(role=Role.DECODE, settings={"options": options})
    asking = asyncio.ensure_future(cluster.ask(request))
    if not dies:
        await until(lambda: cluster.states().get("decode-0") is ProcessState.READY)
        clock.shift_s += READY_S
    with pytest.raises(LaunchError, match=words):
        await asking
    assert set(cluster.states()) == {"router", "prefill-0"}


@pytest.mark.parametrize("ready", [True, False])
async def test_a_server_that_is_removed_while_it_is_added(cluster: Cluster, ready: bool) -> None:
    """Both are answered at once: one that it has ended, the other one that it was removed."""
    cluster.router.registers = False
    request = AddServer(role=Role.DECODE, settings={"options": [] if ready else ["--never-ready"]})
    adding = asyncio.ensure_future(cluster.ask(request))
    wanted = ProcessState.READY if ready else ProcessState.STARTING
    await until(lambda: cluster.states().get("decode-0") is wanted)
    await until(lambda: cluster.events("decode-0"))
    began_s = time.monotonic()
    removed = await cluster.ask(RemoveServer(server_id="decode-0"))
    assert isinstance(removed, ServerRemoved)
    with pytest.raises(LaunchError, match="decode-0 was removed before"):
        await adding
    assert time.monotonic() - began_s < WAIT_S
    assert set(cluster.states()) == {"router", "prefill-0"}


async def test_a_server_that_is_gone_when_the_router_has_answered(cluster: Cluster) -> None:
    """Two remove it at once: the later one is told that there is no such server."""
    await cluster.ask(AddServer(role=Role.PREFILL))
    info = cluster.roster._info

    async def late() -> api.ClusterInfo:
        await cluster.supervisor.remove("prefill-1")
        return await info()

    cluster.roster._info = late  # type: ignore[method-assign]
    with pytest.raises(LaunchError, match=r"'prefill-1'.*no such server; its servers are: prefill"):
        await cluster.ask(RemoveServer(server_id="prefill-1"))


async def test_two_at_once(cluster: Cluster) -> None:
    """Each gets an id of its own."""
    requests = [cluster.ask(AddServer(role=Role.PREFILL)) for _ in range(3)]
    added = await asyncio.gather(*requests)
    assert sorted(each.server_id for each in added) == ["prefill-1", "prefill-2", "prefill-3"]


async def test_a_cluster_that_stops_answers(tmp_path: Path) -> None:
    """A request under way is refused, and leaves no process."""
    async with running_cluster(tmp_path) as cluster:
        options = {"options": ["--never-ready"]}
        asking = asyncio.ensure_future(cluster.ask(AddServer(role=Role.DECODE, settings=options)))
        await until(lambda: "decode-0" in cluster.states() and cluster.events("decode-0"))
    with pytest.raises(LaunchError, match="the cluster is being stopped"):
        await asking


async def test_a_client_that_goes_away_changes_nothing(cluster: Cluster) -> None:
    """What it asked for is done."""
    with socket.socket(socket.AF_UNIX) as connection, short_path(cluster.folder) as path:
        connection.connect(path)
        connection.sendall(b'{"type": "add_server", "role": "decode"}\n')
        await until(lambda: "decode-0" in cluster.states())
    await until(lambda: cluster.states()["decode-0"] is ProcessState.READY)
    await until(lambda: cluster.num_changes)


@pytest.mark.parametrize(
    "sent",
    [
        b"\n",
        b"hello\n",
        b'{"type": "add_server"}\n',
        b'{"type": "add_server", "role": "router"}\n',
        b'{"type": "kill_all"}\n',
        b"x" * (MAX_LINE_BYTES + 10),
        b"\xff\xfe\n",
    ],
)
async def test_what_cannot_be_read_is_refused(cluster: Cluster, sent: bytes) -> None:
    """And the next one is served."""
    assert b"the request cannot be read" in await cluster.talk(sent)
    assert (await cluster.ask(AddServer(role=Role.DECODE))).server_id == "decode-0"


async def test_only_its_user_may_use_the_socket(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the mode of the file and by the kernel's word."""
    assert stat.S_IMODE((cluster.folder / CONTROL_SOCKET).stat().st_mode) == 0o600
    monkeypatch.setattr("streamfill.launcher.control_server._is_own_user", lambda writer: False)
    with pytest.raises(LaunchError, match="only the user who started the cluster"):
        await cluster.ask(AddServer(role=Role.DECODE))


async def test_a_launcher_that_is_not_there(tmp_path: Path, cluster: Cluster) -> None:
    """The error says which process was meant."""
    cluster.folder = tmp_path
    with pytest.raises(LaunchError, match=rf"pid {os.getpid()}\) cannot be reached"):
        await cluster.ask(AddServer(role=Role.DECODE))
