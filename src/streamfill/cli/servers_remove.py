"""`streamfill servers remove ID`: a server is drained, and its process ended for good."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Final

from streamfill.api import Client, ClusterInfo
from streamfill.cli.cluster_options import DEFAULT_NAME, running_cluster_named
from streamfill.cli.draining import drain_and_wait
from streamfill.cli.servers_drain import add_drain_options, say, timeout_of
from streamfill.cli.servers_list import own_servers
from streamfill.errors import ConfigError
from streamfill.launcher.control_client import ask_launcher
from streamfill.launcher.control_messages import RemoveServer, ServerRemoved
from streamfill.launcher.roster import check_not_last
from streamfill.launcher.state import cluster_folder

_EPILOG: Final = """\
1. The server is drained, as by `streamfill servers drain`.
2. When it is empty, its process gets SIGTERM and ends in order; the launcher does not start it
   again.

If streams are left that can go nowhere else, the process is not ended: the server stays drained.
--force ends it all the same; those streams go on as soon as another server comes within 30 seconds.

A server that was not started by the launcher of this cluster is drained; end its process where it
runs, with SIGTERM.

  streamfill servers remove prefill-0
  streamfill servers remove decode-1 --timeout 0

Exit codes: 0 the process has ended; 1 the server is drained, but its process runs: streams are
left, or it is not the launcher's; 2 there is no such server, or it is the last prefill server.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    add_drain_options(parser)
    parser.add_argument(
        "--name", default=DEFAULT_NAME, help=f"name of the cluster; default: {DEFAULT_NAME}"
    )


def run(args: argparse.Namespace) -> int:
    """Drains and ends it."""
    timeout_s, server_id = timeout_of(args), args.server_id
    state = running_cluster_named(args.name)
    own = own_servers(args.name)
    info = asyncio.run(_ask(Client(state.own_address)))
    states = {server.server_id: server.state for server in info.servers}
    if server_id not in own and states.get(server_id, "dead") == "dead":
        there = ", ".join(sorted(own | {x for x, how in states.items() if how != "dead"}))
        raise ConfigError("ID", server_id, f"there is no such server; there are: {there}")
    is_prefill = next(
        (x.role == "prefill" for x in info.servers if x.server_id == server_id),
        server_id.startswith("prefill-"),
    )
    if is_prefill and not args.force:
        check_not_last(info.servers, server_id)
    if states.get(server_id, "dead") != "dead":
        client = Client(state.own_address)
        try:
            result = asyncio.run(
                drain_and_wait(client, server_id, timeout_s, force=args.force, tell=say)
            )
        except KeyboardInterrupt:
            undo = f"`streamfill servers resume {server_id}` takes the drain back"
            print(f"{server_id} is not ended; {undo}.", file=sys.stderr)
            raise
        if not result.is_empty and not args.force:
            print(f"{server_id} is not ended; --force does so all the same.", file=sys.stderr)
            return 1
        if result.is_gone and server_id not in own:
            return 0
    if server_id not in own:
        pid = next(x.pid for x in info.servers if x.server_id == server_id)
        where = f"process {pid} on its machine"
        print(f"{server_id} was not started by this launcher: end it by SIGTERM to {where}.")
        return 1
    request = RemoveServer(server_id=server_id, force=args.force)
    removed = ask_launcher(
        state, cluster_folder(args.name), request, lambda text: say(f"{text} ...")
    )
    assert isinstance(removed, ServerRemoved)
    print(f"{server_id} {removed.ended}, and will not be started again.")
    return 0


async def _ask(connection: Client) -> ClusterInfo:
    async with connection as client:
        return await client.server_info()
