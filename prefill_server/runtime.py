"""A prefill server inside SGLang's scheduler process: the core, the sending endpoint, the line to
the controller."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from prefill_server.core import PrefillCore
from prefill_server.pushes import EarlyPush
from prefill_server.swap import SwapEngine, block_tokens, host_blocks
from streamfill.config import ServerConfig
from streamfill.engine.host_memory import read_host_memory
from streamfill.engine.scheduler_engine import SchedulerEngine
from streamfill.kv_transfer.sender import KvSender
from streamfill.messages.control import Plan, PreemptionMode, Telemetry
from streamfill.models.home import streamfill_home
from streamfill.observability.logging import log_event
from streamfill.preemption.client import ControllerClient
from streamfill.preemption.costs import CostModel
from streamfill.profiling.profile_file import costs_for
from streamfill.serving.deciding import PolicySetting, PreemptionSetting
from streamfill.serving.rank_mailbox import RankMailbox
from streamfill.serving.runtime import SchedulerRuntime
from streamfill.serving.turn import TransportEvent

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CPU_SEGMENT_TOKENS = 96
"""About 0.3 s of SmolLM2 on one core, which is what a commit may wait for. A step costs some 50 ms
there beside 2.5 ms per token, so steps of 256 tokens would be a tenth faster."""
GPU_SEGMENT_TOKENS = 2048
"""Some 0.1 s of an 8-billion-parameter model on an H200 (docs/benchmarks/preemption.md), which
larger steps would use hardly better; the published engine has steps as large for its crawler."""
LAST_TRANSFERS_S = 3.0
"""For transfers of ranks whose rank 0 is through with its own. Less than rank 0 waits for these
processes to end."""
TELEMETRY_INTERVAL_S = 0.5
"""A plan stands until the next; half a second is short beside the seconds between segments."""


class PrefillRuntime(SchedulerRuntime):
    """One rank of a prefill server."""

    def __init__(
        self, config: ServerConfig, model_id: str, rank: int, mailbox: RankMailbox, step_tokens: int
    ) -> None:
        """``step_tokens``: prefill tokens of one step; the rest as ``SchedulerRuntime``."""
        super().__init__(config, model_id, rank, mailbox)
        self._step_tokens = step_tokens
        self._sender: KvSender | None = None
        self._prefill_core: PrefillCore | None = None
        self._controller: ControllerClient | None = None
        self._reported_s = 0.0
        if rank == 0 and config.controller_endpoint is not None:
            self._controller = ControllerClient(
                *(config.controller_endpoint, config.server_id, self.incarnation), keys=self.keys
            )

    def build_core(self, engine: SchedulerEngine) -> PrefillCore:
        share = self.head_share(engine)
        self._sender = KvSender(
            self.config.server_id,
            engine.kv_pool.layout,
            share=share,
            incarnation=self.incarnation,
            device=engine.kv_pool.device,
            codec=self.config.kv_codec,
            keys=self.keys,
        )
        self._prefill_core = PrefillCore(
            engine,
            self.send,
            PolicySetting(
                name=self.config.policy,
                options=self.config.policy_options,
                segment_tokens=self._segment_tokens(engine.kv_pool.device),
                can_interrupt=engine.breaks is not None,
            ),
            self._sender,
            share=share,
            step_tokens=self._step_tokens,
            clock=self.clock,
            preemption=PreemptionSetting(
                mode=PreemptionMode(self.config.preemption),
                costs=self._costs(engine.kv_pool.device),
            ),
            early_push=EarlyPush(self.config.early_push),
            first_transfer_id=self._first_transfer_id(),
        )
        self._attach_swap(engine)
        return self._prefill_core

    def _costs(self, device: torch.device) -> CostModel:
        """What getting KV back costs, to begin with. All ranks read the same file."""
        costs, source = costs_for(
            self.config.cost_profile,
            home=streamfill_home(),
            model=Path(self.config.model_path).name,
            device_type=device.type,
        )
        log_event(logger, "cost_model", source=source)
        recompute = msgspec.structs.replace(costs.recompute, pass_tokens=self._step_tokens)
        return msgspec.structs.replace(costs, recompute=recompute)

    def _first_transfer_id(self) -> int:
        """Of pushes: the same on all ranks, and differs with each start."""
        return self.mailbox.shared_number

    def _attach_swap(self, engine: SchedulerEngine) -> None:
        """Give the engine its host memory."""
        pool = engine.kv_pool
        layout = pool.layout
        num_blocks = host_blocks(
            self.config.host_pool_tokens,
            num_device_tokens=engine.memory().total_tokens,
            page_size=layout.page_size,
            bytes_per_token=layout.bytes_per_token,
            memory_bytes=read_host_memory().total_bytes // self.config.tp_size,
        )
        num_tokens = num_blocks * block_tokens(layout.page_size)
        log_event(
            logger,
            "host_pool",
            num_tokens=num_tokens,
            num_bytes=num_tokens * layout.bytes_per_token,
        )
        if num_blocks:
            k_buffers, v_buffers = pool.buffers
            engine.attach_swap(
                SwapEngine(
                    k_buffers,
                    v_buffers,
                    page_size=layout.page_size,
                    num_host_blocks=num_blocks,
                )
            )

    def _segment_tokens(self, device: torch.device) -> int:
        """Tokens of uncommitted streams in one step."""
        if self.config.segment_tokens is not None:
            return self.config.segment_tokens
        return CPU_SEGMENT_TOKENS if device.type == "cpu" else GPU_SEGMENT_TOKENS

    def wake_sources(self) -> list[Any]:
        sources: list[Any] = [] if self._sender is None else [self._sender]
        if self._controller is not None:
            sources.append(self._controller.socket)
        return sources

    def control_port(self) -> int:
        return 0

    def poll_transport(self) -> list[int]:
        if self._prefill_core is not None:
            self._prefill_core.poll_transfers()
            if self.rank != 0:
                self._prefill_core.forget_transfers()
        return []

    def poll_transport_events(self) -> list[TransportEvent]:
        return [] if self._prefill_core is None else self._prefill_core.poll_events()

    def take_transport_events(self, events: tuple[TransportEvent, ...]) -> None:
        if self._prefill_core is not None:
            self._prefill_core.take_events(events)

    def poll_controller(self) -> tuple[Plan | None, bool]:
        controller = self._controller
        if controller is None:
            return None, False
        now_s = time.monotonic()
        if now_s - self._reported_s >= TELEMETRY_INTERVAL_S:
            self._reported_s = now_s
            memory, room = self.core.engine.memory(), self.core.engine.host_room()
            decider = self.core.decider
            controller.report(
                Telemetry(
                    server_id=self.config.server_id,
                    incarnation=self.incarnation,
                    report=0,
                    num_free_tokens=memory.free_tokens,
                    num_cached_tokens=memory.evictable_tokens,
                    num_total_tokens=memory.total_tokens,
                    num_host_tokens=room.num_tokens,
                    num_free_host_tokens=room.num_free_tokens,
                    bytes_per_token=room.bytes_per_token,
                    mode=decider.preemption_mode,
                    costs=decider.costs.model(),
                    streams=self.core.telemetry(),
                )
            )
        return controller.poll(), controller.alive

    def num_malformed_frames(self) -> int:
        num_frames = 0 if self._sender is None else self._sender.stats().num_malformed_frames
        return num_frames + (self._controller.num_malformed_frames if self._controller else 0)

    def close_transport(self) -> None:
        if self.rank != 0 and self._prefill_core is not None:
            self._end_transfers()
        if self._sender is not None:
            self._sender.close()
        if self._controller is not None:
            self._controller.close()

    def _end_transfers(self) -> None:
        """Rank 0 decides when all stop, and knows of its own transfers only."""
        until_s = time.monotonic() + LAST_TRANSFERS_S
        while self.core.transport_counters().num_transfers and time.monotonic() < until_s:
            self.poll_transport()
            time.sleep(0.01)
