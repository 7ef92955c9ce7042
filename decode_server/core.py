"""The decode server's logic: what ``serving.core`` does, and the receiving end of the hand-off.

1. ``Generate`` names a transfer. If its KV is not here yet the stream waits, for at most
   ``HANDOFF_WAIT_S``.
2. KV that arrived complete is put into the radix tree, whether or not anybody waits for it yet.
3. Of KV that comes ahead of its commit senders hear how much is held, now and later (``early``).
   What a hand-off goes on behind may be lost by then; the sender is told, and sends it again.
4. The stream then runs as an ordinary request that brings its first token along. What the tree does
   not hold, because the transfer failed, was late or was evicted, is computed. It starts when it
   fits beside the others also at their predicted peak (``peak``).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

from decode_server.early import EarlyKv
from decode_server.peak import AnswerLengths, Holding, peak_tokens
from streamfill.engine.interface import Engine
from streamfill.kv_transfer.codecs import CODECS
from streamfill.kv_transfer.interface import (
    HeldReport,
    IncomingTransfer,
    KvReceiverInterface,
    SenderNote,
)
from streamfill.links.server_link import Inbound
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.observability.logging import log_event
from streamfill.serving.core import ServingCore, TransportCounters
from streamfill.serving.deciding import PolicySetting
from streamfill.serving.records import Answer, Phase, StreamRecord
from streamfill.serving.turn import TransportEvent

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
        server_id: str = "",
        rank: int = 0,
    ) -> None:
        """
        Args:
            server_id: of this server.
            rank: of this process within the server's tensor-parallel group.

        The rest as ``ServingCore``.
        """
        super().__init__(engine, send, policy, step_tokens=step_tokens, clock=clock)
        self._receiver = receiver
        self._rank = rank
        self._early = EarlyKv(engine, server_id, self._tell)
        self._early_room = -1
        self._settled: OrderedDict[int, None] = OrderedDict()
        self._held: dict[int, IncomingTransfer] = {}
        self._lengths = AnswerLengths()

    def step(self, messages: Sequence[Inbound]) -> None:
        now_s = self._clock()
        self._stop_waiting(now_s)
        super().step(messages)
        self._early.expire(now_s)
        room = self._early.room_tokens
        if room != self._early_room:
            self._early_room = room
            self._receiver.allow_early(room * self.engine.host_room().bytes_per_token)

    def poll_events(self) -> list[TransportEvent]:
        """On rank 0: what senders said, for all ranks. On others: what they said is dropped."""
        return list(self._receiver.poll_notes())

    def take_events(self, events: Sequence[TransportEvent]) -> None:
        """What rank 0 was told, in the same turn on every rank."""
        notes = [event for event in events if isinstance(event, SenderNote)]
        self._early.take_notes(notes, self._clock())

    def note_losses(self) -> frozenset[int]:
        losers = super().note_losses()
        self._early.note_losses(losers)
        return losers

    def receive(self) -> list[int]:
        """Transfers that arrived completely since the last call. They wait for ``take_in``."""
        arrived = self._receiver.poll()
        for incoming in arrived:
            self._held[incoming.transfer_id] = incoming
            codec = CODECS.get(incoming.codec)
            if codec is not None and codec.is_lossy:
                # Its nodes may be shared by any prompt that begins alike, so all answers are
                # marked. Other ranks tell rank 0, which sends them (`RankMailbox.report`).
                self.kv_codec = codec.name
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
                is_early=incoming.is_early,
            )
            self._note_taken_in(incoming, num_cached)

    def _note_taken_in(self, incoming: IncomingTransfer, num_cached: int) -> None:
        if incoming.is_early:
            self._early.note_import(incoming, self._clock())
            return
        if num_cached < incoming.first_token:
            self._early.report_missed(incoming, num_cached)
            if incoming.replaces is None:
                return  # it may be sent again; who waits for it hears otherwise from the router
        self._early.forget(incoming.stream_id)
        self._settle(incoming.transfer_id if incoming.replaces is None else incoming.replaces)

    def _tell(self, sender_id: str, report: HeldReport) -> None:
        if self._rank == 0:
            self._receiver.tell(sender_id, report)

    def _answer_question(self, message: r.FlushCache | r.SetPolicy | r.DescribeStreams) -> None:
        super()._answer_question(message)
        if isinstance(message, r.FlushCache):
            self._early.flushed()

    def give_up(self, transfer_ids: Sequence[int]) -> None:
        """Let go of KV that never arrived on the other ranks; who waits for it recomputes."""
        for transfer_id in transfer_ids:
            incoming = self._held.pop(transfer_id, None)
            if incoming is not None:
                log_event(
                    logger,
                    "handoff_given_up",
                    stream_id=incoming.stream_id,
                    level=logging.WARNING,
                    transfer_id=transfer_id,
                )
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

    def _about_handoff(self, message: r.PushTo | r.HandOff | r.HandoffFailed) -> None:
        if isinstance(message, r.HandoffFailed):
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
