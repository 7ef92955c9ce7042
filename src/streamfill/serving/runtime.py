"""What surrounds a server's core in the scheduler process: its links, its transport endpoint, its
signals.

The same object is the server on every rank; only rank 0 has the link to the router and to the
controller.
"""

from __future__ import annotations

import abc
import logging
import os
import secrets
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import zmq

from streamfill.config import ServerConfig
from streamfill.curve.keys import keys_to_connect
from streamfill.engine.interface import EngineFacts
from streamfill.engine.interrupts import LayerBreaks
from streamfill.engine.scheduler_engine import SchedulerEngine
from streamfill.engine.version import PINNED_SGLANG_VERSION
from streamfill.errors import ConfigError
from streamfill.kv_transfer.codecs import NO_CODEC
from streamfill.kv_transfer.slices import HeadShare
from streamfill.launcher.ready_line import announce_ready
from streamfill.links.server_link import ServerLink
from streamfill.messages import PROTOCOL_VERSION
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Role
from streamfill.messages.control import Plan
from streamfill.observability.exposition import MetricsServer
from streamfill.observability.logging import log_event
from streamfill.serving.core import ServingCore
from streamfill.serving.metrics import ServerMetrics, ServerSnapshot
from streamfill.serving.rank_mailbox import RankMailbox
from streamfill.serving.turn import TransportEvent, Turn

logger = logging.getLogger(__name__)

STAGING_LIMIT_BYTES = 1 << 30
"""Of KV on its way in or out. Beyond it a transfer is refused and the decode server recomputes."""
COUNTERS_INTERVAL_S = 0.2
_STREAM_MESSAGES = (
    r.OpenStream,
    r.Splice,
    r.PushTo,
    r.Commit,
    r.HandOff,
    r.Cancel,
    r.Forget,
    r.ResendOutput,
)
"""What can be taken in the middle of a step. The others concern the server as a whole."""
DRAIN_TIMEOUT_S = 25.0
"""Less than the launcher's, so that a server ends by itself."""


