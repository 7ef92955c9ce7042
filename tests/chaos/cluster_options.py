"""What a chaos run against the whole cluster is told."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.cluster_judge import SERVICE_WITHIN_S
from tests.chaos.cluster_plan import PROCESSES

MOST_SEEDS = 1000
KILL_EVERY_S = 12.0
KILL_ORDER = ("prefill-0", "decode-0", "prefill-1", "decode-1", "router", "controller")
"""No two of a role follow one another."""


@dataclass(frozen=True, kw_only=True)
class ChaosOptions:
    """How much, and how."""

    load_s: float = 25.0
    """New streams are begun for so long, and faults happen in it."""
    rate: float = 4.0
    """Streams that begin each second."""
    num_at_once: int = 24
    """More wait for a place."""
    most_streams: int = 400
    longest_prompt_tokens: int = 500
    prefill_pool_tokens: int = 3000
    decode_pool_tokens: int = 3000
    """Of each server; 24 streams want more."""
    service_within_s: float = SERVICE_WITHIN_S
    """After each kill."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command line."""

    chaos: ChaosOptions
    seeds: tuple[int, ...]
    kills: tuple[str, ...] | None
    """Kill these, one after the other, and do nothing else; None: what the seeds say."""
    kill_every_s: float
    """Between two of them, so that what follows each can be told apart. One process at a time is
    down only where the killed one is back sooner: ten seconds on a quiet machine."""
    keeps_logs: bool


def parse(arguments: Sequence[str] | None) -> Command:
    """Read a command line; wrong options end the process, as usual."""
    standard = ChaosOptions()
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.cluster",
        description="Kills, pauses and disturbs a whole cluster under load; checks everything.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", metavar="A:B", help="from A on, up to and without B")
    which.add_argument("--seed", type=int, metavar="N", help="the first of --runs (drawn)")
    parser.add_argument("--runs", type=int, metavar="N", help="seeds in a row (1)")
    parser.add_argument(
        "--kills",
        nargs="?",
        const=",".join(KILL_ORDER),
        metavar="A,B",
        help="only kills, of these in turn; without a value of each process once",
    )
    parser.add_argument(
        "--kill-every",
        type=float,
        default=KILL_EVERY_S,
        metavar="S",
        help="seconds between two of --kills (%(default)g); more than a server takes to start",
    )
    parser.add_argument(
        "--load", type=float, default=standard.load_s, metavar="S", help="seconds (%(default)g)"
    )
    parser.add_argument(
        "--rate", type=float, default=standard.rate, help="streams a second (%(default)g)"
    )
    parser.add_argument("--keep-logs", action="store_true", help="also when nothing is wrong")
    given = parser.parse_args(arguments)
    if given.load <= 0 or given.rate <= 0 or given.kill_every <= 0:
        parser.error("--load, --rate and --kill-every must be above 0")
    kills = None
    if given.kills is not None:
        kills = tuple(name.strip() for name in given.kills.split(",") if name.strip())
        unknown = [name for name in kills if name not in PROCESSES]
        if unknown or not kills:
            parser.error(f"--kills: name some of {', '.join(PROCESSES)}, not {given.kills!r}")
    return Command(
        chaos=ChaosOptions(load_s=given.load, rate=given.rate),
        seeds=_seeds(parser, given),
        kills=kills,
        kill_every_s=given.kill_every,
        keeps_logs=given.keep_logs,
    )


def _seeds(parser: argparse.ArgumentParser, given: argparse.Namespace) -> tuple[int, ...]:
    if given.seeds is not None:
        first, colon, end = given.seeds.partition(":")
        if not (first.isdecimal() and colon and end.isdecimal()) or given.runs is not None:
            parser.error("--seeds: write A:B, such as 0:20, and leave --runs out")
        seeds = tuple(range(int(first), int(end)))
    else:
        first_seed = secrets.randbelow(1_000_000) if given.seed is None else given.seed
        seeds = tuple(range(first_seed, first_seed + (1 if given.runs is None else given.runs)))
    if not 0 < len(seeds) <= MOST_SEEDS:
        parser.error(f"between 1 and {MOST_SEEDS} seeds, not {len(seeds)}")
    return seeds
