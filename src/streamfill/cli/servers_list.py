"""`streamfill servers list`: the servers of a cluster, and what each holds."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from collections.abc import Collection
from typing import Final

from streamfill.api import Client, ClusterInfo, Server
from streamfill.cli.cluster_options import (
    add_target_options,
    running_cluster_named,
    target_client,
)
from streamfill.cli.stream_tables import UNKNOWN
from streamfill.cli.tables import Table, show

_COLUMNS: Final = (
    *("server", "role", "state", "address", "pid", "started by"),
    *("streams", "tokens", "pool", "engine"),
)
_EPILOG: Final = """\
  state       alive; suspect: silent for a second; draining: takes nothing new; dead: gone, and
              shown for ten minutes
  started by  the launcher of the cluster, which starts it again when it dies, or somebody else; -:
              not known, with --address
  streams     that the router has placed there; tokens: of their prompts and answers
  pool        size of the KV pool in tokens

Exit codes: 0 the router is ready; 1 it is not, and the last line says why.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    add_target_options(parser)
    parser.add_argument("--json", action="store_true", help="the same for programs")


def run(args: argparse.Namespace) -> int:
    """Prints them. Exit code 1 when the router is not ready."""
    info = _sorted(asyncio.run(_ask(target_client(args))))
    own = None if args.address else own_servers(args.name)
    if args.json:
        print(json.dumps(servers_data(info, own), indent=2))
    else:
        show([servers_table(info.servers, own), *closing_lines(info)])
    return 0 if info.ready else 1


def own_servers(name: str) -> set[str]:
    """Ids of the servers that the launcher of this cluster runs.

    Raises:
        ConfigError: no cluster of this name runs here.
    """
    processes = running_cluster_named(name).processes
    return {process.name for process in processes if process.kind in ("prefill", "decode")}


def servers_table(servers: Collection[Server], own: Collection[str] | None) -> Table:
    """A row for each; those that take nothing new stand out.

    Args:
        own: ids of those that the launcher runs; None: not known.
    """
    return Table(
        columns=_COLUMNS,
        rows=[_row(server, own) for server in servers],
        left=frozenset({"server", "role", "state", "address", "started by", "engine"}),
        alarms=frozenset(n for n, server in enumerate(servers) if server.state != "alive"),
    )


def closing_lines(info: ClusterInfo) -> list[str]:
    """Why servers drain, what was moved, and whether the router is ready."""
    lines = [f"{x.server_id}: {x.state_reason}" for x in info.servers if x.state_reason]
    moves = ", ".join(f"{count} {reason}" for reason, count in sorted(info.num_moves.items()))
    if moves:
        lines.append(f"streams moved between servers: {moves}")
    verdict = "ready" if info.ready else "NOT READY"
    lines.append(f"{verdict}: {info.ready_reason}" if info.ready_reason else verdict)
    return lines


def servers_data(info: ClusterInfo, own: Collection[str] | None) -> dict[str, object]:
    """The same for programs."""
    servers = [
        {
            **dataclasses.asdict(server),
            "started_by_launcher": None if own is None else server.server_id in own,
        }
        for server in info.servers
    ]
    return {
        "ready": info.ready,
        "ready_reason": info.ready_reason,
        "num_moves": dict(info.num_moves),
        "servers": servers,
    }


def _sorted(info: ClusterInfo) -> ClusterInfo:
    """Prefill servers first, in the order of their names."""
    servers = sorted(info.servers, key=lambda x: (x.role != "prefill", x.server_id))
    return dataclasses.replace(info, servers=tuple(servers))


def _row(server: Server, own: Collection[str] | None) -> tuple[str, ...]:
    starter = "launcher" if own is not None and server.server_id in own else "somebody"
    return (
        server.server_id,
        server.role,
        server.state,
        server.address or UNKNOWN,
        str(server.pid),
        UNKNOWN if own is None else starter,
        str(server.num_assigned_streams),
        f"{server.num_held_tokens:,}",
        f"{server.pool_tokens:,}",
        server.version or UNKNOWN,
    )


async def _ask(connection: Client) -> ClusterInfo:
    async with connection as client:
        return await client.server_info()
