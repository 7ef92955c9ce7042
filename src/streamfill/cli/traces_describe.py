"""`streamfill traces describe`: shows what is in a trace file."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from streamfill.errors import ConfigError, ModelError
from streamfill.models.progress import no_progress, show_progress
from streamfill.models.resolve import resolve_model
from streamfill.stream.tokenizer import load_tokenizer
from streamfill.traces.describe import Describer
from streamfill.traces.describe_view import lines_of
from streamfill.traces.files import TraceReader

_REQUESTS_PER_PROGRESS: Final = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("file", type=Path, metavar="FILE", help="trace file, *.jsonl[.gz]")
    parser.add_argument(
        "--model", metavar="PATH", help="whose tokenizer counts text; default: the default model"
    )
    parser.add_argument(
        "--characters", action="store_true", help="count text in characters; much faster"
    )
    parser.add_argument(
        "--prefill-rate",
        type=float,
        metavar="R",
        help="tokens per second that a server prefills, to show how much of it is needed",
    )
    parser.add_argument(
        "--unscale", action="store_true", help="divide times and tokens by the trace's scales"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Prints the description."""
    rate = args.prefill_rate
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ConfigError("--prefill-rate", rate, "must be greater than 0")
    with TraceReader(args.file) as reader:
        describer = Describer(
            reader.header,
            reader.documents,
            count_tokens=None if args.characters else _counter(args.model),
            unscale=args.unscale,
        )
        # On a terminal only: elsewhere the description is all that is wanted.
        shown = sys.stderr.isatty()
        with (
            show_progress(f"Reading {args.file.name}")
            if shown
            else contextlib.nullcontext(no_progress)
        ) as progress:
            for number, request in enumerate(reader):
                describer.add(request)
                if number % _REQUESTS_PER_PROGRESS == 0:
                    progress(reader.num_bytes_read, reader.num_bytes)
            progress(reader.num_bytes, reader.num_bytes)
    description = describer.description(prefill_tokens_per_s=rate)
    if args.json:
        print(msgspec.json.encode(description).decode())
    else:
        print("\n".join(lines_of(description)))
    return 0


def _counter(model: str | None) -> Callable[[str], int] | None:
    """Counts the tokens of a text; None where there is no default model to do it."""
    try:
        with show_progress("Converting the default model") as progress:
            tokenizer = load_tokenizer(resolve_model(model, progress))
    except (ConfigError, ModelError) as error:
        if model is not None:
            raise
        print(f"Text is counted in characters: {error}", file=sys.stderr)
        return None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=True))
