"""Why streams run or wait, server by server, as lines and tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from streamfill.api import ServerStreams, StreamDecision
from streamfill.cli.tables import Table

UNKNOWN: Final = "-"
"""Where there is nothing to show."""
_COLUMNS: Final = (
    "stream",
    "state",
    "known",
    "computed",
    "shared",
    "priority",
    "idle",
    "next in",
    "victim",
    "decision",
    "reason",
)
_LEFT: Final = frozenset({"state", "decision", "reason"})


def stream_parts(
    described: Mapping[str, ServerStreams], stream_id: int | None
) -> list[str | Table]:
    """A heading and a table for each server, with an empty line before each.

    Args:
        described: by server id. Decode servers without streams are left out.
        stream_id: the one stream that was asked for; servers that do not have it are left out.
    """
    parts: list[str | Table] = []
    for name, server in sorted(described.items(), key=lambda item: (item[1].role, item[0])):
        if not server.answered:
            parts += ["", f"{name} did not answer in time; policy {server.policy or UNKNOWN}"]
        elif server.streams:
            parts += ["", _heading(name, server), _table(server)]
        elif stream_id is None and server.role == "prefill":
            parts += ["", _heading(name, server)]
    if stream_id is not None and not parts:
        parts += ["", f"no server has stream {stream_id} now: it is over, or waits for a server"]
    return parts


def _heading(name: str, server: ServerStreams) -> str:
    count = f"{len(server.streams)} stream{'' if len(server.streams) == 1 else 's'}"
    if not server.streams:
        count = "no streams"
    return f"{name}: policy {server.policy}, {count}"


def _table(server: ServerStreams) -> Table:
    return Table(columns=_COLUMNS, rows=[_row(one) for one in server.streams], left=_LEFT)


def _row(one: StreamDecision) -> tuple[str, ...]:
    return (
        str(one.stream_id),
        one.state,
        f"{one.num_known_tokens:,}",
        f"{one.num_computed_tokens:,}",
        f"{one.num_shared_tokens:,}",
        str(one.priority),
        f"{one.idle_s:.1f} s",
        UNKNOWN if one.expected_next_s is None else f"{one.expected_next_s:.1f} s",
        UNKNOWN if one.victim_rank is None else str(one.victim_rank),
        one.decision,
        one.reason,
    )
