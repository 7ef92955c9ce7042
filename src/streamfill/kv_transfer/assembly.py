"""A transfer that reaches a rank in parts, one from each sender rank that holds some of its heads.

The first part that is offered reserves staging for all of them, so that no transfer waits with half
of its memory for another one's. Each part is received into a block of its own. The transfer is
complete with its last part. One part that fails gives up all, and what is offered of it later is
refused; so does a part that never comes (``timeouts.PARTS_S``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from streamfill.kv_transfer.codecs import codec_of_parts
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.slices import HeadRange, is_covered
from streamfill.messages.handoff import Offer


@dataclass(eq=False)
class Assembly:
    """One transfer, and what has come of it. Owned by the receiver's control thread."""

    sender_id: str
    heads: HeadRange
    """Of this rank."""
    offer: Offer
    """Of the part that came first."""
    staging: Tensor
    """Of all parts, in order of their heads."""
    touched_s: float
    """When a part of it was last offered, or came."""
    parts: list[HeadRange] = field(default_factory=list)
    """Offered so far."""
    codecs: list[str] = field(default_factory=list)
    """Of the same parts: each sender rank chooses by the speed of its own link."""
    num_bytes: int = 0
    """Of the same parts, as they travel."""
    arrived: list[HeadRange] = field(default_factory=list)
    num_receiving: int = 0
    """Parts whose blocks belong to their lanes."""
    problem: str | None = None
    """Why it was given up."""

    @property
    def is_complete(self) -> bool:
        """Whether all is here."""
        return is_covered(self.heads, self.arrived)

    @property
    def blocks(self) -> tuple[HeadRange, ...]:
        """Heads of each block of the staging, counted from this rank's first; empty: all in one."""
        if self.parts == [self.heads]:
            return ()
        return tuple(part.behind(self.heads.first) for part in sorted(self.parts))

    @property
    def codec(self) -> str:
        """How the KV was written."""
        return codec_of_parts(self.codecs)

    def add(self, part: HeadRange, offer: Offer, now_s: float) -> None:
        """A part was accepted; its block is its lane's from now on."""
        self.parts.append(part)
        self.codecs.append(offer.codec)
        self.num_bytes += offer.num_bytes
        self.num_receiving += 1
        self.touched_s = now_s

    def is_new(self, sender_id: str, part: HeadRange) -> bool:
        """Whether such a part belongs to it and was not offered before."""
        return sender_id == self.sender_id and not any(map(part.overlap, self.parts))

    def difference(self, offer: Offer) -> str | None:
        """In what the offer of a further part differs from the first one; None: it fits."""
        for name in _COMMON:
            if getattr(offer, name) != getattr(self.offer, name):
                return f"its parts differ in {name}"
        return None

    def block(self, part: HeadRange, layout: KvLayout) -> Tensor:
        """Where a part goes. ``layout`` is that of all heads."""
        bytes_per_head = self.staging.numel() // layout.num_kv_heads
        first = part.first - self.heads.first
        return self.staging[first * bytes_per_head : (first + part.num) * bytes_per_head]


_COMMON = (
    "stream_id",
    "token_ids",
    "first_token",
    "num_tokens",
    "version",
    "is_early",
    "replaces",
    "namespace",
)
"""What a sender's ranks say alike."""
