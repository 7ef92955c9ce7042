"""One server in virtual time: the real policies on made-up streams, thousands of steps a second.

A discrete-event model with the server's own rules and none of its machinery:

1. what has arrived by now is spliced in, committed, cancelled;
2. ``decide`` plans over all streams;
3. the plan is carried out: memory is taken as it says, and what finds none waits in the engine;
4. the clock moves by what the step costs; its tokens are computed, its commits answered. Where
   plan and model allow it, commits that come meanwhile are computed between two of its layers.

Tests check properties of policies with it. What it leaves out: the router, the decode server, and
everything that a cost per step and per token cannot say.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from streamfill.scheduling.learning import Learner
from streamfill.scheduling.plan import RunReason, StepPlan, StreamRun
from streamfill.scheduling.policy import LONG_STEP, Policy
from streamfill.scheduling.shares import FairShares
from streamfill.scheduling.snapshot import (
    UNIT_COSTS,
    ContextMode,
    MemoryView,
    Snapshot,
    StepCosts,
    StreamTable,
    StreamView,
)
from streamfill.stream.ids import StreamId


@dataclass(frozen=True, kw_only=True)
class ContextChange:
    """Keep the first ``keep_tokens``, put ``num_new_tokens`` behind them."""

    at_s: float
    keep_tokens: int
    num_new_tokens: int
    with_commit: bool = False
    """It comes with the commit, so nobody computes it before."""


@dataclass(frozen=True, kw_only=True)
class StreamStory:
    """What the client of one stream does, and when."""

    stream_id: StreamId
    mode: ContextMode = ContextMode.APPEND
    opened_s: float
    changes: tuple[ContextChange, ...]
    committed_s: float | None
    """None: never."""
    cancelled_s: float | None = None
    priority: int = 0
    ttft_slo_s: float | None = None
    tenant: int = 0
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ServerModel:
    """The server that is modelled."""

    costs: StepCosts = UNIT_COSTS
    step_tokens: int = 256
    max_requests: int = 64
    pool_tokens: int = 1 << 20
    page_size: int = 1
    num_layers: int = 0
    """Of the model; between two of them a step can be interrupted. 0: it cannot."""


class SharedCache(Protocol):
    """KV that streams share. Without one, each has only its own."""

    def cached_tokens(self, stream_id: StreamId, num_known: int) -> int:
        """How much of the stream's prompt as it is now others have computed."""
        ...

    def computed(self, stream_id: StreamId, num_tokens: int) -> None:
        """That many first tokens of the stream are computed."""
        ...


@dataclass(slots=True)
class StreamOutcome:
    """What became of one stream."""

    committed_s: float | None = None
    answered_s: float | None = None
    is_cancelled: bool = False
    num_computed_tokens: int = 0
    """That went through the model, each time counted."""
    num_evicted_tokens: int = 0
    num_runs: int = 0

    @property
    def ttft_s(self) -> float | None:
        """From the commit to the first token; None without one."""
        if self.committed_s is None or self.answered_s is None:
            return None
        return self.answered_s - self.committed_s


@dataclass(slots=True)
class _Stream:
    story: StreamStory
    view: StreamView
    keep_tokens: int = 0
    """The least that was kept since its run began."""
    ends: list[tuple[int, float]] = field(default_factory=list)
    """(end, arrival) of each change that is still valid."""


OnStep = Callable[[Snapshot, StepPlan], None]


