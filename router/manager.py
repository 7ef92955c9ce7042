"""The router's core: all streams, and the cluster that they run on.

`start` binds the socket for servers. From then on two things drive it, both in one asyncio loop:
frames of servers, and `_housekeep` ten times a second. Clients come in through `open` and `get`.
`drain` takes nothing new and waits; `close` ends what is left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router import timing
from router.admission import AdmissionCounters, AdmissionLimits
from router.cluster import Cluster, StreamMessage
from router.ended_streams import EndedStream, EndedStreams
from router.handle import ClientHandle
from router.interface import (
    ClusterInfo,
    OpenOptions,
    PolicyOutcome,
    Segment,
    ServerInfo,
    ServerStreams,
    StreamHandle,
)
from router.metrics import PUBLISH_INTERVAL_S, RouterMetrics, RouterSnapshot
from router.placement.placer import Placer
from router.placement.registry import format_placement, make_placement
from router.prompt import Prompt
from router.servers import Server
from router.session import Session
from router.traces import start_traces
from streamfill.config import RouterConfig
from streamfill.errors import (
    InvalidArgumentError,
    ResourceExhaustedError,
    StreamNotFoundError,
    UnavailableError,
)
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Role, StreamMode
from streamfill.models.describe import describe_model
from streamfill.observability.logging import log_event
from streamfill.stream.chat import ChatTemplate
from streamfill.stream.ids import ServerId, StreamId
from streamfill.stream.splice import Splice
from streamfill.stream.state import StreamState
from streamfill.stream.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


class Manager:
    """Implements `interface.StreamManager`."""

    def __init__(self, config: RouterConfig) -> None:
        """Reads the model's description and tokenizer, no weights.

        Raises:
            ModelError: the model folder cannot be read, or the model not be served.
            ConfigError: traces are asked for, and the packages that export them are not there; or
                there is no such placement policy or option.
        """
        folder = Path(config.model_path)
        facts = describe_model(folder)
        self.zmq_port = config.zmq_port
        """The port that servers connect to; final after `start`."""
        self._config = config
        self._facts = facts
        self._context_tokens = min(
            facts.context_length_tokens, config.context_tokens or facts.context_length_tokens
        )
        self._tokenizer = load_tokenizer(folder)
        self._template = ChatTemplate.load(folder)
        admission = AdmissionLimits(
            cap_tokens=config.max_uncommitted_tokens,
            max_waiting=config.max_waiting_segments,
            wait_s=config.admission_wait_s,
        )
        self.metrics = RouterMetrics()
        self.ended_streams = EndedStreams(self.metrics.set)
        self._traces = start_traces(config.otlp_endpoint, os.environ, self.metrics.spans_lost.inc)
        if self._traces is not None:
            self.ended_streams.then = self._traces.add
        self._published_s = float("-inf")
        placer = Placer(
            make_placement(config.placement, config.placement_options),
            format_placement(config.placement, config.placement_options),
        )
        self._cluster = Cluster(
            self, facts.vocab_size, self._context_tokens, admission, self.metrics, placer=placer
        )
        self._sessions: dict[StreamId, Session] = {}
        self._handles: dict[StreamId, ClientHandle] = {}
        self._finished: OrderedDict[StreamId, float] = OrderedDict()
        self._outcomes: Counter[str] = Counter()
        self._draining = False
        self._ready = False
        self._readiness_changed = asyncio.Event()
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._housekeeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen for servers.

        Raises:
            ConfigError: the port is in use, or the host is no address of this machine.
        """
        self.zmq_port = self._cluster.start(
            self._config.zmq_host or self._config.host, self._config.zmq_port
        )
        self.ended_streams.start()
        self._housekeeper = asyncio.create_task(self._housekeep(), name="router-housekeeping")

    async def close(self) -> None:
        """End everything at once. Idempotent."""
        self._draining = True
        self._cancel_all("the router stops")
        if self._housekeeper is not None:
            self._housekeeper.cancel()
            await asyncio.gather(self._housekeeper, return_exceptions=True)
            self._housekeeper = None
        self._cluster.close()
        await asyncio.to_thread(self._close_ended_streams)

    def _close_ended_streams(self) -> None:
        self.ended_streams.close()
        if self._traces is not None:
            self._traces.close()
            self._traces = None

    # For the service.

    async def open(self, options: OpenOptions) -> StreamHandle:
        """See `interface.StreamManager`."""
        if options.deadline_s is not None and not options.deadline_s > 0:
            raise InvalidArgumentError(f"deadline_s is {options.deadline_s}, must be above 0")
        self._check_accepting()
        if not await self._cluster.wait_for_prefill(timing.PLACE_WAIT_S):
            raise UnavailableError("no prefill server is alive")
        self._check_accepting()
        prompt = Prompt(self._tokenizer, self._template)
        first: list[Splice] = []
        if options.messages is not None:
            segment = Segment(messages=options.messages)
            first = prompt.draft(StreamMode.UPDATE, segment, self._cluster.limits())
        session = Session(
            self._cluster,
            self._tokenizer,
            prompt,
            options,
            idle_timeout_s=self._config.idle_stream_timeout_s,
            on_end=self._on_end,
        )
        handle = ClientHandle(session, self._cluster)
        self._sessions[session.stream_id] = session
        self._handles[session.stream_id] = handle
        self._all_ended.clear()
        self.metrics.opened[options.mode].inc()
        session.try_place(time.monotonic())
        owner: dict[str, Any] = {"tenant": options.tenant} if options.tenant else {}
        log_event(
            logger,
            "stream_opened",
            stream_id=session.stream_id,
            request_id=options.request_id,
            mode=options.mode,
            **owner,
        )
        await handle.begin(first)
        return handle

    def get(self, stream_id: int) -> StreamHandle:
        """See `interface.StreamManager`. An ended stream is found for a while."""
        handle = self._handles.get(StreamId(stream_id))
        if handle is None:
            raise StreamNotFoundError(f"there is no stream {stream_id}, or not any more")
        return handle

    def info(self) -> ClusterInfo:
        """See `interface.StreamManager`."""
        now_s = time.monotonic()
        return ClusterInfo(
            model=self._config.model_path,
            vocab_size=self._facts.vocab_size,
            context_tokens=self._cluster.limits().context_tokens,
            pool_tokens=self._cluster.pool_tokens or 0,
            ready=self._is_ready(),
            decode_available=self._cluster.is_usable(Role.DECODE),
            num_open_streams=len(self._sessions),
            num_streams_by_outcome=dict(self._outcomes),
            num_malformed_frames=self._cluster.num_malformed_frames,
            servers=[self._server_info(server, now_s) for server in self._cluster.registry],
            placement=self._cluster.placer.spec,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """See `interface.StreamManager`."""
        found = self._tokenizer.token_bytes(token_id)
        if found:
            return found
        return self._tokenizer.decode((token_id,), skip_special_tokens=False).encode("utf-8")

    async def flush_caches(self, timeout_s: float) -> dict[ServerId, bool]:
        """Empty the KV caches of all servers; per server whether it did. Refused by a server that
        has streams, and False for one that did not answer in time."""
        servers = [server for server in self._cluster.registry if not server.is_dead]
        questions = self._cluster.questions
        question = r.FlushCache(request_id=questions.new_id())
        answers = await questions.ask(servers, question, s.CacheFlushed, timeout_s)
        return {name: answer is not None and answer.ok for name, answer in answers.items()}

    async def set_policy(
        self,
        policy: str,
        options: Mapping[str, str],
        server_id: ServerId | None,
        timeout_s: float,
    ) -> dict[ServerId, PolicyOutcome]:
        """See `interface.StreamManager`."""
        return await self._cluster.policies.set(policy, options, server_id, timeout_s)

    async def describe_streams(
        self, stream_id: int | None, timeout_s: float
    ) -> dict[ServerId, ServerStreams]:
        """See `interface.StreamManager`."""
        if stream_id is not None:
            self.get(stream_id)
        return await self._cluster.policies.describe(stream_id, timeout_s)

    async def wait_readiness_change(self) -> bool:
        """See `interface.StreamManager`."""
        before = self._ready
        while self._ready == before:
            await self._readiness_changed.wait()
        return self._ready

    async def drain(self, timeout_s: float) -> None:
        """See `interface.StreamManager`."""
        self._draining = True
        self._note_readiness()
        try:
            await asyncio.wait_for(self._all_ended.wait(), timeout_s)
        except TimeoutError:
            log_event(logger, "drain_timeout", num_open_streams=len(self._sessions))
        self._cancel_all("the router is shutting down")
        deadline_s = time.monotonic() + timing.DRAIN_CANCEL_WAIT_S
        while len(self._cluster.cancels) and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(timing.HOUSEKEEPING_INTERVAL_S / 2)

    # For the cluster.

    def on_stream_message(self, server: Server, message: StreamMessage) -> None:
        """A server said something about a stream."""
        session = self._sessions.get(StreamId(message.stream_id))
        if session is not None:
            session.on_message(server, message)
            return
        self._cluster.num_stale_messages += 1
        if isinstance(message, s.Output | s.Progress | s.ResyncRequest):
            now_s = time.monotonic()
            self._cluster.cancels.add(server, message.stream_id, message.attempt, now_s)

    def on_streams_lost(self, server: Server, reason: str) -> None:
        """A server died or started anew."""
        for session in list(self._sessions.values()):
            session.on_streams_lost(server, reason)
        self._note_readiness()

    def on_server_usable(self) -> None:
        """A server became alive."""
        now_s = time.monotonic()
        for session in list(self._sessions.values()):
            session.try_place(now_s)
        self._note_readiness()

    def on_server_draining(self, server: Server) -> None:
        """A server takes nothing new."""
        if server.role is Role.PREFILL:
            for session in list(self._sessions.values()):
                session.move_from(server)
        else:
            for session in list(self._sessions.values()):
                session.leave_target(server)
        self._note_readiness()

    async def _housekeep(self) -> None:
        while True:
            await asyncio.sleep(timing.HOUSEKEEPING_INTERVAL_S)
            try:
                self._housekeep_once(time.monotonic())
            except Exception as error:  # noqa: BLE001  the streams' deadlines hang on this loop
                log_event(logger, "housekeeping_failed", level=logging.ERROR, exception=error)

    def _housekeep_once(self, now_s: float) -> None:
        self._cluster.housekeep(now_s)
        self._note_readiness()
        for session in list(self._sessions.values()):
            if now_s >= session.due_s:
                session.tick(now_s)
        if now_s >= self._published_s + PUBLISH_INTERVAL_S:
            self._publish(now_s)
        while self._finished:
            stream_id, ended_s = next(iter(self._finished.items()))
            is_old = now_s > ended_s + timing.FINISHED_RETENTION_S
            if not is_old and len(self._finished) <= timing.MAX_FINISHED_STREAMS:
                return
            del self._finished[stream_id]
            del self._handles[stream_id]

    def _publish(self, now_s: float) -> None:
        self._published_s = now_s
        servers = list(self._cluster.registry)
        self.metrics.publish(
            RouterSnapshot(
                at_s=now_s,
                ready=self._is_ready(),
                num_open_by_state=Counter(each.state for each in self._sessions.values()),
                servers=tuple(self._server_info(server, now_s) for server in servers),
                pending_tokens={server.server_id: server.pending_tokens for server in servers},
                num_malformed_frames=self._cluster.num_malformed_frames,
                num_stale_messages=self._cluster.num_stale_messages,
            )
        )

    def _server_info(self, server: Server, now_s: float) -> ServerInfo:
        return _server_info(server, self._cluster.room.counters(server), now_s)

    def _on_end(self, session: Session, ended: EndedStream) -> None:
        self._outcomes[session.state.value] += 1
        self.metrics.ended[session.state].inc()
        self.ended_streams.add(ended)
        payer = session.options.payer
        if payer is not None:
            payer.ended()
        del self._sessions[session.stream_id]
        self._finished[session.stream_id] = time.monotonic()
        if not self._sessions:
            self._all_ended.set()

    def _cancel_all(self, reason: str) -> None:
        for session in list(self._sessions.values()):
            session.end(StreamState.ABORTED, UnavailableError(reason))

    def _check_accepting(self) -> None:
        if self._draining:
            raise UnavailableError("the router is shutting down and takes nothing new")
        if len(self._sessions) >= self._config.max_streams:
            raise ResourceExhaustedError(
                f"{len(self._sessions)} streams are open, at most {self._config.max_streams}",
                details={"max_streams": self._config.max_streams},
            )

    def _is_ready(self) -> bool:
        return not self._draining and self._cluster.is_usable(Role.PREFILL)

    def _note_readiness(self) -> None:
        ready = self._is_ready()
        if ready != self._ready:
            self._ready = ready
            log_event(logger, "readiness", ready=ready)
            changed, self._readiness_changed = self._readiness_changed, asyncio.Event()
            changed.set()


def _server_info(server: Server, admission: AdmissionCounters | None, now_s: float) -> ServerInfo:
    return ServerInfo(
        server_id=server.server_id,
        role=server.role,
        state=server.state.value,
        pid=server.facts.pid,
        num_assigned_streams=server.num_streams,
        heartbeat_age_s=max(0.0, now_s - server.heard_s),
        loop_age_s=server.loop_age_s,
        controller_alive=server.controller_alive and not server.is_dead,
        counters=server.counters,
        admission=admission,
        policy=server.policy,
    )
