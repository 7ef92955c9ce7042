"""What a server sends to the router. Output tokens are numbered within the answer, so the
router can drop what it already has and ask for what it misses (``ResendOutput``)."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from streamfill.messages.common import (
    Finish,
    Role,
    ServerCounters,
    StreamAccount,
    StreamDecision,
    TokenLogprob,
)


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Register(_Message, frozen=True, kw_only=True, tag="register"):
    """First message of a server, repeated until it is answered."""

    server_id: str
    incarnation: int
    """Chosen at random at each start; a new one means that everything before is lost."""
    role: Role
    protocol_version: int
    pid: int
    model_id: str
    """Digest of the model's configuration; all servers of a cluster have the same."""
    vocab_size: int
    context_tokens: int
    """Longest prompt plus answer that the model takes."""
    pool_tokens: int
    """Capacity of the KV pool."""
    page_size: int
    tp_size: int
    kv_host: str
    kv_control_ports: tuple[int, ...]
    """Transfer control port of each rank."""
    engine_version: str


class ServerHeartbeat(_Message, frozen=True, kw_only=True, tag="server_heartbeat"):
    """The server lives. Sent by a thread of its own, so a long forward pass does not delay it."""

    server_id: str
    incarnation: int
    loop_age_s: float
    """Time since the scheduler's loop last came round."""
    controller_alive: bool
    counters: ServerCounters


class Received(_Message, frozen=True, kw_only=True, tag="received"):
    """Every ``Splice`` and ``Commit`` up to ``seq`` has arrived."""

    stream_id: int
    attempt: int
    seq: int


class ResyncRequest(_Message, frozen=True, kw_only=True, tag="resync_request"):
    """The server has everything up to ``have_seq`` and then a gap (-1: it does not know the stream
    at all)."""

    stream_id: int
    attempt: int
    have_seq: int


class Progress(_Message, frozen=True, kw_only=True, tag="progress"):
    """How far the prefill of an open stream has come."""

    stream_id: int
    attempt: int
    seq: int
    """Newest splice that was applied."""
    num_known_tokens: int
    num_computed_tokens: int
    num_invalidated_tokens: int
    """Computed tokens thrown away by updates, in total."""


class Output(_Message, frozen=True, kw_only=True, tag="output"):
    """Tokens of the answer."""

    stream_id: int
    attempt: int
    first_index: int
    """Index within the answer of the first id here; 0 is the first token."""
    token_ids: bytes
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that this server had in its cache when it was asked for the answer."""
    kv_codec: str = "none"
    """Lossy codec that KV of this answer may have come through; see ``kv_transfer.codecs``."""
    account: StreamAccount | None = None
    """With the first token that this server sampled, whenever that is sent. None: there is nothing
    to tell, as on a decode server that found the whole prompt."""


class HandoffReport(_Message, frozen=True, kw_only=True, tag="handoff_report"):
    """How a KV transfer ended, from the prefill server."""

    stream_id: int
    attempt: int
    transfer_id: int
    ok: bool
    reason: str
    num_tokens: int
    num_bytes: int
    """From all ranks of the prefill server, what went ahead of the commit included."""
    seconds: float
    """By the prefill server's clock; of what was sent after the commit."""
    num_early_bytes: int = 0
    """Of the bytes, those that went ahead of the commit."""


class StreamFailed(_Message, frozen=True, kw_only=True, tag="stream_failed"):
    """The server cannot go on with the stream and has dropped it."""

    stream_id: int
    attempt: int
    code: str
    """A value of ``errors.ErrorCode``."""
    message: str


class Closed(_Message, frozen=True, kw_only=True, tag="closed"):
    """Answer to ``Cancel`` and ``Forget``: nothing of the stream is left here."""

    stream_id: int
    attempt: int


class CacheFlushed(_Message, frozen=True, kw_only=True, tag="cache_flushed"):
    """Answer to ``FlushCache``."""

    request_id: int
    ok: bool
    """False: streams are open, nothing was changed."""


class PolicySet(_Message, frozen=True, kw_only=True, tag="policy_set"):
    """Answer to ``SetPolicy``."""

    request_id: int
    ok: bool
    policy: str
    """In force now, with its options: ``lcas(order=newest)``."""
    reason: str = ""
    """Why it could not be set: names the bad value and what would be right."""


class StreamsDescribed(_Message, frozen=True, kw_only=True, tag="streams_described"):
    """Answer to ``DescribeStreams``."""

    request_id: int
    policy: str
    """In force, with its options."""
    streams: tuple[StreamDecision, ...]
    """All that are not over, in the order of their turn."""


class Residency(_Message, frozen=True, kw_only=True, tag="residency"):
    """Which blocks of prompts are in the server's radix tree, as ``WatchResidency`` asked.

    Changes are numbered from 1 on within an incarnation. A report that does not go on behind the
    newest change that the router has is a gap, and answered with ``WatchResidency``. While nothing
    changes, the newest number is repeated, so that the loss of the last report is noticed too.
    """

    block_tokens: int
    after_seq: int
    """The change that this goes on behind; equal to ``seq`` where it brings none."""
    seq: int
    """Newest change."""
    is_complete: bool
    """``stored`` is all that there is, whatever was reported before."""
    stored: bytes = b""
    """``prefix_blocks.pack_keys``."""
    removed: bytes = b""
    """In the same form. Applied before ``stored``."""


class Draining(_Message, frozen=True, kw_only=True, tag="draining"):
    """The server finishes what it has and takes nothing new."""

    server_id: str


class MalformedByRouter(_Message, frozen=True, kw_only=True, tag="malformed_by_router"):
    """The server could not read a frame of the router."""

    reason: str


ServerToRouter: TypeAlias = (
    Register
    | ServerHeartbeat
    | Received
    | ResyncRequest
    | Progress
    | Output
    | HandoffReport
    | StreamFailed
    | Closed
    | CacheFlushed
    | PolicySet
    | StreamsDescribed
    | Residency
    | Draining
    | MalformedByRouter
)
