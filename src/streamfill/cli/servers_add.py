"""`streamfill servers add ROLE`: one more server for a running cluster."""

from __future__ import annotations

import argparse
from typing import Final

from streamfill.cli.cluster_options import DEFAULT_NAME, parse_settings, running_cluster_named
from streamfill.launcher.control_client import ask_launcher
from streamfill.launcher.control_messages import AddServer, ServerAdded
from streamfill.launcher.state import cluster_folder
from streamfill.messages.common import Role

_EPILOG: Final = """\
The launcher of the cluster starts the server with the settings of its role in the cluster file,
and looks after it as after the others. The command returns when the router counts on the server;
streams come from then on, and with router.rebalance some of those that wait on busy servers, too.
Ctrl-C ends the command; the launcher goes on with the server.

  streamfill servers add prefill
  streamfill servers add decode --set threads=2 --set pool_tokens=16384
  streamfill servers add prefill --set base_gpu_id=3       # the number of its first GPU

Its id is the next number that no server had before. On a CPU the cores are shared: servers that run
already keep their threads.

Exit codes: 0 it is there; 2 it did not get ready, and why; nothing is left of it then.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("role", choices=[role.value for role in Role], help="what it shall do")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of [prefill] or [decode] that is to differ for this server; may be repeated",
    )
    parser.add_argument(
        "--name", default=DEFAULT_NAME, help=f"name of the cluster; default: {DEFAULT_NAME}"
    )


def run(args: argparse.Namespace) -> int:
    """Starts it and waits until it is ready."""
    settings = parse_settings(args.set)
    state = running_cluster_named(args.name)
    request = AddServer(role=Role(args.role), settings=settings)
    added = ask_launcher(state, cluster_folder(args.name), request, _say)
    assert isinstance(added, ServerAdded)
    print(f"{added.server_id} is ready after {added.ready_after_s:.1f} s (pid {added.pid})")
    print(
        f"Its log is {added.log_file}. End it with `streamfill servers remove {added.server_id}`."
    )
    return 0


def _say(text: str) -> None:
    print(f"{text} ...", flush=True)
