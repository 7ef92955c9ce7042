"""Faults put into KV transfers on purpose, for tests of what follows from them.

An endpoint that is given `Faults`, or that starts with ``STREAMFILL_KV_FAULTS`` in its environment,
spoils every transfer whose id is a multiple of ``every``, in a way drawn from ``seed`` and the id.
So both sides of a transfer agree without a word on what is to go wrong, and each does its part::

    STREAMFILL_KV_FAULTS="every=5,seed=1"
    STREAMFILL_KV_FAULTS="every=1,seed=1,kinds=damaged+complete_lost,while=/tmp/faults"

With ``while`` only as long as there is a file of that name. Each fault that really happens is
counted, and logged as ``kv_fault_injected`` with its kind and transfer id. Without such a setting
none of this is in a transfer's way.
"""

from __future__ import annotations

import enum
import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from streamfill.errors import TransportError
from streamfill.fault_words import read_fault_words
from streamfill.kv_transfer.counters import Counters
from streamfill.kv_transfer.group import Pair
from streamfill.kv_transfer.source import KvSource
from streamfill.observability.logging import log_event

_log = logging.getLogger(__name__)

VARIABLE = "STREAMFILL_KV_FAULTS"

CHUNK_BYTES = 16 * 1024
"""At most, of a sender with faults, so that also the transfers of tiny models have a middle."""

BEYOND_S = 0.5
"""How much longer than the other side's time-out a stall or a late answer takes. Less than
``timeouts.JOIN_SLACK_S``, so that endpoints still close in time."""


class Fault(enum.Enum):
    """What can go wrong. *Breaking* closes the pair of ranks, which the other side notices."""

    SENDER_BREAKS_FIRST = "sender_breaks_first"
    """Before the first chunk."""
    SENDER_BREAKS_MIDDLE = "sender_breaks_middle"
    SENDER_BREAKS_LAST = "sender_breaks_last"
    """After the last chunk, and before the receiver's answer is read."""
    SENDER_STALLS = "sender_stalls"
    """In the middle, for longer than the receiver waits."""
    RECEIVER_BREAKS_FIRST = "receiver_breaks_first"
    RECEIVER_BREAKS_MIDDLE = "receiver_breaks_middle"
    RECEIVER_BREAKS_LAST = "receiver_breaks_last"
    """After the last chunk, of which nobody is told."""
    RECEIVER_STALLS = "receiver_stalls"
    DAMAGED = "damaged"
    """A byte arrives as another. Only where the sender gave a checksum."""
    OFFER_REFUSED = "offer_refused"
    ACCEPT_LOST = "accept_lost"
    COMPLETE_LOST = "complete_lost"
    COMPLETE_LATE = "complete_late"
    """When the sender has given up."""

    @property
    def at(self) -> Step | None:
        """The step of the data path before which it happens; None: another place."""
        return _STEP_OF.get(self)


class Step(enum.Enum):
    """Where a thread that carries data is."""

    SEND_FIRST = "send_first"
    SEND_MIDDLE = "send_middle"
    SENT = "sent"
    RECV_FIRST = "recv_first"
    RECV_MIDDLE = "recv_middle"
    RECEIVED = "received"


_STEP_OF = {
    Fault.SENDER_BREAKS_FIRST: Step.SEND_FIRST,
    Fault.SENDER_BREAKS_MIDDLE: Step.SEND_MIDDLE,
    Fault.SENDER_BREAKS_LAST: Step.SENT,
    Fault.SENDER_STALLS: Step.SEND_MIDDLE,
    Fault.RECEIVER_BREAKS_FIRST: Step.RECV_FIRST,
    Fault.RECEIVER_BREAKS_MIDDLE: Step.RECV_MIDDLE,
    Fault.RECEIVER_BREAKS_LAST: Step.RECEIVED,
    Fault.RECEIVER_STALLS: Step.RECV_MIDDLE,
    Fault.DAMAGED: Step.RECEIVED,
}
_STALLS = (Fault.SENDER_STALLS, Fault.RECEIVER_STALLS)