class SchedulerRuntime(abc.ABC):
    """A server inside SGLang's scheduler process (``turn.ServerRuntime``)."""

    def __init__(
        self, config: ServerConfig, model_id: str, rank: int, mailbox: RankMailbox
    ) -> None:
        """
        Args:
            config: of the server.
            model_id: digest of the model, the same on all servers of a cluster.
            rank: of this process within the server's tensor-parallel group.
            mailbox: between the ranks.
        """
        self.config = config
        self.rank = rank
        self.mailbox = mailbox
        self.keys = keys_to_connect(config)
        """Of sockets that connect. None: in the clear."""
        self.incarnation = secrets.randbits(63)
        self._model_id = model_id
        self._scheduler: Any = None
        self._engine: SchedulerEngine | None = None
        self._core: ServingCore | None = None
        self._link: ServerLink | None = None
        self._now_s = time.monotonic()
        self._counted_s = 0.0
        self._stop_asked = threading.Event()
        self._drain_until_s: float | None = None
        self._metrics = ServerMetrics(config.server_id, config.role)
        self._metrics_server: MetricsServer | None = None
        if rank == 0 and config.metrics_port is not None:
            # Here and not in `attach`: a port that is in use is told before the model is loaded.
            self._metrics_server = MetricsServer(
                self._metrics.set.registry,
                host=config.metrics_host,
                port=config.metrics_port,
                section=config.role.value,
                token_file=config.metrics_token_file,
            )

    # Given by the roles

    @abc.abstractmethod
    def build_core(self, engine: SchedulerEngine) -> ServingCore:
        """The core and its transport endpoint."""

    @abc.abstractmethod
    def wake_sources(self) -> list[Any]:
        """File descriptors and sockets besides the link's that must end the loop's sleep."""

    @abc.abstractmethod
    def control_port(self) -> int:
        """Port of this rank's receiving transport endpoint; 0 where there is none."""

    def poll_transport(self) -> list[int]:
        """Look after the transport; returns transfers that arrived completely on this rank."""
        return []

    def poll_transport_events(self) -> list[TransportEvent]:
        """On rank 0, after ``poll_transport``: what all ranks have to know."""
        return []

    def take_transport_events(  # noqa: B027  optional
        self, events: tuple[TransportEvent, ...]
    ) -> None:
        """What rank 0 noticed."""

    def take_transfers(self, transfer_ids: tuple[int, ...]) -> None:  # noqa: B027  optional
        """Transfers that arrived completely on every rank."""

    def give_up_transfers(self, transfer_ids: tuple[int, ...]) -> None:  # noqa: B027  optional
        """Transfers that arrived on some ranks only."""

    def poll_controller(self) -> tuple[Plan | None, bool]:
        """A newer plan, and whether the controller lives."""
        return None, False

    def num_malformed_frames(self) -> int:
        """Frames that this rank's transport, and the line to the controller, could not read."""
        return 0

    def num_refused_handshakes(self) -> int:
        """Connections to this rank's transport that had no admitted key."""
        return 0

    def close_transport(self) -> None:  # noqa: B027  optional
        """End the threads of the transport."""

    # turn.ServerRuntime

    def attach(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._engine = SchedulerEngine(scheduler, STAGING_LIMIT_BYTES)
        self._core = self.build_core(self._engine)
        if self._engine.breaks is not None:
            self._engine.breaks.call(self._interrupt)
        ports = self.mailbox.exchange_ports(self.control_port())
        if self.rank == 0:
            self._link = ServerLink(
                self.config.router_endpoint,
                self._registration(self._engine.facts, ports),
                self._end,
                keys=self.keys,
            )
            self._link.start()
            for source in [self._link, *self.wake_sources(), *self.mailbox.wake_sources()]:
                self._wake_on(source)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def gather(self) -> Turn:
        core, link = self.core, self._link
        if link is None:
            raise RuntimeError("only rank 0 gathers")
        now_s = time.monotonic()
        plan, controller_alive = self.poll_controller()
        arrived = self.mailbox.complete(self.poll_transport(), now_s)
        if self.mailbox.kv_codec != NO_CODEC:
            # Before the last rank has the transfer, so before any answer rests on it.
            core.kv_codec, self.mailbox.kv_codec = self.mailbox.kv_codec, NO_CODEC
        if now_s - self._counted_s >= COUNTERS_INTERVAL_S:
            self._counted_s = now_s
            num_malformed_frames = link.num_malformed_frames + self.num_malformed_frames()
            counters = core.counters(num_malformed_frames)
            link.tick(counters, controller_alive)
            self._metrics.publish(
                ServerSnapshot(
                    at_s=now_s,
                    counters=counters,
                    steps=core.step_counts(),
                    controller_alive=controller_alive,
                    registered=link.registered,
                    num_refused_handshakes=self.num_refused_handshakes(),
                )
            )
        return Turn(
            now_s=now_s,
            messages=tuple(link.drain()),
            transfer_ids=tuple(arrived),
            lost_transfer_ids=tuple(self.mailbox.give_up(now_s)),
            plan=plan,
            controller_alive=controller_alive,
            copies=tuple(core.engine.poll_copies()),
            shut_down=self._must_stop(now_s),
            transport=tuple(self.poll_transport_events()),
        )

    def take(self, turn: Turn) -> None:
        core = self.core
        self._now_s = turn.now_s
        core.plan.update(turn.plan, controller_alive=turn.controller_alive)
        core.kv.note_copies(turn.copies)
        if self.rank != 0:
            core.engine.poll_copies()  # rank 0's count
            arrived = self.poll_transport()
            self.mailbox.report(arrived, core.kv_codec)
        if turn.transport:
            self.take_transport_events(turn.transport)
        if turn.transfer_ids:
            self.take_transfers(turn.transfer_ids)
        if turn.lost_transfer_ids:
            self.give_up_transfers(turn.lost_transfer_ids)
        was_busy = core.is_busy
        core.step(turn.messages)
        events = turn.messages or turn.transport or turn.transfer_ids or turn.lost_transfer_ids
        if self._link is not None and (events or was_busy or core.is_busy):
            self._link.note_change()
        if turn.shut_down:
            self._scheduler.gracefully_exit = True
            if self._link is not None:
                self._link.wake()  # an idle loop would sleep once more before it looks

    def on_step_end(self) -> None:
        if self._core is not None:
            self._core.step_ended_s = time.monotonic()

    def on_abort(self, message: Any) -> None:
        if self._engine is not None:
            self._engine.on_abort(message)

    def _interrupt(self, breaks: LayerBreaks) -> None:
        """Between two layers of a step of context: commits that came meanwhile go first."""
        link, core = self._link, self.core
        was_interrupted = False
        while link is not None and breaks.is_possible:
            messages = link.drain_while(_STREAM_MESSAGES)
            if not messages and not was_interrupted:
                return
            began_s = self._now_s = time.monotonic()
            plan = core.interrupt(messages, again=was_interrupted)
            if plan is None:
                return
            breaks.run_waiting()
            self._now_s = time.monotonic()
            core.end_interruption(plan, self._now_s - began_s)
            was_interrupted = True

    # Around it

    @property
    def core(self) -> ServingCore:
        """The core, once the scheduler is there."""
        if self._core is None:
            raise RuntimeError("the scheduler is not there yet")
        return self._core

    def head_share(self, engine: SchedulerEngine) -> HeadShare:
        """Which of the model's KV heads this rank holds."""
        return HeadShare(engine.num_model_kv_heads, self.config.tp_size, self.rank)

    def clock(self) -> float:
        """Rank 0's clock as of this turn."""
        return self._now_s

    def send(self, message: s.ServerToRouter) -> None:
        """To the router, from rank 0; the other ranks decide the same and stay silent."""
        if self._link is not None:
            self._link.send(message)

    def announce_ready(self) -> None:
        """Tell the launcher, by one line on standard output."""
        if self.rank == 0:
            facts = {
                "server_id": self.config.server_id,
                "role": self.config.role.value,
                "pid": os.getpid(),
            }
            if self._metrics_server is not None:
                facts["metrics_port"] = self._metrics_server.port
            announce_ready(facts)

    def close(self) -> None:
        """End every thread of ours."""
        if self._link is not None:
            self._link.close()
        self.close_transport()
        self.mailbox.close()
        if self._metrics_server is not None:
            self._metrics_server.close()

    def _wake_on(self, source: Any) -> None:
        sleeper = self._scheduler.idle_sleeper
        if sleeper is not None:
            sleeper.poller.register(source, zmq.POLLIN)

    def _registration(self, facts: EngineFacts, ports: tuple[int, ...]) -> s.Register:
        config = self.config
        return s.Register(
            server_id=config.server_id,
            incarnation=self.incarnation,
            role=config.role,
            protocol_version=PROTOCOL_VERSION,
            pid=os.getpid(),
            model_id=self._model_id,
            vocab_size=facts.vocab_size,
            context_tokens=facts.context_tokens,
            pool_tokens=facts.pool_tokens,
            page_size=facts.page_size,
            tp_size=config.tp_size,
            kv_host=config.host,
            kv_control_ports=ports if config.role is Role.DECODE else (),
            engine_version=f"sglang {PINNED_SGLANG_VERSION}",
        )

    def _end(self, reason: str) -> None:
        """Called in the link's thread: there is nobody to serve, so the process ends."""
        error = ConfigError("server_id", self.config.server_id, reason)
        log_event(logger, "router_link_ended", level=logging.ERROR, reason=reason)
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._stop_asked.is_set():
            os._exit(128 + number)
        self._stop_asked.set()

    def _must_stop(self, now_s: float) -> bool:
        if not self._stop_asked.is_set():
            return False
        if self._drain_until_s is None:
            self._drain_until_s = now_s + DRAIN_TIMEOUT_S
            log_event(logger, "draining", num_streams=self.core.num_streams)
            self.send(s.Draining(server_id=self.config.server_id))
        return self.core.is_through or now_s >= self._drain_until_s
