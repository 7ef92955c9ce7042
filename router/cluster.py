"""The servers as one thing that streams are placed on: sockets, registry, load, cancellations.

Everything about a single stream is passed on to the `ClusterListener`, which is the manager.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Collection, Sequence
from typing import Protocol

from router import timing
from router.admission import AdmissionLimits
from router.cancels import OutstandingCancels
from router.link import Identity, RouterLink
from router.metrics import RouterMetrics
from router.placement import ServerState, choose_server
from router.placement.follower import ResidencyFollower
from router.placement.placer import Placer, StreamPlacing
from router.policies import Policies
from router.prompt import PromptLimits
from router.questions import Questions
from router.servers import RegistrationRefusedError, Server, ServerRegistry, fresh_incarnation
from router.waiting_room import WaitingRoom
from streamfill.curve.keys import ListenKeys
from streamfill.errors import ProtocolError
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Role
from streamfill.observability.logging import RateLimited, log_event
from streamfill.stream.ids import ServerId, StreamId, TransferId

logger = logging.getLogger(__name__)

StreamMessage = (
    s.Received | s.ResyncRequest | s.Progress | s.Output | s.HandoffReport | s.StreamFailed
)

STALL_S = 0.5
"""The loop came round so much too late: nobody could be heard meanwhile."""


class ClusterListener(Protocol):
    """Told what happens. Called from the router's loop, must not wait."""

    def on_stream_message(self, server: Server, message: StreamMessage) -> None:
        """A living server said something about a stream."""

    def on_streams_lost(self, server: Server, reason: str) -> None:
        """A server died or lost its memory; nothing that was there is there any more."""

    def on_server_usable(self) -> None:
        """A server became alive; what waits for one may be placed."""

    def on_server_draining(self, server: Server) -> None:
        """A server takes nothing new and would like to be rid of what can go elsewhere."""


