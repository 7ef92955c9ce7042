"""SGLang's router in front of a fake backend, on the core where ours would run."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streamfill.errors import UnavailableError
from streamfill.loadgen.peers.environment import peer_variables
from streamfill.router_bench.processes import Cores, child, process_on_core, read_away

LOOPBACK: Final = "127.0.0.1"
READY_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.2
_ANSWER_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Front:
    """A router that answers."""

    pid: int
    port: int


@asynccontextmanager
async def sglang_router(
    tools: Path, cores: Cores, answer: Mapping[str, Any], body: Mapping[str, Any], log: Path
) -> AsyncIterator[Front]:
    """As long as the block lasts.

    Args:
        tools: `tools.install_tools`.
        answer: of the backend, to every request.
        body: of a request to /v1/completions, asked once before it counts as ready.

    Raises:
        UnavailableError: it, or its backend, was not ready in time.
    """
    backend = ("-m", "streamfill.router_bench.fake_backend", "--answer", json.dumps(answer))
    async with child(backend, cores.servers, log=log) as server:
        port, metrics_port = _free_ports(2)
        program = (
            *(str(tools / "bin" / "python"), "-m", "sglang_router.launch_router"),
            *("--worker-urls", f"http://{LOOPBACK}:{server.ready['port']}"),
            *("--host", LOOPBACK, "--port", str(port), "--policy", "round_robin"),
            *("--prometheus-host", LOOPBACK, "--prometheus-port", str(metrics_port)),
            *("--log-level", "error"),
        )
        variables = peer_variables(tools, threads=1)
        async with process_on_core(program, cores.router, log=log, variables=variables) as process:
            reader = asyncio.create_task(read_away(process))
            try:
                await _answers(process, f"http://{LOOPBACK}:{port}/v1/completions", body, log)
                yield Front(process.pid, port)
            finally:
                if process.returncode is None:
                    process.terminate()
                reader.cancel()


async def _answers(
    process: asyncio.subprocess.Process, url: str, body: Mapping[str, Any], log: Path
) -> None:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + READY_TIMEOUT_S
    while process.returncode is None and loop.time() < deadline_s:
        try:
            await asyncio.to_thread(_ask, request)
        except (OSError, urllib.error.URLError):
            await asyncio.sleep(_POLL_S)
        else:
            return
    raise UnavailableError(f"sglang-router did not answer (log: {log})")


def _ask(request: urllib.request.Request) -> None:
    with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S) as reply:
        reply.read()


def _free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    try:
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
