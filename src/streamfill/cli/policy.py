"""`streamfill policy`: which scheduling policies there are, which are in force, and another one."""

from __future__ import annotations

import argparse
from typing import Final

from streamfill.cli.subcommands import add_subcommands, run_subcommand

COMMANDS: Final = {
    "list": "show the policies that are installed here, with their options",
    "show": "show the policy in force on each server of a cluster",
    "set": "make prefill servers schedule by another policy while they run",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the sub-commands."""
    parser.epilog = (
        "A policy says which streams a prefill server computes next, and how much of each. "
        "`streamfill policy WHAT --help` shows the options. The policy that servers start with is "
        "prefill.policy in the cluster file; `streamfill status --streams` shows what the one in "
        "force decides."
    )
    add_subcommands(parser, "policy", COMMANDS)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen one."""
    return run_subcommand(args, "policy")
