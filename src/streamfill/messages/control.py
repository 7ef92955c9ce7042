"""Between prefill servers and the preemption controller."""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from streamfill.preemption.costs import CostModel


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


class PreemptionMode(enum.Enum):
    """How a server may take KV from a stream that is not over."""

    AUTO = "auto"
    """Swap or recompute, whichever brings it back sooner."""
    SWAP = "swap"
    """Always by a copy in host memory, as long as there is room."""
    RECOMPUTE = "recompute"
    """Never by a copy."""
    NONE = "none"
    """No order of victims and no copies: the engine's own eviction, least recently used first."""


class StreamTelemetry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stream on one prefill server."""

    stream_id: int
    num_known_tokens: int
    num_computed_tokens: int
    residency: Residency
    num_shared_tokens: int = 0
    """Of the computed ones, those that other open streams use too: taking them frees nothing."""
    num_saved_tokens: int = 0
    """Of the computed ones, those that host memory holds as well: taking them costs no copy."""
    num_host_tokens: int = 0
    """Right behind the computed ones, in host memory only."""
    committed: bool
    active: bool
    """Tokens are being computed right now, or wait to be."""
    idle_s: float
    """Since the last splice arrived."""
    gaps_s: tuple[float, ...] = ()
    """Last few times between splices, oldest first."""
    expected_next_s: float | None = None
    """From now on, until its next segment is expected: by the client's hint, else by its own gaps.
    Below 0: overdue. None: nobody knows."""
    was_preempted: bool = False
    """It lost KV, and has not computed anything since."""
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
    num_host_tokens: int = 0
    """Room for so many tokens in host memory."""
    num_free_host_tokens: int = 0
    """Of it, what is empty or holds what nobody is expected to need."""
    bytes_per_token: int = 0
    """Of KV, all layers of one rank."""
    mode: PreemptionMode = PreemptionMode.AUTO
    costs: CostModel | None = None
    """As the server has corrected it. None: the controller takes the CPU's built-in one."""
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
    cost_s: float = 0.0
    """What getting its KV back is predicted to cost: seconds."""


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="plan"):
    """A standing plan for one server. It holds until a newer one comes; the server never waits for
    it."""

    server_id: str
    epoch: int
    """Grows with each start of a controller, unless the wall clock goes back; a plan of an older
    epoch is refused while the newer controller lives."""
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
