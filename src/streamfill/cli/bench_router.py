"""`streamfill bench router`: what one router on one core takes, how long, and in how much memory.

1. Segments of token ids from many streams at once: as many as it takes, then at half of the goal;
   and as many as it takes of text. Those of token ids again with one call for all streams of a
   connection.
2. Idle streams with a prompt each, and what memory one takes.
3. Ordinary requests over HTTP, beside SGLang's own router, where that can be installed.
4. What takes the time, seen by py-spy, where that can be installed.

All servers are fakes that answer at once. Takes four minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from streamfill.cli.bench_router_run import PARTS, measured
from streamfill.errors import ConfigError
from streamfill.launcher.cluster import StoppedError, unless_stopped
from streamfill.launcher.signals import stop_on_signal
from streamfill.models.describe import describe_model
from streamfill.models.progress import show_progress
from streamfill.models.resolve import resolve_model
from streamfill.router_bench.measure import Bench
from streamfill.router_bench.processes import Cores

_EXIT_STOPPED: Final = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.epilog = "docs/benchmarks/router.md explains each key of the RESULT line."
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", default=list(PARTS), help="leave the other parts out"
    )
    parser.add_argument(
        "--streams", type=int, default=1000, metavar="N", help="open at once; default: 1000"
    )
    parser.add_argument(
        "--connections", type=int, default=50, metavar="N", help="of all streams; default: 50"
    )
    parser.add_argument(
        "--segment-tokens", type=int, default=64, metavar="N", help="token ids; default: 64"
    )
    parser.add_argument(
        "--segments-per-stream",
        type=int,
        default=31,
        metavar="N",
        help="then a commit, and the next stream; default: 31, a prompt of 1,984 tokens",
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=2500.0,
        metavar="R",
        help="segments per second while latencies are measured; default: 2500",
    )
    parser.add_argument(
        "--idle-streams",
        type=int,
        default=10_000,
        metavar="N",
        help="open and idle; default: 10000",
    )
    parser.add_argument("--http-connections", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="of each figure; default: 10"
    )
    parser.add_argument("--model", metavar="PATH", help="default: SmolLM2-135M-Instruct")


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    for name in ("streams", "connections", "segments_per_stream", "rate", "seconds"):
        _check(args, name, 1)
    _check(args, "http_connections", 1)
    _check(args, "idle_streams", 1000)
    return asyncio.run(_measure(args))


def _check(args: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(args, name)
    if not least <= value < math.inf:
        remedy = f"must be a number, at least {least}"
        raise ConfigError(f"--{name.replace('_', '-')}", value, remedy)


async def _measure(args: argparse.Namespace) -> int:
    with show_progress("Converting the default model") as progress:
        model_path = resolve_model(args.model, progress)
    facts: dict[str, Any]
    with stop_on_signal() as stop, tempfile.TemporaryDirectory(prefix="streamfill-router-") as name:
        bench = Bench(
            model_path=model_path,
            vocab_size=describe_model(model_path).vocab_size,
            folder=Path(name),
            streams=args.streams,
            connections=args.connections,
            segment_tokens=args.segment_tokens,
            segments_per_stream=args.segments_per_stream,
            seconds=args.seconds,
            cores=Cores.here(),
            say=lambda text: print(text, flush=True),
        )
        try:
            facts = await unless_stopped(measured(bench, args), stop)
        except StoppedError:
            return _EXIT_STOPPED
    facts["load_average"] = round(os.getloadavg()[0], 2)
    print(f"RESULT {json.dumps(facts)}", flush=True)
    return 0
