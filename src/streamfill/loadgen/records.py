"""What is known of each request of a run afterwards, and of the run. Plain data, as JSON too.

Times are seconds since the start of the run's schedule. The events of a request are the client's:

* OPENED: the query was due. SEGMENT_RECEIVED: a piece of context was due; it counts as there from
  then on, however late the generator was (its lag is reported beside it).
* SEGMENT_SENT: the generator sent it. COMMIT_RECEIVED: the prompt was due to be complete.
* FIRST_TOKEN, SECOND_TOKEN, TOKEN, LAST_TOKEN, and how it ended.

so that the functions of ``observability.lifetime`` give what a user feels. ``server_events`` are
the server's own, moved to the same clock, for what happened inside.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from streamfill.observability.lifetime import LifetimeEntry, LifetimeEvent


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ModeName(enum.Enum):
    """What a client does with a request whose context arrives over time."""

    ONESHOT = "oneshot"
    """Waits for the whole context, then sends it."""
    WARMUP = "warmup"
    """After each segment sends the prefix so far as an ordinary request with one output token."""
    STREAM = "stream"
    """Streams each segment as it comes."""


Event: TypeAlias = tuple[str, float, int | None, int | None]
"""``LifetimeEntry`` as JSON: event, seconds, segment, number of tokens."""


Preempted: TypeAlias = tuple[str, int, float | None, float | None]
"""How KV that was taken came back (``swap`` or ``recompute``), how many tokens, and what that was
predicted to cost and did cost, in seconds; None: nobody asked, or not all of it came back."""


class RequestRecord(_Record, frozen=True, kw_only=True):
    """One request of a run, whatever became of it."""

    index: int
    """Place in the trace; the same in all runs of a comparison."""
    request_id: str
    session_id: str | None = None
    is_warm_up: bool = False
    """Left out of all figures."""
    client_events: tuple[Event, ...] = ()
    server_events: tuple[Event, ...] = ()
    """Of all requests that were made for this one: the warm-ups of ``warmup`` too."""
    preemptions: tuple[Preempted, ...] = ()
    lag_s: tuple[float, ...] = ()
    """By how much the generator was late: the start, each piece, the commit."""
    num_segments: int = 0
    num_requests: int = 1
    """Requests made: 1, and in ``warmup`` mode one more per segment before the last."""
    error_code: str | None = None
    """A value of ``errors.ErrorCode``; None: it went well."""
    error: str = ""
    token_ids: tuple[int, ...] | None = None
    text: str = ""
    num_output_tokens: int = 0
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_computed_tokens: int | None = None
    num_recomputed_tokens: int | None = None
    num_reused_tokens: int | None = None
    num_invalidated_tokens: int | None = None
    handoff: str | None = None
    handoff_bytes: int | None = None

    def client_lifetime(self) -> list[LifetimeEntry]:
        """``client_events`` for the functions of ``observability.lifetime``."""
        return _entries(self.client_events)

    def server_lifetime(self) -> list[LifetimeEntry]:
        """``server_events`` likewise."""
        return _entries(self.server_events)


class RunResult(_Record, frozen=True, kw_only=True):
    """One run of one mode over one trace."""

    run: int
    """Number of the repetition, from 0."""
    label: str
    """What it is called in tables: the mode, with the target where that is not ours
    (``stream``, ``oneshot``, ``vllm:warmup``)."""
    mode: ModeName
    target: str
    policy: str = ""
    trace: str = ""
    request_rate: float | None = None
    """Requests per second offered; None: as in the trace."""
    max_concurrency: int | None = None
    is_closed_loop: bool = False
    wall_s: float
    """From the first arrival to the last token."""
    records: tuple[RequestRecord, ...]
    counters_before: dict[str, int] = {}
    counters_after: dict[str, int] = {}


def as_event(entry: LifetimeEntry, shift_s: float = 0.0) -> Event:
    """An entry, moved by ``shift_s``, as it stands in a record."""
    return (entry.event.value, entry.at_s + shift_s, entry.segment, entry.num_tokens)


def _entries(events: tuple[Event, ...]) -> list[LifetimeEntry]:
    return [
        LifetimeEntry(LifetimeEvent(name), at_s, segment, num_tokens)
        for name, at_s, segment, num_tokens in events
    ]