class Harness:
    """Runs stories through a policy."""

    def __init__(
        self,
        policy: Policy,
        model: ServerModel | None = None,
        *,
        cache: SharedCache | None = None,
        on_step: OnStep | None = None,
        on_answer: Callable[[StreamId, float], Iterable[StreamStory]] | None = None,
    ) -> None:
        """
        Args:
            on_step: called with every decision, before it is carried out.
            on_answer: called with every answer and its time; returns streams that follow from it.
        """
        self.policy = policy
        self._model = model or ServerModel()
        self.now_s = 0.0
        self.outcomes: dict[StreamId, StreamOutcome] = {}
        self.num_steps = 0
        """Interruptions included."""
        self.num_interruptions = 0
        self.busy_s = 0.0
        self._cache = cache
        self._on_step = on_step
        self._on_answer = on_answer
        self._learner = Learner(self._model.costs)
        self._table = StreamTable()
        self._shares = FairShares()
        self._streams: dict[StreamId, _Stream] = {}
        self._events: list[tuple[float, int, StreamId, object]] = []
        self._num_events = 0
        self._num_owned = 0
        """KV of streams that are not over."""
        self._num_orphaned = 0
        """KV of streams that are: cached, and first to go."""
        self._stuck: list[StreamRun] = []

    @property
    def num_used_tokens(self) -> int:
        """Of the pool."""
        return self._num_owned + self._num_orphaned

    def add(self, story: StreamStory) -> None:
        """A stream will come."""
        self._note(story.opened_s, story.stream_id, story)
        for change in story.changes:
            self._note(change.at_s, story.stream_id, change)
        if story.committed_s is not None:
            self._note(story.committed_s, story.stream_id, "commit")
        if story.cancelled_s is not None:
            self._note(story.cancelled_s, story.stream_id, "cancel")
        self.outcomes[story.stream_id] = StreamOutcome()

    def run(self, stories: Sequence[StreamStory], *, max_steps: int = 1_000_000) -> None:
        """Until nothing is left to come and nothing to do.

        Raises:
            RuntimeError: it took more than ``max_steps`` steps.
        """
        for story in stories:
            self.add(story)
        while True:
            self._take_events()
            plan = self._decide()
            if plan.runs or self._stuck:
                self._carry_out(plan)
                if self.num_steps > max_steps:
                    raise RuntimeError(f"no end after {max_steps} steps")
            elif self._events:
                self.now_s = max(self.now_s, self._events[0][0])
            else:
                return

    # 1. What arrives

    def _note(self, at_s: float, stream_id: StreamId, event: object) -> None:
        heapq.heappush(self._events, (at_s, self._num_events, stream_id, event))
        self._num_events += 1

    def _take_events(self) -> None:
        while self._events and self._events[0][0] <= self.now_s:
            at_s, _, stream_id, event = heapq.heappop(self._events)
            if isinstance(event, StreamStory):
                self._open(event, at_s)
                continue
            stream = self._streams.get(stream_id)
            if stream is None:
                continue
            if isinstance(event, ContextChange):
                self._change(stream, event, at_s)
            elif event == "commit":
                self._commit(stream, at_s)
            else:
                self.outcomes[stream_id].is_cancelled = True
                self._forget(stream)

    def _open(self, story: StreamStory, at_s: float) -> None:
        view = StreamView(
            stream_id=story.stream_id,
            mode=story.mode,
            arrival_s=at_s,
            last_segment_s=at_s,
            pending_since_s=at_s,
            num_known_tokens=0,
            num_computed_tokens=0,
            priority=story.priority,
            ttft_slo_s=story.ttft_slo_s,
            tenant=story.tenant,
            weight=story.weight,
        )
        self._streams[story.stream_id] = _Stream(story, view)

    def _change(self, stream: _Stream, change: ContextChange, at_s: float) -> None:
        view = stream.view
        keep = min(change.keep_tokens, view.num_known_tokens)
        known = keep + change.num_new_tokens
        computed = min(view.num_computed_tokens, keep)
        self._num_owned -= view.num_computed_tokens - computed
        self._num_orphaned += view.num_computed_tokens - computed
        stream.keep_tokens = min(stream.keep_tokens, keep)
        while stream.ends and stream.ends[-1][0] > keep:
            _, cut_s = stream.ends.pop()
            if not stream.ends or stream.ends[-1][0] < keep:
                if keep:
                    stream.ends.append((keep, cut_s))
                break
        stream.ends.append((known, at_s))
        gaps = view.gaps_s
        if view.num_known_tokens:
            gaps = (*gaps[-7:], at_s - view.last_segment_s)
        stream.view = _with(
            view,
            last_segment_s=at_s,
            num_known_tokens=known,
            num_computed_tokens=computed,
            num_reached_tokens=min(view.num_reached_tokens, keep),
            gaps_s=gaps,
            num_segments=view.num_segments + 1,
            awaits_commit=change.with_commit,
        )
        self._look(stream)
        self._put(stream)

    def _commit(self, stream: _Stream, at_s: float) -> None:
        if not stream.view.num_known_tokens:
            return
        view = stream.view
        self.outcomes[view.stream_id].committed_s = at_s
        self._learner.note_commit(view.mode, view.num_segments, view.gaps_s)
        stream.view = _with(stream.view, committed_s=at_s, awaits_commit=False)
        self._look(stream)
        self._put(stream)

    def _look(self, stream: _Stream) -> None:
        """What others have computed of it counts as computed."""
        if self._cache is None:
            return
        view = stream.view
        cached = self._cache.cached_tokens(view.stream_id, view.num_known_tokens)
        if cached > view.num_computed_tokens:
            self._num_owned += cached - view.num_computed_tokens
            stream.view = _with(
                view,
                num_computed_tokens=cached,
                num_reached_tokens=max(cached, view.num_reached_tokens),
            )

    def _forget(self, stream: _Stream) -> None:
        view = stream.view
        self._num_owned -= view.num_computed_tokens
        self._num_orphaned += view.num_computed_tokens
        del self._streams[view.stream_id]
        self._table.remove(view.stream_id)
        self._stuck = [run for run in self._stuck if run.stream_id != view.stream_id]

    # 2. The decision

    def _decide(
        self, under_way: Sequence[StreamId] | None = None, under_way_s: float = 0.0
    ) -> StepPlan:
        model = self._model
        num_evictable = self._num_orphaned + sum(
            view.num_evictable_tokens for view in self._table.streams.values()
        )
        num_stuck = sum(run.num_tokens for run in self._stuck)
        snapshot = self._table.snapshot(
            memory=MemoryView(
                num_free_tokens=model.pool_tokens - self.num_used_tokens,
                num_evictable_tokens=num_evictable,
                num_total_tokens=model.pool_tokens,
                page_size=model.page_size,
            ),
            token_budget=model.step_tokens - num_stuck,
            long_token_budget=LONG_STEP * model.step_tokens - num_stuck if model.num_layers else 0,
            max_requests=model.max_requests - len(self._stuck),
            now_s=self.now_s,
            experience=self._learner.experience(),
            under_way=under_way,
            under_way_s=under_way_s,
            served=self._shares.served(),
        )
        plan = self.policy.decide(snapshot)
        if under_way is not None:
            commits = (RunReason.COMMIT, RunReason.COMMIT_CHUNK)
            runs = tuple(run for run in plan.runs if run.reason in commits)
            plan = plan._replace(runs=runs, interruptible=False)
        if self._on_step is not None:
            self._on_step(snapshot, plan)
        return plan

    # 3. and 4. Carrying it out

    def _carry_out(self, plan: StepPlan) -> None:
        started: list[StreamRun] = []
        waiting = [*self._stuck, *plan.runs]
        running = {run.stream_id for run in waiting}
        victims = deque(victim.stream_id for victim in plan.victims)
        if self._stuck:
            # The engine asks nobody again before it takes memory for what waits in it.
            victims.extend(self._streams)
        self._stuck = []
        page = self._model.page_size
        for run in plan.runs:
            view = self._streams[run.stream_id].view
            is_committed = view.committed_s is not None
            reaches_end = run.up_to >= view.num_known_tokens // page * page
            self._shares.started(
                run.stream_id,
                view.tenant,
                run.num_tokens / view.weight,
                is_committed=is_committed,
                is_last=run.is_commit if is_committed else reaches_end,
            )
        for run in waiting:
            if self._acquire(run.num_tokens, victims, running):
                started.append(run)
                self._num_owned += run.num_tokens
            else:
                self._stuck.append(run)
        for run in started:
            self._set(run.stream_id, in_flight=True, waiting_on_memory=False)
            self._streams[run.stream_id].keep_tokens = run.up_to
        for run in self._stuck:
            self._set(run.stream_id, in_flight=True, waiting_on_memory=True)
        num_tokens = sum(run.num_tokens for run in started)
        if not num_tokens:
            if not self._events:
                raise RuntimeError("the engine is stuck: a run finds no memory, and nothing ends")
            self.now_s = max(self.now_s, self._events[0][0])
            return
        cost_s = self._model.costs.step_s(num_tokens)
        self.num_steps += 1
        if plan.interruptible and self._model.num_layers and not self._stuck:
            cost_s = self._compute_in_layers(cost_s, started)
        self.now_s += cost_s
        self.busy_s += cost_s
        # What came while the engine computed is known before its results are.
        for run in started:
            # The new tokens become the stream's when they are done; a cancelled one's are nobody's.
            self._num_owned -= run.num_tokens
            self._num_orphaned += run.num_tokens
        self._take_events()
        for run in started:
            self._finish(run)

    def _compute_in_layers(self, cost_s: float, started: Sequence[StreamRun]) -> float:
        """Go through a step layer by layer for as long as something comes; what comes is taken in,
        and commits may be computed at once. Returns what is left of the step."""
        layer_s, done_s = cost_s / self._model.num_layers, 0.0
        while self._events and self._events[0][0] < self.now_s + cost_s - done_s - layer_s:
            num_layers = max(1.0, (self._events[0][0] - self.now_s) // layer_s + 1)
            self.now_s += num_layers * layer_s
            self.busy_s += num_layers * layer_s
            done_s += num_layers * layer_s
            self._take_events()
            while not self._stuck:
                nested = self._decide(self._committed(started), done_s)
                if not nested.runs:
                    break
                self.num_interruptions += 1
                self._carry_out(nested)
        return cost_s - done_s

    def _committed(self, runs: Sequence[StreamRun]) -> list[StreamId]:
        """Streams of these runs that are committed by now, and not cancelled."""
        streams = self._streams
        return [
            run.stream_id
            for run in runs
            if run.stream_id in streams and streams[run.stream_id].view.committed_s is not None
        ]

    def _acquire(self, num_tokens: int, victims: deque[StreamId], running: set[StreamId]) -> bool:
        free = self._model.pool_tokens - self.num_used_tokens
        taken = min(self._num_orphaned, max(0, num_tokens - free))
        self._num_orphaned -= taken
        free += taken
        while free < num_tokens and victims:
            victim = self._streams.get(victims[0])
            if victim is None or victims[0] in running or not victim.view.num_evictable_tokens:
                victims.popleft()
                continue
            view = victim.view
            lost = min(view.num_computed_tokens, num_tokens - free)
            self.outcomes[view.stream_id].num_evicted_tokens += lost
            self._num_owned -= lost
            free += lost
            victim.view = _with(view, num_computed_tokens=view.num_computed_tokens - lost)
            self._put(victim)
        return free >= num_tokens

    def _finish(self, run: StreamRun) -> None:
        stream = self._streams.get(run.stream_id)
        outcome = self.outcomes[run.stream_id]
        outcome.num_runs += 1
        outcome.num_computed_tokens += run.num_tokens
        if stream is None:
            return
        view = stream.view
        useful = min(run.up_to, stream.keep_tokens)
        gained = max(0, useful - view.num_computed_tokens)
        self._num_owned += gained
        self._num_orphaned -= gained
        stream.view = _with(
            view,
            num_computed_tokens=view.num_computed_tokens + gained,
            num_reached_tokens=max(view.num_reached_tokens, useful),
            in_flight=False,
            waiting_on_memory=False,
        )
        if self._cache is not None:
            self._cache.computed(run.stream_id, useful)
        if run.is_commit:
            outcome.answered_s = self.now_s
            self._forget(stream)
            if self._on_answer is not None:
                for story in self._on_answer(run.stream_id, self.now_s):
                    self.add(story)
            return
        self._put(stream)

    def _set(self, stream_id: StreamId, *, in_flight: bool, waiting_on_memory: bool) -> None:
        stream = self._streams[stream_id]
        stream.view = _with(stream.view, in_flight=in_flight, waiting_on_memory=waiting_on_memory)
        self._put(stream)

    def _put(self, stream: _Stream) -> None:
        view, page = stream.view, self._model.page_size
        next_page_end = view.num_computed_tokens - view.num_computed_tokens % page + page
        pending_since_s = next(
            (at_s for end, at_s in stream.ends if end >= next_page_end), view.last_segment_s
        )
        stream.view = _with(
            view,
            pending_since_s=pending_since_s,
            num_evictable_tokens=0 if view.in_flight else view.num_computed_tokens,
        )
        self._table.put(stream.view)


def _with(view: StreamView, **changes: object) -> StreamView:
    return msgspec.structs.replace(view, **changes)
