"""`streamfill bench self`: how late the load generator sends, against a fake router that answers at
once. Its limit: P99 below 5 ms at 500 pieces a second, on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
from typing import Any, Final

from streamfill.cli.bench_progress import run_progress
from streamfill.errors import ConfigError
from streamfill.launcher.cluster import StoppedError, unless_stopped
from streamfill.launcher.signals import StopRequest, stop_on_signal
from streamfill.loadgen.fake_process import fake_router_process
from streamfill.loadgen.lag import P99_LIMIT_MS, CpuMeter, lag_of
from streamfill.loadgen.records import ModeName, RunResult
from streamfill.loadgen.runner import RunPlan, replay
from streamfill.loadgen.steady_schedule import SteadySchedule
from streamfill.loadgen.targets.streamfill import StreamfillTarget

_EXIT_FAILED: Final = 1
_EXIT_STOPPED: Final = 130  # 128 + SIGINT, as shells have it
_REQUEST_TIMEOUT_S: Final = 30.0
"""Against a fake that answers at once, only a fault takes as long."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--appends-per-second", type=float, default=500.0, metavar="R", help="default: 500"
    )
    parser.add_argument(
        "--duration-s", type=float, default=20.0, metavar="S", help="of the schedule; default: 20"
    )
    parser.add_argument(
        "--streams", type=int, default=100, metavar="N", help="open at once; default: 100"
    )
    parser.add_argument(
        "--piece-bytes", type=int, default=4096, metavar="B", help="of text; default: 4096"
    )
    parser.add_argument(
        "--pin", action="store_true", help="generator on one core, the fake router on another one"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the figures. Exit code 1 when a request failed."""
    for name in ("appends_per_second", "duration_s", "streams", "piece_bytes"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must be above 0")
    schedule = SteadySchedule(
        num_streams=args.streams,
        appends_per_s=args.appends_per_second,
        duration_s=args.duration_s,
        piece_bytes=args.piece_bytes,
    )
    fake_core = _pin() if args.pin else None
    return asyncio.run(_measure(schedule, fake_core))


def _pin() -> int:
    """Keeps this process, and all threads that it starts, on one core; returns another one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("--pin", True, "needs two cores, and this process may use one")
    os.sched_setaffinity(0, {cores[0]})
    return cores[1]


async def _measure(schedule: SteadySchedule, fake_core: int | None) -> int:
    with stop_on_signal() as stop:
        try:
            async with fake_router_process(core=fake_core) as address:
                result, cpu_cores = await _replay(schedule, address, stop)
        except StoppedError:
            return _EXIT_STOPPED
    facts = self_facts(schedule, result, cpu_cores)
    lag = lag_of(result.records)
    print(
        f"{facts['num_streams']} streams, {facts['appends_per_s']:.0f} pieces per second, "
        f"{cpu_cores:.2f} cores. {lag.line} (limit of P99: {P99_LIMIT_MS:g} ms)"
    )
    for record in [record for record in result.records if record.error_code][:1]:
        print(f"{record.request_id}: {record.error_code}: {record.error}")
    print(f"RESULT {json.dumps(facts)}", flush=True)
    if stop.first.is_set():
        return _EXIT_STOPPED
    return _EXIT_FAILED if facts["num_failed"] else 0


async def _replay(
    schedule: SteadySchedule, address: str, stop: StopRequest
) -> tuple[RunResult, float]:
    target = StreamfillTarget(address)
    plan = RunPlan(mode=ModeName.STREAM, label="self", timeout_s=_REQUEST_TIMEOUT_S)
    try:
        await unless_stopped(target.facts(), stop)
        with run_progress() as show:
            meter = CpuMeter()
            result = await replay(
                target,
                schedule.scripts(),
                schedule.starts_s,
                plan,
                on_progress=show,
                stop=stop.first,
            )
            return result, meter.cores
    finally:
        await target.close()


def self_facts(schedule: SteadySchedule, result: RunResult, cpu_cores: float) -> dict[str, Any]:
    """The content of the ``RESULT`` line; ``docs/benchmarks/loadgen.md`` explains each key."""
    lag = lag_of(result.records)
    num_appends = sum(record.num_segments for record in result.records if not record.error_code)
    return {
        "lag_p50_ms": round(lag.p50_ms, 3),
        "lag_p99_ms": round(lag.p99_ms, 3),
        "lag_max_ms": round(lag.max_ms, 3),
        "appends_per_s": round(num_appends / result.wall_s, 1) if result.wall_s > 0 else 0.0,
        "cpu_cores": round(cpu_cores, 3),
        "num_streams": schedule.num_streams,
        "num_appends": num_appends,
        "num_failed": sum(record.error_code is not None for record in result.records),
        "wall_s": round(result.wall_s, 3),
        "load_average": round(os.getloadavg()[0], 2),
    }
