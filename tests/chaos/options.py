"""What a soak is told, and what of it follows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.script_writer import Habits
from tests.chaos.weather import Climate


@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    """How long, how much, and how."""

    seed: int
    load_s: float = 600.0
    num_streams: int = 64
    """Open at the same time."""
    most_streams: int = 100_000
    """None is started after so many, whatever the time."""
    only: tuple[int, ...] = ()
    """Scripts to play instead of all from 0 on."""
    num_prompts: int = 300
    longest_prompt_tokens: int = 700
    prefill_pool_tokens: int = 4000
    decode_pool_tokens: int = 4000
    """Both pools hold a part of what 64 streams want at once."""
    switch_every_s: float = 20.0
    """0: the scheduling policy stays as it is."""
    idle_timeout_s: float = 20.0
    """Of the router, for streams that nobody comes back to."""
    most_router_growth: float = 1.3
    """Of its resident memory, from ``settle_s``, or half of a shorter load, to the load's end."""
    settle_s: float = 90.0
    """Of the load, after which memory is measured first: ended streams are remembered for 60 s."""
    habits: Habits = field(default_factory=Habits)
    climate: Climate = field(default_factory=Climate)
    keeps_logs: bool = False


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command line."""

    soak: SoakOptions
    default_model: bool
    model: Path | None


def parse(arguments: Sequence[str] | None, new_seed: int) -> Command:
    """Read a command line; wrong options end the process, as usual."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.soak",
        description="Many streams that do everything at random, for minutes; checks everything.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of load (10)")
    parser.add_argument("--streams", type=int, default=64, help="at the same time (64)")
    parser.add_argument("--most-streams", type=int, default=100_000, help="in total (100000)")
    parser.add_argument("--seed", type=int, default=new_seed, help="of everything (drawn)")
    parser.add_argument(
        "--only", default="", help="numbers of the scripts to play, with commas (all)"
    )
    parser.add_argument("--prompts", type=int, default=300, help="different ones (300)")
    parser.add_argument("--longest-prompt", type=int, default=700, help="in tokens, roughly (700)")
    parser.add_argument("--prefill-pool", type=int, default=4000, help="KV tokens (4000)")
    parser.add_argument("--decode-pool", type=int, default=4000, help="KV tokens (4000)")
    parser.add_argument(
        "--switch-every", type=float, default=20.0, help="seconds between policies, 0: never (20)"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, help="a model folder (a tiny random model)")
    model.add_argument("--default-model", action="store_true", help="SmolLM2-135M-Instruct")
    parser.add_argument("--keep-logs", action="store_true", help="also when nothing is wrong")
    given = parser.parse_args(arguments)
    if given.minutes <= 0 or given.streams < 1 or given.prompts < 1:
        parser.error("--minutes, --streams and --prompts must be above 0")
    return Command(
        soak=SoakOptions(
            seed=given.seed,
            load_s=given.minutes * 60,
            num_streams=given.streams,
            most_streams=given.most_streams,
            only=tuple(int(number) for number in given.only.split(",") if number),
            num_prompts=given.prompts,
            longest_prompt_tokens=given.longest_prompt,
            prefill_pool_tokens=given.prefill_pool,
            decode_pool_tokens=given.decode_pool,
            switch_every_s=given.switch_every,
            keeps_logs=given.keep_logs,
        ),
        default_model=given.default_model,
        model=given.model,
    )
