"""`streamfill model`: makes the default model ready, so that nothing waits for it later."""

from __future__ import annotations

import argparse

from streamfill.models.default import is_default_model_ready
from streamfill.models.progress import show_progress
from streamfill.models.resolve import resolve_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--model", metavar="PATH", help="check this folder instead")


def run(args: argparse.Namespace) -> int:
    """Prints the folder of the model."""
    if args.model is None and not is_default_model_ready():
        with show_progress("Converting the default model") as progress:
            print(resolve_model(None, progress))
    else:
        print(resolve_model(args.model))
    return 0
