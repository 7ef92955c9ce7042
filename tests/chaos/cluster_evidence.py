"""What the logs of a cluster say of the faults that it had, those of earlier lives included."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from streamfill.stream.state import StreamState

_EVENT = re.compile(
    r" (?P<event>link_fault_injected|kv_fault_injected|server_lost|server_suspect|router_stalled|"
    r"router_silent|stream_log_failed)\b(?: kind=(?P<kind>\w+))?"
)
_STREAM = re.compile(
    r" (?P<event>stream_opened|stream_ended) stream=\d+ request_id=(?P<request_id>\S+)"
    r"(?: outcome=(?P<outcome>\w+))?"
)
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.\d+Z ")


@dataclass
class Evidence:
    """Counts of what was logged."""

    link_faults: Counter[str] = field(default_factory=Counter)
    """By kind."""
    kv_faults: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    """``server_lost``, ``server_suspect``, ``router_stalled``, ``router_silent``,
    ``stream_log_failed``."""
    openings: Counter[str] = field(default_factory=Counter)
    """By request id."""
    endings: defaultdict[str, list[StreamState]] = field(default_factory=lambda: defaultdict(list))
    """By request id."""


def read_evidence(logs: Path) -> Evidence:
    """All there is in a folder of logs."""
    found = Evidence()
    for path in sorted(logs.glob("*.log")):
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                _take_in(line, found)
    return found


def shifts_s(log: Path, position: int) -> list[float]:
    """By how much the times of the lines behind a place of a log, which were just written, are off
    the true time."""
    with log.open("rb") as file:
        file.seek(min(position, log.stat().st_size))
        text = file.read().decode("utf-8", errors="replace")
    times = [
        datetime.fromisoformat(match[1]) for match in map(_TIME.match, text.splitlines()) if match
    ]
    now = datetime.now(UTC)
    return [(each.replace(tzinfo=UTC) - now).total_seconds() for each in times]


def _take_in(line: str, found: Evidence) -> None:
    if (event := _EVENT.search(line)) is not None:
        match event["event"]:
            case "link_fault_injected":
                found.link_faults[event["kind"]] += 1
            case "kv_fault_injected":
                found.kv_faults[event["kind"]] += 1
            case other:
                found.events[other] += 1
    elif (stream := _STREAM.search(line)) is not None:
        if stream["event"] == "stream_opened":
            found.openings[stream["request_id"]] += 1
        elif stream["outcome"] is not None:
            found.endings[stream["request_id"]].append(StreamState(stream["outcome"]))
