"""`streamfill bench compare`: replays a trace in several modes and says which makes users wait
least.

1. The trace is read through and arrivals are drawn, once for all modes.
2. Engines run one after the other, each with all its modes and repetitions (`loadgen.compare`).
3. Each finished run is a line of ``--output-file``, so that Ctrl-C costs only the run under way.
4. Answers are compared; a table, the page of ``--report``, and the last line, for programs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamfill.cli.bench_compare_run import CompareRun
from streamfill.cli.bench_engines import Engines
from streamfill.cli.bench_options import (
    add_output_options,
    add_replay_options,
    as_in_file,
    replay_options,
    starts_of,
    workload_of,
)
from streamfill.cli.bench_target_options import add_target_options, own_cluster, target_spec
from streamfill.errors import ConfigError, StreamfillError
from streamfill.launcher.cluster import StoppedError
from streamfill.launcher.plan import thread_share
from streamfill.launcher.signals import stop_on_signal
from streamfill.loadgen.arrivals import ArrivalKind
from streamfill.loadgen.cluster_target import OwnCluster, RunningCluster
from streamfill.loadgen.compare import (
    OWN_ENGINE,
    EngineSession,
    Variant,
    plan_runs,
    split_by_trace,
)
from streamfill.loadgen.compare_modes import BASELINE_POLICY, parse_modes
from streamfill.loadgen.compare_runs import make_runs
from streamfill.loadgen.goodput import parse_goodput
from streamfill.loadgen.identity import compare_outputs
from streamfill.loadgen.outcome import has_failures, result_facts
from streamfill.loadgen.run_file import RunFile
from streamfill.loadgen.table import comparison_table, identity_lines, print_table
from streamfill.scheduling.registry import DEFAULT_POLICY

DEFAULT_MODES: Final = "oneshot,warmup,stream"
_EXIT_FAILED: Final = 1
_EXIT_STOPPED: Final = 130  # 128 + SIGINT, as shells have it


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the options ask for, checked.

    Attributes:
        skipped: why a mode cannot replay this trace, by its label.
        num_runs: over all modes.
    """

    own: OwnCluster | RunningCluster
    sessions: Sequence[EngineSession]
    skipped: dict[str, str]
    num_runs: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--modes",
        default=DEFAULT_MODES,
        metavar="M,…",
        help="of oneshot, warmup, stream, each with @POLICY or @all behind it if wanted, "
        f"sglang-pd[:MODE], vllm[:MODE]; default: {DEFAULT_MODES}",
    )
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="repetitions; default: 1")
    parser.add_argument(
        "--policy",
        default=DEFAULT_POLICY,
        metavar="NAME",
        help="how servers schedule in a plain stream mode, as `streamfill policy list` shows it; "
        f"options in brackets: lcas(order=newest); default: {DEFAULT_POLICY}",
    )
    parser.add_argument(
        "--baseline-policy",
        default=BASELINE_POLICY,
        metavar="NAME",
        help=f"likewise in plain oneshot and warmup modes; default: {BASELINE_POLICY}, arrival "
        "order, as servers without streams have it",
    )
    parser.add_argument(
        "--preemption",
        metavar="M,…",
        help="run each stream mode once for each of these: auto, swap, recompute, none; how "
        "servers take KV from open streams when memory is short; default: as configured",
    )
    add_replay_options(parser)
    parser.add_argument(
        "--saturate",
        type=int,
        metavar="N",
        help="closed loop: N clients, each sends its next request when its last one is answered",
    )
    add_target_options(parser)
    add_output_options(parser)
    parser.add_argument("--report", type=Path, metavar="FILE", help="draw a page of charts (HTML)")


