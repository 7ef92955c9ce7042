"""The border between the router's two services and its core: plain data and one Protocol.

The services (``router/service.py``, ``router/http/``) speak gRPC and HTTP and know nothing of
servers; the core (``router/manager.py``) knows nothing of gRPC and HTTP. All run in the router's
asyncio loop. All methods raise ``errors.StreamError`` subclasses and leave the stream unharmed when
they do, unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from router.admission import AdmissionCounters
from router.watch.frames import Frame
from router.watch.wish import WatchWish
from streamfill.errors import StreamError
from streamfill.messages.common import (
    NO_SHARE,
    SHARED_NAMESPACE,
    Role,
    Sampling,
    ServerCounters,
    Share,
    StreamDecision,
    StreamMode,
    TokenLogprob,
)
from streamfill.observability.lifetime import Lifetime
from streamfill.stream.ids import ServerId
from streamfill.stream.state import StreamState


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of context: exactly one of ``text``, ``token_ids`` or ``messages`` is given.

    In append mode it goes behind what is there; in update mode it is the whole new context.
    ``messages`` are whole chat messages (role, content); with them the stream is a chat and
    further text grows the content of the last message.
    """

    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    next_in_s: float | None = None
    """When the client expects to send the next one, from now; 0 or more."""


class Payer(Protocol):
    """On whose account a stream runs. Called by the core, in its loop; never raises."""

    def used(self, num_tokens: int) -> None:
        """So many tokens came into the prompt or into the answer."""
        ...

    def ended(self) -> None:
        """The stream is over, however it ended. Called once."""
        ...


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """What a client says when it opens a stream."""

    mode: StreamMode = StreamMode.APPEND
    priority: int = 0
    request_id: str = ""
    """The client's own name for it, in logs and replies."""
    deadline_s: float | None = None
    """Whole life of the stream, from now."""
    ttft_slo_s: float | None = None
    """From the commit to the first token, as the client wishes it. None: it did not say."""
    messages: Sequence[Mapping[str, Any]] | None = None
    """First chat messages, the last one open."""
    tenant: str = ""
    """Whose stream it is; empty where there are no API keys."""
    payer: Payer | None = None
    """None: nobody counts."""
    is_resumable: bool = False
    """Its client is told its id, and may come back to it; so it goes into the log, if there is
    one."""
    needs_call: bool = False
    """It lives and dies with the call that opened it."""
    namespace: str = SHARED_NAMESPACE
    """Whose KV its prompt may be served from, and who may be served from its own."""
    share: Share = NO_SHARE
    """On whose account it is computed, where several share the cluster fairly."""


@dataclass(frozen=True, kw_only=True)
class CommitOptions:
    """How the answer is generated. Both services make it by ``request_checks``, so its values are
    valid."""

    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    skip_special_tokens: bool = True
    final_segment: Segment | None = None
    """Applied before the commit, in one step with it."""
    keep_s: float = 0.0
    """For so long after the answer a prompt that begins with this one is to be expected."""


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """How far a client had come that comes back to its stream."""

    next_token_index: int = 0
    """Of the answer: it has all tokens before."""
    next_seq: int | None = None
    """Of its operations, the first that was not answered: it has heard of all before. None: it does
    not say."""
    refused_seqs: Sequence[int] = ()
    """Behind `next_seq`: those that it heard to be refused."""
    payer: Payer | None = None
    """On whose account the stream runs on, should it be on nobody's."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """How far the stream is, for a client that comes back."""

    stream_id: int
    acknowledged: Acknowledged
    is_committed: bool
    refused: Sequence[tuple[int, StreamError]]
    """Operations from `ResumePoint.next_seq` on that were refused, with why."""
    is_paid_anew: bool = False
    """It was on nobody's account, and is on `ResumePoint.payer`'s now."""


@dataclass(frozen=True, kw_only=True)
class Acknowledged:
    """How far the prompt has come. Sent after each operation and whenever a server reports
    progress."""

    client_seq: int
    """Newest client operation that was applied."""
    num_received_tokens: int
    num_computed_tokens: int
    num_invalidated_tokens: int


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """Part of the answer. ``text`` may be empty while a character is incomplete."""

    index: int
    token_id: int
    text: str
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, kw_only=True)
class Usage:
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    """Prompt tokens that were already computed when the commit came."""
    num_invalidated_tokens: int
    num_computed_tokens: int = 0
    """Prompt tokens that went through a model for the stream, each time counted, as far as servers
    reported them."""
    num_recomputed_tokens: int = 0
    """Of them, computed on the same server before and evicted meanwhile."""
    num_reused_tokens: int = 0
    """Prompt tokens that the prefill server found in its cache and never computed for the
    stream."""


@dataclass(frozen=True, kw_only=True)
class DoneEvent:
    """The end of an answer; the last event of a stream that went well."""

    finish_reason: str
    """``stop``, ``length`` or ``abort``."""
    text_tail: str
    """Text that was held back and belongs to no later token."""
    matched_stop: str | int | None
    usage: Usage
    prefill_server: str
    decode_server: str
    """Empty when the prefill server generated everything."""
    decoded_by_prefill: bool
    """No decode server was alive, or the last one died and the prefill server took over."""
    handoff: str
    """``done``, ``failed: <reason>`` or ``none``."""
    num_attempts: int
    lifetime: Lifetime
    """In the order of recording: what servers did is learnt later than it happened."""
    handoff_bytes: int | None = None
    """None: no hand-off succeeded, or its report is not here yet."""
    handoff_s: float | None = None
    """By the prefill server's clock; None when ``handoff_bytes`` is."""
    kv_codec: str = "none"
    """Lossy codec that KV of the answer may have come through."""


