"""What is sent to somebody who looks: the first frame is all of it, later ones are what changed.

Times are whole milliseconds since the router's start, so that they fit any number of JavaScript;
ids are texts, since they do not. Plain data, and no text of any prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

ToMs = Callable[[float], int]
"""From seconds of `time.monotonic` to milliseconds of the frames."""
MAX_ID_CHARS: Final = 120
MAX_ERROR_CHARS: Final = 300
"""Of texts that others chose. An error may quote them."""


class StreamFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One stream but for its timeline; of each frame only those fields that changed."""

    id: str
    request_id: str
    tenant: str
    mode: str
    """``append`` or ``update``."""
    state: str
    """A value of ``stream.state.StreamState``."""
    priority: int
    num_known_tokens: int
    num_computed_tokens: int
    num_invalidated_tokens: int
    num_output_tokens: int
    num_attempts: int
    prefill_server: str
    decode_server: str
    """Empty: there is none, or the prefill server generates everything."""
    handoff: str
    """As in ``interface.DoneEvent``."""
    error: str
    """Why it ended badly; empty when it did not."""
    opened_ms: int
    ended_ms: int | None


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler of its server thinks of a stream."""

    server: str
    decision: str
    """As in ``messages.common.StreamDecision``."""
    reason: str
    """The same as a sentence."""
    num_resident_tokens: int
    """Whose KV is there now."""
    num_shared_tokens: int
    victim_rank: int | None


class Moments(msgspec.Struct, frozen=True, kw_only=True):
    """The single points of a timeline."""

    commit_ms: int | None = None
    first_token_ms: int | None = None
    newest_token_ms: int | None = None
    handoff_started_ms: int | None = None
    handoff_done_ms: int | None = None


class ServerView(msgspec.Struct, frozen=True, kw_only=True):
    """One server."""

    id: str
    role: str
    state: str
    policy: str
    pid: int
    num_streams: int
    num_running: int
    num_pending_tokens: int
    num_used_tokens: int
    num_cached_tokens: int
    num_free_tokens: int
    num_total_tokens: int
    num_host_tokens: int
    num_computed_tokens: int
    """Since its start; the page makes a rate of it."""
    num_preemptions: int
    num_uncommitted_tokens: int | None
    max_uncommitted_tokens: int | None
    heartbeat_age_ms: int
    loop_age_ms: int
    controller_alive: bool
    decisions: dict[str, int]
    """How many of all its streams, also those of others, have each decision."""
    answered: bool
    """Whether its scheduler said so in time; False: ``decisions`` is empty."""


class ClusterView(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster as a whole."""

    model: str
    ready: bool
    num_open: int
    num_by_outcome: dict[str, int]
    sees_all: bool
    """False: only the streams of one tenant are shown; the numbers here are of all."""
    uses_tenants: bool


class Selected(msgspec.Struct, frozen=True, kw_only=True):
    """Which streams are shown."""

    order: list[str]
    """Ids, in the order of the page. What is not in here is shown no more."""
    num_matching: int
    """Streams that the filter lets through; more than in ``order`` where there is a limit."""
    num_visible: int
    """Streams that the viewer may see."""


Row = list[Any]
"""Its number, which stays the same, and its values. A row that comes again has changed."""


class StreamChange(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is new of a stream."""

    id: str
    is_new: bool = False
    """Forget what is known of it; all of it is in here."""
    facts: dict[str, Any] | None = None
    """Changed fields of `StreamFacts`."""
    verdict: Verdict | None = None
    moments: Moments | None = None
    segments: list[Row] | None = None
    """number, received_ms, sent_ms, computed_ms; None for what has not happened."""
    runs: list[Row] | None = None
    """number, start_ms, end_ms, tokens, reason. Known from the first token on."""
    preemptions: list[Row] | None = None
    """number, at_ms, kind, tokens, reason."""
    progress: list[Row] | None = None
    """number, after_ms, until_ms, computed tokens then: between the two it grew to this. A
    stand-in for ``runs`` until they are known, and only as exact as the samples are frequent."""


class Frame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is sent at once."""

    now_ms: int
    epoch_ms: int
    """Of the router's start, by its wall clock, since 1970."""
    cluster: ClusterView | None = None
    servers: list[ServerView] | None = None
    """All of them, when any changed."""
    selected: Selected | None = None
    streams: list[msgspec.Raw] = []
    """Each a `StreamChange`."""
