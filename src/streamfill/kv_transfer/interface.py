"""The contract between the KV transport and the server that uses it.

Both endpoints belong to one server rank and are used by one thread of it, the scheduler's. No
method but `close` blocks for longer than a queue operation. ``fileno()`` becomes readable when
`poll` has something to say; register it with the loop's poller.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from streamfill.kv_transfer.slices import HeadRange
from streamfill.kv_transfer.source import KvSource
from streamfill.messages.common import SHARED_NAMESPACE


@dataclass(frozen=True)
class PeerAddress:
    """Where one rank of a receiving server listens."""

    server_id: str
    host: str
    control_port: int
    rank: int = 0
    num_ranks: int = 1
    """Of that server."""


@dataclass(frozen=True, eq=False)
class OutgoingTransfer:
    """KV to be sent. Nobody changes it from `submit` until the outcome is polled."""

    transfer_id: int
    """Minted by the router; a retry gets a new one."""
    stream_id: int
    token_ids: Sequence[int]
    """The whole sequence; its last ``len(token_ids) - first_token`` tokens are carried."""
    first_token: int
    """Offset of the first token whose KV is carried."""
    kv: KvSource
    """Of the tokens carried, with all KV heads of this rank; of 0 bytes where none is."""
    version: int = 0
    """Of the prompt, as of `KvSenderInterface.ask`."""
    is_early: bool = False
    """The prompt is not committed yet."""
    replaces: int | None = None
    """A transfer that missed what it goes on behind, and that this one is in place of."""
    namespace: str = SHARED_NAMESPACE
    """In which the receiver's tree is to hold it."""


class TransferStatus(enum.Enum):
    """How a transfer ended on the sender's side. Each is final."""

    DELIVERED = "delivered"
    """All bytes are with the receiver, who hands them to its server."""
    REFUSED = "refused"
    """The receiver would not take it; trying another time or peer makes sense."""
    CANCELLED = "cancelled"
    """By `KvSenderInterface.cancel`; the receiver delivered nothing."""
    FAILED = "failed"
    """The peer or the link. Whether the receiver got the data is unknown."""


@dataclass(frozen=True)
class TransferOutcome:
    """The end of one transfer to one rank."""

    transfer_id: int
    status: TransferStatus
    reason: str
    """Empty when delivered."""
    num_bytes: int
    """Of KV; what the transfer was to carry."""
    queued_s: float
    """From `submit` to the beginning: other transfers to this peer, and finding the peer."""
    seconds: float
    """From ``Offer`` to the end, the set-up of the group included where one was needed."""
    peer_rank: int = 0
    """To which it went."""
    codec: str = "none"
    """How the KV was written; a name of `codecs`."""

    @property
    def ok(self) -> bool:
        """Whether the receiver has the data."""
        return self.status is TransferStatus.DELIVERED

    @property
    def bytes_per_s(self) -> float | None:
        """Measured bandwidth; None where nothing was carried."""
        if not self.ok or self.num_bytes == 0 or self.seconds <= 0:
            return None
        return self.num_bytes / self.seconds


@dataclass(frozen=True, eq=False)
class IncomingTransfer:
    """KV that arrived completely. The server owns ``staging`` until `release`."""

    transfer_id: int
    stream_id: int
    epoch: int
    source_server_id: str
    token_ids: array[int]
    """The whole sequence, type code ``i``."""
    first_token: int
    """Offset of the first token whose KV is here; the KV before it must be in the tree already,
    otherwise this transfer is of no use and is simply released."""
    staging: Tensor
    """For `head_copies.scatter_blocks`; uint8 [number of bytes]."""
    blocks: tuple[HeadRange, ...] = ()
    """KV heads of each block of the staging, counted from this rank's first, where several sender
    ranks sent a part each; empty: all in one."""
    version: int = 0
    is_early: bool = False
    """The prompt is not committed yet."""
    replaces: int | None = None
    """A transfer that missed what it goes on behind, and that this one is in place of."""
    codec: str = "none"
    """How the KV was written on its way. Other than ``none`` it may not be what was sent."""
    namespace: str = SHARED_NAMESPACE
    """In which the tree is to hold it."""


@dataclass(frozen=True)
class HeldReport:
    """What a receiver's tree holds of a stream's prompt."""

    server_id: str
    """Of the receiver."""
    stream_id: int
    version: int
    """Of the prompt that the number is about."""
    num_tokens: int
    is_loss: bool = False
    """It held more before, or was sent more. Otherwise it may hold more by now, since other KV was
    under way when it said this."""
    missed_transfer_id: int | None = None
    """A transfer that was of no use, since what it goes on behind is not there."""


@dataclass(frozen=True)
class ReceiverLost:
    """A session ended: nothing is known any more of what the receiver holds."""

    server_id: str


HeldNews: TypeAlias = HeldReport | ReceiverLost


@dataclass(frozen=True, eq=False)
class Question:
    """A sender asks how much of a prompt is held, now and from now on."""

    server_id: str
    """Of the sender, as below."""
    stream_id: int
    version: int
    token_ids: array[int]
    """Type code ``i``."""
    namespace: str = SHARED_NAMESPACE
    """Where it is looked for."""


