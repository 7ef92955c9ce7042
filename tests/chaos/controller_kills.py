"""The preemption controller is killed again and again while memory is short; nobody may notice.

``make chaos-controller``, or ``python -m tests.chaos.controller_kills --help``. A trace is replayed
twice against one cluster whose prefill pool is far too small: once left alone, once with the
controller killed by SIGKILL and restarted by the launcher, ``--kills`` times, evenly over the run.
``docs/benchmarks/preemption.md`` explains the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence

from streamfill.cli.bench_options import add_replay_options, replay_options, starts_of, workload_of
from streamfill.cli.bench_target_options import add_target_options, own_cluster
from streamfill.errors import StreamfillError
from streamfill.launcher.cluster import StoppedError, unless_stopped
from streamfill.launcher.managed_process import ProcessStatus
from streamfill.launcher.signals import StopRequest, stop_on_signal
from streamfill.loadgen.cluster_target import OpenTarget, open_target, prime
from streamfill.loadgen.figures import Figure
from streamfill.loadgen.identity import compare_outputs
from streamfill.loadgen.metrics import RunSummary, summarise
from streamfill.loadgen.records import ModeName, RunResult
from streamfill.loadgen.runner import RunPlan, replay

_EXIT_FAILED = 1
_EXIT_STOPPED = 130
_CONTROLLER = "controller"


class _Controller:
    """The controller process, as the launcher last told of it."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self._changed = asyncio.Event()

    def show(self, statuses: Sequence[ProcessStatus]) -> None:
        """As ``open_target``'s ``on_change``."""
        for status in statuses:
            if status.name == _CONTROLLER:
                self.pid = status.pid
                self._changed.set()

    async def kill_often(self, times: int, every_s: float) -> int:
        """Kill it so many times, one every ``every_s``; where it is not up yet, wait for it.
        Returns how many were killed; cancelled, those until then."""
        num_killed = 0
        last: int | None = None
        try:
            while num_killed < times:
                await asyncio.sleep(every_s)
                while self.pid is None or self.pid == last:
                    self._changed.clear()
                    await self._changed.wait()
                last = self.pid
                os.kill(last, signal.SIGKILL)
                num_killed += 1
        except asyncio.CancelledError:
            pass
        return num_killed


async def _run(args: argparse.Namespace) -> int:
    options = replay_options(args)
    workload = workload_of(options)
    starts_s = starts_of(options, workload)
    controller = _Controller()

    async def play(opened: OpenTarget, label: str, stop: StopRequest) -> RunResult:
        await opened.target.empty_caches()
        plan = RunPlan(mode=ModeName.STREAM, label=label, trace=workload.name)
        scripts = workload.scripts(opened.facts.vocab_size)
        return await unless_stopped(replay(opened.target, scripts, starts_s, plan), stop)

    with stop_on_signal() as stop:
        try:
            async with open_target(
                own_cluster(args), stop=stop, on_change=controller.show, say=print
            ) as opened:
                await prime(opened)
                alone = await play(opened, "undisturbed", stop)
                _say(summarise(alone))
                every_s = 0.9 * alone.wall_s / args.kills
                killing = asyncio.create_task(controller.kill_often(args.kills, every_s))
                try:
                    disturbed = await play(opened, "killed", stop)
                finally:
                    killing.cancel()
                    num_kills = await killing
        except StoppedError:
            return _EXIT_STOPPED
    return _judge(alone, disturbed, num_kills)


def _judge(alone: RunResult, disturbed: RunResult, num_kills: int) -> int:
    summaries = [summarise(alone), summarise(disturbed)]
    _say(summaries[1])
    identity = compare_outputs([alone, disturbed])
    first, second = (_p99_ms(summary) for summary in summaries)
    facts = {
        "num_kills": num_kills,
        "num_failed": sum(summary.num_failed for summary in summaries),
        "identical": identity.is_identical,
        "undisturbed_p99_ttft_ms": first,
        "killed_p99_ttft_ms": second,
        "p99_ratio": None if not first or second is None else round(second / first, 3),
        "num_preemptions": [summary.num_preemptions for summary in summaries],
    }
    print(f"RESULT {json.dumps(facts, allow_nan=False)}", flush=True)
    is_well = identity.is_identical and not facts["num_failed"]
    return 0 if is_well else _EXIT_FAILED


def _p99_ms(summary: RunSummary) -> float | None:
    figure = summary.figure(Figure.TTFT_LAST_SEGMENT)
    return None if figure is None else round(figure.p99, 1)


def _say(summary: RunSummary) -> None:
    print(
        f"{summary.label}: {summary.num_completed} of {summary.num_requests} requests, "
        f"P99 {_p99_ms(summary)} ms, preemptions {summary.num_preemptions}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.controller_kills",
        description="Kills the preemption controller under load; nobody may notice.",
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="default: 20")
    add_replay_options(parser)
    add_target_options(parser)
    parser.set_defaults(
        request_rate=0.85,
        set=["prefill.pool_tokens=5000"],
    )
    args = parser.parse_args(arguments)
    if args.kills < 1:
        parser.error("--kills must be at least 1")
    try:
        return asyncio.run(_run(args))
    except StreamfillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
