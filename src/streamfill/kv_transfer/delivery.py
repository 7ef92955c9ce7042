"""Carrying one transfer over an open session.

1. ``Offer``; the answer is ``Accept``, or ``Refuse`` ends it.
2. All chunks go out, also when it was cancelled meanwhile: a group cannot skip what both sides
   agreed on, and draining is cheaper than a new group. The receiver is told and forgets them.
3. ``Complete`` or ``Abort`` ends it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

import torch

from streamfill.errors import TransportError
from streamfill.kv_transfer.codecs import NO_CODEC, Codec
from streamfill.kv_transfer.counters import Counters, SenderCount
from streamfill.kv_transfer.faults import BEYOND_S, Faults
from streamfill.kv_transfer.interface import OutgoingTransfer, TransferOutcome, TransferStatus
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.sender_session import SenderSession, SessionLostError
from streamfill.kv_transfer.source import StagedKv
from streamfill.messages.codec import pack_ids
from streamfill.messages.handoff import Abort, Accept, Complete, Offer, Pong, Refuse, Reject


class TransferEndedError(Exception):
    """The transfer ended in an orderly way; the session goes on."""

    def __init__(self, status: TransferStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class SenderJob:
    """A transfer on its way. Only ``cancelled`` is written by the scheduler's thread."""

    def __init__(self, transfer: OutgoingTransfer, peer_rank: int) -> None:
        """Called by the scheduler's thread."""
        self.transfer = transfer
        self.peer_rank = peer_rank
        self.submitted_s = time.monotonic()
        self.offered_s: float | None = None
        self.cancelled = False
        self.codec = NO_CODEC
        """Chosen when it is offered."""
        self.abort_sent = False
        self.data_ready: torch.cuda.Event | None = None
        """Of the scheduler's stream, which may still be gathering."""
        kv = transfer.kv
        if isinstance(kv, StagedKv) and kv.staging.is_cuda:
            self.data_ready = torch.cuda.current_stream(kv.staging.device).record_event()

    def outcome(self, status: TransferStatus, reason: str) -> TransferOutcome:
        """The job's end, as of now."""
        now_s = time.monotonic()
        begun_s = now_s if self.offered_s is None else self.offered_s
        return TransferOutcome(
            transfer_id=self.transfer.transfer_id,
            status=status,
            reason=reason,
            num_bytes=self.transfer.kv.num_bytes,
            queued_s=begun_s - self.submitted_s,
            seconds=now_s - begun_s,
            peer_rank=self.peer_rank,
            codec=self.codec,
        )


