"""`streamfill status`: what a cluster is doing, asked of its router."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Final

from streamfill.api import Client, ClusterInfo, Server, ServerStreams
from streamfill.cli.cluster_options import (
    add_target_options,
    running_cluster_named,
    target_address,
    target_client,
    target_http_url,
)
from streamfill.cli.stream_tables import UNKNOWN, stream_parts
from streamfill.cli.tables import Table, show
from streamfill.launcher.state import ClusterState
from streamfill.observability.metrics import METRICS_PATH

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
    "policy",
)
_LEFT: Final = frozenset({"server", "role", "state", "policy"})
_EPILOG: Final = """\
KV is counted in tokens. With --streams, for each stream of a server, in the order of their turn:

  state      open, waiting_kv (its KV is on its way), committed or answering
  known      tokens of its prompt that are there; computed: those with KV; shared: those whose
             KV other open streams use too
  idle       since its newest segment; next in: until the next one, going by its gaps so far
  victim     its place in the order in which memory is taken, 0 first; -: none is taken from it
  decision   what the scheduler decided in its newest step, and the reason as a sentence
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    add_target_options(parser)
    parser.add_argument(
        "--streams", action="store_true", help="show also why each stream runs or waits"
    )
    parser.add_argument("--stream", type=int, metavar="ID", help="the same for one stream only")
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def run(args: argparse.Namespace) -> int:
    """Prints the cluster. Exit code 1 when it could not serve a request now."""
    address, http_url = target_address(args), target_http_url(args)
    info, described = asyncio.run(_ask(target_client(args), args.streams, args.stream))
    # Who is asked by address may run on another machine, whose processes only that one knows.
    metrics = {} if args.address else metrics_urls(running_cluster_named(args.name))
    if args.json:
        data = {**_as_data(address, http_url, info, described), "metrics": metrics}
        print(json.dumps(data, indent=2))
    else:
        parts: list[str | Table] = [
            *summary(info, address, http_url),
            "",
            server_table(info.servers),
        ]
        if metrics:
            parts += ["", *(f"metrics of {name}: {url}" for name, url in metrics.items())]
        if described is not None:
            parts += stream_parts(described, args.stream)
        show(parts)
    return 0 if info.ready else 1


async def _ask(
    connection: Client, streams: bool, stream_id: int | None
) -> tuple[ClusterInfo, Mapping[str, ServerStreams] | None]:
    async with connection as client:
        described = None
        if streams or stream_id is not None:
            described = await client.describe_streams(stream_id)
        return await client.server_info(), described


def _as_data(
    address: str,
    http_url: str | None,
    info: ClusterInfo,
    described: Mapping[str, ServerStreams] | None,
) -> dict[str, object]:
    data: dict[str, object] = {"address": address, "http_url": http_url, **dataclasses.asdict(info)}
    if described is not None:
        data["streams"] = {name: dataclasses.asdict(each) for name, each in described.items()}
    return data


def metrics_urls(state: ClusterState) -> dict[str, str]:
    """Where Prometheus finds each process, by its name."""
    return {
        process.name: f"http://{process.metrics_address}{METRICS_PATH}"
        for process in state.processes
        if process.metrics_address is not None
    }


def summary(info: ClusterInfo, address: str, http_url: str | None = None) -> list[str]:
    """What matters about the cluster as a whole, one sentence a line."""
    lines = [f"{address} serves {info.model}, context {info.context_tokens} tokens"]
    if http_url is not None:
        lines.append(f"HTTP, as of the OpenAI API: {http_url}/v1")
    if not info.ready:
        lines.append(f"NOT READY: {info.ready_reason or 'no prefill server is alive'}")
    elif not info.decode_available:
        lines.append("no decode server is alive: answers come from the prefill server")
    prefill = [server for server in info.servers if server.role == "prefill"]
    if prefill and not any(server.controller_alive for server in prefill):
        lines.append("no preemption controller is alive: servers use their local rule")
    if info.placement and len(prefill) > 1:
        lines.append(f"streams are placed by {info.placement}")
    ended = ", ".join(f"{n} {name}" for name, n in sorted(info.num_streams_by_outcome.items()) if n)
    lines.append(f"streams: {info.num_open_streams} open" + (f"; ended: {ended}" if ended else ""))
    if info.num_malformed_frames:
        lines.append(f"malformed frames at the router: {info.num_malformed_frames}")
    return lines


def server_table(servers: Sequence[Server]) -> Table:
    """All servers; those that are not alive stand out."""
    return Table(
        columns=_COLUMNS,
        rows=[_server_row(server) for server in servers],
        left=_LEFT,
        alarms=frozenset(n for n, server in enumerate(servers) if server.state != "alive"),
    )


def _server_row(server: Server) -> tuple[str, ...]:
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
        "alive" if server.controller_alive else UNKNOWN,
        server.policy or UNKNOWN,
    )
