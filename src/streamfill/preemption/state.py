"""What the controller knows of the prefill servers, and the plan that stands for each.

Plain data: the clock comes in as an argument, frames are somebody else's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from streamfill.messages.control import (
    ControllerStatus,
    Plan,
    PlanEntry,
    PreemptionAction,
    Telemetry,
)
from streamfill.preemption.costs import BUILT_IN
from streamfill.preemption.rule import Pricing, rank_victims
from streamfill.preemption.timeouts import REFRESH_S, SERVER_TIMEOUT_S

_MAX_RETIRED = 8
"""Former incarnations remembered per server, so that a frame of one that was still under way brings
nothing back."""


@dataclass
class _Server:
    telemetry: Telemetry
    heard_s: float
    plan: Plan | None = None
    planned_s: float = 0.0
    """When ``plan`` was last given out."""
    retired: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_RETIRED))


class ControllerState:
    """Newest telemetry and standing plan of each server.

    Invariants: ``version`` grows with every plan made, over all servers; the report number of a
    server's telemetry never goes back within an incarnation.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.num_reports = 0
        self.num_stale_reports = 0
        """Reports dropped because a newer one, or a newer incarnation, was known."""
        self.num_victims_ranked = 0
        """Over all plans, those that changed nothing included."""
        self.num_plans_sent = 0
        self._num_plans = 0
        self._servers: dict[str, _Server] = {}

    def receive(self, telemetry: Telemetry, now_s: float) -> Plan | None:
        """Take a report in. Returns the plan to answer with: one that changed, or whose refresh is
        due."""
        self.num_reports += 1
        server = self._servers.get(telemetry.server_id)
        if server is None:
            server = self._servers[telemetry.server_id] = _Server(telemetry, now_s)
        elif _is_stale(server, telemetry):
            self.num_stale_reports += 1
            return None
        elif telemetry.incarnation != server.telemetry.incarnation:
            retired = server.retired
            retired.append(server.telemetry.incarnation)
            server = self._servers[telemetry.server_id] = _Server(telemetry, now_s, retired=retired)
        server.telemetry = telemetry
        server.heard_s = now_s

        standing = server.plan
        plan = self.plan_for(telemetry.server_id)
        if plan is standing and now_s - server.planned_s < REFRESH_S:
            return None
        server.planned_s = now_s
        self.num_plans_sent += 1
        return plan

    def plan_for(self, server_id: str) -> Plan:
        """The plan for a server's newest telemetry: the standing one unless its victims would
        change.

        Raises:
            KeyError: the server is not known.
        """
        server = self._servers[server_id]
        telemetry = server.telemetry
        victims = rank_victims(telemetry.streams, pricing_of(telemetry))
        self.num_victims_ranked += len(victims)
        if server.plan is None or _decisions(server.plan.victims) != _decisions(victims):
            self._num_plans += 1
            server.plan = Plan(
                server_id=server_id, epoch=self.epoch, version=self._num_plans, victims=victims
            )
        return server.plan

    def plans(self) -> tuple[Plan, ...]:
        """The standing plans of all servers that are known."""
        return tuple(server.plan for server in self._servers.values() if server.plan is not None)

    def expire(self, now_s: float) -> tuple[str, ...]:
        """Forget servers that are silent for too long. Returns their ids."""
        silent = tuple(
            server_id
            for server_id, server in self._servers.items()
            if now_s - server.heard_s >= SERVER_TIMEOUT_S
        )
        for server_id in silent:
            del self._servers[server_id]
        return silent

    def next_expiry_s(self) -> float | None:
        """When ``expire`` has something to do if nobody reports until then. None: no server is
        known."""
        if not self._servers:
            return None
        return min(server.heard_s for server in self._servers.values()) + SERVER_TIMEOUT_S

    def status(self, num_malformed_frames: int) -> ControllerStatus:
        """The answer to ``ControllerHello``."""
        return ControllerStatus(
            epoch=self.epoch,
            num_servers=len(self._servers),
            num_streams=sum(len(server.telemetry.streams) for server in self._servers.values()),
            num_plans=self._num_plans,
            num_malformed_frames=num_malformed_frames,
        )


def pricing_of(telemetry: Telemetry) -> Pricing:
    """What the streams of a report are priced with."""
    return Pricing(
        mode=telemetry.mode,
        costs=telemetry.costs or BUILT_IN["cpu"],
        bytes_per_token=telemetry.bytes_per_token,
        free_host_tokens=telemetry.num_free_host_tokens,
    )


def _is_stale(server: _Server, telemetry: Telemetry) -> bool:
    known = server.telemetry
    if telemetry.incarnation == known.incarnation:
        return telemetry.report <= known.report
    return telemetry.incarnation in server.retired


def _decisions(victims: Sequence[PlanEntry]) -> list[tuple[int, PreemptionAction]]:
    """What a server acts on. Reasons tell ages and change all the time."""
    return [(entry.stream_id, entry.action) for entry in victims]
