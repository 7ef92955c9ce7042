"""Runs the parts of `streamfill bench router`, and says what was seen."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from streamfill.cli.document import demo_document
from streamfill.errors import StreamfillError
from streamfill.loadgen.peers.errors import PeerUnavailable
from streamfill.models.progress import Progress, show_progress
from streamfill.router_bench import measure
from streamfill.router_bench.measure import Bench
from streamfill.router_bench.sglang_front import sglang_router
from streamfill.router_bench.tools import install_tools

PARTS: Final = ("streams", "lanes", "memory", "http", "profile")
IDLE_TOKENS: Final = 2000
ID_BYTES: Final = 4
ANSWER_TOKENS: Final = 16
PROMPT: Final = "The quick brown fox jumps over the lazy dog and runs away. " * 10
"""Some 130 tokens, an ordinary question."""
_TICK_S: Final = 0.5
_START_S: Final = 6.0
_IDLE_S: Final = 40.0


async def measured(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """The content of the ``RESULT`` line.

    Raises:
        StreamfillError: a part failed, with the reason.
    """
    each_s = measure.WARM_S + bench.seconds
    needed_s = {
        "streams": 3 * each_s,
        "lanes": 2 * each_s,
        "memory": _IDLE_S,
        "http": 3 * each_s,
        "profile": 2 * each_s,
    }
    total_s = sum(_START_S + needed_s[part] for part in args.only)
    facts: dict[str, Any] = {}
    tools = await _tools(bench, args)
    done_s = 0.0
    with show_progress("Router on one core") as progress:
        for part in args.only:
            until_s = done_s + _START_S + needed_s[part]
            async with _ticking(progress, done_s, until_s, total_s):
                match part:
                    case "streams":
                        facts |= await _streams(bench, args)
                    case "lanes":
                        facts |= await _lanes(bench, args)
                    case "memory":
                        facts |= await _memory(bench, args)
                    case "http":
                        facts |= await _http(bench, args, tools)
                    case "profile":
                        facts |= await _profile(bench, tools)
            done_s = until_s
    return facts


async def _tools(bench: Bench, args: argparse.Namespace) -> Path | None:
    if not {"http", "profile"} & set(args.only):
        return None
    try:
        return await asyncio.to_thread(install_tools, bench.say)
    except PeerUnavailable as error:
        bench.say(f"Neither sglang-router nor py-spy: {error}")
        return None


@asynccontextmanager
async def _ticking(
    progress: Progress, from_s: float, until_s: float, total_s: float
) -> AsyncIterator[None]:
    """Moves the bar as time goes by, never beyond what the part was to take."""

    async def tick() -> None:
        at_s = from_s
        while True:
            progress(round(at_s), round(total_s))
            await asyncio.sleep(_TICK_S)
            at_s = min(until_s, at_s + _TICK_S)

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
    progress(round(until_s), round(total_s))


async def _streams(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    async with measure.router_process(bench) as router:
        most = await measure.throughput(bench, router)
        bench.say(_said_most(bench, most))
        half = await measure.latency(bench, router, args.rate)
        text = await measure.text_throughput(bench, router, demo_document())
    tokenizer_us = round(text["router_cpu_us"] - most["router_cpu_us"], 1)
    bench.say(_said_half(half))
    bench.say(
        f"As text: {text['segments_per_s']:.0f} segments per second, "
        f"{text['router_cpu_us']:.0f} µs of CPU each, so {tokenizer_us:.0f} more than as token ids"
    )
    return {
        "ready_s": round(router.ready_s, 2),
        "segments_per_s": most["segments_per_s"],
        "router_cpu_us_per_segment": most["router_cpu_us"],
        "generator_ceiling_per_s": round(1e6 / most["load_cpu_us"]),
        "added_p50_ms": half["under_way_p50_ms"],
        "added_p99_ms": half["under_way_p99_ms"],
        "text_segments_per_s": text["segments_per_s"],
        "tokenizer_us_per_segment": tokenizer_us,
        "throughput": most,
        "half_rate": half,
        "text": text,
    }


async def _lanes(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """The loads of token ids again, the streams of a connection sharing one call."""
    async with measure.router_process(bench) as router:
        most = await measure.throughput(bench, router, lanes=True)
        bench.say(f"In {bench.connections} calls for all, {_said_most(bench, most)}")
        half = await measure.latency(bench, router, args.rate, lanes=True)
        bench.say(f"In {bench.connections} calls for all, {_said_half(half)}")
    return {
        "lanes_segments_per_s": most["segments_per_s"],
        "lanes_router_cpu_us_per_segment": most["router_cpu_us"],
        "lanes_added_p50_ms": half["under_way_p50_ms"],
        "lanes_added_p99_ms": half["under_way_p99_ms"],
        "lanes_throughput": most,
        "lanes_half_rate": half,
    }


async def _memory(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    steps = (max(100, args.idle_streams // 10), args.idle_streams)
    async with measure.router_process(bench) as router:
        found = await measure.idle(bench, router, steps, IDLE_TOKENS)
    beyond = found["bytes_per_stream"] - ID_BYTES * IDLE_TOKENS
    bench.say(
        f"{steps[1]} idle streams of {IDLE_TOKENS} tokens: "
        f"{found['steps'][-1]['rss_bytes'] / 1e6:.0f} MB, {beyond / 1000:.1f} kB each beyond "
        "its token ids; "
        f"{100 * found['router_cores']:.0f}% of the core while nothing happens"
    )
    return {"idle_kb_per_stream": round(beyond / 1000, 1), "idle": found}


async def _http(bench: Bench, args: argparse.Namespace, tools: Path | None) -> dict[str, Any]:
    body = {
        "model": "default",
        "prompt": PROMPT,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    facts: dict[str, Any] = {}
    for name, tokens_per_output in (("http", 1), ("http_whole", ANSWER_TOKENS)):
        async with measure.router_process(bench, tokens_per_output=tokens_per_output) as router:
            port = router.ready["http_port"]
            found = await measure.http_requests(
                bench, port, router.pid, body, args.http_connections
            )
        facts[name] = found
        bench.say(f"{_said(found)}; tokens from the server: {tokens_per_output} a message")
    if tools is None:
        return facts
    answer = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "default",
        "choices": [{"index": 0, "text": " word" * ANSWER_TOKENS, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 130, "completion_tokens": ANSWER_TOKENS, "total_tokens": 146},
    }
    try:
        async with sglang_router(tools, bench.cores, answer, body, bench.log) as front:
            found = await measure.http_requests(
                bench, front.port, front.pid, body, args.http_connections
            )
    except StreamfillError as error:
        bench.say(f"sglang-router is left out: {error}")
        return facts
    bench.say(f"{_said(found)}; this is sglang-router")
    facts["sglang_router"] = found
    for name in ("http", "http_whole"):
        ratio = found["requests_per_s"] / facts[name]["requests_per_s"]
        facts[f"{name}_times_slower"] = round(ratio, 2)
    return facts


async def _profile(bench: Bench, tools: Path | None) -> dict[str, Any]:
    if tools is None:
        return {}
    try:
        async with measure.router_process(bench) as router:
            py_spy = tools / "bin" / "py-spy"
            found = await measure.profile(bench, router, py_spy)
            lanes = await measure.profile(bench, router, py_spy, lanes=True)
    except StreamfillError as error:
        bench.say(f"The profile is left out: {error}")
        return {}
    for profile, where in ((found, ""), (lanes, ", with one call for the streams of a connection")):
        bench.say(f"Where the router's main thread is{where}:")
        for name, share in list(profile["functions"].items())[:20]:
            bench.say(f"  {100 * share:5.1f}%  {name}")
    return {"profile": found, "lanes_profile": lanes}


def _said_most(bench: Bench, most: dict[str, Any]) -> str:
    return (
        f"{bench.streams} streams: {most['segments_per_s']:.0f} segments per second, "
        f"{most['router_cpu_us']:.0f} µs of CPU each; the load takes {most['load_cpu_us']:.0f}"
    )


def _said_half(half: dict[str, Any]) -> str:
    return (
        f"at {half['segments_per_s']:.0f} per second: to the server P50 "
        f"{half['under_way_p50_ms']:.2f} ms, P99 {half['under_way_p99_ms']:.2f} ms; "
        f"generator lag P99 {half['lag_p99_ms']:.2f} ms"
    )


def _said(found: dict[str, Any]) -> str:
    return (
        f"Ordinary requests: {found['requests_per_s']:.0f} per second, "
        f"{found['router_cpu_us']:.0f} µs of CPU each, P50 {found['p50_ms']:.1f} ms, "
        f"P99 {found['p99_ms']:.1f} ms"
    )