@dataclass(frozen=True)
class Farewell:
    """A sender needs to know no more about a stream."""

    server_id: str
    stream_id: int


@dataclass(frozen=True)
class SenderLost:
    """A session ended: nobody waits for news of any stream of this sender."""

    server_id: str


SenderNote: TypeAlias = Question | Farewell | SenderLost


@dataclass(frozen=True)
class SenderStats:
    """Counters since the start, and what there is now."""

    num_peers: int
    num_pending: int
    """Submitted, without an outcome yet."""
    num_delivered: int
    num_refused: int
    num_cancelled: int
    num_failed: int
    num_sessions: int
    """Sessions opened since the start; more than peers when groups were rebuilt."""
    num_shared: int
    """Of these, those that found the peer on the same machine and share memory with it."""
    num_malformed_frames: int
    num_stale_frames: int
    bytes_delivered: int


@dataclass(frozen=True)
class ReceiverStats:
    """Counters since the start, and what there is now."""

    num_peers: int
    num_active: int
    """Transfers accepted and not complete."""
    num_ready: int
    """Complete and not polled."""
    staging_used_bytes: int
    staging_cached_bytes: int
    num_completed: int
    num_refused: int
    num_aborted: int
    """Given up by the sender."""
    num_failed: int
    """Lost with the peer or the link, or of the wrong checksum."""
    num_malformed_frames: int
    num_stale_frames: int
    """Of an older epoch, or about an unknown transfer or session; thrown away on purpose."""
    num_late_writes: int
    """Transfers whose bytes all came, but whose session had ended; thrown away on purpose."""
    num_duplicates: int
    bytes_received: int
    num_refused_handshakes: int = 0
    """Connections that had no admitted key."""


class KvSenderInterface(Protocol):
    """The sending endpoint of a server rank. The fake is `fake.FakeKvSender`."""

    def submit(self, peer: PeerAddress, transfer: OutgoingTransfer) -> None:
        """Queue a transfer to one rank, which gets what it wants of this rank's KV heads.

        Every submitted transfer has exactly one outcome, also when the queue is full or the
        endpoint is closed. Transfers to one peer are carried one after the other, in this order.
        To several ranks of one server the same transfer is submitted once for each.

        Raises:
            ValueError: sizes that do not fit the layout, a transfer id that is pending already, or
                a rank that gets nothing from this one.
        """
        ...

    def ask(
        self,
        peer: PeerAddress,
        stream_id: int,
        version: int,
        token_ids: Sequence[int],
        *,
        namespace: str = SHARED_NAMESPACE,
    ) -> None:
        """Ask how much of a prompt the receiver holds; `poll_held` tells, then and when it changes,
        until `let_go` or `ReceiverLost`, after which it has to be asked anew. Of a receiver that
        cannot be reached nothing else is said.

        Args:
            version: counts how often tokens of the prompt were replaced.
            token_ids: all that is known of it.
            namespace: where it is looked for.
        """
        ...

    def let_go(self, peer: PeerAddress, stream_id: int) -> None:
        """Nothing more needs to be known about this stream."""
        ...

    def poll_held(self) -> list[HeldNews]:
        """What receivers said since the last call; `fileno` is readable."""
        ...

    def cancel(self, transfer_id: int) -> None:
        """Give a transfer up, to whichever ranks; its outcomes follow as ever. Too late, or
        unknown: no effect."""
        ...

    def poll(self) -> list[TransferOutcome]:
        """What ended since the last call; called when `fileno` is readable, or in every loop.

        The KV of each transfer named belongs to the caller again.
        """
        ...

    def fileno(self) -> int:
        """Readable when `poll` or `poll_held` has something."""
        ...

    def stats(self) -> SenderStats:
        """For metrics; at any time."""
        ...

    def close(self) -> None:
        """End all threads; blocks for at most ``timeouts.join_s``. Pending transfers fail, and
        one last `poll` tells which."""
        ...


class KvReceiverInterface(Protocol):
    """The receiving endpoint of a server rank. The fake is `fake.FakeKvReceiver`."""

    @property
    def port(self) -> int:
        """Control port on which it listens."""
        ...

    def poll(self) -> list[IncomingTransfer]:
        """What is complete since the last call, in order of completion; called when `fileno` is
        readable, or in every loop. Each must be given back by `release`."""
        ...

    def release(self, incoming: IncomingTransfer) -> None:
        """Give the staging of a transfer back, used or not. Nobody may touch it afterwards.

        Raises:
            ValueError: it was given back before.
        """
        ...

    def poll_notes(self) -> list[SenderNote]:
        """What senders asked since the last call."""
        ...

    def tell(self, sender_id: str, report: HeldReport) -> None:
        """Answer a sender, if it is still there."""
        ...

    def allow_early(self, num_bytes: int) -> None:
        """Refuse KV of prompts that are not committed beyond so many bytes, from now on."""
        ...

    def fileno(self) -> int:
        """Readable when `poll` or `poll_notes` has something."""
        ...

    def stats(self) -> ReceiverStats:
        """For metrics; at any time."""
        ...

    def close(self) -> None:
        """End all threads; blocks for at most ``timeouts.join_s``. What was not polled is gone."""
        ...
