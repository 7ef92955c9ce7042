"""Stops this process at one phase of a KV transfer, so that a test can kill it right there.

Only for a child process: what is replaced here stays so.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from typing import Any

from streamfill.kv_transfer.control_socket import ControlSocket
from streamfill.kv_transfer.delivery import Delivery
from streamfill.kv_transfer.group import PairGroup
from streamfill.kv_transfer.reception_desk import ReceptionDesk
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.sender_session import SenderSession
from streamfill.kv_transfer.session_table import SessionTable
from streamfill.kv_transfer.shared_memory import SharedMemoryPair
from streamfill.messages.handoff import Accept, Complete, Hello, Offer

_LEAVES_S = 0.05
"""A message just sent goes out by a thread of ZeroMQ."""


class Phase(enum.Enum):
    """How far a transfer has come."""

    HELLO = "hello"
    OFFER = "offer"
    ACCEPT = "accept"
    SETUP = "group set-up"
    CHUNK = "mid-chunk"
    COMPLETE = "before complete"

    @property
    def has_data_path(self) -> bool:
        """Whether what carries the data makes a difference by then."""
        return self in (Phase.SETUP, Phase.CHUNK, Phase.COMPLETE)


def stop_sender_at(phase: Phase, tell: Callable[[], None]) -> None:
    """A sender's thread tells, and stands still for ever: when it said ``Hello`` or made its offer,
    when that was accepted, in the middle of setting its pair up or of the chunks, or when all of
    them are sent."""
    match phase:
        case Phase.HELLO:
            _after(SenderSession, "send", tell, lambda _, message: isinstance(message, Hello))
        case Phase.OFFER:
            _after(SenderSession, "send", tell, lambda _, message: isinstance(message, Offer))
        case Phase.ACCEPT:
            _after(Delivery, "offer", tell)
        case Phase.SETUP:
            _after(RendezvousStore, "set", tell)
        case Phase.CHUNK:
            for pair in (SharedMemoryPair, PairGroup):
                _before(pair, "send", tell, lambda _pair, _kv, begin, _end: begin > 0)
        case Phase.COMPLETE:
            for pair in (SharedMemoryPair, PairGroup):
                _after(pair, "flush", tell)


def stop_receiver_at(phase: Phase, tell: Callable[[], None]) -> None:
    """Likewise a receiver's thread: before it answers a ``Hello`` or an offer, when it accepted, in
    the middle of setting its pair up or of the chunks, or before it says that it has them all."""
    match phase:
        case Phase.HELLO:
            _before(SessionTable, "greet", tell)
        case Phase.OFFER:
            _before(ReceptionDesk, "accept", tell)
        case Phase.ACCEPT:
            _after(ControlSocket, "reply", tell, lambda *args: isinstance(args[2], Accept))
        case Phase.SETUP:
            _after(RendezvousStore, "set", tell)
        case Phase.CHUNK:
            for pair in (SharedMemoryPair, PairGroup):
                _before(pair, "recv", tell, lambda _pair, _into, begin, *_: begin > 0)
        case Phase.COMPLETE:
            _before(ControlSocket, "reply", tell, lambda *args: isinstance(args[2], Complete))


def _always(*_: object) -> bool:
    return True


def _before(
    owner: type, name: str, tell: Callable[[], None], when: Callable[..., bool] = _always
) -> None:
    original = getattr(owner, name)

    def replacement(*args: Any) -> Any:
        if when(*args):
            _stand_still(tell)
        return original(*args)

    setattr(owner, name, replacement)


def _after(
    owner: type, name: str, tell: Callable[[], None], when: Callable[..., bool] = _always
) -> None:
    original = getattr(owner, name)

    def replacement(*args: Any) -> Any:
        result = original(*args)
        if when(*args):
            _stand_still(tell)
        return result

    setattr(owner, name, replacement)


def _stand_still(tell: Callable[[], None]) -> None:
    time.sleep(_LEAVES_S)
    tell()
    threading.Event().wait()
