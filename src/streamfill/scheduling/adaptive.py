"""Ours, and the default: short waits first, nobody forgotten, context in the order of its use.

Three decisions, each a rule over what the server has learned (``learning``):

1. **Which commit first.** Shortest rest first makes the mean wait least, and lets long ones wait
   for as long as short ones come. So a commit's wait counts for it: the key of a stream that was
   committed at ``t`` and whose rest costs ``c`` is ``t + AGEING * c``. Both sides age alike, so the
   order of two streams never changes by waiting.
2. **How many commits in one step.** All tokens of a step come out at its end. Let ``m`` commits be
   in the step and ``n`` wait, with fixed costs ``F`` a step and ``p`` a token. The next one, of
   ``k`` tokens, makes the first ``m`` wait for ``k * p`` longer and saves the ``n - m`` others a
   step's ``F``. It joins while ``m * k * p < (n - m) * F``.
3. **Which context, and how much of it.** Context is of use if it is computed before its commit. So
   the stream goes first whose commit is expected first, going by its own pauses and by how many
   segments streams of its mode had. A step of context is what a commit may have to wait for, so it
   is short; but short steps waste their fixed costs, and the more context waits the more that
   matters. It grows with the backlog, to at most twice the server's ``segment_tokens``. Where
   commits can interrupt it between two layers (the option ``interrupts``) only those of its own
   streams wait for it, and it may be as long as any step. A step of commits is interrupted too, by
   one that goes before all of them by rule 1, the work that was done for them taken off;
   so it may be ``policy.LONG_STEP`` times as long as others.

Bounded wait, where memory suffices, in the words of ``turn_policy``: before a committed stream only
those go that were committed before it, or within ``AGEING * c + P * d + S`` seconds after, where
``c`` is the cost of its rest at its commit, ``d`` how much higher their priority is, ``P`` the
seconds that a priority is worth, and ``S`` how much tighter their SLO is, at most ``MAX_SLO_S``.
Before an uncommitted stream no segment goes that arrived more than ``MAX_HORIZON_S + P * d``
seconds after its own newest one.

Victims are taken in the order of the preemption plan in force.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from streamfill.scheduling.plan import DeferReason, StepPlan
from streamfill.scheduling.policy import PolicyContext
from streamfill.scheduling.snapshot import Experience, Snapshot, StreamView
from streamfill.scheduling.step import Step, num_lacking_tokens
from streamfill.scheduling.turn_policy import TurnPolicy
from streamfill.scheduling.turn_queue import Key
from streamfill.stream.ids import StreamId

AGEING: Final = 3.0
"""How many seconds of waiting outweigh one second of work. By the model of ``harness``: less is
better for the longest prompts, more for the median."""
PRIORITY_S: Final = 1.0
"""A priority of one more is worth having come so much earlier."""
DEFAULT_SLO_S: Final = 1.0
MAX_SLO_S: Final = 10.0
"""Being in no hurry at all is worth as much as this."""
MAX_HORIZON_S: Final = 60.0
"""A commit that is expected later than this counts as expected then."""
BACKLOG_STEPS: Final = 6
"""Waiting context is to be computed in about so many steps, within the limits."""


class AdaptivePolicy(TurnPolicy):
    """The ``Policy`` described above."""

    victim_reason = "first in the preemption plan"

    def __init__(self, context: PolicyContext | None = None) -> None:
        context = context or PolicyContext()
        self._ageing = context.number("ageing", AGEING, least=0.0)
        self._priority_s = context.number("priority_s", PRIORITY_S, least=0.0)
        wanted = context.choice("interrupts", "on", "off") == "on"
        self._interrupts = wanted and context.can_interrupt
        super().__init__(context)

    def commit_key(self, view: StreamView, experience: Experience) -> Key:
        committed_s = view.last_segment_s if view.committed_s is None else view.committed_s
        slo_s = DEFAULT_SLO_S if view.ttft_slo_s is None else min(view.ttft_slo_s, MAX_SLO_S)
        work_s = experience.costs.step_s(num_lacking_tokens(view))
        hurry_s = self._priority_s * view.priority + DEFAULT_SLO_S - slo_s
        return committed_s + self._ageing * work_s - hurry_s, committed_s

    def context_key(self, view: StreamView, experience: Experience) -> Key:
        expected_s = experience.habits[view.mode].expected_commit_s(view)
        expected_s = min(expected_s, view.last_segment_s + MAX_HORIZON_S)
        return expected_s - self._priority_s * view.priority, view.arrival_s

    def victim_key(self, view: StreamView, experience: Experience) -> Key:
        expected_s, _ = self.context_key(view, experience)
        return float(view.committed_s is not None), -expected_s

    def decide(self, snapshot: Snapshot) -> StepPlan:
        plan = super().decide(snapshot)
        return plan._replace(interruptible=True) if self._interrupts else plan

    def _run_commits(self, snapshot: Snapshot, step: Step) -> DeferReason | None:
        if snapshot.under_way:
            return self._run_commits_before(snapshot, step, snapshot.under_way)
        if self._interrupts and snapshot.under_way is None:
            step.budget = max(step.budget, snapshot.long_token_budget)
        commits = self._index.commits
        num_waiting = len(commits)
        if num_waiting < 2:
            return self._run_queue(snapshot, step, commits)
        streams, costs = snapshot.streams, snapshot.experience.costs
        for num_in_step, stream_id in enumerate(commits):
            view = streams[stream_id]
            if step.is_full:
                return step.full_reason
            if num_in_step:
                costs_others_s = num_in_step * num_lacking_tokens(view) * costs.per_token_s
                if costs_others_s >= (num_waiting - num_in_step) * costs.fixed_s:
                    return DeferReason.NOT_WORTH_IT
            step.take_committed(view)
        return None

    def _run_commits_before(
        self, snapshot: Snapshot, step: Step, under_way: Sequence[StreamId]
    ) -> DeferReason | None:
        """The first commit, if it goes before all those that it would interrupt: their rests are
        as much shorter by now as their step has been computed. One of another tenant goes before
        them if that tenant had less than each of theirs."""
        experience, streams = snapshot.experience, snapshot.streams
        first = min(self.commit_key(streams[stream_id], experience) for stream_id in under_way)
        first_left = (first[0] - self._ageing * snapshot.under_way_s, first[1])
        served = snapshot.served
        tenants = {streams[stream_id].tenant for stream_id in under_way}
        for stream_id in self._index.commits:
            view = streams[stream_id]
            if view.tenant not in tenants:
                start = served.start_of(view.tenant)
                if any(served.start_of(tenant) <= start for tenant in tenants):
                    break
            elif self.commit_key(view, experience) >= first_left:
                break
            step.take_committed(view)
            if step.runs:
                break
        return DeferReason.YIELDS

    def _run_context(self, snapshot: Snapshot, step: Step) -> DeferReason | None:
        step.budget = snapshot.token_budget
        least = self._context.segment_tokens
        if least is not None:
            backlog = self._index.num_context_tokens // BACKLOG_STEPS
            most = step.budget if self._interrupts else 2 * least
            step.limit(min(max(least, backlog), most))
        return super()._run_context(snapshot, step)

    def _segment_limit(self) -> int | None:
        return None  # set above, by the backlog

    def _victim_order(self, snapshot: Snapshot) -> Iterable[StreamId]:
        return snapshot.standing_order or super()._victim_order(snapshot)
