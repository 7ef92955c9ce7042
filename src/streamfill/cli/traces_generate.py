"""`streamfill traces generate`: draws a trace of any size from the published distributions."""

from __future__ import annotations

import argparse
import math
from fractions import Fraction
from pathlib import Path

from streamfill.errors import ConfigError
from streamfill.models.progress import show_progress
from streamfill.models.resolve import resolve_model
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer
from streamfill.traces.generate import Plan, generate, matching_time_scale
from streamfill.traces.published import PREFILL_TOKENS_PER_S, WorkloadName


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "workload",
        choices=[str(name) for name in WorkloadName],
        help="crawl: appends pages; ann: replaces a ranking of documents",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="*.jsonl[.gz]")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    parser.add_argument(
        "--token-scale",
        default="1",
        metavar="F",
        help="token counts are the published ones times this, such as 1/24; default: 1",
    )
    parser.add_argument(
        "--time-scale",
        metavar="G",
        help="times are the published ones times this; by default what keeps the published ratio "
        "of prefill time to gap on a machine of --prefill-rate",
    )
    parser.add_argument(
        "--prefill-rate",
        type=float,
        default=PREFILL_TOKENS_PER_S,
        metavar="R",
        help="tokens per second that the replaying machine prefills; default: the published "
        f"machine's {PREFILL_TOKENS_PER_S:,.0f}",
    )
    parser.add_argument(
        "--output-tokens", type=int, default=16, metavar="N", help="of each answer; default: 16"
    )
    parser.add_argument("--model", metavar="PATH", help="whose tokenizer counts the tokens")
    parser.add_argument(
        "--length-only",
        action="store_true",
        help="write lengths instead of text; needs no tokenizer; only for crawl",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the file."""
    for option, value in (("--requests", args.requests), ("--output-tokens", args.output_tokens)):
        if value < 1:
            raise ConfigError(option, value, "must be at least 1")
    workload = WorkloadName(args.workload)
    if args.length_only and workload is WorkloadName.ANN:
        raise ConfigError(
            "--length-only",
            True,
            "lengths alone cannot say what an update keeps; leave it out, or generate crawl",
        )
    token_scale = _scale("--token-scale", args.token_scale)
    prefill_rate = _scale("--prefill-rate", args.prefill_rate)
    if args.time_scale is None:
        time_scale = matching_time_scale(token_scale, prefill_rate)
    else:
        time_scale = _scale("--time-scale", args.time_scale)
    output: Path = args.output
    plan = Plan(
        name=output.name.removesuffix(".gz").removesuffix(".jsonl"),
        workload=workload,
        num_requests=args.requests,
        seed=args.seed,
        token_scale=token_scale,
        time_scale=time_scale,
        max_output_tokens=args.output_tokens,
    )
    tokenizer = None if args.length_only else _tokenizer(args.model)
    with show_progress(f"Generating {plan.name}") as progress:
        generate(plan, output, tokenizer, progress)
    print(f"{output}: {plan.num_requests} requests, {output.stat().st_size:,} bytes")
    return 0


def _tokenizer(model: str | None) -> TextTokenizer:
    with show_progress("Converting the default model") as progress:
        return load_tokenizer(resolve_model(model, progress))


def _scale(option: str, value: str | float) -> float:
    """A positive number, also written as a fraction."""
    try:
        number = float(Fraction(value)) if isinstance(value, str) else value
    except (ValueError, ArithmeticError) as error:
        raise ConfigError(option, value, "must be a number or a fraction such as 1/24") from error
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(option, value, "must be greater than 0")
    return number
