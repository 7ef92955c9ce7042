"""Starts SGLang's own prefill server, decode server and router.

1. Both servers start at the same time, each with a front end, a scheduler and a detokenizer.
2. When both answer ``/health``, the router starts, which is Rust and takes a second or two.
3. One token is asked for through the router, which goes through both servers and Mooncake.

Everything is stock but the platform: SGLang has none for a CPU without its compiled kernels, so it
finds ours, which brings attention and pool classes (``engine.platform``) and nothing of streaming.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from streamfill.errors import StreamError
from streamfill.loadgen.peers.environment import peer_variables
from streamfill.loadgen.peers.limits import POOL_TOKENS, context_tokens
from streamfill.loadgen.peers.process import PeerProcess, peer_process
from streamfill.loadgen.peers.recipes import Recipe
from streamfill.loadgen.peers.sglang_target import SglangTarget
from streamfill.loadgen.target import Ask
from streamfill.loadgen.targets.sse import HttpEndpoint, HttpStatusError

SERVERS_TIMEOUT_S: Final = 240.0
"""Both were ready 30 s after a cold start on two cores."""
ROUTER_TIMEOUT_S: Final = 90.0
"""It asks its workers again after a growing pause, up to half a minute."""
FIRST_ANSWER_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.5
_LOOPBACK: Final = "127.0.0.1"


@asynccontextmanager
async def sglang_pd(
    recipe: Recipe, *, model_path: Path, threads: int, run_dir: Path, say: Callable[[str], None]
) -> AsyncIterator[SglangTarget]:
    """The target, ready and with empty caches. Raises ``PeerUnavailable``."""
    started = time.monotonic()
    python = str(recipe.folder / "bin" / "python")
    prefill, decode, bootstrap, front = _free_ports(4)
    variables = peer_variables(recipe.folder, threads=threads) | {
        "SGLANG_SET_CPU_AFFINITY": "0",
        # Mooncake would listen on the machine's first network address, and look for RDMA.
        "SGLANG_HOST_IP": _LOOPBACK,
        "MC_FORCE_TCP": "1",
    }
    router_variables = {**variables, "OMP_NUM_THREADS": "1"}
    async with AsyncExitStack() as stack:

        async def started_process(name: str, argv: list[str], env: dict[str, str]) -> PeerProcess:
            context = peer_process(name, [python, *argv], variables=env, run_dir=run_dir)
            return await stack.enter_async_context(context)

        say(f"sglang-pd: starting prefill and decode server (logs: {run_dir / 'logs'})")
        common = _server_arguments(model_path)
        servers = [
            await started_process(
                f"sglang-{mode}",
                [*common, "--disaggregation-mode", mode, "--port", str(port), *more],
                variables,
            )
            for mode, port, more in (
                ("prefill", prefill, ["--disaggregation-bootstrap-port", str(bootstrap)]),
                ("decode", decode, []),
            )
        ]
        for server, port in zip(servers, (prefill, decode), strict=True):
            await _healthy(server, servers, port, started + SERVERS_TIMEOUT_S)
        say("sglang-pd: starting SGLang's router")
        router = await started_process(
            "sglang-router", _router_arguments(front, prefill, bootstrap, decode), router_variables
        )
        target = SglangTarget(
            f"http://{_LOOPBACK}:{front}",
            model_path=model_path,
            context_tokens=context_tokens(model_path),
        )
        stack.push_async_callback(target.close)
        await _answers(target, [*servers, router])
        say(f"sglang-pd: ready after {time.monotonic() - started:.0f} s")
        try:
            yield target
        finally:
            # All at once: each may take its whole grace.
            await asyncio.shield(asyncio.gather(*(each.stop() for each in (*servers, router))))


def _server_arguments(model_path: Path) -> list[str]:
    return [
        *("-m", "sglang.launch_server", "--model-path", str(model_path), "--host", _LOOPBACK),
        *("--device", "cpu", "--dtype", "float32", "--disable-cuda-graph"),
        *("--disaggregation-transfer-backend", "mooncake"),
        *("--max-total-tokens", str(POOL_TOKENS)),
        # Without it an idle scheduler takes a whole core from the other server.
        "--sleep-on-idle",
        *("--grammar-backend", "none", "--skip-server-warmup", "--log-level", "warning"),
    ]


def _router_arguments(port: int, prefill: int, bootstrap: int, decode: int) -> list[str]:
    [metrics] = _free_ports(1)
    return [
        *("-m", "sglang_router.launch_router", "--pd-disaggregation"),
        *("--prefill", f"http://{_LOOPBACK}:{prefill}", str(bootstrap)),
        *("--decode", f"http://{_LOOPBACK}:{decode}"),
        *("--host", _LOOPBACK, "--port", str(port)),
        *("--prometheus-host", _LOOPBACK, "--prometheus-port", str(metrics)),
        *("--log-level", "warn"),
    ]


async def _healthy(
    server: PeerProcess, servers: list[PeerProcess], port: int, deadline_s: float
) -> None:
    """Returns when the server answers. Raises ``PeerUnavailable``: one ended, or silence."""
    endpoint = HttpEndpoint(f"http://{_LOOPBACK}:{port}")
    try:
        while True:
            for each in servers:
                each.check()
            try:
                await asyncio.wait_for(endpoint.get("/health"), 10 * _POLL_S)
            except (HttpStatusError, StreamError, TimeoutError):
                if time.monotonic() > deadline_s:
                    raise server.failure(
                        f"was not ready within {SERVERS_TIMEOUT_S:.0f} s"
                    ) from None
                await server.pause(_POLL_S)
            else:
                return
    finally:
        await endpoint.close()


async def _answers(target: SglangTarget, processes: list[PeerProcess]) -> None:
    """Returns when a request went through all processes; empties the caches after it."""
    router = processes[-1]
    deadline_s = time.monotonic() + ROUTER_TIMEOUT_S
    while True:
        for each in processes:
            each.check()
        ask = Ask(request_id=f"first-{time.monotonic_ns()}", max_output_tokens=2)
        try:
            async with asyncio.timeout(FIRST_ANSWER_TIMEOUT_S):
                await target.generate("Hello", ask)
                await target.empty_caches()
        except (StreamError, TimeoutError) as error:
            if time.monotonic() > deadline_s:
                raise router.failure(f"gave no answer: {error}") from error
            await router.pause(_POLL_S)
        else:
            return


def _free_ports(count: int) -> list[int]:
    """Ports that are free now; another program can still take one before it is used."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in sockets]
