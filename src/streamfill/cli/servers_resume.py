"""`streamfill servers resume ID`: a server that was drained takes streams again."""

from __future__ import annotations

import argparse
import asyncio

from streamfill.api import Client, Server
from streamfill.cli.cluster_options import add_target_options, target_client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.epilog = (
        "New streams come to it again; those that were moved stay where they are. Exit codes: 0 it "
        "takes streams; 2 there is no such server, or it is about to end."
    )
    parser.add_argument("server_id", metavar="ID", help="such as prefill-0")
    add_target_options(parser)


def run(args: argparse.Namespace) -> int:
    """Takes the drain back."""
    server = asyncio.run(_resume(target_client(args), args.server_id))
    print(f"{server.server_id} is {server.state}")
    return 0


async def _resume(connection: Client, server_id: str) -> Server:
    async with connection as client:
        return await client.resume_server(server_id)
