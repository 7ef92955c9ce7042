"""Hand-offs under faults: every fifth transfer goes wrong and every server is killed; all streams
are answered as if nothing had happened.

``make chaos-handoff``, or ``python -m tests.chaos.handoff_faults --help``.
``docs/benchmarks/handoff_faults.md`` says what is done, what is checked, and what the figures mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from streamfill.models.tiny import make_tiny_model
from streamfill.stream.tokenizer import load_tokenizer
from tests.chaos.handoff_run import (
    HandoffOptions,
    HandoffReport,
    play_disturbed,
    play_undisturbed,
    start,
)
from tests.chaos.handoff_streams import plan_streams

MOST_SHOWN = 20
"""Violations that are told in full."""
_EXIT_FAILED = 1
_EXIT_STOPPED = 130


def run(options: HandoffOptions, folder: Path) -> HandoffReport:
    """Both runs, each on a cluster of its own in ``folder``.

    Raises:
        AssertionError: a cluster does not start, or an undisturbed stream fails.
    """
    model = make_tiny_model(folder / "model", tokenizer="bpe")
    tokenizer = load_tokenizer(model)
    streams = plan_streams(tokenizer, options.seed, options.most_streams)
    _say(f"Seed {options.seed}. {len(streams)} streams, undisturbed; logs in {folder}.")
    cluster = start(folder / "alone", model, "alone", options, with_faults=False)
    try:
        undisturbed = asyncio.run(play_undisturbed(cluster.address, streams, tokenizer, options))
    finally:
        cluster.stop()
    _say(f"Done in {undisturbed.wall_s:.0f} s. Now with faults, and {len(options.kills)} kills.")
    cluster = start(folder / "disturbed", model, "disturbed", options, with_faults=True)
    try:
        return asyncio.run(play_disturbed(cluster, streams, tokenizer, undisturbed, options))
    finally:
        cluster.stop()


def parse(arguments: Sequence[str] | None) -> tuple[HandoffOptions, bool]:
    """Read a command line: what to do, and whether to keep the logs of a run in which all was well.
    Wrong options end the process, as usual."""
    standard = HandoffOptions(seed=0)
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.handoff_faults",
        description="Spoils hand-offs and kills servers; every stream must be answered all the "
        "same.",
    )
    parser.add_argument("--streams", type=int, default=500, metavar="N", help="at least (500)")
    parser.add_argument("--every", type=int, default=5, metavar="N", help="spoiled: one in N (5)")
    parser.add_argument("--seed", type=int, default=None, help="of everything (drawn)")
    parser.add_argument(
        "--kills",
        default=",".join(standard.kills),
        metavar="A,B",
        help="servers to kill, in this order; empty for none (%(default)s)",
    )
    parser.add_argument("--rate", type=float, default=standard.rate, help="streams a second (6)")
    parser.add_argument("--at-once", type=int, default=24, help="streams at the same time (24)")
    parser.add_argument("--keep-logs", action="store_true", help="also when nothing is wrong")
    given = parser.parse_args(arguments)
    kills = tuple(name.strip() for name in given.kills.split(",") if name.strip())
    unknown = [name for name in kills if name not in standard.kills]
    if unknown:
        parser.error(f"--kills: no server is named {unknown[0]!r}; {', '.join(standard.kills)} are")
    if len(set(kills)) != len(kills):
        parser.error("--kills: each server is killed once")
    if min(given.streams, given.at_once) < 1 or given.rate <= 0:
        parser.error("--streams, --at-once and --rate must be above 0")
    if given.every < 3:
        parser.error("--every must be at least 3: some hand-offs must have a chance")
    options = HandoffOptions(
        seed=secrets.randbelow(1_000_000) if given.seed is None else given.seed,
        num_streams=given.streams,
        every=given.every,
        fewest_faults=int(0.8 * given.streams / given.every),
        kills=kills,
        num_at_once=given.at_once,
        rate=given.rate,
    )
    return options, given.keep_logs


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    options, keeps_logs = parse(arguments)
    folder = Path(tempfile.mkdtemp(prefix=f"streamfill-handoff-{os.getpid()}-"))
    is_well = False
    try:
        report = run(options, folder)
        for violation in report.violations[:MOST_SHOWN]:
            number = "" if violation.number is None else f"stream {violation.number}: "
            print(f"VIOLATION {violation.rule.name}: {violation.rule}\n  {number}{violation.text}")
        if len(report.violations) > MOST_SHOWN:
            print(f"and {len(report.violations) - MOST_SHOWN} more violations")
        print(f"RESULT {json.dumps(report.facts, allow_nan=False)}", flush=True)
        is_well = not report.violations
        return 0 if is_well else _EXIT_FAILED
    except AssertionError as error:
        _say(f"error: {error}")
        return _EXIT_FAILED
    except KeyboardInterrupt:
        return _EXIT_STOPPED
    finally:
        if is_well and not keeps_logs:
            shutil.rmtree(folder)
        else:
            _say(f"Logs are kept in {folder}.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
