"""Which offers a receiver takes, and the staging that it reserved for them. No sockets."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

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
        staging = self._pool.try_acquire(offer.num_bytes)
        if staging is None:
            usage = self._pool.usage()
            return (
                f"staging memory is short: {offer.num_bytes} bytes wanted, "
                f"{usage.used_bytes} of {usage.limit_bytes} in use"
            )
        self._seen_ids[offer.transfer_id] = None
        if len(self._seen_ids) > MAX_REMEMBERED:
            self._seen_ids.popitem(last=False)
        reception = self._receptions[session.epoch] = Reception(session, offer, staging)
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
        return self._receptions.pop(report.epoch)

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
        if len(offer.token_ids) % 4:
            return f"token ids of {len(offer.token_ids)} bytes are not whole 32-bit integers"
        return self._layout.transfer_problem(
            num_token_ids=len(offer.token_ids) // 4,
            first_token=offer.first_token,
            num_tokens=offer.num_tokens,
            num_bytes=offer.num_bytes,
        )
