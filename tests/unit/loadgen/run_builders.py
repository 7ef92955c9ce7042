"""Records and runs with known figures, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamfill.loadgen.ratios import label_parts
from streamfill.loadgen.records import Event, ModeName, RequestRecord, RunResult
from streamfill.observability.lifetime import LifetimeEvent

E = LifetimeEvent


def event(
    kind: LifetimeEvent, at_s: float, *, segment: int | None = None, num_tokens: int | None = None
) -> Event:
    """One event as it stands in a record."""
    return (kind.value, at_s, segment, num_tokens)


def client_events(
    *, open_s: float = 0.0, last_segment_s: float = 2.0, tokens_s: Sequence[float] = (2.5, 2.6, 2.8)
) -> tuple[Event, ...]:
    """Two segments, the second of which is the commit; at least two tokens."""
    first, second, *rest = tokens_s
    return (
        event(E.OPENED, open_s),
        event(E.SEGMENT_RECEIVED, open_s + 1.0, segment=0),
        event(E.SEGMENT_SENT, open_s + 1.0, segment=0),
        event(E.SEGMENT_RECEIVED, last_segment_s, segment=1),
        event(E.COMMIT_RECEIVED, last_segment_s),
        event(E.FIRST_TOKEN, first),
        event(E.SECOND_TOKEN, second),
        *(event(E.LAST_TOKEN, at_s) for at_s in rest),
        event(E.DONE, tokens_s[-1]),
    )


def record(index: int = 0, *, ttft_s: float = 0.5, **fields: Any) -> RequestRecord:
    """A completed request whose last segment comes 2 s after its query."""
    given = {
        "request_id": f"q{index}",
        "client_events": client_events(tokens_s=(2.0 + ttft_s, 2.1 + ttft_s, 2.3 + ttft_s)),
        "num_output_tokens": 3,
        "token_ids": (7, 8, 9),
        "text": "abc",
    }
    return RequestRecord(index=index, **{**given, **fields})


def failed(index: int = 0, code: str = "UNAVAILABLE", **fields: Any) -> RequestRecord:
    """A request that ended without an answer."""
    events = (event(E.OPENED, 0.0), event(E.FAILED, 9.0))
    given = {"error_code": code, "error": "x", "client_events": events, "token_ids": None}
    return record(index, **{**given, "num_output_tokens": 0, "text": "", **fields})


def result(
    *records: RequestRecord,
    label: str = "oneshot",
    run: int = 0,
    wall_s: float = 10.0,
    **fields: Any,
) -> RunResult:
    """A run of ours, or of a peer where the label names one."""
    target, mode, _ = label_parts(label)
    return RunResult(
        run=run,
        label=label,
        mode=ModeName(mode),
        target=target or "streamfill",
        wall_s=wall_s,
        records=records,
        **fields,
    )


def run_with_ttft(
    label: str, run: int, ttft_s: float, *, wall_s: float = 10.0, num: int = 3
) -> RunResult:
    """A run all of whose requests have the same time to the first token."""
    records = [record(index, ttft_s=ttft_s) for index in range(num)]
    return result(*records, label=label, run=run, wall_s=wall_s)
