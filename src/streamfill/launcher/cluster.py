"""A whole cluster as one block of code: `streamfill up` and `streamfill demo` run inside it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from streamfill.api import Client, ClusterInfo
from streamfill.config import ClusterConfig, with_absolute_files
from streamfill.errors import ConfigError, StreamfillError, UnavailableError
from streamfill.launcher.control_server import control_socket
from streamfill.launcher.errors import LaunchError, written_in
from streamfill.launcher.managed_process import ProcessStatus
from streamfill.launcher.metrics_targets import write_targets
from streamfill.launcher.more_servers import ServerPlanner
from streamfill.launcher.plan import ClusterPlan, plan_cluster
from streamfill.launcher.ports import choose_ports
from streamfill.launcher.roster import Roster
from streamfill.launcher.signals import StopRequest
from streamfill.launcher.state import (
    ClusterPhase,
    ClusterState,
    ProcessRecord,
    claimed,
    claimed_run_dir,
    own_start_ticks,
    write_state,
)
from streamfill.launcher.supervisor import Supervisor

logger = logging.getLogger(__name__)
T = TypeVar("T")

_REGISTRATION_POLL_S: Final = 0.1
"""Servers register within a heartbeat of the router's readiness."""


class StoppedError(StreamfillError):
    """A signal came before the cluster was ready."""


@dataclass(frozen=True, kw_only=True)
class RunningCluster:
    """A cluster that is ready."""

    address: str
    """``host:port`` for clients on this machine."""
    startup_s: float
    run_dir: Path
    supervisor: Supervisor
    http_url: str | None = None
    """For HTTP clients on this machine; None: no HTTP."""
    operator_address: str | None = None
    """As in `ClusterPlan`."""

    @property
    def own_address(self) -> str:
        """Where whoever started the cluster reaches the router, without a key."""
        return self.operator_address or self.address


@asynccontextmanager
async def running_cluster(
    config: ClusterConfig,
    *,
    model_path: Path,
    state_dir: Path,
    run_dir: Path,
    stop: StopRequest,
    on_change: Callable[[Sequence[ProcessStatus]], None],
) -> AsyncIterator[RunningCluster]:
    """Starts the cluster; drains it at the end of the block, whatever ended it.

    Args:
        config: a checked cluster.
        model_path: absolute folder of its model.
        state_dir: where its state file and its lock lie.
        run_dir: absolute folder for logs and the processes' configurations.
        stop: its first signal ends the start, its second one the drain.
        on_change: as in `Supervisor`.

    Raises:
        ConfigError: the name, a port or the run folder is taken, or a folder cannot be written to.
        LaunchError: a process did not start.
        StoppedError: a signal came while it was starting.
    """
    started = time.monotonic()
    config = with_absolute_files(config)
    _make_folders(run_dir, state_dir)
    with claimed(state_dir, config.name), claimed_run_dir(run_dir):
        ports, num_cores = choose_ports(config), len(os.sched_getaffinity(0))
        plan = plan_cluster(
            config,
            model_path=model_path,
            ports=ports,
            num_cores=num_cores,
            run_dir=run_dir,
            state_dir=state_dir,
        )
        state = _StateWriter(plan, model_path, state_dir, run_dir)

        def changed(statuses: Sequence[ProcessStatus]) -> None:
            state.write(statuses)
            on_change(statuses)

        with written_in(run_dir, "launcher.run_dir"):
            write_targets(plan.name, plan.processes, run_dir)
        supervisor = Supervisor(plan, run_dir=run_dir, settings=config.launcher, on_change=changed)
        stop.on_second = supervisor.kill_all
        try:
            await unless_stopped(supervisor.start(), stop)
            await unless_stopped(_wait_registered(plan.own_address, config, supervisor), stop)
            startup_s = time.monotonic() - started
            planner = ServerPlanner(
                config=config,
                model_path=model_path,
                ports=ports,
                num_cores=num_cores,
                run_dir=run_dir,
            )
            roster = Roster(
                planner,
                supervisor,
                plan.own_address,
                lambda: _rewrite_targets(plan.name, supervisor, run_dir),
            )
            async with control_socket(state_dir, roster):
                state.enter(ClusterPhase.READY, supervisor.statuses, startup_s)
                yield RunningCluster(
                    address=plan.address,
                    startup_s=startup_s,
                    run_dir=run_dir,
                    supervisor=supervisor,
                    http_url=plan.http_url,
                    operator_address=plan.operator_address,
                )
        finally:
            state.enter(ClusterPhase.DRAINING, supervisor.statuses)
            await supervisor.drain()