StreamEvent = Acknowledged | TokenEvent | DoneEvent


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """One server as the router sees it."""

    server_id: str
    role: Role
    state: str
    """``alive``, ``suspect``, ``draining`` or ``dead``."""
    pid: int
    num_assigned_streams: int
    heartbeat_age_s: float
    loop_age_s: float
    controller_alive: bool
    counters: ServerCounters
    admission: AdmissionCounters | None = None
    """What uncommitted contexts hold. None: none was ever on this server."""
    policy: str = ""
    """In force, with its options, as last heard. Empty: it has not said yet."""
    state_reason: str = ""
    """Why it drains; empty when it does not."""
    address: str = ""
    """Where other servers reach it."""
    version: str = ""
    """Of its engine."""
    pool_tokens: int = 0
    """Size of its KV pool."""
    num_held_tokens: int = 0
    """Of the streams that the router has placed there."""


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """The cluster as the router sees it."""

    model: str
    vocab_size: int
    context_tokens: int
    pool_tokens: int
    """Of the smallest prefill server; 0 while there is none."""
    ready: bool
    decode_available: bool
    num_open_streams: int
    num_streams_by_outcome: Mapping[str, int]
    num_malformed_frames: int
    servers: Sequence[ServerInfo]
    ready_reason: str = ""
    """Why it is not ready, or only by prefill servers alone; see `readiness`."""
    num_moves: Mapping[str, int] = field(default_factory=dict)
    """Streams that were moved between living servers since the router's start, by reason."""
    placement: str = ""
    """Policy that places streams on prefill servers, with its options."""


@dataclass(frozen=True, kw_only=True)
class PolicyOutcome:
    """What one server made of a new scheduling policy."""

    ok: bool
    policy: str
    """In force now, with its options; as last heard from a server that did not answer."""
    reason: str
    """Why it is not the new one; empty when ``ok``."""


@dataclass(frozen=True, kw_only=True)
class ServerStreams:
    """The streams of one server as its scheduler sees them."""

    answered: bool
    """In time. False: nothing is known of its streams."""
    role: Role
    policy: str
    """In force, with its options, as last heard."""
    streams: Sequence[StreamDecision]
    """In the order of their turn."""


@dataclass(frozen=True, kw_only=True)
class StreamStatus:
    """One stream at this moment, for a client that comes back to it by its id."""

    stream_id: int
    request_id: str
    mode: StreamMode
    priority: int
    state: StreamState
    acknowledged: Acknowledged
    """What the next acknowledgement would say."""
    num_output_tokens: int


class MoveReason(StrEnum):
    """Why a stream is moved from one living server to another; a label of the metric."""

    DRAIN = "drain"
    """Its server takes nothing new and is to become empty."""
    BALANCE = "balance"
    """Another server would come to it much sooner; see `rebalance`."""