def run(args: argparse.Namespace) -> int:
    """Prints the comparison. Exit code 1 when answers differ or a request failed."""
    _saturate(args)
    variants = parse_modes(
        args.modes,
        policy=args.policy,
        baseline_policy=args.baseline_policy,
        preemption=args.preemption,
    )
    plan_runs(variants, args.runs)
    goodput = parse_goodput(args.goodput)
    options = replay_options(args)
    _check_outputs(args)
    workload = workload_of(options)
    kept, skipped = split_by_trace(variants, has_updates=workload.has_updates)
    sessions = plan_runs(kept, args.runs)
    options = as_in_file(options, workload)
    starts_s = starts_of(options, workload)
    file = None
    if args.output_file is not None:
        file = RunFile(args.output_file, saves_records=args.save_records)
    plan = _Plan(
        own=_own(args, kept),
        sessions=sessions,
        skipped=skipped,
        num_runs=sum(len(session.runs) for session in sessions),
    )

    async def compare() -> int:
        with stop_on_signal() as stop:
            comparison = CompareRun(
                options,
                workload,
                starts_s,
                own=plan.own,
                goodput=goodput,
                file=file,
                num_runs=plan.num_runs,
                stop=stop,
                say=_say,
            )
            engines = Engines(plan.own, peer_threads=_peer_threads(plan.own), stop=stop, say=_say)
            try:
                missing = await make_runs(
                    plan.sessions,
                    open_engine=engines.open,
                    replay=comparison.make,
                    on_result=comparison.keep,
                )
            except StreamfillError as error:
                if comparison.summaries:
                    print("\nStopped. The runs that were finished:")
                    print_table(comparison_table(comparison.summaries))
                if isinstance(error, StoppedError):
                    return _EXIT_STOPPED
                raise
        return _finish(comparison, plan.skipped | missing, args)

    return asyncio.run(compare())


def _saturate(args: argparse.Namespace) -> None:
    """Turns ``--saturate N`` into the replay options that it stands for."""
    if args.saturate is None:
        return
    if args.saturate < 1:
        raise ConfigError("--saturate", args.saturate, "must be at least 1")
    for option in ("request_rate", "max_concurrency", "arrivals_file"):
        if getattr(args, option) is not None:
            other = f"--{option.replace('_', '-')}"
            raise ConfigError("--saturate", args.saturate, f"has no arrivals; leave {other} out")
    if args.arrivals not in (ArrivalKind.TRACE.value, ArrivalKind.CLOSED.value):
        raise ConfigError("--saturate", args.saturate, "has no arrivals; leave --arrivals out")
    args.arrivals = ArrivalKind.CLOSED.value
    args.max_concurrency = args.saturate


def _check_outputs(args: argparse.Namespace) -> None:
    """What would only be noticed after all runs."""
    if args.save_records and args.output_file is None:
        raise ConfigError("--save-records", True, "needs --output-file")
    if args.report is not None and (args.report.is_dir() or not args.report.parent.is_dir()):
        raise ConfigError("--report", str(args.report), "name a file in a folder that exists")


def _own(args: argparse.Namespace, variants: Sequence[Variant]) -> OwnCluster | RunningCluster:
    if args.address is None:
        return own_cluster(args)
    if any(variant.engine != OWN_ENGINE for variant in variants):
        remedy = (
            "peers run the same model as our cluster, so it has to be started here; leave it out"
        )
        raise ConfigError("--address", args.address, remedy)
    spec = target_spec(args)
    assert isinstance(spec, RunningCluster)
    return spec


def _peer_threads(own: OwnCluster | RunningCluster) -> int:
    """As many as a prefill server of ours."""
    if isinstance(own, RunningCluster):
        return 1
    prefill, decode = own.config.prefill, own.config.decode
    num_cores = len(os.sched_getaffinity(0))
    return prefill.threads or thread_share(num_cores, prefill.count + decode.count)


def _finish(comparison: CompareRun, skipped: dict[str, str], args: argparse.Namespace) -> int:
    results, summaries = comparison.results, comparison.summaries
    identity = compare_outputs(results)
    facts = result_facts(summaries, identity, skipped)
    print()
    if summaries:
        print_table(comparison_table(summaries))
        print("\n".join(identity_lines(identity)))
    for label, reason in skipped.items():
        print(f"{label} was skipped: {reason}")
    try:
        if args.report is not None and results:
            _write_report(comparison, skipped, args)
    finally:  # a page that fails must not cost the figures
        print(f"RESULT {json.dumps(facts, allow_nan=False)}", flush=True)
    is_well = bool(results) and identity.is_identical and not has_failures(summaries)
    return 0 if is_well else _EXIT_FAILED


def _write_report(
    comparison: CompareRun, skipped: dict[str, str], args: argparse.Namespace
) -> None:
    from streamfill.loadgen.report import write_report

    write_report(
        args.report,
        comparison.results,
        comparison.summaries,
        comparison.environment,
        skipped=skipped,
        config=comparison.config,
        command=_command(args.words),
    )
    print(f"Report: {args.report}")


def _command(words: Sequence[str]) -> str:
    """The command line, files without their folders."""
    shown = [Path(word).name if word.startswith("/") else word for word in words]
    return shlex.join(["streamfill", *shown])


def _say(text: str) -> None:
    print(text, flush=True)
