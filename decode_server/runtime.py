"""A decode server inside SGLang's scheduler process: the core and the receiving endpoint."""

from __future__ import annotations

from typing import Any

from decode_server.core import DecodeCore
from streamfill.config import ServerConfig
from streamfill.curve.keys import keys_to_listen
from streamfill.engine.scheduler_engine import SchedulerEngine
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.serving.deciding import PolicySetting
from streamfill.serving.rank_mailbox import RankMailbox
from streamfill.serving.runtime import STAGING_LIMIT_BYTES, SchedulerRuntime
from streamfill.serving.turn import TransportEvent


class DecodeRuntime(SchedulerRuntime):
    """One rank of a decode server."""

    def __init__(
        self, config: ServerConfig, model_id: str, rank: int, mailbox: RankMailbox, step_tokens: int
    ) -> None:
        """``step_tokens``: recomputed tokens of one step; the rest as ``SchedulerRuntime``."""
        super().__init__(config, model_id, rank, mailbox)
        self._step_tokens = step_tokens
        # Here and not in `build_core`: what is wrong is told before the model is loaded.
        self._listen_keys = keys_to_listen(config, "decode.host", config.host)
        self._receiver: KvReceiver | None = None
        self._decode_core: DecodeCore | None = None

    def build_core(self, engine: SchedulerEngine) -> DecodeCore:
        self._receiver = KvReceiver(
            self.config.server_id,
            engine.kv_pool.layout,
            self.config.host,
            memory_limit_bytes=STAGING_LIMIT_BYTES,
            share=self.head_share(engine),
            incarnation=self.incarnation,
            device=engine.kv_pool.device,
            keys=self._listen_keys,
        )
        self._decode_core = DecodeCore(
            engine,
            self.send,
            PolicySetting(name="fcfs"),  # all that it computes was committed
            self._receiver,
            step_tokens=self._step_tokens,
            clock=self.clock,
            server_id=self.config.server_id,
            rank=self.rank,
        )
        return self._decode_core

    def wake_sources(self) -> list[Any]:
        return [] if self._receiver is None else [self._receiver]

    def control_port(self) -> int:
        return 0 if self._receiver is None else self._receiver.port

    def poll_transport(self) -> list[int]:
        if self._decode_core is None:
            return []
        if self.rank != 0:
            self._decode_core.poll_events()  # rank 0 hears the same
        return self._decode_core.receive()

    def poll_transport_events(self) -> list[TransportEvent]:
        return [] if self._decode_core is None else self._decode_core.poll_events()

    def take_transport_events(self, events: tuple[TransportEvent, ...]) -> None:
        if self._decode_core is not None:
            self._decode_core.take_events(events)

    def take_transfers(self, transfer_ids: tuple[int, ...]) -> None:
        if self._decode_core is not None:
            self._decode_core.take_in(transfer_ids)

    def give_up_transfers(self, transfer_ids: tuple[int, ...]) -> None:
        if self._decode_core is not None:
            self._decode_core.give_up(transfer_ids)

    def num_malformed_frames(self) -> int:
        return 0 if self._receiver is None else self._receiver.stats().num_malformed_frames

    def num_refused_handshakes(self) -> int:
        return 0 if self._receiver is None else self._receiver.stats().num_refused_handshakes

    def close_transport(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
