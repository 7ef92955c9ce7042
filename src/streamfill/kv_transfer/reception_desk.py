"""Which offers a receiver takes, and the staging that it reserved for them. No sockets."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from streamfill.kv_transfer.codecs import CODECS, NO_CODEC
from streamfill.kv_transfer.counters import Counters, ReceiverCount
from streamfill.kv_transfer.inbound_lane import LaneReport
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.pool import StagingPool
from streamfill.kv_transfer.session_table import InboundSession
from streamfill.messages.handoff import Offer

MAX_READY = 256
"""Complete transfers that the server has not polled. Bounds what their token ids take."""

MAX_REMEMBERED = 4096
"""Transfer ids; late repetitions are minutes old at most."""


UNLIMITED = sys.maxsize


@dataclass(eq=False)
class Reception:
    """An accepted transfer that its lane has not reported yet."""

    session: InboundSession
    offer: Offer
    staging: Tensor
    """Reserved; the lane's until it reports."""
    encoded: Tensor | None = None
    """The same, for what is written in a codec, and released then."""
    given_up: bool = False
    """By the sender. The chunks still travel, for nobody."""


class ReceptionDesk:
    """The accepted transfers of one receiver, one per session. Owned by its control thread."""

    def __init__(
        self,
        layout: KvLayout,
        *,
        pool: StagingPool,
        counters: Counters[ReceiverCount],
        num_ready: Callable[[], int],
    ) -> None:
        """Args as in `inbound_control.InboundControl`."""
        self._layout = layout
        self._pool = pool
        self._counters = counters
        self._num_ready = num_ready
        self.early_room_bytes = UNLIMITED
        """For KV of prompts that are not committed. Set by the server's thread."""
        self._receptions: dict[int, Reception] = {}  # by epoch
        self._seen_ids: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._receptions)

    def is_receiving(self, session: InboundSession) -> bool:
        """Whether a transfer of this session is under way."""
        return session.epoch in self._receptions

    def accept(self, session: InboundSession, offer: Offer) -> Reception | str:
        """Reserve staging for an offer, or say why not; a refused id may be offered again."""
        refusal = self._refusal(session, offer)
        if refusal is not None:
            return refusal
        num_bytes = offer.num_tokens * self._layout.bytes_per_token
        staging = self._pool.try_acquire(num_bytes)
        encoded = None
        if staging is not None and offer.codec != NO_CODEC:
            encoded = self._pool.try_acquire(offer.num_bytes)
            if encoded is None:
                self._pool.release(staging)
                staging = None
        if staging is None:
            usage = self._pool.usage()
            return (
                f"staging memory is short: {num_bytes} bytes wanted, "
                f"{usage.used_bytes} of {usage.limit_bytes} in use"
            )
        self._seen_ids[offer.transfer_id] = None
        if len(self._seen_ids) > MAX_REMEMBERED:
            self._seen_ids.popitem(last=False)
        reception = self._receptions[session.epoch] = Reception(session, offer, staging, encoded)
        return reception

    def give_up(self, session: InboundSession, transfer_id: int) -> bool:
        """Mark a transfer as unwanted; False when it is not under way."""
        reception = self._receptions.get(session.epoch)
        if reception is None or reception.offer.transfer_id != transfer_id:
            return False
        reception.given_up = True
        return True

    def finish(self, report: LaneReport) -> Reception:
        """Take an accepted transfer off the books; the caller decides about its staging."""
        reception = self._receptions.pop(report.epoch)
        if reception.encoded is not None:
            self._pool.release(reception.encoded)
        return reception

    def _refusal(self, session: InboundSession, offer: Offer) -> str | None:
        if offer.transfer_id in self._seen_ids:
            self._counters.add(ReceiverCount.DUPLICATES)
            return f"transfer {offer.transfer_id} was offered before"
        if session.epoch in self._receptions:
            return "another transfer of this session is under way"
        if self._num_ready() >= MAX_READY:
            return f"{MAX_READY} complete transfers wait for the server"
        if offer.is_early and offer.num_bytes > self.early_room_bytes:
            return (
                f"no room for KV ahead of its commit: {offer.num_bytes} bytes, "
                f"{self.early_room_bytes} left"
            )
        return self._size_problem(offer)

    def _size_problem(self, offer: Offer) -> str | None:
        """What is wrong with what is said of the bytes."""
        if len(offer.token_ids) % 4:
            return f"token ids of {len(offer.token_ids)} bytes are not whole 32-bit integers"
        num_bytes = offer.num_bytes
        if offer.codec != NO_CODEC:
            codec = CODECS.get(offer.codec)
            problem = "it is not known here" if codec is None else codec.problem(self._layout)
            if codec is None or problem is not None:
                return f"codec {offer.codec!r}: {problem}"
            num_bytes = offer.num_tokens * self._layout.bytes_per_token
            if offer.num_bytes != codec.num_bytes(num_bytes, self._layout):
                return f"{offer.num_tokens} tokens are not {offer.num_bytes} bytes of {codec.name}"
        return self._layout.transfer_problem(
            num_token_ids=len(offer.token_ids) // 4,
            first_token=offer.first_token,
            num_tokens=offer.num_tokens,
            num_bytes=num_bytes,
        )
