"""The parts of the measurement, each with a router and fake servers that start and end with it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from streamfill.config import RouterConfig
from streamfill.router_bench.processes import (
    Child,
    Cores,
    child,
    run_to_result,
    thread_cpu_s,
)
from streamfill.router_bench.profile import by_function, by_module, stacks
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer

LOOPBACK: Final = "127.0.0.1"
WARM_S: Final = 3.0
SLACK_S: Final = 150.0
"""Of a load beyond the time that it is to take: opening ten thousand streams takes a while."""
IDLE_S: Final = 3.0
"""For the look at what idle streams cost."""
PROFILE_SLACK_S: Final = 4.0
"""The load begins before py-spy looks, and ends after."""
PROFILE_SHARE: Final = 0.01
"""Smaller shares are not in the table."""
_PACKAGE: Final = "streamfill.router_bench"
_LANES: Final = ("--lanes",)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all parts have in common.

    Attributes:
        model_path: whose tokenizer the router loads.
        vocab_size: of that model.
        folder: for configuration files and logs.
        streams: open at once.
        connections: of the load, shared by its streams.
        seconds: of each measurement.
        say: told what is seen.
    """

    model_path: Path
    vocab_size: int
    folder: Path
    streams: int
    connections: int
    segment_tokens: int
    segments_per_stream: int
    seconds: float
    cores: Cores
    say: Callable[[str], None]

    @property
    def log(self) -> Path:
        """What all processes say."""
        return self.folder / "bench.log"


@asynccontextmanager
async def router_process(bench: Bench, *, tokens_per_output: int = 1) -> AsyncIterator[Child]:
    """A router with a fake prefill server."""
    config = RouterConfig(
        model_path=str(bench.model_path),
        host=LOOPBACK,
        grpc_port=0,
        zmq_port=0,
        http_port=0,
        max_streams=100_000,
        log_level="warning",
    )
    config_file = bench.folder / "router.json"
    config_file.write_bytes(msgspec.json.encode(config))
    arguments = ("-m", "router", "--config-file", str(config_file))
    async with child(arguments, bench.cores.router, log=bench.log) as router:
        server = (
            *("-m", f"{_PACKAGE}.fake_server", "--vocab-size", str(bench.vocab_size)),
            *("--endpoint", f"tcp://{LOOPBACK}:{router.ready['zmq_port']}"),
            *("--tokens-per-output", str(tokens_per_output)),
        )
        async with child(server, bench.cores.servers, log=bench.log):
            yield router


async def start_s(bench: Bench) -> float:
    """From the start of the router's process to its readiness."""
    async with router_process(bench) as router:
        return router.ready_s


async def throughput(bench: Bench, router: Child, *, lanes: bool = False) -> dict[str, Any]:
    """As many segments as the router takes.

    Args:
        lanes: the streams of a connection share one call.
    """
    options = _LANES if lanes else ()
    return await _stream_load(bench, router, "saturate", seconds=bench.seconds, options=options)


async def text_throughput(bench: Bench, router: Child, prose: str) -> dict[str, Any]:
    """The same of segments that are text of about as many tokens, so that the router tokenises.

    Args:
        prose: its beginning is each segment.
    """
    options = ("--text", beginning(prose, load_tokenizer(bench.model_path), bench.segment_tokens))
    return await _stream_load(bench, router, "saturate", seconds=bench.seconds, options=options)


def beginning(prose: str, tokenizer: TextTokenizer, num_tokens: int) -> str:
    """Words of so many tokens, or the first that are more, with a space behind each. Prose that is
    too short begins again."""
    words = itertools.cycle(prose.split())
    text = ""
    while len(tokenizer.encode(text, add_special_tokens=False)) < num_tokens:
        text += next(words) + " "
    return text


async def latency(
    bench: Bench, router: Child, rate: float, *, lanes: bool = False
) -> dict[str, Any]:
    """How long segments take that come at a steady rate."""
    options = ("--rate", f"{rate:.1f}", *(_LANES if lanes else ()))
    return await _stream_load(bench, router, "paced", seconds=bench.seconds, options=options)


async def idle(bench: Bench, router: Child, steps: Sequence[int], tokens: int) -> dict[str, Any]:
    """The router's memory with so many open streams of so many tokens each, in four segments."""
    options = (
        *("--steps", *map(str, steps), "--segment-tokens", str(tokens // 4)),
        *("--segments-per-stream", "4"),
    )
    found = await _stream_load(bench, router, "idle", seconds=IDLE_S, options=options)
    (few, first), (many, last) = ((x["num_streams"], x["rss_bytes"]) for x in found["steps"])
    return {**found, "bytes_per_stream": round((last - first) / (many - few))}


async def profile(
    bench: Bench, router: Child, py_spy: Path, *, lanes: bool = False
) -> dict[str, Any]:
    """What takes the time under the load of `throughput`. py-spy shares the core of the load."""
    seconds, options = bench.seconds + PROFILE_SLACK_S, _LANES if lanes else ()
    load = asyncio.create_task(
        _stream_load(bench, router, "saturate", seconds=seconds, options=options)
    )
    try:
        await asyncio.sleep(WARM_S + PROFILE_SLACK_S / 2)
        before = thread_cpu_s(router.pid)
        lines = await stacks(py_spy, router.pid, bench.seconds, bench.cores.load, bench.folder)
        used = {name: cpu - before[name] for name, cpu in thread_cpu_s(router.pid).items()}
    finally:
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
    total_s = sum(used.values())
    return {
        "threads": {name: round(cpu / total_s, 3) for name, cpu in used.items()},
        "modules": {
            row.name: round(row.share, 3) for row in by_module(lines) if row.share > PROFILE_SHARE
        },
        "functions": {
            row.name: round(row.share, 3) for row in by_function(lines) if row.share > PROFILE_SHARE
        },
    }


async def http_requests(
    bench: Bench, port: int, pid: int, body: dict[str, Any], connections: int
) -> dict[str, Any]:
    """The same request again and again, on so many connections."""
    arguments = (
        *("-m", f"{_PACKAGE}.http_load", "--address", f"{LOOPBACK}:{port}"),
        *("--router-pid", str(pid), "--connections", str(connections)),
        *("--seconds", str(bench.seconds)),
    )
    return await run_to_result(
        arguments,
        bench.cores.load,
        log=bench.log,
        timeout_s=bench.seconds + SLACK_S,
        given=json.dumps(body).encode(),
    )


async def _stream_load(
    bench: Bench,
    router: Child,
    kind: str,
    *,
    seconds: float,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    arguments = (
        *("-m", f"{_PACKAGE}.stream_load", kind),
        *("--address", f"{LOOPBACK}:{router.ready['grpc_port']}"),
        *("--router-pid", str(router.pid), "--vocab-size", str(bench.vocab_size)),
        *("--streams", str(bench.streams), "--connections", str(bench.connections)),
        *("--segment-tokens", str(bench.segment_tokens)),
        *("--segments-per-stream", str(bench.segments_per_stream)),
        *("--warm-s", str(WARM_S), "--seconds", str(seconds), *options),
    )
    timeout_s = WARM_S + seconds + SLACK_S
    return await run_to_result(arguments, bench.cores.load, log=bench.log, timeout_s=timeout_s)
