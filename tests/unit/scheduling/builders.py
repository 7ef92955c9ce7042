"""Builders of snapshots for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streamfill.scheduling.plan import DeferReason, RunReason, StepPlan
from streamfill.scheduling.policy import Policy
from streamfill.scheduling.registry import make_policy, parse_policy_spec, policy_names
from streamfill.scheduling.snapshot import (
    NO_EXPERIENCE,
    ContextMode,
    Experience,
    MemoryView,
    Snapshot,
    StreamTable,
    StreamView,
)
from streamfill.stream.ids import StreamId

POLICIES: Final = (*policy_names(), "lcas(order=newest)")
"""All that there are, with the options that make another policy of one."""
UNTIERED: Final = ("default", "mcps")
"""Those that do not tell commits from context."""
TIERED: Final = tuple(spec for spec in POLICIES if spec not in UNTIERED)


def policy(spec: str, *, segment_tokens: int | None = None, can_interrupt: bool = False) -> Policy:
    name, options = parse_policy_spec(spec)
    return make_policy(name, options, segment_tokens=segment_tokens, can_interrupt=can_interrupt)


def stream(
    stream_id: int,
    known: int,
    computed: int = 0,
    *,
    committed_s: float | None = None,
    pending_since_s: float = 0.0,
    reached: int = 0,
    on_host: int = 0,
    evictable: int = 0,
    priority: int = 0,
    in_flight: bool = False,
    waiting_on_memory: bool = False,
    arrival_s: float = 0.0,
    last_segment_s: float | None = None,
    mode: ContextMode = ContextMode.APPEND,
    shared: int = 0,
    ttft_slo_s: float | None = None,
    gaps_s: tuple[float, ...] = (),
    num_segments: int = 1,
    awaits_commit: bool = False,
) -> StreamView:
    return StreamView(
        stream_id=StreamId(stream_id),
        mode=mode,
        arrival_s=arrival_s,
        last_segment_s=pending_since_s if last_segment_s is None else last_segment_s,
        pending_since_s=pending_since_s,
        committed_s=committed_s,
        num_known_tokens=known,
        num_computed_tokens=computed,
        num_host_tokens=on_host,
        num_reached_tokens=reached,
        num_evictable_tokens=evictable,
        priority=priority,
        in_flight=in_flight,
        waiting_on_memory=waiting_on_memory,
        num_shared_tokens=shared,
        ttft_slo_s=ttft_slo_s,
        gaps_s=gaps_s,
        num_segments=num_segments,
        awaits_commit=awaits_commit,
    )


def snapshot(
    *streams: StreamView,
    budget: int = 256,
    max_requests: int = 64,
    free: int = 100_000,
    evictable: int = 0,
    page_size: int = 1,
    experience: Experience = NO_EXPERIENCE,
    standing_order: tuple[int, ...] = (),
    now_s: float = 100.0,
    long_budget: int = 0,
    under_way: Sequence[StreamId] | None = None,
    under_way_s: float = 0.0,
) -> Snapshot:
    memory = MemoryView(
        num_free_tokens=free,
        num_evictable_tokens=evictable,
        num_total_tokens=max(100_000, free + evictable),
        page_size=page_size,
    )
    return StreamTable(streams).snapshot(
        memory=memory,
        token_budget=budget,
        long_token_budget=long_budget,
        max_requests=max_requests,
        now_s=now_s,
        experience=experience,
        standing_order=tuple(map(StreamId, standing_order)),
        under_way=under_way,
        under_way_s=under_way_s,
    )


def runs(by: Policy, shot: Snapshot) -> list[tuple[int, int, bool]]:
    """(stream, up to, commit) of each run."""
    return [(run.stream_id, run.up_to, run.is_commit) for run in by.decide(shot).runs]


def order(by: Policy, *views: StreamView) -> list[int]:
    """Who runs, first in turn first, where everybody can."""
    return [run.stream_id for run in by.decide(snapshot(*views, budget=100_000)).runs]


def victims(by: Policy, shot: Snapshot) -> list[tuple[int, int]]:
    """(stream, tokens freed) of each victim."""
    return [(each.stream_id, each.num_freed_tokens) for each in by.decide(shot).victims]


def said(plan: StepPlan, shot: Snapshot) -> dict[int, RunReason | DeferReason]:
    """What the plan says of each stream."""
    page_size = shot.memory.page_size
    return {view.stream_id: plan.reason(view, page_size) for view in shot.streams.values()}
