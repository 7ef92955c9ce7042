"""A router without a cluster behind it: speaks the client API, computes nothing.

``python -m streamfill.loadgen.fake_router --port 0`` prints ``READY {"port": N}`` once it listens,
and ends at SIGTERM or SIGINT. Pieces are acknowledged at once. The first token comes a fixed time
after the commit, and the answer is a function of the prompt alone, however it was sent. Used to
measure the load generator itself, and in tests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import grpc.aio

from streamfill.api.client import MAX_MESSAGE_BYTES
from streamfill.api.streamfill_pb2_grpc import add_StreamfillServicer_to_server
from streamfill.loadgen.fake_service import FakeBehaviour, FakeService

_OPTIONS: Final = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # The client pings every 30 s while nothing else is sent.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)
_GRACE_S: Final = 0.2
"""For calls that are open at the end."""


@asynccontextmanager
async def fake_router(
    behaviour: FakeBehaviour | None = None, port: int = 0
) -> AsyncIterator[tuple[str, FakeService]]:
    """A fake router in this process; its address and what it saw."""
    service = FakeService(behaviour or FakeBehaviour())
    server = grpc.aio.server(options=_OPTIONS)
    add_StreamfillServicer_to_server(service, server)
    bound_port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound_port}", service
    finally:
        await server.stop(_GRACE_S)


async def _serve(behaviour: FakeBehaviour, port: int) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with fake_router(behaviour, port) as (address, _):
        print(f"READY {json.dumps({'port': int(address.rpartition(':')[2])})}", flush=True)
        await stopped.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal."""
    parser = argparse.ArgumentParser(
        prog="python -m streamfill.loadgen.fake_router",
        description="Speaks the client API of a router, computes nothing.",
    )
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--core", type=int, metavar="N", help="run on this core only")
    parser.add_argument(
        "--ttft-ms", type=float, default=0.0, metavar="MS", help="from commit to first token"
    )
    parser.add_argument(
        "--tpot-ms", type=float, default=0.0, metavar="MS", help="from one token to the next"
    )
    args = parser.parse_args(argv)
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    behaviour = FakeBehaviour(ttft_s=args.ttft_ms / 1000.0, tpot_s=args.tpot_ms / 1000.0)
    asyncio.run(_serve(behaviour, args.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
