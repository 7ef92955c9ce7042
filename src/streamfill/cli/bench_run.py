"""`streamfill bench run`: replays a trace once, in one mode, and shows the figures.

1. The trace is read through, arrivals are drawn or read from their file.
2. The target is started, where it does not run already, and made to do everything once.
3. The trace is replayed; Ctrl-C ends that early: what is known by then is shown, but not saved.
4. A table, and a line that is appended to ``--output-file``; the last line is for programs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass
from typing import Final

from streamfill.cli.bench_facts import run_config
from streamfill.cli.bench_options import (
    ReplayOptions,
    add_output_options,
    add_replay_options,
    as_in_file,
    replay_options,
    starts_of,
    workload_of,
)
from streamfill.cli.bench_progress import run_progress
from streamfill.cli.bench_target import shown_target
from streamfill.cli.bench_target_options import add_target_options, target_spec
from streamfill.errors import ConfigError
from streamfill.launcher.cluster import StoppedError
from streamfill.launcher.signals import StopRequest, stop_on_signal
from streamfill.loadgen.cluster_target import OpenTarget, TargetSpec
from streamfill.loadgen.environment import LoadAverage, environment, load_average
from streamfill.loadgen.goodput import Goodput, parse_goodput
from streamfill.loadgen.lag import lag_of
from streamfill.loadgen.metrics import RunSummary, flat, summarise
from streamfill.loadgen.records import ModeName, RunResult
from streamfill.loadgen.run_file import RunFile, SavedRun
from streamfill.loadgen.runner import RunPlan, replay
from streamfill.loadgen.table import comparison_table, print_table
from streamfill.loadgen.workload import Workload

_EXIT_FAILED: Final = 1
_EXIT_STOPPED: Final = 130  # 128 + SIGINT, as shells have it
_OWN_TARGET: Final = "streamfill"
_MOST_ERRORS: Final = 5
"""Shown; all of them are in the file of records."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One run, as the options describe it."""

    spec: TargetSpec
    mode: ModeName
    options: ReplayOptions
    workload: Workload
    starts_s: tuple[float, ...]
    goodput: Goodput | None
    file: RunFile | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_replay_options(parser)
    parser.add_argument(
        "--mode",
        choices=[mode.value for mode in ModeName],
        default=ModeName.STREAM.value,
        help="what the client does with context that arrives over time; default: stream",
    )
    parser.add_argument(
        "--openai", metavar="URL", help="a server with OpenAI's interface; no stream mode"
    )
    add_target_options(parser)
    add_output_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the figures. Exit code 1 when a request failed."""
    options = replay_options(args)
    goodput = parse_goodput(args.goodput)
    mode = ModeName(args.mode)
    if args.openai is not None and mode is ModeName.STREAM:
        raise ConfigError("--mode", args.mode, "--openai has no streams; use oneshot or warmup")
    if args.save_records and args.output_file is None:
        raise ConfigError("--save-records", True, "needs --output-file")
    workload = workload_of(options)
    options = as_in_file(options, workload)
    starts_s = starts_of(options, workload)
    file = None
    if args.output_file is not None:
        file = RunFile(args.output_file, saves_records=args.save_records)
    job = _Job(
        spec=target_spec(args),
        mode=mode,
        options=options,
        workload=workload,
        starts_s=starts_s,
        goodput=goodput,
        file=file,
    )
    return asyncio.run(_run(job))


async def _run(job: _Job) -> int:
    with stop_on_signal() as stop:
        try:
            async with shown_target(job.spec, stop) as opened:
                load_start = load_average()
                result = await _replay(job, opened, stop)
                load = LoadAverage(start=load_start, end=load_average())
                summary = summarise(result, job.goodput)
                opened.keeps_logs = summary.num_failed > 0 and not stop.first.is_set()
        except StoppedError:
            return _EXIT_STOPPED
    is_stopped = stop.first.is_set()
    if job.file is not None and not is_stopped:
        saved = SavedRun(
            result=result,
            environment=environment(trace=job.workload.path, model=opened.facts.model),
            load=load,
            config=run_config(job.options, job.spec),
            goodput=job.goodput,
        )
        job.file.add(saved, summary)
    _print_report(result, summary)
    if is_stopped:
        return _EXIT_STOPPED
    return _EXIT_FAILED if summary.num_failed else 0


async def _replay(job: _Job, opened: OpenTarget, stop: StopRequest) -> RunResult:
    name, mode = opened.target.name, job.mode
    plan = RunPlan(
        mode=mode,
        label=mode.value if name == _OWN_TARGET else f"{name}:{mode.value}",
        trace=job.workload.name,
        request_rate=job.options.request_rate,
        max_concurrency=job.options.max_concurrency,
        is_closed_loop=job.options.is_closed_loop,
        num_warm_up=job.options.num_warm_up,
        timeout_s=job.options.timeout_s,
        ttft_slo_ms=job.options.ttft_slo_ms,
    )
    with run_progress(plan.label) as show:
        return await replay(
            opened.target,
            job.workload.scripts(opened.facts.vocab_size),
            job.starts_s,
            plan,
            on_progress=show,
            stop=stop.first,
        )


def _print_report(result: RunResult, summary: RunSummary) -> None:
    print_table(comparison_table([summary]))
    print(
        f"{summary.num_completed} of {summary.num_requests} requests completed "
        f"in {summary.wall_s:.1f} s. {lag_of(result.records).line}."
    )
    failed = [record for record in result.records if record.error_code is not None]
    for record in failed[:_MOST_ERRORS]:
        print(f"  {record.request_id}: {record.error_code}: {record.error}")
    if len(failed) > _MOST_ERRORS:
        print(f"  and {len(failed) - _MOST_ERRORS} more")
    print(f"RESULT {json.dumps(flat(summary), allow_nan=False)}", flush=True)
