"""A transfer under way, as one to all ranks of the decode server that this rank feeds."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamfill.engine.interface import ExportedKv
from streamfill.kv_transfer.codecs import codec_of_parts
from streamfill.kv_transfer.interface import TransferOutcome, TransferStatus

_WORST_FIRST = (
    TransferStatus.FAILED,
    TransferStatus.REFUSED,
    TransferStatus.CANCELLED,
    TransferStatus.DELIVERED,
)


@dataclass(frozen=True, eq=False)
class PendingTransfer:
    """KV lent to the transport until every part of it has ended."""

    stream_id: int
    attempt: int
    exported: ExportedKv | None
    """None: nothing is carried, all is there already."""
    num_tokens: int
    """Of the sequence, what is there already included."""
    num_parts: int
    """One for each rank that gets something."""
    total_bytes: int
    """Of KV, what the other ranks of this server send included."""
    handoff_id: int | None
    """The router's name for it. None: it goes ahead of the commit."""
    ended: list[TransferOutcome] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """On this rank."""
        return 0 if self.exported is None else self.exported.kv.num_bytes

    @property
    def is_over(self) -> bool:
        """Whether nobody reads the KV any more."""
        return len(self.ended) == self.num_parts

    def outcome(self) -> TransferOutcome:
        """Of all parts: the worst one's, which took as long as the slowest."""
        worst = min(self.ended, key=lambda outcome: _WORST_FIRST.index(outcome.status))
        if self.num_parts == 1:
            return worst
        return TransferOutcome(
            transfer_id=worst.transfer_id,
            status=worst.status,
            reason=worst.reason,
            num_bytes=sum(outcome.num_bytes for outcome in self.ended),
            queued_s=max(outcome.queued_s for outcome in self.ended),
            seconds=max(outcome.seconds for outcome in self.ended),
            codec=codec_of_parts(outcome.codec for outcome in self.ended),
        )
