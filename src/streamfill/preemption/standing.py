"""The preemption plan in force on one prefill server."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from streamfill.messages.control import (
    Plan,
    PlanEntry,
    PreemptionAction,
    PreemptionMode,
    StreamTelemetry,
)
from streamfill.preemption.rule import (
    DEFAULT_PRICING,
    Pricing,
    is_expendable,
    price_of,
    rank_victims,
)


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

    def order(
        self, streams: Sequence[StreamTelemetry], pricing: Pricing = DEFAULT_PRICING
    ) -> list[int]:
        """Ids of all ``streams``, the one to take memory from first in front; see ``ranking``."""
        return [entry.stream_id for entry in self.ranking(streams, pricing)]

    def ranking(
        self, streams: Sequence[StreamTelemetry], pricing: Pricing = DEFAULT_PRICING
    ) -> tuple[PlanEntry, ...]:
        """All ``streams`` with what to do with each, the one to take memory from first in front.

        The server knows better than a plan who is committed or active by now: such streams are
        kept, whatever the plan says. Of the idle ones those that the plan ranks come first, in its
        order; the others were opened or extended after it was made, so they follow, by the local
        rule. Entries for other streams are passed over. Empty in mode ``NONE``.
        """
        local = rank_victims(streams, pricing)
        if pricing.mode is PreemptionMode.NONE:
            return ()
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


def streams_to_save(
    ranking: Sequence[PlanEntry], streams: Sequence[StreamTelemetry], pricing: Pricing
) -> frozenset[int]:
    """Ids of those whose KV is copied to host memory when it is taken: what the ``ranking`` of
    ``streams`` says, and of those to be kept (it may have to be taken after all) the ones for whom
    a copy is the cheaper way too. Host memory goes to the first."""
    by_id = {stream.stream_id: stream for stream in streams}
    room = pricing.free_host_tokens
    saved: set[int] = set()
    for entry in ranking:
        if entry.action is PreemptionAction.RECOMPUTE:
            continue
        price = price_of(by_id[entry.stream_id], pricing, room)
        if price.action is PreemptionAction.SWAP:
            room -= price.num_host_tokens
            saved.add(entry.stream_id)
    return frozenset(saved)
