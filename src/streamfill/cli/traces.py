"""`streamfill traces`: describe, import, generate and collect trace files."""

from __future__ import annotations

import argparse
from typing import Final

from streamfill.cli.subcommands import add_subcommands, run_subcommand

COMMANDS: Final = {
    "describe": "show what is in a trace file",
    "import": "make a trace of a file in another format",
    "generate": "draw a trace of any size from the published distributions",
    "collect": "make a real trace anew, by crawling or by searching",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the sub-commands."""
    parser.epilog = "`streamfill traces WHAT --help` shows the options; docs/traces.md the format."
    add_subcommands(parser, "traces", COMMANDS)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen one."""
    return run_subcommand(args, "traces")