def _rewrite_targets(name: str, supervisor: Supervisor, run_dir: Path) -> None:
    """A full disk costs the file, not the cluster."""
    try:
        write_targets(name, supervisor.specs, run_dir)
    except OSError:
        logger.exception("targets file not written folder=%s", run_dir)


async def unless_stopped(work: Awaitable[T], stop: StopRequest) -> T:
    """What `work` returns; a signal cancels it.

    Raises:
        StoppedError: a signal came first.
    """
    task = asyncio.ensure_future(work)
    signalled = asyncio.create_task(stop.first.wait())
    try:
        await asyncio.wait({task, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise StoppedError("stopped")
    finally:
        for each in (task, signalled):
            each.cancel()
        await asyncio.wait({task, signalled})


async def _wait_registered(
    address: str, config: ClusterConfig, supervisor: Supervisor
) -> ClusterInfo:
    """Returns when the router counts every server among the living.

    Raises:
        LaunchError: a process died meanwhile, or the time is over.
    """
    wanted = {"prefill": config.prefill.count, "decode": config.decode.count}
    deadline = time.monotonic() + config.launcher.ready_timeout_s
    async with Client(address) as client:
        while True:
            try:
                info = await client.server_info()
            except UnavailableError as error:
                missing = f"the router does not answer at {address}: {error.message}"
            else:
                alive = [server.role for server in info.servers if server.state == "alive"]
                if info.ready and all(alive.count(role) >= n for role, n in wanted.items()):
                    return info
                missing = f"the router sees {len(alive)} of {sum(wanted.values())} servers alive"
            supervisor.raise_death()
            if time.monotonic() > deadline:
                reason = f"started, but after {config.launcher.ready_timeout_s:g} s {missing}"
                raise LaunchError("the cluster", reason)
            await asyncio.sleep(_REGISTRATION_POLL_S)


def _make_folders(run_dir: Path, state_dir: Path) -> None:
    for key, folder in (
        ("launcher.run_dir", run_dir),
        ("launcher.run_dir", run_dir / "logs"),
        ("STREAMFILL_HOME", state_dir),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):  # it was there before, and is not ours
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            remedy = f"name a folder that can be written to ({error.strerror})"
            raise ConfigError(key, str(folder), remedy) from error


class _StateWriter:
    """Keeps ``cluster.json`` up to date."""

    def __init__(self, plan: ClusterPlan, model_path: Path, state_dir: Path, run_dir: Path) -> None:
        self._folder = state_dir
        self._phase = ClusterPhase.STARTING
        self._startup_s: float | None = None
        self._plan = plan
        self._model_path = model_path
        self._run_dir = run_dir

    def enter(
        self,
        phase: ClusterPhase,
        statuses: Sequence[ProcessStatus],
        startup_s: float | None = None,
    ) -> None:
        """The cluster came so far."""
        self._phase = phase
        self._startup_s = startup_s if startup_s is not None else self._startup_s
        self.write(statuses)

    def write(self, statuses: Sequence[ProcessStatus]) -> None:
        """Something about the processes changed. A full disk costs the file, not the cluster."""
        state = ClusterState(
            name=self._plan.name,
            address=self._plan.address,
            http_url=self._plan.http_url,
            operator_address=self._plan.operator_address,
            model_path=str(self._model_path),
            phase=self._phase,
            launcher_pid=os.getpid(),
            launcher_start_ticks=own_start_ticks(),
            run_dir=str(self._run_dir),
            startup_s=self._startup_s,
            processes=tuple(
                ProcessRecord(
                    name=status.name,
                    kind=status.kind.value,
                    state=status.state.value,
                    pid=status.pid,
                    num_restarts=status.num_restarts,
                    log_file=str(status.log_file),
                    metrics_address=status.metrics_address,
                )
                for status in statuses
            ),
        )
        try:
            write_state(self._folder, state)
        except OSError:
            logger.exception("state file not written folder=%s", self._folder)
