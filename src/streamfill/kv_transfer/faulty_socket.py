"""A receiver's control socket that loses, delays and refuses what `faults` says, for tests."""

from __future__ import annotations

import time
from collections import deque

import zmq

from streamfill.curve.keys import ListenKeys
from streamfill.errors import ProtocolError
from streamfill.kv_transfer.control_socket import ControlSocket
from streamfill.kv_transfer.counters import Counters, ReceiverCount
from streamfill.kv_transfer.faults import Fault, Faults
from streamfill.messages.handoff import Accept, Complete, Offer, Refuse, ToReceiver, ToSender


class FaultySocket(ControlSocket):
    """Behaves as its base but for the transfers that are to be spoiled."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        host: str,
        port: int,
        counters: Counters[ReceiverCount],
        faults: Faults,
        late_s: float,
        keys: ListenKeys | None = None,
    ) -> None:
        """
        Args:
            context: as of the base, like all that is not named here.
            host: see there.
            port: see there.
            counters: see there.
            faults: of the receiver.
            late_s: longer than a sender waits for an answer.
            keys: as of the base.
        """
        super().__init__(context, host=host, port=port, counters=counters, keys=keys)
        self._faults = faults
        self._late_s = late_s
        self._late: deque[tuple[float, bytes, ToSender]] = deque()
        """Answers kept back, with the time at which they are due."""

    def receive(self) -> tuple[bytes, ToReceiver | ProtocolError] | None:
        """See the base. Called in every turn of the control thread, so late answers leave here."""
        while self._late and time.monotonic() >= self._late[0][0]:
            _, route, message = self._late.popleft()
            super().reply(route, message)
        while (received := super().receive()) is not None:
            route, offer = received
            if not isinstance(offer, Offer) or not self._faults.injects(
                offer.transfer_id, Fault.OFFER_REFUSED
            ):
                return received
            self._counters.add(ReceiverCount.REFUSED)
            super().reply(
                route,
                Refuse(
                    transfer_id=offer.transfer_id,
                    epoch=offer.epoch,
                    reason=f"a fault was injected: {Fault.OFFER_REFUSED.value}",
                ),
            )
        return None

    def reply(self, route: bytes, message: ToSender) -> None:
        """See the base."""
        fault = None
        if isinstance(message, Accept):
            fault = self._faults.injects(message.transfer_id, Fault.ACCEPT_LOST)
        elif isinstance(message, Complete):
            fault = self._faults.injects(
                message.transfer_id, Fault.COMPLETE_LOST, Fault.COMPLETE_LATE
            )
        if fault is Fault.COMPLETE_LATE:
            self._late.append((time.monotonic() + self._late_s, route, message))
        elif fault is None:
            super().reply(route, message)
