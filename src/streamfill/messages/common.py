"""Parts that several messages share."""

from __future__ import annotations

import enum
from typing import Annotated, Final, TypeAlias

import msgspec

MAX_NAMESPACE_CHARS: Final = 64
Namespace: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_NAMESPACE_CHARS)]
"""Whose KV a prompt may be served from: what was computed in one namespace is not found in another.
Opaque."""
SHARED_NAMESPACE: Final = ""
"""Of all who do not keep to themselves."""


class Role(enum.Enum):
    """What a server process does."""

    PREFILL = "prefill"
    DECODE = "decode"


class StreamMode(enum.Enum):
    """How the context of a stream grows."""

    APPEND = "append"
    UPDATE = "update"


class Share(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """On whose account a stream is computed, where several share the cluster fairly."""

    tenant: Namespace = ""
    """Opaque. Empty: nobody in particular."""
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Twice the weight is worth twice the tokens while all want more than there is."""


NO_SHARE: Final = Share()
"""Of streams that nobody in particular pays for."""


class FinishReason(enum.Enum):
    """Why a generation ended, in the words of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters after the router filled the defaults in. Semantics are SGLang's.

    Stop *strings* are not here: the router matches them, since only it holds text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1: the whole vocabulary."""
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    """Of the whole answer, the first token included."""
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    num_logprobs: int | None = None
    """None: no logprobs. 0: of the sampled token only. n: also of the n most likely ones."""


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Natural logarithm of the probability of one output token, and of its competitors."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most likely first."""


class Finish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The end of a generation on a server."""

    reason: FinishReason
    matched_token_id: int | None = None
    """The end-of-sequence or stop token that ended it."""
    message: str = ""


class HandoffTarget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a committed stream's KV blocks go."""

    transfer_id: int
    """Minted by the router, never used twice."""
    server_id: str
    host: str
    control_ports: tuple[int, ...]
    """Transfer control port of each rank."""

    @property
    def peer(self) -> KvPeer:
        """The server alone."""
        return KvPeer(server_id=self.server_id, host=self.host, control_ports=self.control_ports)


class KvPeer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decode server, as somebody to send KV to."""

    server_id: str
    host: str
    control_ports: tuple[int, ...]
    """Transfer control port of each rank."""


class ComputeRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of a stream's prompt in the engine. Ages are seconds before the message was sent."""

    start_age_s: float
    end_age_s: float
    num_tokens: int
    """Prompt tokens that went through the model."""
    reason: str = ""
    """Why it ran: a value of ``scheduling.plan.RunReason``. Of runs that were merged, the later
    one's."""


class Preemption(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """KV of a living stream was found to be evicted."""

    age_s: float
    """Seconds before the message was sent; of the moment when it was noticed."""
    num_tokens: int
    """Whose KV is gone, whoever had computed it."""
    action: str = "recompute"
    """A value of ``control.PreemptionAction``: how it came back, or was to come back."""
    reason: str = ""
    """Why this stream gave up memory."""
    predicted_s: float | None = None
    """What getting it back was predicted to cost. None: nobody asked."""
    actual_s: float | None = None
    """What it did cost. None: it is not all back."""


class StreamAccount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server did for the prompt of one stream, up to the first token that it sampled.

    Counted from the start of the attempt on this server. Times are ages, so that the clocks of two
    processes never meet.
    """

    num_computed_tokens: int
    """Prompt tokens that went through the model, each time counted; the sum of ``runs``."""
    num_recomputed_tokens: int
    """Of them, those that this server had computed for the stream before and evicted."""
    num_reused_tokens: int
    """Prompt tokens found in the radix tree and never computed here for this stream. 0 where the
    stream was not opened here: handed-over KV is not counted."""
    runs: tuple[ComputeRun, ...]
    """In order of time. Of a stream with very many, some stand for two of the old ones."""
    preemptions: tuple[Preemption, ...]
    """As they were noticed. Of very many, the first one stands for all the old ones."""


class StreamDecision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server's scheduler decided about one stream in its newest step."""

    stream_id: int
    state: str
    """``open``, ``waiting_kv``, ``committed`` or ``answering``."""
    num_known_tokens: int
    num_computed_tokens: int
    num_shared_tokens: int
    """Of the computed tokens, those whose KV other open streams use too."""
    priority: int
    idle_s: float
    """Since its newest segment."""
    expected_next_s: float | None
    """Until its next segment, going by its gaps. None: too few were seen."""
    decision: str
    """A value of ``scheduling.plan.RunReason`` or ``DeferReason``; ``idle``: nothing to compute."""
    reason: str
    """The same as a sentence."""
    victim_rank: int | None
    """Place in the order in which memory is taken, 0 first. None: none is taken from it."""


class ServerCounters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server holds right now. All but the capacities, and what is counted since the start,
    go back to zero when no stream is left, except ``num_cached_tokens``: the cache keeps what may
    be useful again."""

    num_streams: int = 0
    num_waiting: int = 0
    """Requests in SGLang's waiting queue."""
    num_running: int = 0
    """Requests that hold a request slot."""
    num_pending_tokens: int = 0
    """Known tokens of open streams that are not computed yet."""
    num_used_tokens: int = 0
    """KV slots that can be neither allocated nor evicted."""
    num_cached_tokens: int = 0
    """KV slots that the radix tree could give back."""
    num_free_tokens: int = 0
    num_total_tokens: int = 0
    num_free_slots: int = 0
    """Free request slots."""
    num_total_slots: int = 0
    num_transfers: int = 0
    """KV transfers under way, in either direction."""
    staging_bytes: int = 0
    """Transfer staging memory in use."""
    num_malformed_frames: int = 0
    """Since the start."""
    num_evicted_tokens: int = 0
    """Since the start."""
    num_computed_tokens: int = 0
    """Prefilled since the start."""
    num_recomputed_tokens: int = 0
    """Of them, prompt tokens that the same stream had computed here before and that were evicted
    while it lived. Since the start."""
    num_preemptions: int = 0
    """How often a living stream was found to have lost KV to eviction. Since the start."""
    num_interruptions: int = 0
    """How often committed prompts were computed between two layers of a step of context. Since the
    start."""
    num_handoff_bytes: int = 0
    """KV that was sent to decode servers, from all ranks. Since the start."""
    num_early_bytes: int = 0
    """Of them, sent before the commit. Since the start."""
    num_swap_outs: int = 0
    """Groups of KV pages copied to host memory. Since the start, as the next three."""
    num_swap_ins: int = 0
    swap_out_bytes: int = 0
    swap_in_bytes: int = 0
    num_host_tokens: int = 0
    """KV in host memory that an open stream may need again, in tokens. Goes back to zero as the
    others."""
    plan_version: int = 0
    """Newest preemption plan applied; 0 while the local rule is in force."""
