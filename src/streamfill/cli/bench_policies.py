"""`streamfill bench policies`: every scheduling policy on several traces at several loads.

1. Traces are read, and arrivals are drawn: one schedule for each cell, that is for a trace at a
   load. How long all of it takes is estimated and printed.
2. One cluster is started. Cell after cell, ``oneshot``, ``warmup`` and each policy are replayed;
   policies are changed while the cluster runs.
3. Each finished run is a line of ``--output-file``; ``--resume`` goes on from there.
4. For each cell a table and how ``adaptive`` compares; the last line is for programs. After Ctrl-C
   the same for what there is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from streamfill.cli.bench_engines import Engines
from streamfill.cli.bench_options import (
    add_output_options,
    add_pace_options,
    replay_options,
    starts_of,
    workload_of,
)
from streamfill.cli.bench_policies_run import CellPlan, PolicyRuns, about
from streamfill.cli.bench_target_options import add_target_options, target_spec
from streamfill.errors import ConfigError, StreamfillError
from streamfill.launcher.cluster import StoppedError
from streamfill.launcher.signals import stop_on_signal
from streamfill.loadgen.arrivals import ArrivalKind
from streamfill.loadgen.cluster_target import OwnCluster, RunningCluster
from streamfill.loadgen.compare import Variant, plan_runs
from streamfill.loadgen.compare_modes import (
    ALL_POLICIES,
    BASELINE_POLICY,
    parse_modes,
    parse_policies,
)
from streamfill.loadgen.goodput import parse_goodput
from streamfill.loadgen.kept_runs import KeptRuns, read_kept_runs
from streamfill.loadgen.outcome import has_failures
from streamfill.loadgen.policy_cells import LOADS, Cell, parse_cells
from streamfill.loadgen.policy_outcome import CellOutcome, policy_facts
from streamfill.loadgen.policy_table import policy_table, verdict_lines
from streamfill.loadgen.run_file import RunFile
from streamfill.loadgen.table import identity_lines, print_table
from streamfill.loadgen.workload import Workload

DEFAULT_TRACES: Final = "traces/crawl-small.jsonl,traces/ann-small.jsonl"
_EXIT_FAILED: Final = 1
_EXIT_STOPPED: Final = 130  # 128 + SIGINT, as shells have it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.epilog = "docs/benchmarks/policies.md explains the figures."
    parser.add_argument(
        "--traces", default=DEFAULT_TRACES, metavar="F,…", help=f"default: {DEFAULT_TRACES}"
    )
    loads = ",".join(LOADS)
    parser.add_argument("--loads", default=loads, metavar="L,…", help=f"default: {loads}")
    parser.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="TRACE:LOAD=R",
        help="requests per second of a trace at a load; needed for traces that are not shipped",
    )
    parser.add_argument(
        "--policies",
        default=ALL_POLICIES,
        metavar="P,…",
        help=f"as `streamfill policy list` shows them; default: {ALL_POLICIES} of this package",
    )
    parser.add_argument(
        "--baseline-policy",
        default=BASELINE_POLICY,
        metavar="NAME",
        help=f"how servers schedule in oneshot and warmup modes; default: {BASELINE_POLICY}",
    )
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="repetitions; default: 1")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out runs that --output-file holds with the same options",
    )
    add_pace_options(parser)
    add_target_options(parser)
    add_output_options(parser, always_saves_records=True)


def run(args: argparse.Namespace) -> int:
    """Prints the comparison. Exit code 1 when answers differ or a request failed."""
    policies = parse_policies(args.policies, "--policies")
    words = ["oneshot", "warmup", *(f"stream@{policy}" for policy in policies)]
    variants = parse_modes(",".join(words), baseline_policy=args.baseline_policy)
    plan_runs(variants, args.runs)
    cells = parse_cells(args.traces, args.loads, args.rate)
    parse_goodput(args.goodput)
    if args.arrivals == ArrivalKind.CLOSED.value:
        raise ConfigError("--arrivals", args.arrivals, "has no rate; use another kind")
    if args.resume and args.output_file is None:
        raise ConfigError("--resume", True, "needs --output-file")
    plans = _cell_plans(args, cells)
    kept = read_kept_runs(args.output_file) if args.resume else KeptRuns()
    file = None if args.output_file is None else RunFile(args.output_file, saves_records=True)
    own = target_spec(args)
    assert isinstance(own, (OwnCluster, RunningCluster))  # there is no --openai
    return asyncio.run(_measure(args, plans, variants, own=own, kept=kept, file=file))


def _cell_plans(args: argparse.Namespace, cells: Sequence[Cell]) -> list[CellPlan]:
    plans: list[CellPlan] = []
    workloads: dict[Path, Workload] = {}
    for cell in cells:
        replayed = {"trace": cell.path, "request_rate": cell.rate, "arrivals_file": None}
        options = replay_options(argparse.Namespace(**{**vars(args), **replayed}))
        if cell.path not in workloads:
            workloads[cell.path] = workload_of(options)
        workload = workloads[cell.path]
        plans.append(
            CellPlan(
                cell=cell,
                options=options,
                workload=workload,
                starts_s=starts_of(options, workload),
            )
        )
    return plans


async def _measure(
    args: argparse.Namespace,
    plans: Sequence[CellPlan],
    variants: Sequence[Variant],
    *,
    own: OwnCluster | RunningCluster,
    kept: KeptRuns,
    file: RunFile | None,
) -> int:
    failure: StreamfillError | None = None
    with stop_on_signal() as stop:
        runs = PolicyRuns(
            plans,
            variants,
            args.runs,
            own=own,
            goodput=parse_goodput(args.goodput),
            file=file,
            kept=kept,
            stop=stop,
            say=_say,
        )
        _say_estimate(runs)
        engines = Engines(own, peer_threads=1, stop=stop, say=_say)
        try:
            await runs.make(engines.open)
        except StreamfillError as error:
            failure = error
    outcomes = runs.outcomes
    if outcomes:
        _print_outcomes(outcomes, is_complete=failure is None)
    if isinstance(failure, StoppedError):
        return _EXIT_STOPPED
    if failure is not None:
        raise failure
    is_well = all(
        each.identity.is_identical and not has_failures(each.summaries) for each in outcomes
    )
    return 0 if is_well else _EXIT_FAILED


def _say_estimate(runs: PolicyRuns) -> None:
    held = ""
    if runs.num_kept:
        commits = ", ".join(sorted(runs.kept_commits))
        held = f"; {runs.num_kept} more are in the file already, made at commit {commits}"
    _say(f"{runs.num_left} runs, {about(runs.left_s)} where servers keep up{held}.")


def _print_outcomes(outcomes: Sequence[CellOutcome], *, is_complete: bool) -> None:
    print("" if is_complete else "\nStopped. The runs that were finished:")
    for outcome in outcomes:
        print_table(policy_table(outcome))
        for line in [*verdict_lines(outcome), *identity_lines(outcome.identity), ""]:
            print(line)
    facts = policy_facts(outcomes, is_complete=is_complete)
    print(f"RESULT {json.dumps(facts, allow_nan=False)}", flush=True)


def _say(text: str) -> None:
    print(text, flush=True)
