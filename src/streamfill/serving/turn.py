"""One turn of a server's loop: what all ranks of a tensor-parallel group are told at the same
moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from streamfill.engine.interface import CopyReport
from streamfill.kv_transfer.interface import HeldNews, SenderNote, TransferOutcome
from streamfill.links.server_link import Inbound
from streamfill.messages.control import Plan

TransportEvent: TypeAlias = HeldNews | SenderNote | TransferOutcome


@dataclass(frozen=True)
class Turn:
    """Gathered on rank 0, taken on every rank. SGLang broadcasts it within its own process
    group."""

    now_s: float
    """Rank 0's monotonic clock; the others have no clock of their own, so that all decide alike."""
    messages: tuple[Inbound, ...]
    transfer_ids: tuple[int, ...]
    """KV transfers that have arrived on every rank."""
    lost_transfer_ids: tuple[int, ...]
    """KV transfers that arrived on some ranks and never will on the others."""
    plan: Plan | None
    """A newer preemption plan."""
    controller_alive: bool
    copies: tuple[CopyReport, ...]
    """Swaps that ended on rank 0."""
    shut_down: bool
    transport: tuple[TransportEvent, ...] = ()
    """What the KV transport of rank 0 noticed, or was told by other servers."""


class ServerRuntime(Protocol):
    """A server inside SGLang's scheduler process. Everything is called in the scheduler's
    thread."""

    def attach(self, scheduler: Any) -> None:
        """The scheduler is complete; its loop starts next. Called once."""
        ...

    def gather(self) -> Turn:
        """What came since the last turn. Called on rank 0 only, in every round of the loop."""
        ...

    def take(self, turn: Turn) -> None:
        """Act on a turn, before SGLang forms its next batch."""
        ...

    def on_step_end(self) -> None:
        """A forward pass is over."""
        ...

    def on_abort(self, message: Any) -> None:
        """SGLang gave up a request (``io_struct.AbortReq``)."""
        ...
