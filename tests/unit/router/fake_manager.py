"""A core without servers, for tests of the gRPC and HTTP services and of the clients.

Every character of text is one token. The answer is what the test says; it comes token by token as
fast as it is fetched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from router.access.key_ring import KeyRing
from router.interface import (
    Acknowledged,
    ClusterInfo,
    CommitOptions,
    DoneEvent,
    OpenOptions,
    PolicyOutcome,
    Resumed,
    ResumePoint,
    Segment,
    ServerInfo,
    ServerStreams,
    StreamEvent,
    StreamStatus,
    TokenEvent,
    Usage,
)
from router.refusals import Note, not_counted
from router.service_server import GrpcServer
from router.tls import RouterTls
from router.watch.frames import Frame
from router.watch.wish import WatchWish
from streamfill.errors import (
    CancelledStreamError,
    ErrorCode,
    FailedPreconditionError,
    InvalidArgumentError,
    StreamError,
    StreamNotFoundError,
    UnavailableError,
)
from streamfill.messages.common import Role, ServerCounters, StreamMode, TokenLogprob
from streamfill.observability.lifetime import Lifetime, LifetimeEvent
from streamfill.stream.ids import ServerId
from streamfill.stream.state import StreamState

VOCAB_SIZE = 1000
CONTEXT_TOKENS = 100
STEP_S = 60.0
"""Every wait of the tests is bounded by this; none of them takes noticeable time."""


@dataclass
class FakeManager:
    """The core. A test sets the fields and looks at ``streams``."""

    answer: Callable[[], Iterator[str]] = lambda: iter(("Hello", " ", "world"))
    ready: bool = True
    open_error: Exception | None = None
    """How the opening of a stream fails. None: as ``ready`` says."""
    changes_at_once: bool = True
    """False: every operation has to wait for something."""
    hold_answer: bool = False
    """No token comes until the stream ends."""
    hold_commit: bool = False
    """A commit is taken, and its call does not return before the stream ends."""
    streams: dict[int, FakeStream] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    any_commit: asyncio.Event = field(default_factory=asyncio.Event)
    is_draining: bool = False
    policy: str = "fcfs"
    """In force on its one server."""
    policy_outcome: PolicyOutcome | StreamError | None = None
    """How the next change of policy ends. None: well."""
    policy_calls: list[tuple[str, Mapping[str, str], ServerId | None, float]] = field(
        default_factory=list
    )
    described: Mapping[ServerId, ServerStreams] = field(default_factory=dict)
    """What schedulers say."""
    describe_calls: list[tuple[int | None, float]] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=lambda: [Frame(now_ms=1, epoch_ms=2)])
    """What somebody who looks sees."""
    hold_frames: bool = False
    """Then nothing more until ``changed``."""
    watch_error: StreamError | None = None
    """How it ends. None: well."""
    wishes: list[WatchWish] = field(default_factory=list)
    num_watching: int = 0
    drain_calls: list[tuple[ServerId, float | None, bool]] = field(default_factory=list)
    resume_calls: list[ServerId] = field(default_factory=list)

    async def open(self, options: OpenOptions) -> FakeStream:
        if self.open_error is not None:
            raise self.open_error
        if not self.ready or self.is_draining:
            raise UnavailableError("no prefill server is alive")
        stream = FakeStream(self, 2**63 + len(self.streams), options)
        self.streams[stream.stream_id] = stream
        return stream

    def get(self, stream_id: int) -> FakeStream:
        if stream_id not in self.streams:
            raise StreamNotFoundError(f"there is no stream {stream_id}")
        return self.streams[stream_id]

    def info(self) -> ClusterInfo:
        server = ServerInfo(
            server_id="prefill-0",
            role=Role.PREFILL,
            state="alive",
            pid=4711,
            num_assigned_streams=len(self.streams),
            heartbeat_age_s=0.5,
            loop_age_s=0.25,
            controller_alive=True,
            counters=ServerCounters(num_streams=len(self.streams), num_free_tokens=9),
            policy=self.policy,
        )
        return ClusterInfo(
            model="fake",
            vocab_size=VOCAB_SIZE,
            context_tokens=CONTEXT_TOKENS,
            pool_tokens=500,
            ready=self.ready,
            decode_available=False,
            num_open_streams=len(self.streams),
            num_streams_by_outcome={"DONE": 3},
            num_malformed_frames=1,
            servers=[server] if self.ready else [],
            ready_reason="" if self.ready else "no prefill server is there",
        )

    def token_bytes(self, token_id: int) -> bytes:
        return f"<{token_id}>".encode()

    async def wait_readiness_change(self) -> bool:
        await self.changed.wait()
        self.changed.clear()
        return self.ready

    async def flush_caches(self, timeout_s: float) -> Mapping[ServerId, bool]:
        return {ServerId("prefill-0"): not self.streams}

    async def set_policy(
        self,
        policy: str,
        options: Mapping[str, str],
        server_id: ServerId | None,
        timeout_s: float,
    ) -> Mapping[ServerId, PolicyOutcome]:
        self.policy_calls.append((policy, dict(options), server_id, timeout_s))
        if isinstance(self.policy_outcome, StreamError):
            raise self.policy_outcome
        if self.policy_outcome is None:
            self.policy = policy
        outcome = self.policy_outcome or PolicyOutcome(ok=True, policy=policy, reason="")
        return {ServerId("prefill-0"): outcome}

    async def describe_streams(
        self, stream_id: int | None, timeout_s: float
    ) -> Mapping[ServerId, ServerStreams]:
        self.describe_calls.append((stream_id, timeout_s))
        if stream_id is not None:
            self.get(stream_id)
        return self.described

    async def watch(self, wish: WatchWish) -> AsyncGenerator[Frame, None]:
        self.wishes.append(wish)
        self.num_watching += 1
        try:
            for frame in self.frames:
                yield frame
            if self.hold_frames:
                await self.changed.wait()
            if self.watch_error is not None:
                raise self.watch_error
        finally:
            self.num_watching -= 1

    async def drain_server(
        self, server_id: ServerId, answers_s: float | None, *, force: bool
    ) -> ServerInfo:
        self.drain_calls.append((server_id, answers_s, force))
        return replace(self._server(server_id), state="draining", state_reason="an operator")

    async def resume_server(self, server_id: ServerId) -> ServerInfo:
        self.resume_calls.append(server_id)
        return self._server(server_id)

    def _server(self, server_id: ServerId) -> ServerInfo:
        for server in self.info().servers:
            if server.server_id == server_id:
                return server
        raise StreamError(f"there is no living server {server_id!r}", code=ErrorCode.NOT_FOUND)

    async def drain(self, timeout_s: float) -> None:
        self.is_draining = True
        for stream in self.streams.values():
            await stream.cancel("draining")

    def set_ready(self, ready: bool) -> None:
        self.ready = ready
        self.changed.set()


@dataclass
class FakeStream:
    """One stream; an event queue without merging but for acknowledgements."""

    manager: FakeManager
    stream_id: int
    options: OpenOptions
    tokens: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_invalidated_tokens: int = 0
    last_seq: int = 0
    refused_seqs: list[int] = field(default_factory=list)
    committed: CommitOptions | None = None
    num_fetched_events: int = 0
    cancelled_because: str | None = None
    failure: StreamError | None = None
    done: bool = False

    def __post_init__(self) -> None:
        self.ended = asyncio.Event()
        self.lifetime = Lifetime()
        self.lifetime.record(LifetimeEvent.OPENED)
        self._wake = asyncio.Event()
        self._acknowledged_waits = False

    @property
    def mode(self) -> StreamMode:
        return self.options.mode

    @property
    def tenant(self) -> str:
        return self.options.tenant

    def status(self) -> StreamStatus:
        state = StreamState.COMMITTED if self.committed else StreamState.OPEN
        return StreamStatus(
            stream_id=self.stream_id,
            request_id=self.options.request_id,
            mode=self.mode,
            priority=self.options.priority,
            state=StreamState.ABORTED if self.cancelled_because else state,
            acknowledged=self._acknowledged(),
            num_output_tokens=0,
        )

    async def append(self, segment: Segment, client_seq: int | None = None) -> Acknowledged:
        self._check(StreamMode.APPEND)
        if self._is_new(client_seq):
            self._set_tokens(self.tokens + _tokens(segment))
            self._note(client_seq)
        return self._acknowledged()

    async def update(self, segment: Segment, client_seq: int | None = None) -> Acknowledged:
        self._check(StreamMode.UPDATE)
        if self._is_new(client_seq):
            self._set_tokens(_tokens(segment))
            self._note(client_seq)
        return self._acknowledged()

    def change_at_once(self, segment: Segment, client_seq: int | None = None) -> bool:
        if not self.manager.changes_at_once or self.committed or not self._is_new(client_seq):
            return False
        before = self.tokens if self.mode is StreamMode.APPEND else []
        self._set_tokens(before + _tokens(segment))
        self._note(client_seq)
        return True

    def acknowledged(self) -> Acknowledged:
        return self._acknowledged()

    async def commit(self, options: CommitOptions, client_seq: int | None = None) -> None:
        if not self._is_new(client_seq):
            return
        if self.committed:
            raise FailedPreconditionError(f"stream {self.stream_id} is already committed")
        if options.final_segment is not None:
            self._set_tokens(self.tokens + _tokens(options.final_segment))
        if not self.tokens:
            raise InvalidArgumentError(f"stream {self.stream_id} has an empty prompt")
        self.committed = options
        self.manager.any_commit.set()
        self.lifetime.record(LifetimeEvent.COMMIT_RECEIVED)
        self._note(client_seq)
        if self.manager.hold_commit:
            await self.ended.wait()

    async def events(
        self, on_acknowledged: Callable[[], bool] | None = None
    ) -> AsyncIterator[StreamEvent]:
        while self.committed is None or self.manager.hold_answer:
            if self.failure is not None:
                raise self.failure
            if self._acknowledged_waits:
                self._acknowledged_waits = False
                if on_acknowledged is None or not on_acknowledged():
                    yield self._acknowledged()
            else:
                self._wake.clear()
                await self._wake.wait()
        logprob = None
        index = -1
        for index, text in enumerate(self.manager.answer()):
            if self.failure is not None:
                raise self.failure
            if self.committed.sampling.num_logprobs is not None:
                logprob = TokenLogprob(token_id=index, logprob=-0.5, top=((index, -0.5), (9, -2.0)))
            self.num_fetched_events += 1
            yield TokenEvent(index=index, token_id=index, text=text, logprob=logprob)
        self.done = True
        self.lifetime.record(LifetimeEvent.DONE)
        yield self._done_event(index + 1)

    async def cancel(self, reason: str) -> None:
        if self.cancelled_because is None and not self.done:
            self.cancelled_because = reason
            self.fail(CancelledStreamError(f"cancelled: {reason}"))

    def note_refused(self, client_seq: int, error: StreamError) -> None:
        self.refused_seqs.append(client_seq)

    @property
    def is_resumable(self) -> bool:
        return False

    @property
    def num_resumptions(self) -> int:
        return 0

    def resume(self, point: ResumePoint) -> Resumed:
        return Resumed(
            stream_id=self.stream_id,
            acknowledged=self._acknowledged(),
            is_committed=self.committed is not None,
            refused=(),
        )

    def fail(self, error: StreamError) -> None:
        """End the stream as a server would."""
        self.failure = error
        self._wake.set()
        self.ended.set()

    def compute(self) -> None:
        """The prefill has come to the end of what is known."""
        self.num_computed_tokens = len(self.tokens)
        self._acknowledged_waits = True
        self._wake.set()

    def _check(self, mode: StreamMode) -> None:
        if self.committed:
            raise FailedPreconditionError(f"stream {self.stream_id} is committed")
        if self.mode is not mode:
            raise FailedPreconditionError(f"stream {self.stream_id} is in {self.mode.value} mode")

    def _is_new(self, client_seq: int | None) -> bool:
        return client_seq is None or client_seq > self.last_seq

    def _note(self, client_seq: int | None) -> None:
        self.last_seq = self.last_seq if client_seq is None else client_seq
        self._acknowledged_waits = True
        self._wake.set()

    def _set_tokens(self, tokens: list[int]) -> None:
        if len(tokens) > CONTEXT_TOKENS:
            raise InvalidArgumentError(
                f"the prompt has {len(tokens)} tokens, the context takes {CONTEXT_TOKENS}",
                details={"limit_tokens": CONTEXT_TOKENS},
            )
        same = 0
        while same < min(len(tokens), len(self.tokens)) and tokens[same] == self.tokens[same]:
            same += 1
        self.num_invalidated_tokens += max(0, self.num_computed_tokens - same)
        self.num_computed_tokens = min(self.num_computed_tokens, same)
        self.tokens = tokens

    def _acknowledged(self) -> Acknowledged:
        return Acknowledged(
            client_seq=self.last_seq,
            num_received_tokens=len(self.tokens),
            num_computed_tokens=self.num_computed_tokens,
            num_invalidated_tokens=self.num_invalidated_tokens,
        )

    def _done_event(self, num_output_tokens: int) -> DoneEvent:
        return DoneEvent(
            finish_reason="stop",
            text_tail="!",
            matched_stop="END",
            usage=Usage(
                num_prompt_tokens=len(self.tokens),
                num_output_tokens=num_output_tokens,
                num_cached_tokens=self.num_computed_tokens,
                num_invalidated_tokens=self.num_invalidated_tokens,
                num_computed_tokens=7,
                num_recomputed_tokens=2,
                num_reused_tokens=1,
            ),
            prefill_server="prefill-0",
            decode_server="",
            decoded_by_prefill=True,
            handoff="none",
            num_attempts=1,
            lifetime=self.lifetime,
        )


@asynccontextmanager
async def serve(
    manager: FakeManager,
    keys: KeyRing | None = None,
    tls: RouterTls | None = None,
    on_refused: Note = not_counted,
) -> AsyncIterator[str]:
    """The real gRPC service over ``manager``, on a free port. Gives ``host:port``."""
    server = GrpcServer(manager, "127.0.0.1", 0, keys=keys, tls=tls, on_refused=on_refused)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0.1)


def _tokens(segment: Segment) -> list[int]:
    if segment.token_ids is not None:
        return list(segment.token_ids)
    if segment.messages is not None:
        return [
            ord(character) % VOCAB_SIZE for one in segment.messages for character in one["content"]
        ]
    return [ord(character) % VOCAB_SIZE for character in segment.text or ""]
