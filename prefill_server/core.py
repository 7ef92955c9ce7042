"""The prefill server's logic: what ``serving.core`` does, and the sending end of the hand-off.

1. The first token leaves for the router at once (``ServingCore._on_answer``).
2. The prompt's KV is copied out of the pool: the only part of a hand-off in which the scheduler's
   loop takes part.
3. The transport carries it to the decode server in a thread of its own.
4. The outcome goes to the router. Failure costs the decode server a recomputation, nothing else.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from streamfill.engine.interface import Engine, ExportedKv
from streamfill.kv_transfer.interface import KvSenderInterface, OutgoingTransfer, PeerAddress
from streamfill.messages import server_to_router as s
from streamfill.messages.common import HandoffTarget
from streamfill.observability.logging import log_event
from streamfill.serving.core import ServingCore, TransportCounters
from streamfill.serving.deciding import PolicySetting, PreemptionSetting
from streamfill.serving.records import Answer, StreamRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Pending:
    stream_id: int
    attempt: int
    exported: ExportedKv
    num_ranks: int
    """Each sends its part, all of the same size."""


class PrefillCore(ServingCore):
    """Logic of one rank of a prefill server."""

    def __init__(
        self,
        engine: Engine,
        send: Callable[[s.ServerToRouter], None],
        policy: PolicySetting,
        sender: KvSenderInterface,
        *,
        rank: int,
        step_tokens: int,
        clock: Callable[[], float],
        preemption: PreemptionSetting | None = None,
    ) -> None:
        """``rank`` is this process's within the server's tensor-parallel group; the rest as
        ``ServingCore``."""
        super().__init__(
            engine, send, policy, step_tokens=step_tokens, clock=clock, preemption=preemption
        )
        self._sender = sender
        self._rank = rank
        self._pending: dict[int, _Pending] = {}

    def poll_transfers(self) -> None:
        """Report transfers that ended. Called in every turn."""
        for outcome in self._sender.poll():
            pending = self._pending.pop(outcome.transfer_id, None)
            if pending is None:
                continue
            self.engine.release_export(pending.exported)
            num_bytes = outcome.num_bytes * pending.num_ranks
            if outcome.ok:
                self.num_handoff_bytes += num_bytes
            log_event(
                logger,
                "handoff_ended",
                stream_id=pending.stream_id,
                status=outcome.status,
                reason=outcome.reason,
                num_tokens=pending.exported.num_tokens,
                num_bytes=num_bytes,
                seconds=outcome.seconds,
            )
            self._send(
                s.HandoffReport(
                    stream_id=pending.stream_id,
                    attempt=pending.attempt,
                    transfer_id=outcome.transfer_id,
                    ok=outcome.ok,
                    reason=outcome.reason,
                    num_tokens=pending.exported.num_tokens,
                    num_bytes=num_bytes,
                    seconds=outcome.seconds,
                )
            )

    def transport_counters(self) -> TransportCounters:
        return TransportCounters(
            num_transfers=len(self._pending),
            staging_bytes=sum(pending.exported.kv.num_bytes for pending in self._pending.values()),
        )

    def _on_answered(self, record: StreamRecord, answer: Answer) -> None:
        if answer.handoff is not None and answer.finish is None:
            self._hand_off(record, answer.handoff)

    def _hand_off(self, record: StreamRecord, target: HandoffTarget) -> None:
        if target.transfer_id in self._pending:
            self._report_failure(record, target, f"transfer {target.transfer_id} was used before")
            return
        exported = self.engine.export_kv(record.ids)
        if exported is None:
            self._report_failure(
                record, target, "no KV of the prompt is left, or no staging memory"
            )
            return
        if self._rank >= len(target.control_ports):
            self.engine.release_export(exported)
            self._report_failure(
                record,
                target,
                f"rank {self._rank} here, {len(target.control_ports)} ranks at {target.server_id}",
            )
            return
        peer = PeerAddress(
            target.server_id, target.host, target.control_ports[self._rank], self._rank
        )
        transfer = OutgoingTransfer(
            transfer_id=target.transfer_id,
            stream_id=record.stream_id,
            token_ids=array("i", record.ids[: exported.num_tokens]),
            first_token=0,
            kv=exported.kv,
        )
        self._pending[target.transfer_id] = _Pending(
            record.stream_id, record.attempt, exported, len(target.control_ports)
        )
        try:
            self._sender.submit(peer, transfer)
        except ValueError as error:
            del self._pending[target.transfer_id]
            self.engine.release_export(exported)
            self._report_failure(record, target, str(error))

    def _report_failure(self, record: StreamRecord, target: HandoffTarget, reason: str) -> None:
        log_event(
            logger,
            "handoff_not_started",
            level=logging.WARNING,
            stream_id=record.stream_id,
            reason=reason,
        )
        self._send(
            s.HandoffReport(
                stream_id=record.stream_id,
                attempt=record.attempt,
                transfer_id=target.transfer_id,
                ok=False,
                reason=reason,
                num_tokens=0,
                num_bytes=0,
                seconds=0.0,
            )
        )

    def _drop(self, record: StreamRecord) -> None:
        answer = record.answer
        if (
            answer is not None
            and answer.handoff is not None
            and answer.handoff.transfer_id in self._pending
        ):
            self._sender.cancel(answer.handoff.transfer_id)
        super()._drop(record)