class StreamHandle(Protocol):
    """One stream, held by the service call that opened it or attached to it."""

    @property
    def stream_id(self) -> int: ...

    @property
    def mode(self) -> StreamMode: ...

    @property
    def tenant(self) -> str:
        """As in the options that it was opened with."""
        ...

    def status(self) -> StreamStatus: ...

    async def append(self, segment: Segment, client_seq: int | None = None) -> Acknowledged:
        """Put ``segment`` behind the context. ``client_seq`` repeated: ignored and acknowledged.

        Raises:
            FailedPreconditionError: the stream is in update mode, or committed.
            InvalidArgumentError: bad ids or text, or the prompt would outgrow the context or
                the KV pool.
            ResourceExhaustedError: there is no room for more uncommitted context on the stream's
                server, and it waited too long for it or too many wait already.
        """
        ...

    async def update(self, segment: Segment, client_seq: int | None = None) -> Acknowledged:
        """Replace the context by ``segment``. Raises as ``append``, with the modes exchanged."""
        ...

    def change_at_once(self, segment: Segment, client_seq: int | None = None) -> bool:
        """``append``, or ``update`` in update mode, if it needs to wait for nothing and nobody.

        Returns:
            whether it is done. If not, nothing happened: those two do it, or say why not.
        """
        ...

    def acknowledged(self) -> Acknowledged:
        """How far the prompt is."""
        ...

    async def commit(self, options: CommitOptions, client_seq: int | None = None) -> None:
        """The prompt is complete. The answer comes through ``events``.

        Raises:
            FailedPreconditionError: already committed.
            InvalidArgumentError: the prompt is empty, or the final segment is as in ``append``.
            UnavailableError: no prefill server is alive.
        """
        ...

    def events(
        self, on_acknowledged: Callable[[], bool] | None = None
    ) -> AsyncIterator[StreamEvent]:
        """Everything that happens, until ``DoneEvent``. One consumer at a time;
        acknowledgements that nobody fetched are merged, tokens never are. Raises the stream's
        ``StreamError`` when it ends badly.

        Args:
            on_acknowledged: called at once for each acknowledgement; returns whether it has taken
                it, so that it is no event.
        """
        ...

    async def cancel(self, reason: str) -> None:
        """Stop everything, on every server. Idempotent."""
        ...

    def note_refused(self, client_seq: int, error: StreamError) -> None:
        """The service itself refused the operation of this number, so that it never came here: the
        next number is no gap."""
        ...

    @property
    def is_resumable(self) -> bool:
        """Whether the stream outlives this router process, so that its client may come back."""
        ...

    @property
    def num_resumptions(self) -> int:
        """How often its client came back. The stream is the newest call's: one that finds more than
        there were when it began has nothing to give up."""
        ...

    def resume(self, point: ResumePoint) -> Resumed:
        """The client came back, and ``events`` is asked for next: it begins behind ``point``.

        Raises:
            StreamError: OUT_OF_RANGE, the wanted tokens are not there any more.
        """
        ...


class StreamManager(Protocol):
    """The router's core."""

    async def open(self, options: OpenOptions) -> StreamHandle:
        """Mint a stream and place it on a prefill server.

        Raises:
            UnavailableError: no prefill server came alive within a second.
            ResourceExhaustedError: ``max_streams`` are open, or there was no room for the first
                messages, as in ``StreamHandle.append``.
        """
        ...

    def get(self, stream_id: int) -> StreamHandle:
        """Raises StreamNotFoundError."""
        ...

    def info(self) -> ClusterInfo: ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, as UTF-8, perhaps a part of a character; markup by its name.
        Nothing for one that only the model knows, and its tokenizer does not."""
        ...

    async def wait_readiness_change(self) -> bool:
        """Returns the new readiness when it changes; see `readiness`."""
        ...

    async def flush_caches(self, timeout_s: float) -> Mapping[ServerId, bool]:
        """Empty the KV caches of all servers; per server whether it did. A server that has streams
        refuses, one that did not answer in time counts as False."""
        ...

    async def set_policy(
        self,
        policy: str,
        options: Mapping[str, str],
        server_id: ServerId | None,
        timeout_s: float,
    ) -> Mapping[ServerId, PolicyOutcome]:
        """Make prefill servers schedule by another policy: all living ones and those that register
        later, or the one with this id.

        Raises:
            UnavailableError: no prefill server is alive.
            StreamError: NOT_FOUND, no living prefill server has this id.
            InvalidArgumentError: every server refused the policy.
        """
        ...

    async def describe_streams(
        self, stream_id: int | None, timeout_s: float
    ) -> Mapping[ServerId, ServerStreams]:
        """What the schedulers of all living servers decided about their streams, or about one.

        Raises:
            StreamNotFoundError: there is no stream of this id.
        """
        ...

    def watch(self, wish: WatchWish) -> AsyncGenerator[Frame, None]:
        """The cluster as it changes, some times a second, for as long as the caller takes more.
        Costs nothing while nobody does.

        Raises:
            ResourceExhaustedError: too many look already.
            UnavailableError: the router stops.
        """
        ...

    async def drain_server(
        self, server_id: ServerId, answers_s: float | None, *, force: bool
    ) -> ServerInfo:
        """Give the server nothing new, and move its streams elsewhere; returns at once. Answers
        that have not ended after ``answers_s`` are moved as well. None: never.

        Raises:
            StreamError: NOT_FOUND, no living server has this id.
            FailedPreconditionError: it is the last prefill server that takes streams, and not
                ``force``.
        """
        ...

    async def resume_server(self, server_id: ServerId) -> ServerInfo:
        """Take a drain back.

        Raises:
            StreamError: NOT_FOUND, no living server has this id.
            FailedPreconditionError: the server is about to end.
        """
        ...

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, wait for what is open, then cancel the rest."""
        ...
