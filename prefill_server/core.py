"""The prefill server's logic: what ``serving.core`` does, and the sending end of the hand-off.

1. While context arrives, what is stable of its KV goes to the decode server already (``pushes``).
2. The first token leaves for the router at once (``ServingCore._on_answer``).
3. The rest of the prompt's KV is lent to the transport, which carries it to the decode server in a
   thread of its own; where that has another number of ranks, to each the KV heads that it wants.
4. The outcome goes to the router. Failure costs the decode server a recomputation, nothing else. If
   it missed what the rest goes on behind, that is sent again where this is cheaper; if it dies,
   all of it goes to its successor.

All ranks decide alike: what differs between them, when a transfer ends and what decode servers say,
comes to all from rank 0 (``take_events``).
"""

from __future__ import annotations

import itertools
import logging
import secrets
from array import array
from collections.abc import Callable, Sequence

import torch

from prefill_server.pushes import MIN_PUSH_TOKENS, EarlyPush, StreamPush, num_stable
from prefill_server.transfers import PendingTransfer
from streamfill.engine.interface import Engine, ExportedKv, RequestUpdate
from streamfill.kv_transfer.interface import (
    HeldReport,
    KvSenderInterface,
    OutgoingTransfer,
    PeerAddress,
    ReceiverLost,
    TransferOutcome,
)
from streamfill.kv_transfer.slices import HeadShare, num_received
from streamfill.kv_transfer.source import KvSource, StagedKv
from streamfill.links.server_link import Inbound
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import HandoffTarget, KvPeer
from streamfill.observability.logging import log_event
from streamfill.serving.core import ServingCore, TransportCounters
from streamfill.serving.deciding import PolicySetting, PreemptionSetting
from streamfill.serving.records import Answer, Phase, StreamRecord
from streamfill.serving.turn import TransportEvent

logger = logging.getLogger(__name__)

_MEMORY = 0.9
"""Weight that what is known of a transfer's cost keeps with each new one."""


