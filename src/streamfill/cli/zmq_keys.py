"""`streamfill zmq-keys`: CURVE keys of the links between the processes of a cluster."""

from __future__ import annotations

import argparse
from typing import Final

from streamfill.cli.subcommands import add_subcommands, run_subcommand

COMMANDS: Final = {"create": "make the keys of a cluster in a folder"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the sub-commands."""
    parser.epilog = (
        "With zmq_keys_dir in the cluster file the ZeroMQ links between router, controller and "
        "servers are encrypted, and nobody without a key is let in. They are needed where a "
        "process listens on an address that other machines can reach."
    )
    add_subcommands(parser, "zmq-keys", COMMANDS)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen one."""
    return run_subcommand(args, "zmq-keys")
