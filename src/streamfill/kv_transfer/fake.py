"""In-memory endpoints for tests of those who use the transport. No threads, no sockets.

A transfer arrives, or fails, at the moment it is submitted, unless the network is told to hold it.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from streamfill.kv_transfer.codecs import NO_CODEC
from streamfill.kv_transfer.interface import (
    Farewell,
    HeldNews,
    HeldReport,
    IncomingTransfer,
    OutgoingTransfer,
    PeerAddress,
    Question,
    ReceiverStats,
    SenderNote,
    SenderStats,
    TransferOutcome,
    TransferStatus,
)
from streamfill.kv_transfer.pool import StagingPool
from streamfill.kv_transfer.reception_desk import UNLIMITED
from streamfill.kv_transfer.waker import Waker
from streamfill.messages.common import SHARED_NAMESPACE


@dataclass(frozen=True, eq=False)
class _Parcel:
    sender: FakeKvSender
    peer: PeerAddress
    transfer: OutgoingTransfer


class FakeNetwork:
    """Connects fakes; a test steers it."""

    def __init__(self) -> None:
        self.is_holding = False
        """While set, transfers wait until `deliver_held`."""
        self.next_failures: deque[tuple[TransferStatus, str]] = deque()
        """Ends for the next transfers that would have been delivered."""
        self.codec = NO_CODEC
        """What transfers are said to be written in; their bytes stay as they are."""
        self.senders: dict[str, FakeKvSender] = {}
        self._receivers: dict[tuple[str, int], FakeKvReceiver] = {}
        self._held: list[_Parcel] = []
        self._seen_ids: set[tuple[int, str, int]] = set()
        """Each rank sees an id once."""

    def attach(self, receiver: FakeKvReceiver) -> None:
        """Make a receiver reachable, in place of an older one of the same name."""
        self._receivers[receiver.server_id, receiver.rank] = receiver

    def detach(self, receiver: FakeKvReceiver) -> None:
        """Make a receiver unreachable."""
        self._receivers.pop((receiver.server_id, receiver.rank), None)

    def take(self, sender: FakeKvSender, peer: PeerAddress, transfer: OutgoingTransfer) -> None:
        """Called by the fake sender."""
        self._held.append(_Parcel(sender, peer, transfer))
        if not self.is_holding:
            self.deliver_held()

    def drop(self, transfer_id: int) -> list[int]:
        """Forget a held transfer; the ranks that it was to go to."""
        dropped = [parcel for parcel in self._held if parcel.transfer.transfer_id == transfer_id]
        self._held = [parcel for parcel in self._held if parcel not in dropped]
        return [parcel.peer.rank for parcel in dropped]

    @property
    def num_held(self) -> int:
        """Transfers that wait for `deliver_held`."""
        return len(self._held)

    def deliver_held(self, num: int | None = None) -> None:
        """Deliver held transfers, in order of submission; the first ``num``, or all."""
        held, self._held = self._held[:num], self._held[:0] if num is None else self._held[num:]
        for parcel in held:
            parcel.sender.finish(parcel.peer, parcel.transfer, *self._deliver(parcel))

    def receiver(self, peer: PeerAddress) -> FakeKvReceiver | None:
        """The receiver at an address."""
        return self._receivers.get((peer.server_id, peer.rank))

    def answer(self, sender_id: str, report: HeldReport) -> None:
        """Called by a fake receiver."""
        sender = self.senders.get(sender_id)
        if sender is not None:
            sender.hear(report)

    def _deliver(self, parcel: _Parcel) -> tuple[TransferStatus, str]:
        transfer_id = parcel.transfer.transfer_id
        receiver = self._receivers.get((parcel.peer.server_id, parcel.peer.rank))
        if receiver is None:
            return TransferStatus.FAILED, f"{parcel.peer} did not answer"
        if self.next_failures:
            return self.next_failures.popleft()
        seen = (transfer_id, parcel.peer.server_id, parcel.peer.rank)
        if seen in self._seen_ids:
            return TransferStatus.REFUSED, f"transfer {transfer_id} was offered before"
        if not receiver.accept(parcel.sender.server_id, parcel.transfer):
            return TransferStatus.REFUSED, "staging memory is short"
        self._seen_ids.add(seen)
        return TransferStatus.DELIVERED, ""


class FakeKvSender:
    """Fake of `interface.KvSenderInterface`."""

    def __init__(self, server_id: str, network: FakeNetwork) -> None:
        self.server_id = server_id
        self._network = network
        self._waker = Waker()
        self._pending: dict[tuple[int, int], float] = {}
        """By transfer id and rank of the receiver: when it was submitted."""
        self._outcomes: deque[TransferOutcome] = deque()
        self._held: deque[HeldNews] = deque()
        self._counts: Counter[TransferStatus] = Counter()
        self._bytes_delivered = 0
        network.senders[server_id] = self

    def submit(self, peer: PeerAddress, transfer: OutgoingTransfer) -> None:
        """See the interface."""
        key = (transfer.transfer_id, peer.rank)
        if key in self._pending:
            raise ValueError(f"transfer {transfer.transfer_id}: it is pending already")
        self._pending[key] = time.monotonic()
        self._network.take(self, peer, transfer)

    def ask(
        self,
        peer: PeerAddress,
        stream_id: int,
        version: int,
        token_ids: Sequence[int],
        *,
        namespace: str = SHARED_NAMESPACE,
    ) -> None:
        """See the interface."""
        receiver = self._network.receiver(peer)
        if receiver is not None:
            ids = array("i", token_ids)
            receiver.note(Question(self.server_id, stream_id, version, ids, namespace))

    def let_go(self, peer: PeerAddress, stream_id: int) -> None:
        """See the interface."""
        receiver = self._network.receiver(peer)
        if receiver is not None:
            receiver.note(Farewell(self.server_id, stream_id))

    def hear(self, news: HeldNews) -> None:
        """Called by the network, and by tests."""
        self._held.append(news)
        self._waker.set()

    def poll_held(self) -> list[HeldNews]:
        """See the interface."""
        news = list(self._held)
        self._held.clear()
        return news

    def finish(
        self, peer: PeerAddress, transfer: OutgoingTransfer, status: TransferStatus, reason: str
    ) -> None:
        """Called by the network."""
        now_s = time.monotonic()
        self._counts[status] += 1
        if status is TransferStatus.DELIVERED:
            self._bytes_delivered += transfer.kv.num_bytes
        self._outcomes.append(
            TransferOutcome(
                transfer_id=transfer.transfer_id,
                status=status,
                reason=reason,
                num_bytes=transfer.kv.num_bytes,
                queued_s=0.0,
                seconds=now_s - self._pending[transfer.transfer_id, peer.rank],
                peer_rank=peer.rank,
            )
        )
        self._waker.set()

    def cancel(self, transfer_id: int) -> None:
        """See the interface."""
        for rank in self._network.drop(transfer_id):
            self._counts[TransferStatus.CANCELLED] += 1
            self._outcomes.append(
                TransferOutcome(
                    transfer_id=transfer_id,
                    status=TransferStatus.CANCELLED,
                    reason="cancelled before the offer",
                    num_bytes=0,
                    queued_s=0.0,
                    seconds=0.0,
                    peer_rank=rank,
                )
            )
            self._waker.set()

    def poll(self) -> list[TransferOutcome]:
        """See the interface."""
        self._waker.clear()
        ended = list(self._outcomes)
        self._outcomes.clear()
        for outcome in ended:
            del self._pending[outcome.transfer_id, outcome.peer_rank]
        return ended

    def fileno(self) -> int:
        """See the interface."""
        return self._waker.fileno()

    def stats(self) -> SenderStats:
        """See the interface."""
        return SenderStats(
            num_peers=0,
            num_pending=len(self._pending),
            num_delivered=self._counts[TransferStatus.DELIVERED],
            num_refused=self._counts[TransferStatus.REFUSED],
            num_cancelled=self._counts[TransferStatus.CANCELLED],
            num_failed=self._counts[TransferStatus.FAILED],
            num_sessions=0,
            num_shared=0,
            num_malformed_frames=0,
            num_stale_frames=0,
            bytes_delivered=self._bytes_delivered,
        )

    def close(self) -> None:
        """See the interface."""
        self._waker.close()


class FakeKvReceiver:
    """Fake of `interface.KvReceiverInterface`."""

    def __init__(
        self,
        server_id: str,
        network: FakeNetwork,
        *,
        rank: int = 0,
        memory_limit_bytes: int = 1 << 30,
    ) -> None:
        self.server_id = server_id
        self.rank = rank
        self._network = network
        self._pool = StagingPool(memory_limit_bytes)
        self._waker = Waker()
        self._ready: deque[IncomingTransfer] = deque()
        self._notes: deque[SenderNote] = deque()
        self._early_room_bytes = UNLIMITED
        self._num_completed = 0
        self._num_refused = 0
        self._bytes_received = 0
        network.attach(self)

    @property
    def port(self) -> int:
        """See the interface; a fake listens nowhere."""
        return 1

    def accept(self, source_server_id: str, transfer: OutgoingTransfer) -> bool:
        """Called by the network: take a copy, if there is memory for it."""
        has_room = not transfer.is_early or transfer.kv.num_bytes <= self._early_room_bytes
        staging = self._pool.try_acquire(transfer.kv.num_bytes) if has_room else None
        if staging is None:
            self._num_refused += 1
            return False
        transfer.kv.read(0, staging)
        self._num_completed += 1
        self._bytes_received += staging.numel()
        self._ready.append(
            IncomingTransfer(
                transfer_id=transfer.transfer_id,
                stream_id=transfer.stream_id,
                epoch=1,
                source_server_id=source_server_id,
                token_ids=array("i", transfer.token_ids),
                first_token=transfer.first_token,
                staging=staging,
                version=transfer.version,
                is_early=transfer.is_early,
                replaces=transfer.replaces,
                codec=self._network.codec,
                namespace=transfer.namespace,
            )
        )
        self._waker.set()
        return True

    def poll(self) -> list[IncomingTransfer]:
        """See the interface."""
        self._waker.clear()
        ready = list(self._ready)
        self._ready.clear()
        return ready

    def note(self, note: SenderNote) -> None:
        """Called by fake senders, and by tests."""
        self._notes.append(note)
        self._waker.set()

    def poll_notes(self) -> list[SenderNote]:
        """See the interface."""
        notes = list(self._notes)
        self._notes.clear()
        return notes

    def tell(self, sender_id: str, report: HeldReport) -> None:
        """See the interface."""
        self._network.answer(sender_id, report)

    def allow_early(self, num_bytes: int) -> None:
        """See the interface."""
        self._early_room_bytes = num_bytes

    def release(self, incoming: IncomingTransfer) -> None:
        """See the interface."""
        self._pool.release(incoming.staging)

    def fileno(self) -> int:
        """See the interface."""
        return self._waker.fileno()

    def stats(self) -> ReceiverStats:
        """See the interface."""
        usage = self._pool.usage()
        return ReceiverStats(
            num_peers=0,
            num_active=0,
            num_ready=len(self._ready),
            staging_used_bytes=usage.used_bytes,
            staging_cached_bytes=usage.cached_bytes,
            num_completed=self._num_completed,
            num_refused=self._num_refused,
            num_aborted=0,
            num_failed=0,
            num_malformed_frames=0,
            num_stale_frames=0,
            num_late_writes=0,
            num_duplicates=0,
            bytes_received=self._bytes_received,
        )

    def close(self) -> None:
        """See the interface."""
        self._network.detach(self)
        self._waker.close()
