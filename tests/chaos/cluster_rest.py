"""What a cluster holds when nothing goes on: streams, tokens, pages, file descriptors, threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from streamfill.api import Client
from streamfill.errors import StreamError
from tests.support.cluster import RunningCluster
from tests.support.counters import FRESH_S, what_is_held

_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Use:
    """What one process, with all below it, has of the operating system."""

    num_fds: int
    num_threads: int


SPARE = Use(num_fds=12, num_threads=12)
"""That a process may have more than before the load: connections of this client, and pools of
threads that grow when they are first needed. A leak of one for every stream is far beyond it."""


def uses(cluster: RunningCluster) -> dict[str, Use]:
    """By the processes' names; those that are not up are left out."""
    found: dict[str, Use] = {}
    for record in cluster.state.processes:
        if record.pid is None:
            continue
        try:
            process = psutil.Process(record.pid)
            family = [process, *process.children(recursive=True)]
            found[record.name] = Use(
                num_fds=sum(each.num_fds() for each in family),
                num_threads=sum(each.num_threads() for each in family),
            )
        except psutil.NoSuchProcess:
            continue
    return found


def too_much(base: Mapping[str, Use], now: Mapping[str, Use]) -> list[str]:
    """Processes that have more of something than they may."""
    texts = []
    for name, use in now.items():
        before = base[name]
        if use.num_fds > before.num_fds + SPARE.num_fds:
            texts.append(f"{name}: {use.num_fds} file descriptors, {before.num_fds} before")
        if use.num_threads > before.num_threads + SPARE.num_threads:
            texts.append(f"{name}: {use.num_threads} threads, {before.num_threads} before")
    return texts


async def not_at_base(
    cluster: RunningCluster, client: Client, base: Mapping[str, Use], within_s: float
) -> list[str]:
    """Wait until every counter is at its base, as servers say twice; what is not in time."""
    end_s = time.monotonic() + within_s
    rest_since_s: float | None = None
    while True:
        try:
            held = what_is_held(await client.server_info())
        except StreamError as error:
            held = [f"the router does not say: {error}"]
        held += too_much(base, uses(cluster))
        now_s = time.monotonic()
        if held:
            rest_since_s = None
            if now_s >= end_s:
                return held
        elif rest_since_s is None:
            rest_since_s = now_s
        elif now_s - rest_since_s >= FRESH_S:
            return []
        await asyncio.sleep(_POLL_S)


async def not_healthy(cluster: RunningCluster, client: Client, within_s: float) -> list[str]:
    """Wait until every process is ready and every server alive to the router; who is not."""
    end_s = time.monotonic() + within_s
    while True:
        records = cluster.state.processes
        wrong = [f"{each.name}: {each.state}" for each in records if each.state != "ready"]
        pids = {each.name: each.pid for each in records}
        try:
            servers = {each.server_id: each for each in (await client.server_info()).servers}
        except StreamError as error:
            servers = {}
            wrong.append(f"router: {error}")
        for name, pid in pids.items():
            if name in ("router", "controller"):
                continue
            server = servers.get(name)
            if server is None or server.state != "alive" or server.pid != pid:
                wrong.append(
                    f"{name}: {'unknown' if server is None else server.state} to the router"
                )
            elif not server.controller_alive and server.role == "prefill":
                wrong.append(f"{name}: hears no controller")
        if not wrong or time.monotonic() >= end_s:
            return wrong
        await asyncio.sleep(_POLL_S)
