"""The preemption plan in force on one prefill server."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from streamfill.messages.control import Plan, PlanEntry, PreemptionAction, StreamTelemetry
from streamfill.preemption.rule import is_expendable, rank_victims


class PlanSource(enum.Enum):
    """Whose ranking is in force."""

    CONTROLLER = "controller"
    LOCAL = "local"


class StandingPlan:
    """Merges the controller's newest plan with what the server itself knows better.

    No clock and no socket: the same updates and streams give the same order on every
    tensor-parallel rank. Ranks other than the one with the ``ControllerClient`` are told its plans
    and its ``alive``.
    """

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._controller_alive = False

    def update(self, plan: Plan | None, *, controller_alive: bool) -> None:
        """Take over what ``ControllerClient.poll`` and ``.alive`` say. ``plan`` None: the old one
        stays."""
        if plan is not None:
            self._plan = plan
        self._controller_alive = controller_alive

    @property
    def source(self) -> PlanSource:
        """``LOCAL`` before the first plan and while the controller is silent."""
        return PlanSource.LOCAL if self._plan_in_force() is None else PlanSource.CONTROLLER

    @property
    def version(self) -> int:
        """Of the plan in force; 0 while the local rule is."""
        plan = self._plan_in_force()
        return 0 if plan is None else plan.version

    def order(self, streams: Sequence[StreamTelemetry]) -> list[int]:
        """Ids of all ``streams``, the one to take memory from first in front; see ``ranking``."""
        return [entry.stream_id for entry in self.ranking(streams)]

    def ranking(self, streams: Sequence[StreamTelemetry]) -> tuple[PlanEntry, ...]:
        """All ``streams`` with what to do with each, the one to take memory from first in front.

        The server knows better than a plan who is committed or active by now: such streams are
        kept, whatever the plan says. Of the idle ones those that the plan ranks come first, in its
        order; the others were opened or extended after it was made, so they follow, by the local
        rule. Entries for other streams are passed over.
        """
        local = rank_victims(streams)
        plan = self._plan_in_force()
        if plan is None:
            return local
        expendable = {stream.stream_id for stream in streams if is_expendable(stream)}
        planned = {
            entry.stream_id: entry
            for entry in plan.victims
            if entry.action is not PreemptionAction.KEEP and entry.stream_id in expendable
        }
        return (*planned.values(), *(entry for entry in local if entry.stream_id not in planned))

    def _plan_in_force(self) -> Plan | None:
        return self._plan if self._controller_alive else None
