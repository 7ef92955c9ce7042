"""`streamfill servers`: the servers of a running cluster: which there are, one more, one less."""

from __future__ import annotations

import argparse
from typing import Final

from streamfill.cli.subcommands import add_subcommands, run_subcommand

COMMANDS: Final = {
    "list": "show the servers of a cluster, and what each holds",
    "add": "start one more prefill or decode server",
    "drain": "give a server nothing new and move its streams to others",
    "resume": "take a drain back",
    "remove": "drain a server, then end its process",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the sub-commands."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
A cluster goes on while its servers come and go. To replace one without losing a stream:

  streamfill servers add prefill          # prefill-1 is there
  streamfill servers remove prefill-0     # its streams move to prefill-1, then it ends

`streamfill servers WHAT --help` says what each does to streams; docs/servers.md also how servers of
other machines join. What is added here lasts as long as `streamfill up` runs: for good, set
prefill.count or decode.count in the cluster file.
"""
    add_subcommands(parser, "servers", COMMANDS)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen one."""
    return run_subcommand(args, "servers")
