"""From a server's streams to a decision, and what is learned on the way.

The core says which streams changed (``touch``, ``forget``); only their views are made anew. Then,
once per turn:

1. ``decide``: the changed views go into the table, and the policy plans over all streams (phase 1);
2. ``apply_victims``: the order in which the engine takes memory, where the plan needs some;
3. ``note_step_start``, and in the next turn ``note_step_end``: how long the step took.

Everything depends on rank 0's clock and on what every rank is told, so all ranks decide alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streamfill.engine.interface import Engine
from streamfill.messages.common import NO_SHARE, StreamDecision, StreamMode
from streamfill.messages.control import PlanEntry, PreemptionMode
from streamfill.preemption.costs import BUILT_IN, Corrected, CostModel
from streamfill.preemption.rule import Pricing
from streamfill.preemption.standing import StandingPlan, streams_to_save
from streamfill.scheduling.learning import Learner
from streamfill.scheduling.plan import SENTENCES, StepPlan, StreamRun
from streamfill.scheduling.policy import LONG_STEP, Policy
from streamfill.scheduling.registry import (
    DEFAULT_POLICY,
    format_policy_spec,
    make_policy,
    split_preemption,
)
from streamfill.scheduling.shares import FairShares
from streamfill.scheduling.snapshot import (
    UNIT_COSTS,
    ContextMode,
    MemoryView,
    StepCosts,
    StreamTable,
    StreamView,
)
from streamfill.serving.records import Phase, StreamRecord
from streamfill.stream.ids import StreamId

_SCHEDULED = (Phase.OPEN, Phase.COMMITTED, Phase.ANSWERING)
_MODES = {StreamMode.APPEND: ContextMode.APPEND, StreamMode.UPDATE: ContextMode.UPDATE}


@dataclass(frozen=True, kw_only=True)
class PreemptionSetting:
    """How KV may be taken from streams that are not over."""

    mode: PreemptionMode = PreemptionMode.AUTO
    costs: CostModel = BUILT_IN["cpu"]
    """To begin with; corrected by what is observed."""


@dataclass(frozen=True, kw_only=True)
class PolicySetting:
    """A policy as it is asked for."""

    name: str = DEFAULT_POLICY
    options: Mapping[str, str] = field(default_factory=dict)
    segment_tokens: int | None = None
    """See ``scheduling.policy.PolicyContext``."""
    can_interrupt: bool = False
    """Likewise."""
    costs: StepCosts = UNIT_COSTS
    """What a step may be expected to take before one was seen."""

    @property
    def spec(self) -> str:
        """``NAME(key=value)``"""
        return format_policy_spec(self.name, self.options)

    def make(self) -> Policy:
        """Raises ConfigError: there is no such policy, or an option is wrong."""
        return make_policy(
            self.name,
            self.options,
            segment_tokens=self.segment_tokens,
            can_interrupt=self.can_interrupt,
        )


class Decider:
    """Owned by the server's core, used in the scheduler's thread only."""

    def __init__(
        self,
        engine: Engine,
        standing: StandingPlan,
        policy: PolicySetting,
        preemption: PreemptionSetting,
        *,
        step_tokens: int,
    ) -> None:
        """Raises ConfigError: the policy cannot be had."""
        self.policy = policy
        """In force."""
        mode, _ = split_preemption(policy.options)
        self._default_mode = preemption.mode
        self.preemption_mode = preemption.mode if mode is None else PreemptionMode(mode)
        self._first_costs = preemption.costs
        self.costs = Corrected(preemption.costs)
        """Of getting KV back."""
        self._decide = policy.make()
        self._engine = engine
        self._standing = standing
        self._step_tokens = step_tokens
        self._long_step_tokens = LONG_STEP * step_tokens if policy.can_interrupt else 0
        self._page_size = engine.facts.page_size
        self._learner = Learner(policy.costs)
        self._table = StreamTable()
        self._shares = FairShares()
        self._tenants = {NO_SHARE.tenant: 0}
        self._dirty: dict[int, StreamRecord] = {}
        self._waiting: frozenset[str] = frozenset()
        self._standing_order: tuple[StreamId, ...] = ()
        self._standing_entries: dict[int, PlanEntry] = {}
        self._to_save: frozenset[int] = frozenset()
        self._ranked: tuple[int, ...] | None = None
        self._ranked_at: tuple[int, int] | None = None
        self._applied_to_save: frozenset[int] = frozenset()
        self._num_changes = 0
        self._newest = StepPlan((), ())
        self._step: tuple[float, int, float] | None = None

    def set_policy(self, name: str, options: Mapping[str, str]) -> None:
        """Use another policy from the next decision on.

        Raises:
            ConfigError: it cannot be had; the old one stays.
        """
        setting = PolicySetting(
            name=name,
            options=dict(options),
            segment_tokens=self.policy.segment_tokens,
            can_interrupt=self.policy.can_interrupt,
            costs=self.policy.costs,
        )
        mode, _ = split_preemption(setting.options)
        self._decide = setting.make()
        self.policy = setting
        self.set_preemption(self._default_mode if mode is None else PreemptionMode(mode))

    def set_preemption(self, mode: PreemptionMode) -> None:
        """Take KV in another way from the next decision on."""
        self.preemption_mode = mode
        self._forget_ranking()

    def entry_of(self, stream_id: int) -> PlanEntry | None:
        """What the newest ranking says of a stream."""
        return self._standing_entries.get(stream_id)

    def pricing(self) -> Pricing:
        """What victims are priced with now."""
        room = self._engine.host_room()
        return Pricing(
            mode=self.preemption_mode,
            costs=self.costs.model(),
            bytes_per_token=room.bytes_per_token,
            free_host_tokens=room.num_free_tokens,
        )

    @property
    def watermark_tokens(self) -> int:
        """With less free memory than this it counts as short, and victims are ranked."""
        return max(4 * self._step_tokens, self._engine.memory().total_tokens // 4)

    @property
    def standing_order(self) -> tuple[StreamId, ...]:
        """Whose memory is taken first; empty while memory is plenty."""
        return self._standing_order

    @property
    def to_save(self) -> frozenset[int]:
        """Streams whose KV is copied to host memory when it is taken."""
        return self._to_save

    def forget_experience(self) -> None:
        """Start from nothing, as after a start: what is measured next must not depend on what was
        measured before."""
        self._learner = Learner(self.policy.costs)
        self.costs = Corrected(self._first_costs)

    def touch(self, record: StreamRecord) -> None:
        """Something about the stream changed."""
        self._dirty[record.stream_id] = record
        self._num_changes += 1

    def forget(self, record: StreamRecord) -> None:
        """The stream is over, or its successor of the same id comes next."""
        self._dirty.pop(record.stream_id, None)
        self._table.remove(StreamId(record.stream_id))
        self._num_changes += 1

    def note_start(self, record: StreamRecord, run: StreamRun) -> None:
        """A run of the stream is given to the engine: its tenant had so much more."""
        share = record.share
        is_committed = record.answer is not None
        reaches_end = run.up_to >= len(record.ids) // self._page_size * self._page_size
        self._shares.started(
            run.stream_id,
            self._tenant(share.tenant),
            run.num_tokens / share.weight,
            is_committed=is_committed,
            is_last=run.is_commit if is_committed else reaches_end,
        )

    def note_output(self, record: StreamRecord, num_tokens: int) -> None:
        """Tokens of the stream's answer came out."""
        share = record.share
        self._shares.generated(self._tenant(share.tenant), num_tokens / share.weight)

    def _tenant(self, name: str) -> int:
        """The number that stands for a tenant here: the same on all ranks, which hear of tenants in
        the same order."""
        return self._tenants.setdefault(name, len(self._tenants))

    def note_commit(self, record: StreamRecord) -> None:
        """A stream was committed."""
        mode = _MODES[record.mode]
        self._learner.note_commit(mode, record.num_segments, tuple(record.gaps_s))

    def decide(
        self,
        records: Mapping[int, StreamRecord],
        by_key: Mapping[str, StreamRecord],
        now_s: float,
        *,
        kept: Mapping[int, StreamRecord] | None = None,
        is_interruption: bool = False,
    ) -> StepPlan:
        """Phase 1. Changes nothing but what is known.

        Args:
            kept: streams that are over and expected back: they have KV to give, and nothing else.
            is_interruption: what the engine computes now is interrupted by what is decided, and
                uses none of its tokens.
        """
        under_way: list[StreamId] | None = None
        self._note_waiting(by_key, now_s)
        for record in self._dirty.values():
            if record.phase in _SCHEDULED and record.ids:
                self._table.put(self._view(record))
            else:
                self._table.remove(StreamId(record.stream_id))
        self._dirty.clear()
        memory = self._engine.memory()
        if memory.free_tokens < self.watermark_tokens:
            self._rank([*records.values(), *(kept or {}).values()], now_s)
        else:
            self._forget_ranking()
        num_in_engine = 0
        if is_interruption:
            under_way = [
                StreamId(record.stream_id)
                for record in by_key.values()
                if record.answer is not None
                and record.in_flight is not None
                and not record.in_flight.is_sampling
            ]
        else:
            num_in_engine = sum(
                record.in_flight.num_new_tokens
                for record in by_key.values()
                if record.in_flight is not None and not record.in_flight.is_sampling
            )
        snapshot = self._table.snapshot(
            memory=MemoryView(
                num_free_tokens=memory.free_tokens,
                num_evictable_tokens=memory.evictable_tokens,
                num_total_tokens=memory.total_tokens,
                page_size=self._page_size,
            ),
            token_budget=max(0, self._step_tokens - num_in_engine),
            # Beside what the engine has already a step is not interrupted, so it must be short.
            long_token_budget=0 if by_key else self._long_step_tokens,
            max_requests=max(0, self._engine.load().num_free_slots - len(self._waiting)),
            now_s=now_s,
            experience=self._learner.experience(),
            standing_order=self._standing_order,
            under_way=under_way,
            under_way_s=0.0 if self._step is None else now_s - self._step[0],
            served=self._shares.served(),
        )
        self._newest = self._decide.decide(snapshot)
        return self._newest

    def apply_victims(self, plan: StepPlan) -> None:
        """Tell the engine whose KV goes first: the plan's victims, then the standing plan's."""
        order = [victim.stream_id for victim in plan.victims]
        named = {*order, *(run.stream_id for run in plan.runs)}
        order.extend(stream_id for stream_id in self._standing_order if stream_id not in named)
        if order:
            # What is about to run would only have to be computed twice.
            order.extend(run.stream_id for run in plan.runs)
        ranked = tuple(order)
        if ranked != self._ranked or self._to_save != self._applied_to_save:
            self._ranked, self._applied_to_save = ranked, self._to_save
            self._engine.set_victim_order(
                {stream_id: rank for rank, stream_id in enumerate(ranked)}, self._to_save
            )

    def note_step_start(self, now_s: float, plan: StepPlan) -> None:
        """The runs of the plan were started."""
        num_tokens = plan.num_tokens
        prefix = sum(run.num_tokens * (run.up_to - run.num_tokens) for run in plan.runs)
        self._step = (now_s, num_tokens, prefix / max(1, num_tokens)) if plan.runs else None

    def note_interruption(
        self, plan: StepPlan, seconds: float, interrupted: Sequence[StreamRecord]
    ) -> None:
        """The plan's runs were computed in the middle of a step, which is not to be blamed for
        it."""
        self._learner.note_step(plan.num_tokens, seconds)
        if self._step is not None:
            started_s, num_tokens, prefix = self._step
            self._step = (started_s + seconds, num_tokens, prefix)
        for record in interrupted:
            if record.in_flight is not None:
                record.in_flight.began_s += seconds

    def note_step_end(self, now_s: float, in_engine: Mapping[str, StreamRecord]) -> None:
        """The next turn: what was started is over, if nothing is left in the engine."""
        if self._step is not None and not in_engine:
            started_s, num_tokens, prefix = self._step
            self._learner.note_step(num_tokens, now_s - started_s)
            self.costs.observe_recompute(num_tokens, int(prefix), now_s - started_s)
        self._step = None

    def describe(
        self, records: Mapping[int, StreamRecord], now_s: float
    ) -> tuple[StreamDecision, ...]:
        """Every stream that is not over, with what the newest decision says of it: committed ones
        first, then the others, each by arrival."""
        open_records = [record for record in records.values() if record.phase is not Phase.DONE]
        open_records.sort(
            key=lambda record: (record.committed_s is None, record.opened_s, record.stream_id)
        )
        ranks = {stream_id: rank for rank, stream_id in enumerate(self._ranked or ())}
        return tuple(
            self._decision(record, ranks.get(record.stream_id), now_s) for record in open_records
        )

    def _decision(
        self, record: StreamRecord, victim_rank: int | None, now_s: float
    ) -> StreamDecision:
        view = self._view(record)
        if record.in_flight is not None:
            reason = record.in_flight.reason
            decision, sentence = reason.value, SENTENCES[reason]
        elif record.phase is Phase.WAITING_KV:
            decision, sentence = "waiting_kv", "its KV is on its way from a prefill server"
        else:
            planned = self._newest.reason(view, self._page_size)
            decision, sentence = planned.value, SENTENCES[planned]
        expected_s = record.expected_next_s()
        return StreamDecision(
            stream_id=record.stream_id,
            state=record.phase.name.lower(),
            num_known_tokens=len(record.ids),
            num_computed_tokens=record.num_computed,
            num_shared_tokens=min(record.num_shared, record.num_computed),
            priority=record.priority,
            idle_s=max(0.0, now_s - max(record.last_splice_s, record.opened_s)),
            expected_next_s=None if expected_s is None else expected_s - now_s,
            decision=decision,
            reason=sentence,
            victim_rank=victim_rank,
        )

    def _note_waiting(self, by_key: Mapping[str, StreamRecord], now_s: float) -> None:
        """Requests that the engine could not start yet have not begun."""
        waiting = self._engine.waiting_keys()
        for key in waiting ^ self._waiting:
            record = by_key.get(key)
            if record is not None:
                self.touch(record)
        for key in waiting:
            record = by_key.get(key)
            if record is not None and record.in_flight is not None:
                record.in_flight.began_s = now_s
        self._waiting = waiting

    def _forget_ranking(self) -> None:
        """None is in force: nobody's KV goes by it, and no reason is told from it."""
        self._ranked_at = None
        self._standing_order, self._standing_entries = (), {}
        self._to_save = frozenset()

    def _rank(self, records: Sequence[StreamRecord], now_s: float) -> None:
        """Bring the order of the preemption plan up to date, where anything changed."""
        state = (self._num_changes, self._standing.version)
        if state == self._ranked_at:
            return
        self._ranked_at = state
        telemetry = [
            record.telemetry(now_s, self._page_size)
            for record in records
            if record.phase is not Phase.DONE or record.keep_until_s() is not None
        ]
        pricing = self.pricing()
        ranking = self._standing.ranking(telemetry, pricing)
        self._standing_order = tuple(StreamId(entry.stream_id) for entry in ranking)
        self._standing_entries = {entry.stream_id: entry for entry in ranking}
        self._to_save = streams_to_save(ranking, telemetry, pricing)

    def _view(self, record: StreamRecord) -> StreamView:
        in_flight = record.in_flight
        return StreamView(
            stream_id=StreamId(record.stream_id),
            mode=_MODES[record.mode],
            arrival_s=record.opened_s,
            last_segment_s=record.last_splice_s,
            pending_since_s=record.pending_since_s(self._page_size),
            committed_s=record.committed_s,
            num_known_tokens=len(record.ids),
            num_computed_tokens=record.num_computed,
            num_reached_tokens=record.num_reached,
            num_evictable_tokens=0 if in_flight is not None else record.num_computed,
            num_host_tokens=0 if in_flight is not None else record.num_host,
            num_shared_tokens=min(record.num_shared, record.num_computed),
            priority=record.priority,
            tenant=self._tenant(record.share.tenant),
            weight=record.share.weight,
            ttft_slo_s=record.ttft_slo_s,
            num_segments=record.num_segments,
            gaps_s=tuple(record.gaps_s),
            in_flight=in_flight is not None,
            waiting_on_memory=in_flight is not None and in_flight.key in self._waiting,
            awaits_commit=record.awaits_commit,
        )
