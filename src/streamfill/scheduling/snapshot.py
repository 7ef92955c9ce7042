"""What a policy decides on: streams and memory at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamfill.stream.ids import StreamId


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamView:
    """One open stream. Times are seconds of one monotonic clock, any origin."""

    stream_id: StreamId
    arrival_s: float
    """When it was opened."""
    last_segment_s: float
    """When its newest segment arrived."""
    pending_since_s: float
    """When the oldest segment arrived that is not wholly computed; of no meaning when everything
    is."""
    committed_s: float | None = None
    """When it was committed. None: its prompt may still grow."""
    num_known_tokens: int
    """At least 1 once it is committed."""
    num_computed_tokens: int
    """Length of the prefix whose KV is there now."""
    num_reached_tokens: int = 0
    """Length of the prefix that was ever computed and not invalidated since. More than
    ``num_computed_tokens``: KV was taken from the stream. An uncommitted stream that lacks no more
    than that gets it back only where no other stream has to pay for it."""
    num_evictable_tokens: int = 0
    """Of its computed tokens, those that ``MemoryView.num_evictable_tokens`` counts. Running the
    stream locks them, so they make room for nothing. An estimate will do; 0 where nobody knows."""
    priority: int = 0
    """Higher goes first among uncommitted streams."""
    in_flight: bool = False
    """A run of it is with the engine already, so it gets no other."""
    waiting_on_memory: bool = False
    """That run found no memory yet. Of a committed stream: nobody may take what it waits for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryView:
    """The KV pool, in tokens."""

    num_free_tokens: int
    num_evictable_tokens: int
    """Cached, and nobody runs on it."""
    num_total_tokens: int
    page_size: int = 1
    """Tokens are allocated, shared and evicted in pages of this many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Everything that a decision may depend on.

    ``token_budget`` has to be at least a page on the whole: less can never compute one.
    """

    streams: Sequence[StreamView]
    """In any order, each once."""
    memory: MemoryView
    token_budget: int
    """Tokens that may be computed in this step."""
    max_requests: int
    """Runs that may start in this step: free request slots."""
    now_s: float
    """On the clock of the streams' times."""
