"""Which servers a running cluster has on this machine: one more, one less.

Adding: a fresh id, its process, its READY line, its registration at the router. A server that does
not come so far is ended again, and the reason is told. Removing: SIGTERM, upon which the server
finishes what it has, its end, and no restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from streamfill.api import Client, ClusterInfo, Server
from streamfill.errors import ConfigError, StreamError
from streamfill.launcher.control_messages import AddServer, RemoveServer, ServerAdded, ServerRemoved
from streamfill.launcher.errors import LaunchError
from streamfill.launcher.managed_process import ManagedProcess
from streamfill.launcher.more_servers import ServerPlanner
from streamfill.launcher.plan import ProcessKind
from streamfill.launcher.supervisor import Supervisor
from streamfill.messages.common import Role

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]
"""Takes a line about how far it is. Must return at once and not raise."""

_REGISTRATION_POLL_S: Final = 0.1


class Roster:
    """Carries requests out, in the event loop of the launcher. Any number at the same time."""

    def __init__(
        self,
        planner: ServerPlanner,
        supervisor: Supervisor,
        address: str,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            planner: of this cluster.
            supervisor: of its processes, started.
            address: where the launcher reaches the router.
            on_change: called when there is another set of processes.
        """
        self._planner = planner
        self._supervisor = supervisor
        self._address = address
        self._on_change = on_change
        self._used_ids = {spec.name for spec in supervisor.specs}
        self._ready_timeout_s = planner.config.launcher.ready_timeout_s

    async def add(self, request: AddServer, tell: Tell) -> ServerAdded:
        """One more server; returns when the router counts on it.

        Raises:
            ConfigError: a setting cannot work.
            LaunchError: the server did not get ready, or the router did not take it in.
            StreamError: the router does not answer.
        """
        # Servers that others started have ids too, and one that takes it over would end them.
        known = {server.server_id for server in (await self._info()).servers}
        spec = self._planner.plan(
            request.role, request.settings, self._used_ids | known, self._supervisor.specs
        )
        self._used_ids.add(spec.name)
        tell(f"starting {spec.name}")
        began_s = time.monotonic()
        process = await self._supervisor.add(spec)
        self._on_change()
        try:
            tell(f"{spec.name} is ready; waiting for the router to take it in")
            await self._registered(process, began_s + self._ready_timeout_s)
        except BaseException:
            process.kill()
            with contextlib.suppress(KeyError):  # another request has removed it
                await asyncio.shield(self._supervisor.remove(spec.name))
                self._on_change()
            raise
        status = process.status
        logger.info("server added name=%s pid=%s", spec.name, status.pid)
        return ServerAdded(
            server_id=spec.name,
            pid=status.pid or 0,
            ready_after_s=time.monotonic() - began_s,
            log_file=str(status.log_file),
        )

    async def remove(self, request: RemoveServer, tell: Tell) -> ServerRemoved:
        """One server less; returns when its process has ended.

        Raises:
            ConfigError: the launcher runs no server of this id, or it is the last prefill server.
            StreamError: the router does not answer.
        """
        name = request.server_id
        if self._kind_of(name) is ProcessKind.PREFILL and not request.force:
            servers = (await self._info()).servers
            self._kind_of(name)  # another request may have removed it meanwhile
            check_not_last(servers, name)
        tell(f"ending {name}")
        ended = await self._supervisor.remove(name)
        self._on_change()
        logger.info("server removed name=%s: %s", name, ended)
        return ServerRemoved(server_id=name, ended=ended or "was not running")

    def _kind_of(self, name: str) -> ProcessKind:
        """Of a server that runs here.

        Raises:
            ConfigError: there is none of this id.
        """
        kinds = {spec.name: spec.kind for spec in self._supervisor.specs}
        if kinds.get(name) not in (ProcessKind.PREFILL, ProcessKind.DECODE):
            raise ConfigError("ID", name, f"this launcher runs no such server; {_ours(kinds)}")
        return kinds[name]

    async def _registered(self, process: ManagedProcess, deadline_s: float) -> None:
        name = process.spec.name
        while True:
            if process.last_death is not None:
                raise process.last_death
            states = {server.server_id: server.state for server in (await self._info()).servers}
            if process.spec not in self._supervisor.specs:
                raise LaunchError(name, "was removed before the router had taken it in")
            if states.get(name) == "alive":
                return
            if time.monotonic() > deadline_s:
                reason = f"started, but after {self._ready_timeout_s:g} s the router has not got it"
                raise LaunchError(name, reason)
            await asyncio.sleep(_REGISTRATION_POLL_S)

    async def _info(self) -> ClusterInfo:
        async with Client(self._address) as client:
            return await client.server_info()


def check_not_last(servers: Sequence[Server], server_id: str) -> None:
    """Without prefill servers no request is served.

    Raises:
        ConfigError: there is no other one that takes new streams.
    """
    others = [
        server
        for server in servers
        if server.server_id != server_id and server.role == Role.PREFILL.value
    ]
    if not any(server.state == "alive" for server in others):
        remedy = (
            "is the last prefill server that takes streams: without it no request is served; add "
            "another one first (`streamfill servers add prefill`), or give --force"
        )
        raise ConfigError("ID", server_id, remedy)


def explained(error: Exception) -> str:
    """What a person is told of an error of `Roster`; of any other, that it is a bug."""
    known = ConfigError | LaunchError | StreamError | OSError
    return str(error) if isinstance(error, known) else f"the launcher failed: {error!r}"


def _ours(kinds: Mapping[str, Any]) -> str:
    names = [
        name for name, kind in kinds.items() if kind in (ProcessKind.PREFILL, ProcessKind.DECODE)
    ]
    return f"its servers are: {', '.join(names) or 'none'}"
