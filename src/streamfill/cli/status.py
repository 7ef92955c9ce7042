"""`streamfill status`: what a cluster is doing, asked of its router."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Final

from streamfill.api import Client, ClusterInfo, Server
from streamfill.cli.cluster_options import add_target_options, target_address

_COLUMNS: Final = (
    "server",
    "role",
    "state",
    "pid",
    "streams",
    "running",
    "KV used",
    "KV cached",
    "KV free",
    "controller",
)
_NUM_TEXT_COLUMNS: Final = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_target_options(parser)
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def run(args: argparse.Namespace) -> int:
    """Prints the cluster. Exit code 1 when it could not serve a request now."""
    address = target_address(args)
    info = asyncio.run(_ask(address))
    if args.json:
        print(json.dumps({"address": address, **dataclasses.asdict(info)}, indent=2))
    elif sys.stdout.isatty():
        _print_rich(info, address)
    else:
        print("\n".join([*summary(info, address), "", *text_table(info.servers)]))
    return 0 if info.ready else 1


async def _ask(address: str) -> ClusterInfo:
    async with Client(address) as client:
        return await client.server_info()


def summary(info: ClusterInfo, address: str) -> list[str]:
    """What matters about the cluster as a whole, one sentence a line."""
    lines = [f"{address} serves {info.model}, context {info.context_tokens} tokens"]
    if not info.ready:
        lines.append("NOT READY: no prefill server is alive; requests get UNAVAILABLE")
    elif not info.decode_available:
        lines.append("no decode server is alive: answers come from the prefill server")
    prefill = [server for server in info.servers if server.role == "prefill"]
    if prefill and not any(server.controller_alive for server in prefill):
        lines.append("no preemption controller is alive: servers use their local rule")
    ended = ", ".join(f"{n} {name}" for name, n in sorted(info.num_streams_by_outcome.items()) if n)
    lines.append(f"streams: {info.num_open_streams} open" + (f"; ended: {ended}" if ended else ""))
    if info.num_malformed_frames:
        lines.append(f"malformed frames at the router: {info.num_malformed_frames}")
    return lines


def server_row(server: Server) -> tuple[str, ...]:
    """One server, in the order of the table's columns."""
    counters = server.counters
    return (
        server.server_id,
        server.role,
        server.state,
        str(server.pid),
        str(server.num_assigned_streams),
        str(counters.get("num_running", 0)),
        f"{counters.get('num_used_tokens', 0):,}",
        f"{counters.get('num_cached_tokens', 0):,}",
        f"{counters.get('num_free_tokens', 0):,}",
        "alive" if server.controller_alive else "-",
    )


def text_table(servers: Sequence[Server]) -> list[str]:
    """All servers as lines of aligned columns; KV is counted in tokens."""
    rows = [_COLUMNS, *(server_row(server) for server in servers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return ["  ".join(_align(row, widths)).rstrip() for row in rows]


def _align(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if column < _NUM_TEXT_COLUMNS else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _print_rich(info: ClusterInfo, address: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for line in summary(info, address):
        console.print(line, markup=False, highlight=False)
    table = Table(box=None)
    for column, name in enumerate(_COLUMNS):
        table.add_column(name, justify="left" if column < _NUM_TEXT_COLUMNS else "right")
    for server in info.servers:
        table.add_row(*server_row(server), style=None if server.state == "alive" else "red")
    console.print(table)
