"""Which offers a receiver takes, and the staging that it reserved for them. No sockets."""

from __future__ import annotations

import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from streamfill.kv_transfer.assembly import Assembly
from streamfill.kv_transfer.codecs import CODECS, NO_CODEC
from streamfill.kv_transfer.counters import Counters, ReceiverCount
from streamfill.kv_transfer.inbound_lane import LaneReport
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.pool import StagingPool
from streamfill.kv_transfer.session_table import InboundSession
from streamfill.kv_transfer.slices import HeadShare
from streamfill.kv_transfer.source import MAX_CUTS
from streamfill.messages.handoff import Offer

MAX_READY = 256
"""Complete transfers that the server has not polled. Bounds what their token ids take."""

MAX_REMEMBERED = 4096
"""Transfer ids; late repetitions are minutes old at most."""


UNLIMITED = sys.maxsize


@dataclass(eq=False)
class Reception:
    """An accepted transfer, or part of one, that its lane has not reported yet."""

    session: InboundSession
    offer: Offer
    staging: Tensor
    """Its block; the lane's until it reports."""
    assembly: Assembly
    encoded: Tensor | None = None
    """The lane's too, for what is written in a codec; released with its report."""
    given_up: bool = False
    """By the sender. The chunks still travel, for nobody."""


class ReceptionDesk:
    """The accepted transfers of one receiver. Owned by its control thread."""

    def __init__(
        self,
        layout: KvLayout,
        share: HeadShare,
        *,
        pool: StagingPool,
        counters: Counters[ReceiverCount],
        num_ready: Callable[[], int],
    ) -> None:
        """Args as in `inbound_control.InboundControl`."""
        self._layout = layout
        self._heads = share.heads
        self._pool = pool
        self._counters = counters
        self._num_ready = num_ready
        self.early_room_bytes = UNLIMITED
        """For KV of prompts that are not committed. Set by the server's thread."""
        self._receptions: dict[int, Reception] = {}  # by epoch
        self._assemblies: dict[int, Assembly] = {}  # by transfer id
        self._seen_ids: OrderedDict[int, None] = OrderedDict()
        self._given_up: OrderedDict[int, str] = OrderedDict()
        """Why, of transfers in parts: the parts that are offered later are not wanted."""

    def __len__(self) -> int:
        return len(self._assemblies)

    def is_receiving(self, session: InboundSession) -> bool:
        """Whether a transfer of this session is under way."""
        return session.epoch in self._receptions

    def accept(self, session: InboundSession, offer: Offer, now_s: float) -> Reception | str:
        """Reserve staging for an offer, or say why not; a refused id may be offered again, unless
        other parts go with it."""
        refusal = self._refusal(session, offer)
        if refusal is not None:
            return refusal
        encoded: Tensor | None = None
        if offer.codec != NO_CODEC:
            encoded = self._pool.try_acquire(offer.num_bytes)
            if encoded is None:
                return self._refuse(session, offer, self._shortage(offer.num_bytes))
        assembly = self._assembly_for(session, offer)
        if isinstance(assembly, str):
            if encoded is not None:
                self._pool.release(encoded)
            return self._refuse(session, offer, assembly)
        assembly.add(session.heads, offer, now_s)
        block = assembly.block(session.heads, self._layout)
        reception = Reception(session, offer, block, assembly, encoded)
        self._receptions[session.epoch] = reception
        return reception

    def give_up(self, session: InboundSession, transfer_id: int) -> bool:
        """Mark a transfer as unwanted; False when it is not under way."""
        reception = self._receptions.get(session.epoch)
        if reception is None or reception.offer.transfer_id != transfer_id:
            return False
        reception.given_up = True
        return True

    def finish(self, report: LaneReport, now_s: float) -> Reception:
        """What a lane reported. To be followed by `arrived` or `give_up_all`."""
        reception = self._receptions.pop(report.epoch)
        if reception.encoded is not None:
            self._pool.release(reception.encoded)
        reception.assembly.num_receiving -= 1
        reception.assembly.touched_s = now_s
        return reception

    def arrived(self, reception: Reception) -> bool:
        """This part is here. Returns whether all is, and the staging is the caller's now."""
        assembly = reception.assembly
        assembly.arrived.append(reception.session.heads)
        if not assembly.is_complete:
            return False
        del self._assemblies[reception.offer.transfer_id]
        return True

    def give_up_all(self, assembly: Assembly, reason: str) -> bool:
        """Give up all parts of a transfer. Their staging is free as soon as no lane has any of
        it. Returns whether this was not done before."""
        transfer_id = assembly.offer.transfer_id
        is_first = assembly.problem is None
        if is_first:
            assembly.problem = reason
            if assembly.heads not in assembly.parts:
                self._remember(transfer_id, reason)
        if not assembly.num_receiving:
            del self._assemblies[transfer_id]
            self._pool.release(assembly.staging)
        return is_first

    def overdue(self, before_s: float) -> list[Assembly]:
        """Transfers of which nothing was heard since ``before_s``, and parts are missing."""
        return [
            assembly
            for assembly in self._assemblies.values()
            if not assembly.num_receiving and assembly.touched_s < before_s
        ]

    def _assembly_for(self, session: InboundSession, offer: Offer) -> Assembly | str:
        """Where an offer belongs; with its first part a transfer begins."""
        assembly = self._assemblies.get(offer.transfer_id)
        if assembly is None:
            return self._begin(session, offer)
        return assembly.difference(offer) or assembly

    def _begin(self, session: InboundSession, offer: Offer) -> Assembly | str:
        num_bytes = offer.num_tokens * self._layout.bytes_per_token
        if self._num_ready() >= MAX_READY:
            return f"{MAX_READY} complete transfers wait for the server"
        if offer.is_early and num_bytes > self.early_room_bytes:
            return (
                f"no room for KV ahead of its commit: {num_bytes} bytes, "
                f"{self.early_room_bytes} left"
            )
        staging = self._pool.try_acquire(num_bytes)
        if staging is None:
            return self._shortage(num_bytes)
        self._seen_ids[offer.transfer_id] = None
        if len(self._seen_ids) > MAX_REMEMBERED:
            self._seen_ids.popitem(last=False)
        assembly = self._assemblies[offer.transfer_id] = Assembly(
            session.server_id, self._heads, offer, staging, touched_s=session.heard_s
        )
        return assembly

    def _shortage(self, num_bytes: int) -> str:
        usage = self._pool.usage()
        return (
            f"staging memory is short: {num_bytes} bytes wanted, "
            f"{usage.used_bytes} of {usage.limit_bytes} in use"
        )

    def _refuse(self, session: InboundSession, offer: Offer, reason: str) -> str:
        """Without this part the others are of no use, whether they are here or still to come."""
        assembly = self._assemblies.get(offer.transfer_id)
        if assembly is not None:
            self.give_up_all(assembly, reason)
        elif session.heads != self._heads:
            self._remember(offer.transfer_id, reason)
        return reason

    def _refusal(self, session: InboundSession, offer: Offer) -> str | None:
        given_up = self._given_up.get(offer.transfer_id)
        if given_up is not None:
            return f"another part of transfer {offer.transfer_id} was given up: {given_up}"
        assembly = self._assemblies.get(offer.transfer_id)
        is_new_part = assembly is not None and assembly.is_new(session.server_id, session.heads)
        if offer.transfer_id in self._seen_ids and not is_new_part:
            self._counters.add(ReceiverCount.DUPLICATES)
            return f"transfer {offer.transfer_id} was offered before"
        if session.epoch in self._receptions:
            return "another transfer of this session is under way"
        return self._size_problem(session.layout, offer)

    @staticmethod
    def _size_problem(layout: KvLayout, offer: Offer) -> str | None:
        """What is wrong with what is said of the bytes; ``layout`` is that of what is sent."""
        if len(offer.token_ids) % 4:
            return f"token ids of {len(offer.token_ids)} bytes are not whole 32-bit integers"
        num_bytes = offer.num_bytes
        edges = (0, *offer.cuts, num_bytes)
        if len(offer.cuts) > MAX_CUTS:
            return f"{len(offer.cuts)} cuts are more than {MAX_CUTS}"
        if offer.cuts and any(first >= second for first, second in itertools.pairwise(edges)):
            return f"its cuts do not ascend from 0 to {num_bytes}"
        if offer.codec != NO_CODEC:
            codec = CODECS.get(offer.codec)
            problem = "it is not known here" if codec is None else codec.problem(layout)
            if codec is None or problem is not None:
                return f"codec {offer.codec!r}: {problem}"
            num_bytes = offer.num_tokens * layout.bytes_per_token
            if offer.num_bytes != codec.num_bytes(num_bytes, layout):
                return f"{offer.num_tokens} tokens are not {offer.num_bytes} bytes of {codec.name}"
        return layout.transfer_problem(
            num_token_ids=len(offer.token_ids) // 4,
            first_token=offer.first_token,
            num_tokens=offer.num_tokens,
            num_bytes=num_bytes,
        )

    def _remember(self, transfer_id: int, reason: str) -> None:
        self._given_up[transfer_id] = reason
        if len(self._given_up) > MAX_REMEMBERED:
            self._given_up.popitem(last=False)
