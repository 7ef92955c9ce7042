"""A policy made of an order: streams run in turn until the step is full.

Phase 1, here, looks at all unfinished streams against the whole capacity and changes nothing: the
runs of the step, then whose memory they would take. Phase 2, the server's, starts the runs; what
finds no memory after all waits in the engine, and the next snapshot says so.

Bounds where memory suffices, with budget B, page size P, R requests per step:

* tiered policies: a committed stream's last run starts within ceil(W / (B - P + 1)) + ceil(n / R)
  steps, where W counts the tokens that it and the n - 1 streams before it in turn lack. With
  ``adaptive`` and ``laps``, which end some steps before they are full, n stands for ceil(n / R). No
  uncommitted stream ever delays it by more than the step that is under way: a step that runs a
  committed stream runs no other ones, since all tokens of a step come out at its end.
* an uncommitted stream runs within the same bound, counted over the streams before it in turn,
  while no commit comes. Commits go before it for as long as they come faster than they run.

How long others may come before a stream is the order's business; see each policy. An uncommitted
run for new context may make the engine evict other streams, once per segment that arrives; one that
only brings back evicted KV may not, or two streams too large for the pool would evict each other
for ever.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable

from streamfill.scheduling.plan import DeferReason, StepPlan, StreamRun, Victim
from streamfill.scheduling.policy import PolicyContext
from streamfill.scheduling.snapshot import Experience, Snapshot, StreamView
from streamfill.scheduling.step import Step
from streamfill.scheduling.turn_queue import Key
from streamfill.scheduling.turns import RankIndex, TurnIndex
from streamfill.stream.ids import StreamId

MAX_REFUSED = 16
"""Streams in a row that found no room before the rest of a queue is left for the next step."""


class TurnPolicy(abc.ABC):
    """``Policy`` by keys. Sub-classes say who goes first and who gives up memory first."""

    is_tiered = True
    """Committed streams before all others, and in steps of their own."""

    def __init__(self, context: PolicyContext | None = None) -> None:
        self._context = context or PolicyContext()
        self._index = TurnIndex(self.commit_key, self.context_key, is_tiered=self.is_tiered)
        self._ranks = RankIndex(self.victim_key)

    @abc.abstractmethod
    def commit_key(self, view: StreamView, experience: Experience) -> Key:
        """Order among committed streams."""

    @abc.abstractmethod
    def context_key(self, view: StreamView, experience: Experience) -> Key:
        """Order among uncommitted streams; among all where ``is_tiered`` is False."""

    @abc.abstractmethod
    def victim_key(self, view: StreamView, experience: Experience) -> Key:
        """Who gives up memory first."""

    victim_reason = "last in turn"

    def decide(self, snapshot: Snapshot) -> StepPlan:
        """The next step."""
        index = self._index
        index.follow(snapshot)
        step = Step(snapshot)
        step.commit_waits = bool(index.blocked)
        if self.is_tiered:
            rest_of_commits = self._run_commits(snapshot, step)
            if step.runs or snapshot.under_way is not None:
                return self._plan(snapshot, step, rest_of_commits, DeferReason.YIELDS)
        else:
            rest_of_commits = None
        rest_of_context = self._run_context(snapshot, step)
        return self._plan(snapshot, step, rest_of_commits or rest_of_context, rest_of_context)

    def _run_commits(self, snapshot: Snapshot, step: Step) -> DeferReason | None:
        """Give committed streams their turn. Returns why those behind have to wait."""
        return self._run_queue(snapshot, step, self._index.commits)

    def _run_context(self, snapshot: Snapshot, step: Step) -> DeferReason | None:
        """Give uncommitted streams their turn. Returns why those behind have to wait."""
        if step.commit_waits:
            return DeferReason.YIELDS
        limit = self._segment_limit()
        if limit is not None:
            step.limit(limit)
        rest = self._run_queue(snapshot, step, self._index.context)
        if rest is None and len(self._index.recompute):
            if not step.has_spare_page:
                return DeferReason.NO_MEMORY
            rest = self._run_queue(snapshot, step, self._index.recompute)
        return rest

    def _segment_limit(self) -> int | None:
        """Tokens of uncommitted streams in one step. None: the whole budget, as in policies that do
        not tell commits from context."""
        return self._context.segment_tokens if self.is_tiered else None

    def _run_queue(
        self, snapshot: Snapshot, step: Step, queue: Iterable[StreamId]
    ) -> DeferReason | None:
        streams = snapshot.streams
        num_refused = 0
        for stream_id in queue:
            if step.is_full:
                return step.full_reason
            if num_refused == MAX_REFUSED:
                return DeferReason.NO_MEMORY
            num_runs = len(step.runs)
            view = streams[stream_id]
            if view.committed_s is None:
                step.take_uncommitted(view)
            else:
                step.take_committed(view)
            num_refused = num_refused + 1 if len(step.runs) == num_runs else 0
        return None

    def _plan(
        self,
        snapshot: Snapshot,
        step: Step,
        rest_of_commits: DeferReason | None,
        rest_of_context: DeferReason | None,
    ) -> StepPlan:
        runs = tuple(step.runs)
        victims: tuple[Victim, ...] = ()
        if step.num_new_tokens > snapshot.memory.num_free_tokens:
            victims = self._victims(snapshot, step, runs)
        return StepPlan(runs, tuple(step.deferred), rest_of_commits, rest_of_context, victims)

    def _victims(
        self, snapshot: Snapshot, step: Step, runs: tuple[StreamRun, ...]
    ) -> tuple[Victim, ...]:
        """Whose memory the step takes, once what is free or belongs to nobody is used up."""
        memory = snapshot.memory
        spare = memory.num_free_tokens + max(
            0, memory.num_evictable_tokens - snapshot.num_streams_evictable_tokens
        )
        num_needed = step.num_new_tokens - spare
        if num_needed <= 0:
            return ()
        running = {run.stream_id for run in runs}
        victims: list[Victim] = []
        for stream_id in self._victim_order(snapshot):
            view = snapshot.streams.get(stream_id)
            if view is None or view.in_flight or stream_id in running:
                continue
            num_freed = view.num_evictable_tokens - view.num_shared_tokens
            if num_freed > 0:
                victims.append(Victim(stream_id, num_freed, self.victim_reason))
                num_needed -= num_freed
                if num_needed <= 0:
                    break
        return tuple(victims)

    def _victim_order(self, snapshot: Snapshot) -> Iterable[StreamId]:
        return self._ranks.follow(snapshot)
