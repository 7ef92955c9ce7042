"""The router's core: all streams, and the cluster that they run on.

`start` binds the socket for servers. From then on two things drive it, both in one asyncio loop:
frames of servers, and `_housekeep` ten times a second. Clients come in through `open` and `get`.
`drain` takes nothing new and waits; `close` ends what is left.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import Any

from router import timing
from router.admission import AdmissionCounters, AdmissionLimits
from router.cluster import Cluster, StreamMessage
from router.drains import Drains
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
from router.readiness import Readiness, readiness
from router.rebalancer import Rebalancer
from router.recovery.keeper import Keeper
from router.recovery.log_writer import LogMetrics
from router.recovery.replay import LoggedStream
from router.servers import Server
from router.session import Session
from router.traces import start_traces
from router.watch.frames import Frame
from router.watch.hub import Watches
from router.watch.wish import WatchWish
from streamfill.config import RouterConfig
from streamfill.curve.keys import keys_to_listen
from streamfill.errors import (
    ConfigError,
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


MAX_PLACED_PER_TURN = 128
"""Streams sent to a server before the loop gets to its other work; each takes up to 0.1 ms."""


class Manager:
    """Implements `interface.StreamManager`."""

    def __init__(self, config: RouterConfig) -> None:
        """Reads the model's description and tokenizer, no weights.

        Raises:
            ModelError: the model folder cannot be read, or the model not be served.
            ConfigError: traces are asked for, and the packages that export them are not there; or
                others could reach the port for servers, and there are no keys for it, or
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
        self._keeper = _keeper(config, facts.vocab_size, self.metrics.log)
        self._published_s = float("-inf")
        placer = Placer(
            make_placement(config.placement, config.placement_options),
            format_placement(config.placement, config.placement_options),
            self.metrics.placed,
        )
        keys = keys_to_listen(
            config,
            "router.host" if config.zmq_host is None else "router.zmq_host",
            config.zmq_host or config.host,
        )
        self._cluster = Cluster(
            self,
            facts.vocab_size,
            self._context_tokens,
            admission,
            self.metrics,
            placer=placer,
            keys=keys,
        )
        self._sessions: dict[StreamId, Session] = {}
        self._drains = Drains(
            self._cluster.registry,
            lambda: list(self._sessions.values()),
            (lambda drains: None) if self._keeper is None else self._keeper.keep_drains,
        )
        self._rebalancer = (
            Rebalancer(self._cluster, self._sessions.values) if config.rebalance else None
        )
        self._handles: dict[StreamId, ClientHandle] = {}
        self._finished: OrderedDict[StreamId, float] = OrderedDict()
        self._outcomes: Counter[str] = Counter()
        self._watches = Watches(self)
        self._draining = False
        self._ready = False
        self._readiness_changed = asyncio.Event()
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._housekeeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up the streams of the log, if there is one, then listen for servers.

        Raises:
            ConfigError: the port is in use, or the host is no address of this machine; the log
                cannot be used.
        """
        if self._keeper is not None:
            self._take_up(self._keeper)
        self.zmq_port = self._cluster.start(
            self._config.zmq_host or self._config.host, self._config.zmq_port
        )
        self.ended_streams.start()
        self._housekeeper = asyncio.create_task(self._housekeep(), name="router-housekeeping")

    async def close(self) -> None:
        """End everything at once. Idempotent."""
        self._draining = True
        self._watches.close()
        self._cancel_all("the router stops")
        if self._housekeeper is not None:
            self._housekeeper.cancel()
            await asyncio.gather(self._housekeeper, return_exceptions=True)
            self._housekeeper = None
        self._cluster.close()
        if self._keeper is not None:
            await asyncio.to_thread(self._keeper.close)
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
        journal = None
        if self._keeper is not None and options.is_resumable:
            journal = self._keeper.journal(session.stream_id, session.events)
        await handle.begin(first, journal)
        return handle

    def _take_up(self, keeper: Keeper) -> None:
        """Make sessions of the streams that an earlier router process left behind."""
        began_s = time.monotonic()
        gc.disable()  # it would look at all that is made here again and again, in vain
        try:
            found = keeper.open()
            keeper.start()
            self._drains.take_up(keeper.drains())
            num_open = sum(self._take_up_one(keeper, each) for each in found)
        except BaseException:
            keeper.close()
            raise
        finally:
            gc.enable()
        log_event(
            logger,
            "streams_restored",
            num_open=num_open,
            num_ended=len(self._finished),
            seconds=round(time.monotonic() - began_s, 3),
        )

    def _take_up_one(self, keeper: Keeper, found: LoggedStream) -> bool:
        """Whether it goes on."""
        opened, stream_id = found.opened, StreamId(found.stream_id)
        prompt = Prompt(self._tokenizer, self._template)
        options = OpenOptions(
            mode=opened.mode,
            priority=opened.priority,
            request_id=opened.request_id,
            deadline_s=opened.deadline_s,
            ttft_slo_s=opened.ttft_slo_s,
            tenant=opened.tenant,
            namespace=opened.namespace,
            share=opened.share,
            is_resumable=True,
            needs_call=opened.needs_call,
        )
        session = Session(
            self._cluster,
            self._tokenizer,
            prompt,
            options,
            idle_timeout_s=self._config.idle_stream_timeout_s,
            on_end=self._on_end,
            stream_id=stream_id,
        )
        journal = keeper.journal(stream_id, session.events)
        try:
            prompt.restore(found.prompt.ids, found.prompt.state)
            session.take_up(found, journal, keeper.opened_s(found))
        except Exception as error:  # noqa: BLE001  one stream must not take the others along
            self.metrics.log.failures.inc()
            log_event(
                logger,
                "stream_not_restored",
                level=logging.ERROR,
                stream_id=stream_id,
                exception=error,
            )
            keeper.forget(stream_id)
            return False
        handle = self._handles[stream_id] = ClientHandle(session, self._cluster)
        handle.take_up([each.seq for each in found.refused])
        self.metrics.log.restored.inc()
        if session.machine.is_terminal:
            self._finished[stream_id] = time.monotonic()
            return False
        self._sessions[stream_id] = session
        self._all_ended.clear()
        return True

    def get(self, stream_id: int) -> StreamHandle:
        """See `interface.StreamManager`. An ended stream is found for a while."""
        handle = self._handles.get(StreamId(stream_id))
        if handle is None:
            raise StreamNotFoundError(f"there is no stream {stream_id}, or not any more")
        return handle

    def info(self) -> ClusterInfo:
        """See `interface.StreamManager`."""
        now_s = time.monotonic()
        now = self._readiness()
        return ClusterInfo(
            model=self._config.model_path,
            vocab_size=self._facts.vocab_size,
            context_tokens=self._cluster.limits().context_tokens,
            pool_tokens=self._cluster.pool_tokens or 0,
            ready=now.ready,
            ready_reason=now.reason,
            decode_available=self._cluster.is_usable(Role.DECODE),
            num_open_streams=len(self._sessions),
            num_streams_by_outcome=dict(self._outcomes),
            num_malformed_frames=self._cluster.num_malformed_frames,
            servers=[self._server_info(server, now_s) for server in self._cluster.registry],
            num_moves=dict(self.metrics.num_moves),
            placement=self._cluster.placer.spec,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """See `interface.StreamManager`."""
        if token_id >= self._tokenizer.vocab_size:
            return b""  # padding of the model's
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

    def watch(self, wish: WatchWish) -> AsyncGenerator[Frame, None]:
        """See `interface.StreamManager`."""
        return self._watches.watch(wish)

    async def drain_server(
        self, server_id: ServerId, answers_s: float | None, *, force: bool
    ) -> ServerInfo:
        """See `interface.StreamManager`."""
        now_s = time.monotonic()
        server = self._drains.begin(server_id, answers_s, now_s, force=force)
        self._note_readiness()
        if self._keeper is not None:
            await self._keeper.drains_kept()
        return self._server_info(server, now_s)

    async def resume_server(self, server_id: ServerId) -> ServerInfo:
        """See `interface.StreamManager`."""
        server = self._drains.end(server_id)
        self._cluster.became_usable()
        if self._keeper is not None:
            await self._keeper.drains_kept()
        return self._server_info(server, time.monotonic())

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
        finally:
            self._watches.close()
        self._cancel_all("the router is shutting down")
        deadline_s = time.monotonic() + timing.DRAIN_CANCEL_WAIT_S
        while len(self._cluster.cancels) and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(timing.HOUSEKEEPING_INTERVAL_S / 2)

    # For those who look.

    def open_streams(self) -> list[Session]:
        """See `watch.source.WatchSource`."""
        return list(self._sessions.values())

    def newest_ended(self) -> Iterator[Session]:
        """See `watch.source.WatchSource`."""
        return (self._handles[stream_id].session for stream_id in reversed(self._finished))

    # For the cluster.

    def on_stream_message(self, server: Server, message: StreamMessage) -> None:
        """A server said something about a stream."""
        session = self._sessions.get(StreamId(message.stream_id))
        if session is not None:
            session.on_message(server, message)
            return
        self._cluster.num_stale_messages += 1
        if isinstance(message, s.Received | s.Output | s.Progress | s.ResyncRequest):
            now_s = time.monotonic()
            self._cluster.cancels.add(server, message.stream_id, message.attempt, now_s)

    def on_streams_lost(self, server: Server, reason: str) -> None:
        """A server died or started anew."""
        for session in list(self._sessions.values()):
            session.on_streams_lost(server, reason)
        self._note_readiness()

    def on_server_usable(self) -> None:
        """A server became alive."""
        self._place_some(deque(self._sessions.values()))
        self._drains.tick_now(time.monotonic())
        self._note_readiness()

    def _place_some(self, sessions: deque[Session]) -> None:
        """Behind a restart these are all streams; clients and servers are heard in between."""
        now_s = time.monotonic()
        for _ in range(min(MAX_PLACED_PER_TURN, len(sessions))):
            sessions.popleft().try_place(now_s)
        if sessions:
            asyncio.get_running_loop().call_soon(self._place_some, sessions)

    def on_server_draining(self, server: Server) -> None:
        """A server takes nothing new."""
        self._drains.leave(server, time.monotonic())
        self._drains.note_changes()
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
        self._drains.tick(now_s)
        if self._rebalancer is not None:
            self._rebalancer.tick(now_s)
        self._note_readiness()
        for session in list(self._sessions.values()):
            if session.is_due(now_s):
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
            if self._keeper is not None:
                self._keeper.forget(stream_id)

    def _publish(self, now_s: float) -> None:
        self._published_s = now_s
        servers = list(self._cluster.registry)
        self.metrics.publish(
            RouterSnapshot(
                at_s=now_s,
                ready=self._readiness().ready,
                num_open_by_state=Counter(each.state for each in self._sessions.values()),
                servers=tuple(self._server_info(server, now_s) for server in servers),
                pending_tokens={server.server_id: server.pending_tokens for server in servers},
                num_malformed_frames=self._cluster.num_malformed_frames,
                num_stale_messages=self._cluster.num_stale_messages,
                placement=self._cluster.placer.spec,
                num_residency_gaps=self._cluster.residency.num_gaps,
                num_residency_asked=self._cluster.residency.num_asked,
                num_residency_awaited=self._cluster.residency.num_awaited,
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

    def _readiness(self) -> Readiness:
        return readiness(
            ((server.role, server.state) for server in self._cluster.registry),
            stopping=self._draining,
            without_decode=self._config.ready_without_decode,
        )

    def _note_readiness(self) -> None:
        now = self._readiness()
        if now.ready != self._ready:
            self._ready = now.ready
            log_event(logger, "readiness", ready=now.ready, reason=now.reason)
            changed, self._readiness_changed = self._readiness_changed, asyncio.Event()
            changed.set()


def _keeper(config: RouterConfig, vocab_size: int, metrics: LogMetrics) -> Keeper | None:
    if config.log != "sqlite":
        return None
    if config.log_file is None:
        raise ConfigError("router.log_file", None, 'is needed for log = "sqlite"; name a file')
    return Keeper(Path(config.log_file), f"{config.model_path} {vocab_size}", metrics)


def _server_info(server: Server, admission: AdmissionCounters | None, now_s: float) -> ServerInfo:
    return ServerInfo(
        server_id=server.server_id,
        role=server.role,
        state=server.state.value,
        state_reason=server.state_reason,
        address=server.facts.kv_host,
        version=server.facts.engine_version,
        pool_tokens=server.facts.pool_tokens,
        num_held_tokens=server.held_tokens,
        pid=server.facts.pid,
        num_assigned_streams=server.num_streams,
        heartbeat_age_s=max(0.0, now_s - server.heard_s),
        loop_age_s=server.loop_age_s,
        controller_alive=server.controller_alive and not server.is_dead,
        counters=server.counters,
        admission=admission,
        policy=server.policy,
    )
