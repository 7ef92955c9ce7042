"""Whether a cluster holds nothing but cache, or not even that."""

from __future__ import annotations

import asyncio
import time

from streamfill.api import Client
from streamfill.api.types import ClusterInfo, Server

FRESH_S = 0.6
"""Counters come with heartbeats, several in this time: what is unchanged after it is news."""

REST_WITHIN_S = 30.0
"""A second or two on a quiet machine; what is left for longer than this is left for good."""

_ZERO_AT_REST = (
    "num_streams",
    "num_waiting",
    "num_running",
    "num_pending_tokens",
    "num_used_tokens",
    "num_transfers",
    "staging_bytes",
)

_ZERO_AT_REST_IF_THERE = ("num_uncommitted_tokens", "num_waiting_segments")
"""Counted by the router, for prefill servers that had a stream."""


def what_is_held(info: ClusterInfo) -> list[str]:
    """Everything that an idle cluster must not hold; empty at rest."""
    held = [f"router: {info.num_open_streams} open streams"] if info.num_open_streams else []
    for server in info.servers:
        held += [f"{server.server_id}: {what}" for what in _held_by(server)]
    return held


async def wait_until_at_rest(client: Client, within_s: float = REST_WITHIN_S) -> None:
    """Returns when nothing is held, as servers said twice.

    Raises:
        AssertionError: that is not so in time; names what is held.
    """
    end_s = time.monotonic() + within_s
    rest_since_s: float | None = None
    while True:
        held = what_is_held(await client.server_info())
        now_s = time.monotonic()
        if held:
            rest_since_s = None
            assert now_s < end_s, f"still held after {within_s} s: {held}"
        elif rest_since_s is None:
            rest_since_s = now_s
        elif now_s - rest_since_s >= FRESH_S:
            return
        await asyncio.sleep(0.1)


async def empty_caches(client: Client, within_s: float = 30.0) -> None:
    """Empty the caches of all servers; one that is still busy with the end of a stream refuses, and
    is asked again.

    Raises:
        AssertionError: a server refused all the time.
    """
    end_s = time.monotonic() + within_s
    while True:
        flushed = await client.flush_caches()
        if all(flushed.values()):
            return
        assert time.monotonic() < end_s, f"not emptied: {flushed}"
        await asyncio.sleep(0.05)


def _held_by(server: Server) -> list[str]:
    counters = server.counters
    held = [f"{name} = {counters[name]}" for name in _ZERO_AT_REST if counters[name]]
    held += [f"{key} = {counters[key]}" for key in _ZERO_AT_REST_IF_THERE if counters.get(key)]
    if server.num_assigned_streams:
        held.append(f"num_assigned_streams = {server.num_assigned_streams}")
    if counters["num_free_slots"] != counters["num_total_slots"]:
        held.append(f"{counters['num_free_slots']} of {counters['num_total_slots']} slots are free")
    free, cached = counters["num_free_tokens"], counters["num_cached_tokens"]
    if free + cached != counters["num_total_tokens"]:
        held.append(f"{free} free and {cached} cached of {counters['num_total_tokens']} tokens")
    return held
