"""`streamfill bench`: replay traces, compare modes, draw the report."""

from __future__ import annotations

import argparse
from typing import Final

from streamfill.cli.subcommands import add_subcommands, run_subcommand

COMMANDS: Final = {
    "run": "replay a trace in one mode",
    "compare": "replay a trace in several modes, side by side",
    "policies": "compare all scheduling policies on several traces at several loads",
    "report": "draw the page of runs that were saved",
    "handoff": "how fast KV is handed over, and how soon the second token comes",
    "router": "what one router on one core takes, beside SGLang's router",
    "self": "measure the load generator itself against a fake server",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the sub-commands."""
    parser.epilog = (
        "`streamfill bench WHAT --help` shows the options; docs/benchmarks/ the figures."
    )
    add_subcommands(parser, "bench", COMMANDS)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen one."""
    return run_subcommand(args, "bench")
