"""What the load generator can measure: a streamfill cluster, an OpenAI-compatible server, a fake.

A target is used by one event loop. All times are of ``time.monotonic``. Every failure is a
``StreamError``; implementations translate those of their transport.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from streamfill.messages.common import StreamMode
from streamfill.observability.lifetime import LifetimeEntry
from streamfill.traces.script import Content


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """What a run has to know of a target."""

    model: str
    vocab_size: int
    context_tokens: int
    """Longest prompt plus answer; 0: not known."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """How a request wants to be answered. Always greedy, and never ended by the model."""

    request_id: str
    max_output_tokens: int
    ttft_slo_ms: float | None = None
    """The time from the commit to the first token that is wanted; targets that know no such thing
    ignore it. None: nothing is said."""


@dataclass(frozen=True, kw_only=True)
class ServerAccount:
    """What the target said of how it made an answer; None: it did not say."""

    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    """Of the answer, also those without a text of their own, such as the end of an answer."""
    num_cached_tokens: int | None = None
    """Prompt tokens that were in the cache when the answer was asked for."""
    num_computed_tokens: int | None = None
    """Prompt tokens that went through the model for this request, each time counted."""
    num_recomputed_tokens: int | None = None
    """Of them, those that had been computed before and were lost to memory pressure."""
    num_reused_tokens: int | None = None
    """Prompt tokens whose KV other requests had left in the cache."""
    num_invalidated_tokens: int | None = None
    """Computed tokens that updates threw away."""
    handoff: str | None = None
    handoff_bytes: int | None = None
    lifetime: tuple[LifetimeEntry, ...] = ()
    """The server's own events, in seconds since it opened the request."""
    opened_s: float | None = None
    """When the server opened it, by the clock of this process: when the client asked it to."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...] | None
    """None: the target gives no ids."""
    token_times_s: tuple[float, ...]
    """Arrival of each token."""
    account: ServerAccount = field(default_factory=ServerAccount)


class TargetStream(Protocol):
    """One open stream of a target.

    Calls overlap: the next one may begin before the one before it has returned. They begin in the
    order of the pieces, the commit last, and take effect in the order in which they began.
    """

    async def send(self, piece: Content) -> None:
        """Append the piece, or put it in the context's place. Returns when the target has taken it.
        Raises ``StreamError``."""
        ...

    async def commit(self, piece: Content | None) -> Reply:
        """The prompt is complete, with an optional last piece; the answer. Called once. Raises
        ``StreamError``."""
        ...


class Target(Protocol):
    """Something that answers prompts."""

    name: str
    """For tables and files: ``streamfill``, ``sglang-pd``, ``vllm``, ``openai``, ``fake``."""
    has_streams: bool
    """Whether ``open`` works."""

    async def facts(self) -> TargetFacts:
        """Asked once, before the first request. Raises ``StreamError``."""
        ...

    async def generate(self, prompt: Content, ask: Ask) -> Reply:
        """The answer to a whole prompt. Any number at the same time. Raises ``StreamError``."""
        ...

    def open(self, mode: StreamMode, ask: Ask) -> AbstractAsyncContextManager[TargetStream]:
        """A stream; it is cancelled when the block is left before its answer is complete."""
        ...

    async def empty_caches(self) -> None:
        """Make the target as cold as after its start. Called while no request is open. Raises
        ``StreamError``: it cannot."""
        ...

    async def counters(self) -> dict[str, int]:
        """Totals over all its servers, by the names of ``messages.common.ServerCounters``; empty
        where it has none. Called before and after a run."""
        ...

    async def close(self) -> None:
        """Drop all connections. Idempotent."""
        ...
