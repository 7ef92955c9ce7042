"""`streamfill policy show`: the scheduling policy in force on each server of a cluster."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from typing import Final

from streamfill.api import Client, ClusterInfo, Server
from streamfill.cli.cluster_options import add_target_options, target_client
from streamfill.cli.stream_tables import UNKNOWN
from streamfill.cli.tables import Table, show

_COLUMNS: Final = ("server", "role", "state", "policy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.epilog = (
        "As the router last heard it. Decode servers have a policy too, but always keep theirs."
    )
    add_target_options(parser)
    parser.add_argument("--json", action="store_true", help="policy by server, for programs")


def run(args: argparse.Namespace) -> int:
    """Prints them. Exit code 1 when there is no server to show."""
    servers = asyncio.run(_ask(target_client(args))).servers
    if args.json:
        print(json.dumps({server.server_id: server.policy for server in servers}, indent=2))
    else:
        show([policy_table(servers)] if servers else ["the cluster has no servers"])
    return 0 if servers else 1


def policy_table(servers: Sequence[Server]) -> Table:
    """A row for each server."""
    return Table(
        columns=_COLUMNS,
        rows=[(x.server_id, x.role, x.state, x.policy or UNKNOWN) for x in servers],
        left=frozenset(_COLUMNS),
        alarms=frozenset(n for n, server in enumerate(servers) if server.state != "alive"),
    )


async def _ask(connection: Client) -> ClusterInfo:
    async with connection as client:
        return await client.server_info()