class Cluster:
    """Owned by the router's loop. `start` before anything else, `close` at the end."""

    def __init__(
        self,
        listener: ClusterListener,
        vocab_size: int,
        context_tokens: int,
        admission: AdmissionLimits,
        metrics: RouterMetrics,
        *,
        placer: Placer,
        keys: ListenKeys | None = None,
    ) -> None:
        self.metrics = metrics
        """Where the streams count what happens to them."""
        self.incarnation = fresh_incarnation()
        self.registry = ServerRegistry(self.incarnation, vocab_size)
        self.cancels = OutstandingCancels(self.send)
        self.room = WaitingRoom(admission, metrics)
        self.questions = Questions(self.send)
        self.policies = Policies(self.send, self.questions, self.registry)
        self.placer = placer
        self.residency = ResidencyFollower(placer, self._watch_residency)
        self.num_stale_messages = 0
        self._listener = listener
        self._vocab_size = vocab_size
        self._context_tokens = context_tokens
        self._limits: PromptLimits | None = None
        self._limits_as_of = 0
        """`num_changes` of the registry that it was made of."""
        self._link = RouterLink(
            self._on_message,
            keys=keys,
            on_refused=metrics.count_refused_handshake,
            on_unreachable=self._note_unreachable,
        )
        self._ids = itertools.count(1)
        # The upper half differs with each start, so that no id is ever used twice.
        self._id_base = (self.incarnation >> 31) << 32
        self._usable_waiters: set[asyncio.Future[None]] = set()
        self._next_heartbeat_s = 0.0
        self._housekept_s = time.monotonic()
        self._log_refused = RateLimited()

    def start(self, host: str, port: int) -> int:
        """Listen for servers; returns the port. Raises ConfigError."""
        return self._link.bind(host, port)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._link.close()

    @property
    def num_malformed_frames(self) -> int:
        """Since the start."""
        return self._link.num_malformed_frames

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus answer that every server takes."""
        return min(
            (server.facts.context_tokens for server in self.registry if not server.is_dead),
            default=self._context_tokens,
        )

    @property
    def pool_tokens(self) -> int | None:
        """Of the smallest prefill server; None while there is none."""
        return min(
            (server.facts.pool_tokens for server in self._of(Role.PREFILL)),
            default=None,
        )

    def limits(self) -> PromptLimits:
        """What prompts must keep to right now. Asked for each segment, so it is kept."""
        num_changes = self.registry.num_changes
        if self._limits is None or self._limits_as_of != num_changes:
            self._limits_as_of = num_changes
            self._limits = PromptLimits(
                vocab_size=self._vocab_size,
                context_tokens=min(self._context_tokens, self.context_tokens),
                pool_tokens=self.pool_tokens,
            )
        return self._limits

    def room_tokens(self) -> int:
        """For prompt and answer together, such that SGLang does not shorten the answer further.

        SGLang's own bound is two tokens less than the context
        (``Scheduler.init_req_max_new_tokens``); servers register what it leaves.
        """
        room = min(self._context_tokens - 2, self.context_tokens)
        for server in self._of(Role.PREFILL):
            room = min(room, server.facts.pool_tokens)
        return room

    def new_stream_id(self) -> StreamId:
        """Never used before, by no router."""
        return StreamId(self._id_base + next(self._ids))

    def new_transfer_id(self) -> TransferId:
        """Never used before, by no router."""
        return TransferId(self._id_base + next(self._ids))

    def send(self, server: Server, message: r.RouterToServer) -> None:
        """Send, or drop when the server is dead; what matters is repeated until acknowledged."""
        if not server.is_dead:
            self._link.send(server.identity, message)

    def _note_unreachable(self, identity: bytes) -> None:
        server = self.registry.by_identity(identity)
        if server is not None:
            server.reachable = False

    def choose_decode(
        self,
        *,
        need_tokens: int,
        avoid: Collection[ServerId] = (),
        prefer: ServerId | None = None,
    ) -> Server | None:
        """The least loaded living decode server. See `placement.choose_server`."""
        loads = (server.load() for server in self.registry)
        chosen = choose_server(
            loads, Role.DECODE, need_tokens=need_tokens, avoid=avoid, prefer=prefer
        )
        self.metrics.decode_chosen(is_found=chosen is not None)
        return None if chosen is None else self.registry.by_id(chosen)

    def choose_prefill(
        self,
        placing: StreamPlacing,
        prompt: Sequence[int],
        *,
        is_complete: bool,
        need_tokens: int,
        avoid: Collection[ServerId] = (),
    ) -> Server | None:
        """What the placement policy says, of living servers, one that has room if possible. See
        `placement.placer`."""
        chosen = self.placer.choose(
            placing.request(prompt, time.monotonic(), is_complete=is_complete),
            [server.load(self.room.spare_tokens(server)) for server in self.registry],
            need_tokens=need_tokens,
            avoid={*avoid, *self.room.full_servers()},
        )
        return None if chosen is None else self.registry.by_id(chosen)

    def is_usable(self, role: Role) -> bool:
        """Whether a server of this role is alive."""
        return any(server.state is ServerState.ALIVE for server in self._of(role))

    async def wait_for_prefill(self, timeout_s: float) -> bool:
        """Whether a prefill server is alive, now or within this time."""
        deadline_s = time.monotonic() + timeout_s
        while not self.is_usable(Role.PREFILL):
            waiter = asyncio.get_running_loop().create_future()
            self._usable_waiters.add(waiter)
            try:
                # And not `wait_for`, which before Python 3.12 may swallow a cancellation.
                async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                    await waiter
            except TimeoutError:
                return self.is_usable(Role.PREFILL)
            finally:
                self._usable_waiters.discard(waiter)
        return True

    def housekeep(self, now_s: float) -> None:
        """Heartbeats, deaths, repetitions. Called every `HOUSEKEEPING_INTERVAL_S`."""
        stalled_s = now_s - self._housekept_s - timing.HOUSEKEEPING_INTERVAL_S
        self._housekept_s = now_s
        if stalled_s > STALL_S:
            log_event(
                logger, "router_stalled", level=logging.WARNING, stalled_s=round(stalled_s, 2)
            )
            self.registry.forgive(stalled_s)
        if now_s >= self._next_heartbeat_s:
            self._next_heartbeat_s = now_s + timing.HEARTBEAT_INTERVAL_S
            for server in self.registry:
                beat = r.RouterHeartbeat(router_incarnation=server.router_incarnation)
                self.send(server, beat)
        suspects, dead = self.registry.sweep(now_s)
        for server in suspects:
            log_event(logger, "server_suspect", level=logging.WARNING, server_id=server.server_id)
        for server in dead:
            self._lose(server, f"server {server.server_id} died")
        self.cancels.tick(now_s)
        self.policies.tick(now_s)
        self.residency.tick(now_s)

    def _watch_residency(self, server_id: ServerId, block_tokens: int) -> None:
        self.send(self.registry.by_id(server_id), r.WatchResidency(block_tokens=block_tokens))

    def _hear_residency(self, server: Server, report: s.Residency) -> None:
        try:
            self.residency.heard(server.server_id, report, time.monotonic())
        except ProtocolError as error:
            self.send(server, r.Malformed(reason=str(error)))

    def _of(self, role: Role) -> list[Server]:
        return [x for x in self.registry if x.role is role and not x.is_dead]

    def _lose(self, server: Server, reason: str) -> None:
        log_event(
            logger,
            "server_lost",
            level=logging.WARNING,
            server_id=server.server_id,
            role=server.role,
            reason=reason,
            num_streams=server.num_streams,
        )
        self.cancels.drop(server)
        self.questions.lost(server)
        self.residency.lost(server.server_id)
        self._listener.on_streams_lost(server, reason)
        self.room.drop(server)

    def became_usable(self) -> None:
        """A server takes streams that did not before."""
        for waiter in self._usable_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._listener.on_server_usable()

    def _on_message(self, identity: Identity, message: s.ServerToRouter) -> None:
        match message:
            case s.Register():
                self._register(identity, message)
                return
            case s.ServerHeartbeat():
                self._heartbeat(identity, message)
                return
        server = self.registry.by_identity(identity)
        if server is None:
            # Of a process that is dead to us, or that reconnected and whose heartbeat comes next.
            self.num_stale_messages += 1
            return
        match message:
            case s.Closed(stream_id=stream_id, attempt=attempt):
                self.cancels.closed(server, stream_id, attempt)
            case s.CacheFlushed():
                self.questions.answered(server, message)
            case s.PolicySet() | s.StreamsDescribed():
                self.policies.heard(server, message)
                self.questions.answered(server, message)
            case s.Residency():
                self._hear_residency(server, message)
            case s.Draining():
                log_event(logger, "server_draining", server_id=server.server_id)
                server.state = ServerState.DRAINING
                server.is_leaving = True
                self._listener.on_server_draining(server)
            case s.MalformedByRouter(reason=reason):
                log_event(
                    logger,
                    "server_could_not_read",
                    level=logging.ERROR,
                    server_id=server.server_id,
                    reason=reason,
                )
            case _:
                self._listener.on_stream_message(server, message)

    def _register(self, identity: Identity, facts: s.Register) -> None:
        try:
            registration = self.registry.register(identity, facts, time.monotonic())
        except RegistrationRefusedError as error:
            if self._log_refused.allow():
                log_event(
                    logger,
                    "registration_refused",
                    level=logging.WARNING,
                    server_id=facts.server_id,
                    reason=str(error),
                )
            self._link.send(identity, r.RegistrationRefused(reason=str(error)))
            return
        server = registration.server
        self._link.send(
            identity,
            r.Registered(
                router_incarnation=server.router_incarnation,
                heartbeat_interval_s=timing.HEARTBEAT_INTERVAL_S,
            ),
        )
        if registration.lost is not None:
            self._lose(registration.lost, f"server {server.server_id} started anew")
        if registration.is_new:
            log_event(
                logger,
                "server_registered",
                server_id=server.server_id,
                role=server.role,
                pid=facts.pid,
                pool_tokens=facts.pool_tokens,
            )
            self.policies.settle(server, time.monotonic())
            if server.role is Role.PREFILL:
                self.residency.follow(server.server_id, time.monotonic())
            self.became_usable()

    def _heartbeat(self, identity: Identity, beat: s.ServerHeartbeat) -> None:
        outcome = self.registry.heartbeat(identity, beat, time.monotonic())
        if isinstance(outcome, int):
            self._link.send(identity, r.RouterHeartbeat(router_incarnation=outcome))
        elif outcome[1]:
            log_event(logger, "server_recovered", server_id=outcome[0].server_id)
            self.became_usable()
