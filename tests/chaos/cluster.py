"""Chaos against the whole cluster: every process is killed and paused, links, transfers and clocks
go wrong, clients vanish, all under load; and everything is checked.

``make chaos``, or ``python -m tests.chaos.cluster --help``. ``docs/benchmarks/chaos.md`` says what
is done, what is checked, and what the figures mean.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from streamfill.models.tiny import make_tiny_model
from tests.chaos.cluster_options import Command, parse
from tests.chaos.cluster_plan import draw_plan, kill_plan
from tests.chaos.cluster_report import ChaosReport, summary
from tests.chaos.cluster_run import run, start

KILL_FIRST_S = 4.0

_EXIT_FAILED = 1
_EXIT_STOPPED = 130


def run_seed(command: Command, seed: int, model: Path, folder: Path) -> ChaosReport:
    """One run on a cluster of its own in ``folder``.

    Raises:
        AssertionError: the cluster does not start, or is not at rest then.
    """
    if command.kills is None:
        plan = draw_plan(seed, command.chaos.load_s)
    else:
        plan = kill_plan(seed, command.kills, KILL_FIRST_S, command.kill_every_s)
    _say(f"Seed {seed}: {'; '.join(fault.describe() for fault in plan.faults)}")
    cluster, clock = start(folder, model, command.chaos, plan)
    try:
        return asyncio.run(run(cluster, clock, model, command.chaos, plan))
    finally:
        cluster.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    command = parse(arguments)
    folder = Path(tempfile.mkdtemp(prefix=f"streamfill-chaos-{os.getpid()}-"))
    reports: list[ChaosReport] = []
    failed_starts: list[int] = []
    is_stopped = False
    _say(f"Seeds {command.seeds[0]} to {command.seeds[-1]}; logs in {folder}.")
    model = make_tiny_model(folder / "model", tokenizer="bpe")
    try:
        for seed in command.seeds:
            place = folder / f"seed-{seed}"
            try:
                report = run_seed(command, seed, model, place)
            except AssertionError as error:
                _say(f"error: seed {seed}: {error}")
                failed_starts.append(seed)
                continue
            report.tell(sys.stdout)
            reports.append(report)
            if not report.violations and not command.keeps_logs:
                shutil.rmtree(place)
    except KeyboardInterrupt:
        is_stopped = True
    facts = summary(reports, failed_starts)
    print(f"RESULT {json.dumps(facts, allow_nan=False)}", flush=True)
    if facts["ok"] and not command.keeps_logs:
        shutil.rmtree(folder)
    else:
        _say(f"Logs are kept in {folder}.")
    if is_stopped:
        return _EXIT_STOPPED
    return 0 if facts["ok"] else _EXIT_FAILED


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
