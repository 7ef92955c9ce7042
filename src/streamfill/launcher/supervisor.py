"""All processes of a cluster together: started at once, watched, stopped in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

from streamfill.config import LauncherSection
from streamfill.launcher.errors import LaunchError, written_in
from streamfill.launcher.managed_process import ManagedProcess, ProcessState, ProcessStatus
from streamfill.launcher.plan import ClusterPlan, ProcessKind, ProcessSpec
from streamfill.launcher.restart_policy import RestartPolicy

logger = logging.getLogger(__name__)

_LATER_STAGE_S: Final = 5.0
"""Servers and controller have nothing to finish once the router has drained; they only tidy up."""


_FOR_EVER: Final = 1 << 30
_CONTROLLER_DELAY_S: Final = 2.0
_ROUTER_DELAY_S: Final = 0.25
"""Nobody is served while it is away, and it starts in a second."""


class Supervisor:
    """Runs a `ClusterPlan`.

    Call `start`, then `wait_hopeless` as long as the cluster shall run, then `drain`, which must
    be called whatever happened before. All in the event loop of the main thread.
    """

    def __init__(
        self,
        plan: ClusterPlan,
        *,
        run_dir: Path,
        settings: LauncherSection,
        policy: RestartPolicy | None = None,
        on_change: Callable[[Sequence[ProcessStatus]], None] = lambda statuses: None,
    ) -> None:
        """
        Args:
            plan: what to start.
            run_dir: absolute folder for logs; also the processes' working folder.
            settings: time-outs and the number of restarts.
            policy: when to restart; by default as `settings` says.
            on_change: told of all processes each time that one of them changes its state. Called
                from the event loop; must return at once and not raise.
        """
        self._drain_timeout_s = settings.drain_timeout_s
        self._on_change = on_change
        self._something_failed = asyncio.Event()
        self._run_dir = run_dir
        self._settings = settings
        self._policy = policy
        self._processes = [self._managed(spec) for spec in plan.processes]
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._draining = False

    @property
    def statuses(self) -> tuple[ProcessStatus, ...]:
        """All processes as they are now, in the plan's order."""
        return tuple(process.status for process in self._processes)

    @property
    def specs(self) -> tuple[ProcessSpec, ...]:
        """Of the same processes."""
        return tuple(process.spec for process in self._processes)

    async def start(self) -> None:
        """Starts everything at once and returns when all processes said that they are ready.

        Raises:
            LaunchError: one died or was not ready in time; carries the last lines of its log.
            ConfigError: their configuration cannot be written.
        """
        with written_in(self._run_dir, "launcher.run_dir"):
            for process in self._processes:
                _write_config(process.spec)
        for process in self._processes:
            self._run(process)
        all_ready = asyncio.create_task(self._all_ready())
        failed = asyncio.create_task(self._first_failure())
        try:
            await asyncio.wait({all_ready, failed}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                raise failed.result()
        finally:
            all_ready.cancel()
            failed.cancel()

    async def add(self, spec: ProcessSpec) -> ManagedProcess:
        """Starts one more process and returns when it said that it is ready. One that does not get
        so far is gone again. After `start`.

        Raises:
            LaunchError: it died or was not ready in time, or the cluster is being stopped.
            OSError: its configuration cannot be written.
        """
        if self._draining:
            raise LaunchError(spec.name, "was not started: the cluster is being stopped")
        _write_config(spec)
        process = self._managed(spec)
        self._processes.append(process)
        self._run(process)
        ready = asyncio.create_task(process.ready.wait())
        try:
            await asyncio.wait({ready, self._runs[spec.name]}, return_when=asyncio.FIRST_COMPLETED)
            if process.ready.is_set() and not self._draining:
                return process
            if self._draining:
                raise LaunchError(spec.name, "was stopped before it was ready, with the cluster")
            raise process.failure or LaunchError(spec.name, "was removed before it was ready")
        except BaseException:
            if not self._draining:
                process.kill()
                self._forget(process)
            raise
        finally:
            ready.cancel()

    async def remove(self, name: str) -> str:
        """Asks a process to end (SIGTERM), waits for it, and forgets it; it is not restarted. One
        that does not end within the drain time-out is killed.

        Returns:
            how it ended.

        Raises:
            KeyError: there is no process of this name.
        """
        process = next((each for each in self._processes if each.spec.name == name), None)
        if process is None:
            raise KeyError(name)
        await self._stop([process], self._drain_timeout_s)
        self._forget(process)
        return process.last_end

    def raise_death(self) -> None:
        """For the start: a process that dies in its first seconds will do so again.

        Raises:
            LaunchError: one of them died since `start`.
        """
        for process in self._processes:
            if process.last_death is not None:
                raise process.last_death

    async def wait_hopeless(self) -> LaunchError:
        """Returns when the cluster cannot serve any more: its router, or all of its prefill
        servers, were given up."""
        while (error := self._hopeless()) is None:
            await self._something_failed.wait()
            self._something_failed.clear()
        return error

    async def drain(self) -> None:
        """Stops the router, then the servers, then the controller, each when it has finished.

        A router that has not finished after ``drain_timeout_s`` is killed, and so is later on any
        other process that does not end within seconds. Afterwards no process is left.
        """
        self._draining = True
        ordered = sorted(self._processes, key=_stage)
        try:
            for stage, members in groupby(ordered, key=_stage):
                patience_s = self._drain_timeout_s if stage == 0 else _LATER_STAGE_S
                await self._stop(list(members), min(patience_s, self._drain_timeout_s))
        finally:
            self.kill_all()
            await asyncio.gather(*self._runs.values(), return_exceptions=True)

    def kill_all(self) -> None:
        """Ends every process at once; a `drain` under way returns soon after."""
        for process in self._processes:
            process.kill()

    def _managed(self, spec: ProcessSpec) -> ManagedProcess:
        return ManagedProcess(
            spec,
            run_dir=self._run_dir,
            ready_timeout_s=self._settings.ready_timeout_s,
            policy=self._policy or restart_policy(spec.kind, self._settings.max_restarts),
            on_change=self._changed,
        )

    def _run(self, process: ManagedProcess) -> None:
        run = asyncio.create_task(process.run())
        run.add_done_callback(lambda _: self._something_failed.set())
        self._runs[process.spec.name] = run

    def _forget(self, process: ManagedProcess) -> None:
        """Its task is kept until the end, since it may not be done."""
        if process in self._processes:
            self._processes.remove(process)
            self._changed()

    async def _stop(self, processes: Sequence[ManagedProcess], patience_s: float) -> None:
        for process in processes:
            process.request_stop()
        runs = [self._runs[p.spec.name] for p in processes if p.spec.name in self._runs]
        if not runs:
            return
        _, pending = await asyncio.wait(runs, timeout=patience_s)
        if pending:
            late = [p for p in processes if not self._runs[p.spec.name].done()]
            names = ", ".join(process.spec.name for process in late)
            logger.warning("killed after drain time-out: %s patience_s=%g", names, patience_s)
            for process in late:
                process.kill()
            await asyncio.wait(pending)

    async def _all_ready(self) -> None:
        for process in self._processes:
            await process.ready.wait()

    async def _first_failure(self) -> LaunchError:
        while True:
            for process in self._processes:
                if process.failure is not None:
                    return process.failure
                self._raise_bug(process)
            await self._something_failed.wait()
            self._something_failed.clear()

    def _hopeless(self) -> LaunchError | None:
        failed = [process for process in self._processes if process.failure is not None]
        for process in self._processes:
            self._raise_bug(process)
        for process in failed:
            if process.spec.kind is ProcessKind.ROUTER:
                return process.failure
        prefill = [p for p in self._processes if p.spec.kind is ProcessKind.PREFILL]
        if prefill and all(process.failure is not None for process in prefill):
            return prefill[-1].failure
        return None

    def _raise_bug(self, process: ManagedProcess) -> None:
        """A process that nobody looks after any more is a broken invariant of ours."""
        run = self._runs[process.spec.name]
        if run.done() and not run.cancelled():
            run.result()

    def _changed(self) -> None:
        statuses = self.statuses
        if any(status.state is ProcessState.FAILED for status in statuses):
            self._something_failed.set()
        self._on_change(statuses)


def restart_policy(kind: ProcessKind, max_restarts: int) -> RestartPolicy:
    """When a process of this kind is restarted.

    The controller starts in a fifth of a second and nobody waits for it, so it comes back soon, and
    is not given up: its death costs nothing but the quality of its plans.
    """
    if kind is ProcessKind.CONTROLLER and max_restarts > 0:
        return RestartPolicy(max_restarts=_FOR_EVER, max_delay_s=_CONTROLLER_DELAY_S)
    if kind is ProcessKind.ROUTER:
        return RestartPolicy(max_restarts=max_restarts, first_delay_s=_ROUTER_DELAY_S)
    return RestartPolicy(max_restarts=max_restarts)


def _write_config(spec: ProcessSpec) -> None:
    spec.config_file.parent.mkdir(parents=True, exist_ok=True)
    spec.config_file.write_bytes(spec.config_json)


def _stage(process: ManagedProcess) -> int:
    return process.spec.kind.drain_stage
