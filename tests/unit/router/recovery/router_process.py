"""A router process that a test may kill, with fake servers in the test's own loop around it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from streamfill.config import ClusterConfig, RouterSection
from streamfill.launcher.ports import Ports, choose_ports
from streamfill.messages.common import Role
from streamfill.models.describe import describe_model
from tests.unit.router.fake_server import FakeServer

ROOT = Path(__file__).parents[4]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
START_S = 60.0
"""A second on a quiet machine."""


def free_ports() -> Ports:
    """Chosen as the launcher does: the system gives them to nobody who asks for any free one, while
    the router is not there."""
    return choose_ports(ClusterConfig(router=RouterSection(grpc_port=0, http_port=0)))


class RouterProcess:
    """`start` and `kill` as often as wanted: it comes back at the same ports."""

    def __init__(self, folder: Path, model: Path, **config: Any) -> None:
        ports = free_ports()
        self.grpc_port, self.zmq_port = ports.router_grpc, ports.router_zmq
        self.metrics_port, self.http_port = ports.metrics["router"], ports.router_http
        self.log_file = folder / "router_log.sqlite"
        self.output = folder / "router.log"
        self.ready_s = 0.0
        """What its newest start took."""
        self._config_file = folder / "router.json"
        self._vocab_size = describe_model(model).vocab_size
        self._servers: list[FakeServer] = []
        self._process: asyncio.subprocess.Process | None = None
        values: dict[str, Any] = {
            "model_path": str(model),
            "host": "127.0.0.1",
            "grpc_port": self.grpc_port,
            "zmq_port": self.zmq_port,
            "http_port": self.http_port,
            "metrics_port": self.metrics_port,
            "log": "sqlite",
            "log_file": str(self.log_file),
            **config,
        }
        if values["log"] == "memory":
            del values["log_file"]
        self._config_file.write_text(json.dumps(values))

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def __aenter__(self) -> RouterProcess:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.kill()
        for server in self._servers:
            await server.stop()

    async def start(self) -> None:
        """Returns when it is ready."""
        began_s = asyncio.get_running_loop().time()
        with self.output.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "router", "--config-file", str(self._config_file)),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=ENVIRONMENT,
            )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), START_S)
        assert line.startswith(b"READY"), self.output.read_text()
        self.ready_s = asyncio.get_running_loop().time() - began_s

    async def kill(self) -> None:
        """As ``kill -9``. Idempotent."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await process.wait()

    async def restart(self) -> None:
        """Kill it, and have it back."""
        await self.kill()
        await self.start()

    async def serve(self, server_id: str, role: Role, **facts: Any) -> FakeServer:
        """A fake server, registered."""
        server = FakeServer(self.zmq_port, server_id, role, self._vocab_size, **facts)
        self._servers.append(server)
        return await server.start()

    async def pair(self) -> tuple[FakeServer, FakeServer]:
        """A prefill and a decode server."""
        prefill = await self.serve("prefill-0", Role.PREFILL, pool_tokens=100_000)
        return prefill, await self.serve("decode-0", Role.DECODE, pool_tokens=100_000)