class PrefillCore(ServingCore):
    """Logic of one rank of a prefill server."""

    def __init__(
        self,
        engine: Engine,
        send: Callable[[s.ServerToRouter], None],
        policy: PolicySetting,
        sender: KvSenderInterface,
        *,
        share: HeadShare,
        step_tokens: int,
        clock: Callable[[], float],
        preemption: PreemptionSetting | None = None,
        early_push: EarlyPush = EarlyPush.AUTO,
        first_transfer_id: int | None = None,
    ) -> None:
        """
        Args:
            share: this process's place in the server's tensor-parallel group, and the KV heads
                that it holds.
            early_push: whether KV is sent ahead of the commit.
            first_transfer_id: of pushes, the same on all ranks; None draws one.

        The rest as ``ServingCore``.
        """
        super().__init__(
            engine, send, policy, step_tokens=step_tokens, clock=clock, preemption=preemption
        )
        self._sender = sender
        self._share = share
        self._rank = share.rank
        self._early_push = early_push
        self._pending: dict[int, PendingTransfer] = {}
        self._outcomes: list[TransferOutcome] = []
        self._pushes: dict[int, StreamPush] = {}
        """By stream id."""
        self._push_streams: dict[int, int] = {}
        """By transfer id, of pushes under way."""
        self._may_push: set[int] = set()
        """Streams of which more may have become worth sending, or may be sent after a pause."""
        # The router's own ids leave the uppermost bit alone.
        first = secrets.randbits(62) if first_transfer_id is None else first_transfer_id
        self._push_ids = itertools.count((1 << 63) | first)
        self._seconds_per_byte = 0.0
        """Of transfers, lately."""

    def step(self, messages: Sequence[Inbound]) -> None:
        super().step(messages)
        self._push_early()

    @property
    def is_through(self) -> bool:
        """Hand-offs are over too: what a decode server waits for it would compute again."""
        is_handing_off = any(each.handoff_id is not None for each in self._pending.values())
        return super().is_through and not is_handing_off

    def poll_transfers(self) -> None:
        """Take transfers back that ended. Called in every turn, on every rank by itself."""
        for part in self._sender.poll():
            pending = self._pending.get(part.transfer_id)
            if pending is None:
                continue
            pending.ended.append(part)
            if not pending.is_over:
                if not part.ok:  # what the others carry would be of no use
                    self._sender.cancel(part.transfer_id)
                continue
            del self._pending[part.transfer_id]
            outcome = pending.outcome()
            if pending.exported is not None:
                self.engine.release_export(pending.exported)
            self._outcomes.append(outcome)
            self._report_ended(pending, outcome)

    def poll_events(self) -> list[TransportEvent]:
        """On rank 0, after ``poll_transfers``: what all ranks have to know."""
        events: list[TransportEvent] = [*self._outcomes, *self._sender.poll_held()]
        self._outcomes.clear()
        return events

    def take_events(self, events: Sequence[TransportEvent]) -> None:
        """What rank 0 noticed, in the same turn on every rank."""
        for event in events:
            match event:
                case TransferOutcome():
                    self._note_outcome(event)
                case HeldReport():
                    self._note_held(event)
                case ReceiverLost(server_id=server_id):
                    for stream_id, push in self._pushes.items():
                        if push.peer.server_id == server_id:
                            push.lose()
                            self._may_push.add(stream_id)
                case _:
                    pass  # what decode servers are told

    def forget_transfers(self) -> None:
        """On ranks other than 0: what rank 0 tells is enough."""
        self._outcomes.clear()
        self._sender.poll_held()

    def transport_counters(self) -> TransportCounters:
        return TransportCounters(
            num_transfers=len(self._pending),
            staging_bytes=sum(pending.num_bytes for pending in self._pending.values()),
        )

    # Ahead of the commit

    def _about_handoff(self, message: r.PushTo | r.HandOff | r.HandoffFailed) -> None:
        if isinstance(message, r.PushTo):
            self._push_to(message)
        elif isinstance(message, r.HandOff):
            self._hand_off_again(message)

    def _push_to(self, message: r.PushTo) -> None:
        record = self._find(message.stream_id, message.attempt)
        if record is None or record.phase is not Phase.OPEN or self._early_push is EarlyPush.OFF:
            return
        self._assign(record, message.peer)

    def _assign(self, record: StreamRecord, peer: KvPeer) -> None:
        """KV of the stream may go to this decode server from now on."""
        push = self._pushes.get(record.stream_id)
        if (push is not None and push.peer == peer) or isinstance(self._receivers(peer), str):
            return
        if push is not None:
            self._let_go(record.stream_id, push)
        self._pushes[record.stream_id] = StreamPush(peer)
        self._may_push.add(record.stream_id)

    def _splice(self, message: r.Splice) -> None:
        record = self._find(message.stream_id, message.attempt)
        push = self._pushes.get(message.stream_id)
        if record is not None and push is not None and record.phase is Phase.OPEN:
            push.splice(message.keep_tokens, len(record.ids))
        super()._splice(message)
        if push is not None:
            self._may_push.add(message.stream_id)

    def _commit(self, message: r.Commit) -> None:
        super()._commit(message)
        record = self._find(message.stream_id, message.attempt)
        if record is None or record.phase is Phase.OPEN or self._early_push is EarlyPush.OFF:
            return
        if message.handoff is None:
            push = self._pushes.pop(record.stream_id, None)
            if push is not None:
                self._let_go(record.stream_id, push)
        else:
            self._assign(record, message.handoff.peer)

    def _on_segment(self, record: StreamRecord, update: RequestUpdate) -> None:
        super()._on_segment(record, update)
        if record.stream_id in self._pushes:
            self._may_push.add(record.stream_id)

    def _push_early(self) -> None:
        """Send what is worth it. Costs the loop next to nothing: the transport reads it later."""
        waiting, self._may_push = self._may_push, set()
        for stream_id in waiting:
            record, push = self._records.get(stream_id), self._pushes.get(stream_id)
            if record is None or push is None or record.phase not in (Phase.OPEN, Phase.COMMITTED):
                continue
            self._ask(record, push)
            now_s = self._clock()
            if push.is_paused(now_s):
                self._may_push.add(stream_id)
            if not push.may_push(now_s):
                continue
            end = self._num_worth(record, push)
            first = self._whole_pages(push.num_held)
            if end - first < MIN_PUSH_TOKENS:
                continue
            exported = self._export(record, end, first)
            if exported is None:
                continue
            transfer_id = next(self._push_ids)
            if self._submit(record, push.peer, transfer_id, exported, first=first):
                push.push(transfer_id, exported.num_tokens)
                self._push_streams[transfer_id] = stream_id

    def _num_worth(self, record: StreamRecord, push: StreamPush) -> int:
        """Leading tokens that are worth sending now; whole pages."""
        num_tokens = min(record.num_computed, record.num_prompt)
        if record.phase is Phase.OPEN and self._early_push is EarlyPush.AUTO:
            num_tokens = num_stable(record.mode, push.kept, num_tokens, len(self._by_key))
        return self._whole_pages(num_tokens)

    def _ask(self, record: StreamRecord, push: StreamPush) -> None:
        """The decode server may hold part of the prompt, from an earlier turn or other streams."""
        num_known = record.num_prompt
        if not push.wants_to_ask(num_known):
            return
        push.ask(num_known, self._clock())
        if self._rank == 0:
            self._sender.ask(
                self._address(push.peer, 0),
                record.stream_id,
                push.version,
                array("i", record.ids[:num_known]),
                namespace=record.namespace,
            )

    def _let_go(self, stream_id: int, push: StreamPush) -> None:
        if push.transfer_id is not None:
            self._sender.cancel(push.transfer_id)
        if self._rank == 0:
            self._sender.let_go(self._address(push.peer, 0), stream_id)

    # After the commit

    def _on_answered(self, record: StreamRecord, answer: Answer) -> None:
        if answer.handoff is not None and answer.finish is None:
            self._hand_off(record, answer.handoff)

    def _hand_off(self, record: StreamRecord, target: HandoffTarget) -> None:
        if target.transfer_id in self._pending:
            self._report_failure(record, target, f"transfer {target.transfer_id} was used before")
            return
        push = self._pushes.get(record.stream_id)
        first = 0
        if push is not None and push.peer == target.peer:
            first = self._whole_pages(min(push.num_expected, len(record.ids)))
        self._send_rest(record, target, target.transfer_id, first)

    def _hand_off_again(self, message: r.HandOff) -> None:
        """To another decode server: nothing is known of what it holds, so all of it."""
        record = self._find(message.stream_id, message.attempt)
        if record is None or record.answer is None or record.phase is not Phase.DONE:
            self._send(
                s.HandoffReport(
                    stream_id=message.stream_id,
                    attempt=message.attempt,
                    transfer_id=message.target.transfer_id,
                    ok=False,
                    reason="the prompt is not here any more",
                    num_tokens=0,
                    num_bytes=0,
                    seconds=0.0,
                )
            )
            return
        push = self._pushes.pop(record.stream_id, None)
        if push is not None:
            self._let_go(record.stream_id, push)
        record.answer.handoff = message.target
        self._hand_off(record, message.target)

    def _send_rest(
        self, record: StreamRecord, target: HandoffTarget, transfer_id: int, first: int
    ) -> None:
        """Send the prompt's KV from ``first`` on, in place of an earlier try if the id is not the
        router's."""
        exported = self._export(record, len(record.ids), first)
        if exported is None and not first:
            self._report_failure(
                record, target, "no KV of the prompt is left, or no staging memory"
            )
            return
        self._submit(record, target.peer, transfer_id, exported, first=first, target=target)

    def _export(self, record: StreamRecord, end: int, first: int) -> ExportedKv | None:
        """The stream's KV of tokens [first, end), as far as it is here."""
        return self.engine.export_kv(record.ids[:end], first, namespace=record.namespace)

    def _submit(
        self,
        record: StreamRecord,
        peer: KvPeer,
        transfer_id: int,
        exported: ExportedKv | None,
        *,
        first: int,
        target: HandoffTarget | None = None,
    ) -> bool:
        """Give KV to the transport. ``target`` is the hand-off that it completes; None: it goes
        ahead of the commit. Returns whether its outcome will follow."""
        ranks = self._receivers(peer)
        problem = ranks if isinstance(ranks, str) else None
        if not isinstance(ranks, str):
            num_tokens = first if exported is None else exported.num_tokens
            push = self._pushes.get(record.stream_id)
            kv: KvSource = _NOTHING if exported is None else exported.kv
            is_retry = target is not None and transfer_id != target.transfer_id
            transfer = OutgoingTransfer(
                transfer_id=transfer_id,
                stream_id=record.stream_id,
                token_ids=array("i", record.ids[:num_tokens]),
                first_token=first,
                kv=kv,
                version=0 if push is None else push.version,
                is_early=target is None,
                replaces=target.transfer_id if target is not None and is_retry else None,
                namespace=record.namespace,
            )
            pending = PendingTransfer(
                stream_id=record.stream_id,
                attempt=record.attempt,
                exported=exported,
                num_tokens=num_tokens,
                num_parts=len(ranks),
                total_bytes=self._total_bytes(kv.num_bytes, len(peer.control_ports)),
                handoff_id=None if target is None else target.transfer_id,
            )
            problem = self._submit_to(peer, ranks, transfer, pending)
        if problem is None and ranks:
            return True
        if exported is not None:
            self.engine.release_export(exported)
        if problem is None:
            return True  # other ranks hold the same heads, and send them
        if target is not None:
            self._report_failure(record, target, problem)
        return False

    def _submit_to(
        self,
        peer: KvPeer,
        ranks: Sequence[int],
        transfer: OutgoingTransfer,
        pending: PendingTransfer,
    ) -> str | None:
        """Give a transfer to the transport, once for each rank that gets something. Returns what is
        wrong with it, as the first one says; then it was given to none."""
        for rank in ranks:
            try:
                self._sender.submit(self._address(peer, rank), transfer)
            except ValueError as error:
                if rank == ranks[0]:
                    return str(error)
                raise
            self._pending[transfer.transfer_id] = pending
        return None

    def _receivers(self, peer: KvPeer) -> list[int] | str:
        """Ranks of a decode server that get something from this one, or why it can get nothing."""
        num_ranks = len(peer.control_ports)
        try:
            return self._share.receivers(num_ranks)
        except ValueError as error:
            return f"{num_ranks} ranks at {peer.server_id}: {error}"

    def _total_bytes(self, num_bytes: int, num_ranks: int) -> int:
        """Of KV that all ranks of this server send to ``num_ranks``, given what one holds."""
        num_heads = self._share.num_heads
        return num_bytes * num_received(num_heads, num_ranks) // self._share.heads.num

    def _report_ended(self, pending: PendingTransfer, outcome: TransferOutcome) -> None:
        num_bytes = pending.total_bytes
        push = self._pushes.get(pending.stream_id)
        if outcome.ok:
            self.num_handoff_bytes += num_bytes
            if pending.handoff_id is None:
                self.num_early_bytes += num_bytes
                if push is not None:
                    push.num_bytes += num_bytes
        num_early_bytes = 0 if push is None else push.num_bytes
        log_event(
            logger,
            "handoff_ended" if pending.handoff_id is not None else "push_ended",
            level=logging.INFO if pending.handoff_id is not None else logging.DEBUG,
            stream_id=pending.stream_id,
            status=outcome.status,
            reason=outcome.reason,
            num_tokens=pending.num_tokens,
            num_bytes=num_bytes,
            num_early_bytes=num_early_bytes,
            seconds=outcome.seconds,
        )
        if pending.handoff_id is None:
            return
        self._send(
            s.HandoffReport(
                stream_id=pending.stream_id,
                attempt=pending.attempt,
                transfer_id=pending.handoff_id,
                ok=outcome.ok,
                reason=outcome.reason,
                num_tokens=pending.num_tokens,
                num_bytes=num_bytes + num_early_bytes,
                seconds=outcome.seconds,
                num_early_bytes=num_early_bytes,
            )
        )

    def _note_outcome(self, outcome: TransferOutcome) -> None:
        """On every rank, of a transfer of rank 0."""
        if outcome.bytes_per_s is not None:
            cost = 1 / outcome.bytes_per_s
            old = self._seconds_per_byte or cost
            self._seconds_per_byte = _MEMORY * old + (1 - _MEMORY) * cost
        stream_id = self._push_streams.pop(outcome.transfer_id, None)
        push = None if stream_id is None else self._pushes.get(stream_id)
        if stream_id is not None and push is not None and push.transfer_id == outcome.transfer_id:
            push.ended(ok=outcome.ok, now_s=self._clock())
            self._may_push.add(stream_id)

    def _note_held(self, report: HeldReport) -> None:
        record, push = self._records.get(report.stream_id), self._pushes.get(report.stream_id)
        if push is not None and push.peer.server_id == report.server_id:
            push.hear(report.version, report.num_tokens, is_loss=report.is_loss)
            self._may_push.add(report.stream_id)
        if report.missed_transfer_id is None or record is None or record.answer is None:
            return
        target = record.answer.handoff
        if target is not None and target.transfer_id == report.missed_transfer_id:
            self._send_again(record, target, self._whole_pages(report.num_tokens))

    def _send_again(self, record: StreamRecord, target: HandoffTarget, num_held: int) -> None:
        """The decode server lost what the rest of the KV goes on behind. Send all of it, or let it
        compute, whichever is cheaper."""
        num_tokens = len(record.ids) - num_held
        num_bytes = num_tokens * self.engine.host_room().bytes_per_token
        recompute_s = self.decider.costs.model().recompute.seconds(num_tokens, num_held)
        sending_s = num_bytes * self._seconds_per_byte
        num_here = self.kv.cached_tokens(record, len(record.ids))
        log_event(
            logger,
            "handoff_missed",
            level=logging.WARNING,
            stream_id=record.stream_id,
            num_held=num_held,
            num_here=num_here,
            recompute_s=recompute_s,
            sending_s=sending_s,
        )
        if num_here <= num_held or recompute_s < sending_s:
            self._report_failure(record, target, f"{num_tokens} tokens are cheaper to compute")
        else:
            self._send_rest(record, target, next(self._push_ids), num_held)

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

    def _stop(self, record: StreamRecord) -> None:
        for transfer_id, pending in self._pending.items():
            if pending.stream_id == record.stream_id and pending.attempt <= record.attempt:
                self._sender.cancel(transfer_id)
        push = self._pushes.pop(record.stream_id, None)
        if push is not None:
            self._let_go(record.stream_id, push)
        super()._stop(record)

    def _whole_pages(self, num_tokens: int) -> int:
        return num_tokens - num_tokens % self.engine.facts.page_size

    @staticmethod
    def _address(peer: KvPeer, rank: int) -> PeerAddress:
        return PeerAddress(
            server_id=peer.server_id,
            host=peer.host,
            control_port=peer.control_ports[rank],
            rank=rank,
            num_ranks=len(peer.control_ports),
        )


_NOTHING = StagedKv(torch.empty(0, dtype=torch.uint8))
