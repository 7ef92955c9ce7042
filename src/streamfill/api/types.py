"""What the client gives to its user. Plain data, without gRPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from streamfill.observability.lifetime import LifetimeEntry

Mode = Literal["append", "update"]
"""How the context of a stream grows."""


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen. None and an absent key mean the router's default.

    The meaning, range and default of each stand at ``Sampling`` in ``streamfill.proto``.
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    max_tokens: int | None
    min_tokens: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    seed: int | None
    logprobs: int | None
    skip_special_tokens: bool | None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the prompt of a stream has come."""

    seq: int = 0
    """Newest operation of this client that was applied."""
    num_received_tokens: int = 0
    num_computed_tokens: int = 0
    num_invalidated_tokens: int = 0
    """Computed tokens that updates threw away, in total."""

    @property
    def is_computed(self) -> bool:
        """Whether the KV of everything that was sent is there."""
        return self.num_computed_tokens >= self.num_received_tokens


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of an answer."""

    index: int
    token_id: int
    text: str
    """May be empty, while a character or a possible stop string is incomplete."""
    logprob: float | None = None
    """Natural logarithm; only where ``logprobs`` was asked for."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most likely first."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of a stream."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    """Prompt tokens that were already computed when the commit came."""
    num_invalidated_tokens: int
    """Computed tokens that updates threw away."""
    num_computed_tokens: int = 0
    """Prompt tokens that went through the model for this stream, each time counted."""
    num_recomputed_tokens: int = 0
    """Of them, those that it had computed before and whose KV was evicted meanwhile."""
    num_reused_tokens: int = 0
    """Prompt tokens whose KV another stream had left in the prefill server's cache."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """How the cluster made an answer."""

    stream_id: int
    prefill_server: str
    decode_server: str
    """Empty when the prefill server generated everything."""
    decoded_by_prefill: bool
    handoff: str
    """``done``, ``failed: <reason>`` or ``none``."""
    num_attempts: int
    handoff_bytes: int | None = None
    """KV bytes that the hand-off moved. None: there was none, it failed, or its report came after
    the end of the answer."""
    handoff_s: float | None = None
    """How long it took, by the prefill server's clock; None when ``handoff_bytes`` is."""
    kv_codec: str = "none"
    """Lossy codec that KV of the answer may have come through. Other than ``none`` the answer need
    not be that of the exact KV."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When an answer came, by this client's monotonic clock, in seconds."""

    ttft_s: float | None
    """From the send of the commit to the first token. None: the answer has no token."""
    ttft_from_last_segment_s: float | None
    """From the send of the last append or update to the first token. The same as ``ttft_s`` when
    the commit carried a final piece."""
    total_s: float
    """From the send of the commit to the end of the answer."""
    token_times_s: tuple[float, ...]
    """Arrival of each token, from the send of the commit."""
    lifetime: tuple[LifetimeEntry, ...]
    """What the router recorded, in seconds since it opened the stream. The functions of
    ``streamfill.observability.lifetime`` make the router's figures of it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A whole answer."""

    text: str
    """The text of all tokens, and the tail."""
    text_tail: str
    """Text that was held back and belongs to no later token."""
    tokens: tuple[Token, ...]
    finish_reason: str
    """``stop``, ``length`` or ``abort``."""
    matched_stop: str | int | None
    """The stop string or stop token that ended it."""
    usage: Usage
    metadata: Metadata
    timing: Timing

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of the tokens."""
        return tuple(token.token_id for token in self.tokens)


@dataclass(frozen=True, kw_only=True)
class Server:
    """One server process."""

    server_id: str
    role: str
    """``prefill`` or ``decode``."""
    state: str
    """``alive``, ``suspect``, ``draining`` or ``dead``."""
    pid: int
    num_assigned_streams: int
    heartbeat_age_s: float
    loop_age_s: float
    controller_alive: bool
    counters: Mapping[str, int]
    """By the field names of ``streamfill.messages.common.ServerCounters``."""
    policy: str = ""
    """Scheduling policy in force with its options, as last heard: ``lcas(order=newest)``. Empty:
    the server has not said yet."""
    state_reason: str = ""
    """Why it drains; empty when it does not."""
    address: str = ""
    """Where other servers reach it."""
    version: str = ""
    """Of its engine."""
    pool_tokens: int = 0
    """Size of its KV pool."""
    num_held_tokens: int = 0
    """Prompts and answers of the streams that the router has placed there."""


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """The cluster as the router sees it."""

    model: str
    vocab_size: int
    context_tokens: int
    pool_tokens: int
    """KV pool of the smallest prefill server; 0 while there is none."""
    ready: bool
    """New streams are served."""
    decode_available: bool
    num_open_streams: int
    num_streams_by_outcome: Mapping[str, int]
    num_malformed_frames: int
    servers: tuple[Server, ...]
    ready_reason: str = ""
    """Why it is not ready, or only by prefill servers that write whole answers."""
    num_moves: Mapping[str, int] = field(default_factory=dict)
    """Streams that were moved between living servers since the router's start, by reason: ``drain``
    or ``balance``."""
    placement: str = ""
    """Policy that chooses the prefill server of each stream, with its options."""


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """What one server made of a new scheduling policy."""

    ok: bool
    """It schedules by the new policy now."""
    policy: str
    """In force now, with its options; as last heard from a server that did not answer."""
    reason: str
    """Why it is not the new one; empty when ``ok``."""


@dataclass(frozen=True, kw_only=True)
class StreamDecision:
    """What a server's scheduler decided about one stream in its newest step."""

    stream_id: int
    state: str
    """``open``, ``waiting_kv``, ``committed`` or ``answering``."""
    num_known_tokens: int
    """Of the prompt, as far as the server has it."""
    num_computed_tokens: int
    """Of them, those whose KV is there."""
    num_shared_tokens: int
    """Of these, those whose KV other open streams use too."""
    priority: int
    idle_s: float
    """Since its newest segment."""
    expected_next_s: float | None
    """Until its next segment, going by its gaps so far. None: too few were seen."""
    decision: str
    """Why it runs or waits: a value of ``streamfill.scheduling.plan.RunReason`` or
    ``DeferReason``, or ``idle``: it has nothing to compute."""
    reason: str
    """The same as a sentence."""
    victim_rank: int | None
    """Place in the order in which memory is taken, 0 first. None: none is taken from it."""


@dataclass(frozen=True, kw_only=True)
class ServerStreams:
    """The streams of one server as its scheduler sees them."""

    answered: bool
    """In time. False: nothing is known of its streams."""
    role: str
    """``prefill`` or ``decode``."""
    policy: str
    """In force, with its options; as last heard when it did not answer."""
    streams: tuple[StreamDecision, ...]
    """In the order of their turn."""