class Delivery:
    """One job on one session. Used once, by the link's thread."""

    def __init__(
        self,
        job: SenderJob,
        session: SenderSession,
        *,
        codec: Codec | None,
        layout: KvLayout,
        chunk_bytes: int,
        with_checksum: bool,
        reply_s: float,
        chunk_s: float,
        faults: Faults | None,
        stop_reason: Callable[[], str | None],
        counters: Counters[SenderCount],
    ) -> None:
        """Args as in `sender_link.LinkOptions`; ``codec`` is that of this transfer, None for none;
        ``stop_reason`` is asked after every wait."""
        self._job = job
        self._transfer = job.transfer
        self._session = session
        self._kv = job.transfer.kv
        if codec is not None:
            job.codec = codec.name
            self._kv = codec.encode(self._kv, layout)
        self._chunk_bytes = chunk_bytes
        self._with_checksum = with_checksum
        self._reply_s = reply_s
        self._chunk_s = chunk_s
        self._faults = faults
        self._stop_reason = stop_reason
        self._counters = counters

    def offer(self) -> None:
        """Offer the transfer; returns when it is accepted.

        Raises:
            TransferEndedError: it was refused.
            SessionLostError: the receiver knows no such session.
            TransportError: the link failed, or no answer came in time.
        """
        transfer = self._transfer
        if self._job.data_ready is not None:
            self._job.data_ready.synchronize()
        checksum = None
        if self._with_checksum:
            checksum = self._checksum()
        self._job.offered_s = time.monotonic()
        self._session.send(
            Offer(
                transfer_id=transfer.transfer_id,
                epoch=self._session.epoch,
                stream_id=transfer.stream_id,
                token_ids=pack_ids(transfer.token_ids),
                first_token=transfer.first_token,
                num_tokens=len(transfer.token_ids) - transfer.first_token,
                num_bytes=self._kv.num_bytes,
                codec=self._job.codec,
                chunk_bytes=self._chunk_bytes,
                cuts=tuple(self._kv.cuts),
                checksum=checksum,
                version=transfer.version,
                is_early=transfer.is_early,
                replaces=transfer.replaces,
                namespace=transfer.namespace,
            )
        )
        pair = self._session.pair
        if pair is not None and self._kv.num_bytes:
            # A refusal is rarer than an acceptance, and the answer takes as long as this.
            pair.prepare(self._kv, min(self._chunk_bytes, self._kv.num_bytes))
        match self._reply():
            case Accept():
                return
            case Refuse(reason=reason):
                raise TransferEndedError(TransferStatus.REFUSED, reason)
            case Abort(reason=reason):
                raise TransportError(f"given up by the receiver: {reason}")
            case Complete():
                raise TransportError("complete before it was accepted")

    def _checksum(self) -> int:
        """CRC-32 of all bytes."""
        kv, checksum = self._kv, 0
        for begin in range(0, kv.num_bytes, self._chunk_bytes):
            end = min(begin + self._chunk_bytes, kv.num_bytes)
            piece = kv.piece(begin, end)
            if piece is None:
                piece = torch.empty(end - begin, dtype=torch.uint8)
                kv.read(begin, piece)
            checksum = zlib.crc32(piece.cpu().numpy().data, checksum)
        return checksum

    def carry(self) -> None:
        """Send the data of an accepted offer; returns when the receiver has it all.

        Raises:
            TransferEndedError: it was cancelled, and the receiver delivered nothing.
            TransportError: the link failed, or no answer came in time.
        """
        kv = self._kv
        if kv.num_bytes:
            pair = self._session.group()
            if self._faults is not None:
                stall_s = self._chunk_s + BEYOND_S
                pair = self._faults.around(pair, self._transfer.transfer_id, stall_s=stall_s)
            for begin in range(0, kv.num_bytes, self._chunk_bytes):
                pair.send(kv, begin, min(begin + self._chunk_bytes, kv.num_bytes))
                self._obey()
            pair.flush()
        match self._reply():
            case Complete():
                return
            case Abort(reason=reason) if self._job.abort_sent:
                raise TransferEndedError(TransferStatus.CANCELLED, reason)
            case Abort(reason=reason) | Refuse(reason=reason):
                raise TransportError(f"given up by the receiver: {reason}")
            case Accept():
                raise TransportError("accepted twice")

    def _reply(self) -> Accept | Refuse | Abort | Complete:
        """The receiver's next word about this transfer; news about others is stale."""
        deadline_s = time.monotonic() + self._reply_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            self._obey()
            match self._session.receive(left_s):
                case None | Pong():
                    pass
                case Reject(reason=reason):
                    raise SessionLostError(reason)
                case (Accept() | Refuse() | Abort() | Complete()) as reply if (
                    reply.transfer_id == self._transfer.transfer_id
                    and reply.epoch == self._session.epoch
                ):
                    return reply
                case _:
                    self._counters.add(SenderCount.STALE_FRAMES)
        raise TransportError(f"no reply within {self._reply_s} s")

    def _obey(self) -> None:
        """Do what the scheduler's thread asked for meanwhile."""
        reason = self._stop_reason()
        if reason is not None:
            raise TransportError(reason)
        if self._job.cancelled and not self._job.abort_sent:
            self._job.abort_sent = True
            self._session.send(
                Abort(
                    transfer_id=self._transfer.transfer_id,
                    epoch=self._session.epoch,
                    reason="cancelled by the sender",
                )
            )
