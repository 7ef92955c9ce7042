"""`streamfill down`: stops the cluster of a name, wherever it was started."""

from __future__ import annotations

import argparse
import os
import signal
import time
from typing import Final

from streamfill.cli.cluster_options import DEFAULT_NAME, running_cluster_named
from streamfill.launcher.errors import LaunchError

_POLL_S: Final = 0.1
_DEFAULT_TIMEOUT_S: Final = 60.0
"""Twice the default drain time-out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--name", default=DEFAULT_NAME, help=f"default: {DEFAULT_NAME}")
    parser.add_argument(
        "--timeout",
        type=float,
        default=_DEFAULT_TIMEOUT_S,
        metavar="S",
        help=f"seconds to wait for open streams to end; default: {_DEFAULT_TIMEOUT_S:g}",
    )


def run(args: argparse.Namespace) -> int:
    """Asks the launcher to drain and waits until it is gone."""
    state = running_cluster_named(args.name)
    os.kill(state.launcher_pid, signal.SIGTERM)
    deadline = time.monotonic() + args.timeout
    while state.is_alive:
        if time.monotonic() > deadline:
            reason = (
                f"(pid {state.launcher_pid}) is still draining after {args.timeout:g} s; "
                "run `streamfill down` once more to stop it at once"
            )
            raise LaunchError("the launcher", reason)
        time.sleep(_POLL_S)
    print(f"Cluster {args.name!r} is down.")
    return 0
