"""The decode server's logic: what ``serving.core`` does, and the receiving end of the hand-off.

1. ``Generate`` names a transfer. If its KV is not here yet the stream waits, for at most
   ``HANDOFF_WAIT_S``.
2. KV that arrived complete is put into the radix tree, whether or not anybody waits for it yet.
3. The stream then runs as an ordinary request that brings its first token along. What the tree does
   not hold, because the transfer failed, was late or was evicted, is computed. It starts when it
   fits beside the others also at their predicted peak (``peak``).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

from decode_server.peak import AnswerLengths, Holding, peak_tokens
from streamfill.engine.interface import Engine
from streamfill.kv_transfer.interface import IncomingTransfer, KvReceiverInterface
from streamfill.links.server_link import Inbound
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.observability.logging import log_event
from streamfill.serving.core import ServingCore, TransportCounters
from streamfill.serving.deciding import PolicySetting
from streamfill.serving.records import Answer, Phase, StreamRecord

logger = logging.getLogger(__name__)

HANDOFF_WAIT_S = 10.0
"""Longer than any transfer that is worth waiting for; the router or the transport report failures
long before."""
NUM_SETTLED_KEPT = 4096
"""Transfers remembered for a ``Generate`` that comes after its KV, or after its failure."""


class DecodeCore(ServingCore):
    """Logic of one rank of a decode server."""

    def __init__(
        self,
        engine: Engine,
        send: Callable[[s.ServerToRouter], None],
        policy: PolicySetting,
        receiver: KvReceiverInterface,
        *,
        step_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(engine, send, policy, step_tokens=step_tokens, clock=clock)
        self._receiver = receiver
        self._settled: OrderedDict[int, None] = OrderedDict()
        self._held: dict[int, IncomingTransfer] = {}
        self._lengths = AnswerLengths()

    def step(self, messages: Sequence[Inbound]) -> None:
        self._stop_waiting(self._clock())
        super().step(messages)

    def receive(self) -> list[int]:
        """Transfers that arrived completely since the last call. They wait for ``take_in``."""
        arrived = self._receiver.poll()
        for incoming in arrived:
            self._held[incoming.transfer_id] = incoming
        return [incoming.transfer_id for incoming in arrived]

    def take_in(self, transfer_ids: Sequence[int]) -> None:
        """Put KV into the radix tree that has arrived on every rank, and start who waited for
        it."""
        for transfer_id in transfer_ids:
            incoming = self._held.pop(transfer_id, None)
            if incoming is None:
                continue
            try:
                num_cached = self.engine.import_kv(incoming)
            finally:
                self._receiver.release(incoming)
            log_event(
                logger,
                "kv_taken_in",
                stream_id=incoming.stream_id,
                num_tokens=len(incoming.token_ids),
                num_cached=num_cached,
            )
            self._settle(transfer_id)

    def give_up(self, transfer_ids: Sequence[int]) -> None:
        """Let go of KV that never arrived on the other ranks; who waits for it recomputes."""
        for transfer_id in transfer_ids:
            incoming = self._held.pop(transfer_id, None)
            if incoming is not None:
                self._receiver.release(incoming)
            self._settle(transfer_id)

    def transport_counters(self) -> TransportCounters:
        stats = self._receiver.stats()
        return TransportCounters(
            num_transfers=stats.num_active + stats.num_ready + len(self._held),
            staging_bytes=stats.staging_used_bytes,
        )

    def _admits(self, record: StreamRecord) -> bool:
        running = [
            self._holding(other)
            for other in self._records.values()
            if other.phase is Phase.ANSWERING and other is not record
        ]
        if not running:
            return True  # it never fits better
        pool_tokens = self.engine.memory().total_tokens
        return peak_tokens([*running, self._holding(record)]) <= pool_tokens

    def _holding(self, record: StreamRecord) -> Holding:
        answer = record.answer
        if answer is None:
            return Holding(len(record.ids), 0)
        length = answer.num_brought + len(answer.token_ids)
        num_left = self._lengths.predict_left(length, answer.sampling.max_new_tokens)
        page_size = self.engine.facts.page_size
        num_tokens = len(record.ids) + len(answer.token_ids)
        return Holding(-(-num_tokens // page_size) * page_size, num_left)

    def _on_answered(self, record: StreamRecord, answer: Answer) -> None:
        super()._on_answered(record, answer)
        self._lengths.note(answer.num_brought + len(answer.token_ids))

    def _place_answer(self, record: StreamRecord) -> None:
        answer = record.answer
        if answer is None or answer.transfer_id is None or answer.transfer_id in self._settled:
            super()._place_answer(record)
            return
        answer.wait_until_s = self._clock() + HANDOFF_WAIT_S
        record.advance(Phase.WAITING_KV)

    def _handoff_failed(self, message: r.HandoffFailed) -> None:
        self._settle(message.transfer_id)

    def _settle(self, transfer_id: int) -> None:
        """Nobody waits for this transfer, nor will."""
        self._settled[transfer_id] = None
        while len(self._settled) > NUM_SETTLED_KEPT:
            self._settled.popitem(last=False)
        self._end_wait(transfer_id)

    def _end_wait(self, transfer_id: int) -> None:
        for record in list(self._records.values()):
            waits = record.phase is Phase.WAITING_KV and record.answer is not None
            if waits and record.answer is not None and record.answer.transfer_id == transfer_id:
                ServingCore._place_answer(self, record)

    def _stop_waiting(self, now_s: float) -> None:
        for record in list(self._records.values()):
            answer = record.answer
            if (
                record.phase is Phase.WAITING_KV
                and answer is not None
                and now_s >= answer.wait_until_s
            ):
                log_event(logger, "handoff_late", level=logging.WARNING, stream_id=record.stream_id)
                ServingCore._place_answer(self, record)
