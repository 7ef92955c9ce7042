"""Between prefill servers and the preemption controller."""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec


class Residency(enum.Enum):
    """Where a stream's KV is. The token log is the truth, KV is only a cache of it."""

    DEVICE = "device"
    HOST = "host"
    NONE = "none"


class PreemptionAction(enum.Enum):
    """What to do with a stream's KV when memory is needed."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    SWAP = "swap"


class StreamTelemetry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stream on one prefill server."""

    stream_id: int
    num_known_tokens: int
    num_computed_tokens: int
    residency: Residency
    committed: bool
    active: bool
    """Tokens are being computed right now, or wait to be."""
    idle_s: float
    """Since the last splice arrived."""
    gaps_s: tuple[float, ...] = ()
    """Last few times between splices, oldest first."""
    priority: int = 0


class Telemetry(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="telemetry"
):
    """State of one prefill server. Answered with ``Plan``."""

    server_id: str
    incarnation: int
    report: int
    """1, 2, 3, …; an older report than the newest seen is dropped."""
    num_free_tokens: int
    num_cached_tokens: int
    num_total_tokens: int
    streams: tuple[StreamTelemetry, ...]


class ControllerHello(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="controller_hello"
):
    """Sent by anybody who wants to know whether the controller lives. Answered with
    ``ControllerStatus``."""


class PlanEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to do with one stream should memory be needed. The order of entries is the order of
    victims."""

    stream_id: int
    action: PreemptionAction
    reason: str


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="plan"):
    """A standing plan for one server. It holds until a newer one comes; the server never waits for
    it."""

    server_id: str
    epoch: int
    """Grows with each start of a controller; a plan of an older epoch is refused."""
    version: int
    """Grows with each plan within an epoch."""
    victims: tuple[PlanEntry, ...]


class ControllerStatus(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="controller_status"
):
    """How the controller is."""

    epoch: int
    num_servers: int
    num_streams: int
    num_plans: int
    num_malformed_frames: int


ServerToController: TypeAlias = Telemetry | ControllerHello
ControllerToServer: TypeAlias = Plan | ControllerStatus