@dataclass(frozen=True)
class FaultPlan:
    """Which transfers are spoiled, and how."""

    every: int
    """1 spoils all, 5 every fifth by their ids."""
    seed: int
    kinds: tuple[Fault, ...] = tuple(Fault)
    while_file: Path | None = None
    """Only while it exists. None: always."""

    def fault_of(self, transfer_id: int) -> Fault | None:
        """The same on both sides."""
        if transfer_id % self.every or not (self.while_file is None or self.while_file.exists()):
            return None
        return random.Random(f"{self.seed} {transfer_id}").choice(self.kinds)

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """Read what the environment says.

        Raises:
            ConfigError: it cannot be read, or says nothing sensible.
        """
        words = read_fault_words(VARIABLE, text, Fault)
        return cls(words.every, words.seed, words.kinds, words.while_file)


class Faults:
    """The faults of one endpoint. Used by all of its threads."""

    def __init__(self, plan: FaultPlan) -> None:
        self._plan = plan
        self._counters: Counters[Fault] = Counters()
        log_event(
            _log,
            "kv_faults_are_injected",
            level=logging.WARNING,
            every=plan.every,
            seed=plan.seed,
            kinds="+".join(kind.value for kind in plan.kinds),
        )

    @classmethod
    def from_environment(cls) -> Faults | None:
        """What ``STREAMFILL_KV_FAULTS`` asks for; None where it is not set.

        Raises:
            ConfigError: it cannot be read.
        """
        text = os.environ.get(VARIABLE)
        return None if text is None else cls(FaultPlan.parse(text))

    def count(self, kind: Fault) -> int:
        """How often it really happened at this endpoint."""
        return self._counters.get(kind)

    def injects(self, transfer_id: int, *kinds: Fault) -> Fault | None:
        """The planned fault of a transfer, if it is one of these; it counts as having happened."""
        fault = self._plan.fault_of(transfer_id)
        if fault not in kinds:
            return None
        self._counters.add(fault)
        log_event(
            _log,
            "kv_fault_injected",
            level=logging.WARNING,
            kind=fault,
            transfer_id=transfer_id,
        )
        return fault

    def around(
        self, pair: Pair, transfer_id: int, *, stall_s: float, has_checksum: bool = True
    ) -> Pair:
        """The pair as it is to behave during one transfer.

        Args:
            pair: of the session; closed by a fault that breaks it.
            transfer_id: of the transfer.
            stall_s: longer than the other side waits.
            has_checksum: without one no byte is damaged, since nobody would notice.
        """
        fault = self._plan.fault_of(transfer_id)
        if fault is None or fault.at is None or (fault is Fault.DAMAGED and not has_checksum):
            return pair
        return _FaultyPair(pair, self, transfer_id, fault=fault, stall_s=stall_s)


class _FaultyPair:
    """A `group.Pair` of which one operation goes wrong."""

    def __init__(
        self, pair: Pair, faults: Faults, transfer_id: int, *, fault: Fault, stall_s: float
    ) -> None:
        self._pair = pair
        self._faults = faults
        self._transfer_id = transfer_id
        self._fault = fault
        self._stall_s = stall_s
        self._into: Tensor | None = None

    def prepare(self, kv: KvSource, end: int) -> None:
        """See `group.Pair.prepare`."""
        self._pair.prepare(kv, end)

    def send(self, kv: KvSource, begin: int, end: int) -> None:
        """See `group.Pair.send`."""
        if begin == 0:
            self._at(Step.SEND_FIRST)
        if begin <= kv.num_bytes // 2 < end:
            self._at(Step.SEND_MIDDLE)
        self._pair.send(kv, begin, end)

    def recv(self, into: Tensor, begin: int, end: int, cuts: Sequence[int] = ()) -> None:
        """See `group.Pair.recv`."""
        self._into = into
        if begin == 0:
            self._at(Step.RECV_FIRST)
        if begin <= into.numel() // 2 < end:
            self._at(Step.RECV_MIDDLE)
        self._pair.recv(into, begin, end, cuts)

    def flush(self, num_left: int = 0) -> None:
        """See `group.Pair.flush`."""
        self._pair.flush(num_left)
        if not num_left:
            self._at(Step.SENT if self._into is None else Step.RECEIVED)

    def close(self) -> None:
        """See `group.Pair.close`."""
        self._pair.close()

    def _at(self, step: Step) -> None:
        fault = self._fault
        if fault.at is not step or self._faults.injects(self._transfer_id, fault) is None:
            return
        if fault in _STALLS:
            time.sleep(self._stall_s)
        elif fault is Fault.DAMAGED and self._into is not None:
            self._into[self._transfer_id % self._into.numel()] ^= 0xFF
        else:
            self._pair.close()
            raise TransportError(f"a fault was injected: {fault.value}")
