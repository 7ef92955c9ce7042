"""One frame of `streamfill top`: a moment of a cluster as lines and tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from streamfill.api import ClusterInfo, Server, ServerStreams, StreamDecision
from streamfill.cli.status import summary
from streamfill.cli.stream_tables import UNKNOWN
from streamfill.cli.tables import Table

BAR_WIDTH: Final = 20
USED, CACHED, FREE, MISSING = "#", "=", ".", "-"
"""Of a bar: KV in use, evictable KV, and room; of a prompt, what is computed and what is not."""
IDLE: Final = "idle"
"""The decision about a stream that has nothing to compute."""
_SERVER_COLUMNS: Final = (
    *("server", "role", "state", "policy", "streams", "running", "to compute", "computed/s"),
    *("KV pool", "in use", "in host memory", "preempted", "controller"),
)
_SERVER_LEFT: Final = frozenset({"server", "role", "state", "policy", "KV pool", "controller"})
_STREAM_COLUMNS: Final = (
    *("stream", "server", "state", "computed", "of tokens", "", "idle", "victim"),
    *("decision", "reason"),
)
_STREAM_LEFT: Final = frozenset({"server", "state", "", "decision", "reason"})
_STREAM_BAR_WIDTH: Final = 10


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What was known of a cluster at one time."""

    at_s: float
    """When `info` came, in seconds of `time.monotonic`."""
    info: ClusterInfo
    described: Mapping[str, ServerStreams]
    """By server id; the newest answers, which a server in a long step gives late."""
    trouble: str = ""
    """Why nothing newer is known; empty when this is new."""


def frame(
    now: Moment, before: Moment | None, *, address: str, max_streams: int
) -> list[str | Table]:
    """The frame.

    Args:
        now: what is shown.
        before: an earlier moment, to tell rates from. None: there is none, and so are they.
        address: of the router.
        max_streams: rows of the table of streams; the others are counted in a line below it.
    """
    parts: list[str | Table] = [*summary(now.info, address)]
    if now.trouble:
        parts.append(f"NOT UP TO DATE: {now.trouble}; trying again")
    parts += ["", server_table(now, before)]
    silent = [name for name, server in now.described.items() if not server.answered]
    if silent:
        parts.append(f"no answer in time about the streams of {', '.join(sorted(silent))}")
    streams = _streams(now.described)
    if not streams:
        return [*parts, "", "no streams on any server"]
    parts += ["", stream_table(streams[:max_streams])]
    if len(streams) > max_streams:
        parts.append(f"... and {len(streams) - max_streams} more")
    return parts


def server_table(now: Moment, before: Moment | None) -> Table:
    """All servers; those that are not alive stand out."""
    servers = sorted(now.info.servers, key=lambda server: _place(server.role, server.server_id))
    return Table(
        columns=_SERVER_COLUMNS,
        rows=[_server_row(server, _rate(server, now, before)) for server in servers],
        left=_SERVER_LEFT,
        alarms=frozenset(n for n, server in enumerate(servers) if server.state != "alive"),
    )


def stream_table(streams: Sequence[tuple[str, StreamDecision]]) -> Table:
    """Streams with the server that each is on, in this order."""
    return Table(
        columns=_STREAM_COLUMNS,
        rows=[_stream_row(name, stream) for name, stream in streams],
        left=_STREAM_LEFT,
    )


def pool_bar(used: int, cached: int, total: int, width: int = BAR_WIDTH) -> str:
    """A pool as a bar: what is in use, what is cached, what is free.

    Anything that is not nothing gets a character at least, as long as there is one left.
    """
    if total <= 0:
        return MISSING * width
    num_used = _cells(used, total, width)
    num_cached = min(_cells(cached, total, width), width - num_used)
    return USED * num_used + CACHED * num_cached + FREE * (width - num_used - num_cached)


def _streams(described: Mapping[str, ServerStreams]) -> list[tuple[str, StreamDecision]]:
    """All streams with their server: first those that have something to compute, so that the rest
    is what is left out where room is short; server by server in the order of their turn."""
    by_server = sorted(described.items(), key=lambda item: _place(item[1].role, item[0]))
    streams = [(name, stream) for name, server in by_server for stream in server.streams]
    return sorted(streams, key=lambda item: item[1].decision == IDLE)


def _place(role: str, server_id: str) -> tuple[bool, str]:
    """Prefill servers first: what is decided there is what the others wait for."""
    return role != "prefill", server_id


def _cells(part: int, total: int, width: int) -> int:
    if part <= 0:
        return 0
    return min(width, max(1, round(width * part / total)))


def _server_row(server: Server, rate: float | None) -> tuple[str, ...]:
    counters = server.counters
    used, cached = counters.get("num_used_tokens", 0), counters.get("num_cached_tokens", 0)
    total = counters.get("num_total_tokens", 0)
    is_prefill = server.role == "prefill"
    return (
        server.server_id,
        server.role,
        server.state,
        server.policy or UNKNOWN,
        str(server.num_assigned_streams),
        str(counters.get("num_running", 0)),
        f"{counters.get('num_pending_tokens', 0):,}",
        UNKNOWN if rate is None else f"{rate:,.0f}",
        pool_bar(used, cached, total),
        f"{used:,} of {total:,}" if total else UNKNOWN,
        f"{counters.get('num_host_tokens', 0):,}" if is_prefill else UNKNOWN,
        f"{counters.get('num_preemptions', 0):,}" if is_prefill else UNKNOWN,
        ("alive" if server.controller_alive else "not heard") if is_prefill else UNKNOWN,
    )


def _rate(server: Server, now: Moment, before: Moment | None) -> float | None:
    """Prompt tokens per second that the server computed in between. None: it was not the same
    process then, or nothing lies in between."""
    if before is None or now.at_s <= before.at_s:
        return None
    for earlier in before.info.servers:
        if (earlier.server_id, earlier.pid) == (server.server_id, server.pid):
            key = "num_computed_tokens"
            computed = server.counters.get(key, 0) - earlier.counters.get(key, 0)
            return computed / (now.at_s - before.at_s) if computed >= 0 else None
    return None


def _stream_row(name: str, stream: StreamDecision) -> tuple[str, ...]:
    known, computed = stream.num_known_tokens, stream.num_computed_tokens
    num_done = _cells(computed, max(1, known), _STREAM_BAR_WIDTH)
    if computed < known:  # a full bar is a promise
        num_done = min(num_done, _STREAM_BAR_WIDTH - 1)
    return (
        str(stream.stream_id),
        name,
        stream.state,
        f"{computed:,}",
        f"{known:,}",
        USED * num_done + MISSING * (_STREAM_BAR_WIDTH - num_done),
        f"{stream.idle_s:.1f} s",
        UNKNOWN if stream.victim_rank is None else str(stream.victim_rank),
        stream.decision,
        stream.reason,
    )
