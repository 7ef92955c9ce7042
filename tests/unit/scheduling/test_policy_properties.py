"""What holds for the plan of every policy, on every snapshot."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfill.scheduling.plan import DeferReason, RunReason, StepPlan
from streamfill.scheduling.snapshot import Snapshot, StreamTable, StreamView
from streamfill.stream.ids import StreamId
from tests.unit.scheduling.builders import POLICIES, TIERED, UNTIERED, policy, said
from tests.unit.scheduling.strategies import snapshots

each_policy = pytest.mark.parametrize("spec", POLICIES)
many = settings(max_examples=100, deadline=None)


def in_pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size) * page_size


def num_new_tokens(shot: Snapshot, plan: StepPlan) -> int:
    """That the runs allocate: whole pages, and one more each."""
    page = shot.memory.page_size
    return sum(in_pages(run.num_tokens, page) + page for run in plan.runs)


def is_committed(shot: Snapshot, stream_id: StreamId) -> bool:
    return shot.streams[stream_id].committed_s is not None


@each_policy
@many
@given(snapshots())
def test_limits_are_kept(spec: str, shot: Snapshot) -> None:
    """Budget and slots are never exceeded; memory only by a first commit that runs alone."""
    plan = policy(spec).decide(shot)
    assert plan.num_tokens <= shot.token_budget
    long = policy(spec, can_interrupt=True).decide(
        msgspec.structs.replace(shot, long_token_budget=3 * shot.token_budget)
    )
    most = max(shot.token_budget, 3 * shot.token_budget if long.interruptible else 0)
    assert long.num_tokens <= most
    assert len(plan.runs) <= shot.max_requests
    if any(run.reason is RunReason.COMMIT_TRIED for run in plan.runs):
        assert is_committed(shot, plan.runs[0].stream_id)
        assert len(plan.runs) == 1
    elif plan.runs:
        locked = sum(shot.streams[run.stream_id].num_evictable_tokens for run in plan.runs)
        room = shot.memory.num_free_tokens + shot.memory.num_evictable_tokens
        assert num_new_tokens(shot, plan) + locked <= room


@each_policy
@many
@given(snapshots())
def test_recomputing_costs_nobody_anything(spec: str, shot: Snapshot) -> None:
    """Context that lost its KV comes back only into memory that belongs to no stream."""
    plan = policy(spec).decide(shot)
    owned = sum(view.num_evictable_tokens for view in shot.streams.values())
    spare = shot.memory.num_free_tokens + shot.memory.num_evictable_tokens - owned
    if any(run.reason is RunReason.RECOMPUTE for run in plan.runs):
        assert num_new_tokens(shot, plan) <= spare
        assert not plan.victims


@each_policy
@many
@given(snapshots())
def test_runs_are_sound(spec: str, shot: Snapshot) -> None:
    """Each stream at most once; each run starts at a page, computes something, and ends well."""
    plan = policy(spec).decide(shot)
    named = [run.stream_id for run in plan.runs] + [each.stream_id for each in plan.deferred]
    assert len(set(named)) == len(named)
    page = shot.memory.page_size
    for run in plan.runs:
        view = shot.streams[run.stream_id]
        assert not view.in_flight
        assert not view.awaits_commit
        start = run.up_to - run.num_tokens
        assert run.num_tokens >= 1
        assert start % page == 0
        assert start <= view.num_computed_tokens < start + page or start + page >= run.up_to
        assert run.is_commit == (
            view.committed_s is not None and run.up_to == view.num_known_tokens
        )
        assert run.is_commit or run.up_to % page == 0
        assert run.up_to <= view.num_known_tokens
        commits = (RunReason.COMMIT, RunReason.COMMIT_CHUNK, RunReason.COMMIT_TRIED)
        assert (run.reason in commits) == (view.committed_s is not None)


@each_policy
@many
@given(snapshots())
def test_work_is_conserved(spec: str, shot: Snapshot) -> None:
    """A step is empty only if no stream's work fits on its own, or a commit is waited for."""
    plan = policy(spec).decide(shot)
    page = shot.memory.page_size
    if plan.runs or shot.max_requests < 1 or shot.token_budget < page:
        return
    streams = shot.streams.values()
    room = shot.memory.num_free_tokens + shot.memory.num_evictable_tokens
    owned = sum(view.num_evictable_tokens for view in streams)
    if any(v.committed_s is not None and v.in_flight and v.waiting_on_memory for v in streams):
        assert spec in UNTIERED or not any(
            view.committed_s is not None and not view.in_flight for view in streams
        )
        return
    for view in streams:
        if view.in_flight or view.awaits_commit:
            continue
        assert view.committed_s is None
        start = view.num_computed_tokens // page * page
        end = view.num_known_tokens // page * page
        mine = room - view.num_evictable_tokens
        if view.num_reached_tokens // page * page >= end:
            mine = min(mine, room - owned)
        assert end <= start or mine < 2 * page


@pytest.mark.parametrize("spec", TIERED)
@many
@given(snapshots())
def test_commits_go_first(spec: str, shot: Snapshot) -> None:
    """A step with a commit in it has nothing else; nobody takes what a commit waits for."""
    plan = policy(spec).decide(shot)
    turns = [is_committed(shot, run.stream_id) for run in plan.runs]
    assert all(turns) or not any(turns)
    wanted = [v for v in shot.streams.values() if v.committed_s is not None and not v.in_flight]
    if wanted and shot.max_requests and shot.token_budget >= shot.memory.page_size:
        assert turns
        assert all(turns)
    if any(v.committed_s is not None and v.waiting_on_memory for v in shot.streams.values()):
        assert all(turns)


@pytest.mark.parametrize("spec", TIERED)
@many
@given(snapshots(), st.integers(1, 200))
def test_uncommitted_streams_keep_to_their_part(
    spec: str, shot: Snapshot, segment_tokens: int
) -> None:
    """Half as much again at most, never more than the step, and commits run as without a limit."""
    plan = policy(spec, segment_tokens=segment_tokens).decide(shot)
    assert plan.num_tokens <= shot.token_budget
    context = [run for run in plan.runs if not is_committed(shot, run.stream_id)]
    most = segment_tokens * (2 if spec == "adaptive" else 1)
    assert sum(run.num_tokens for run in context) <= max(most, shot.memory.page_size) * 3 // 2
    whole = policy(spec).decide(shot)
    assert [run for run in plan.runs if run not in context] == [
        run for run in whole.runs if is_committed(shot, run.stream_id)
    ]


@each_policy
@many
@given(snapshots())
def test_there_is_a_reason_for_everything(spec: str, shot: Snapshot) -> None:
    """Of every stream the plan says why it runs or waits, and says nothing absurd."""
    plan = policy(spec).decide(shot)
    running = {run.stream_id for run in plan.runs}
    for stream_id, reason in said(plan, shot).items():
        view = shot.streams[StreamId(stream_id)]
        assert isinstance(reason, RunReason) == (stream_id in running)
        if reason is DeferReason.IDLE:
            assert view.num_known_tokens - view.num_computed_tokens < shot.memory.page_size
        if reason in (DeferReason.IDLE, DeferReason.AWAITS_COMMIT):
            assert view.committed_s is None
        assert (reason is DeferReason.IN_FLIGHT) == view.in_flight
        if reason is DeferReason.NO_SLOT:
            assert len(plan.runs) == shot.max_requests
        if reason is DeferReason.WINDOW:
            assert spec == "laps"
        if reason is DeferReason.NOT_WORTH_IT:
            assert spec in ("laps", "adaptive")


@each_policy
@many
@given(snapshots())
def test_victims_are_sound(spec: str, shot: Snapshot) -> None:
    """Just enough or all there is; nobody who runs, nobody twice, and only what is not shared."""
    plan = policy(spec).decide(shot)
    named = [victim.stream_id for victim in plan.victims]
    assert len(set(named)) == len(named)
    running = {run.stream_id for run in plan.runs}
    for victim in plan.victims:
        view = shot.streams[victim.stream_id]
        assert victim.stream_id not in running
        assert not view.in_flight
        assert victim.num_freed_tokens == view.num_evictable_tokens - view.num_shared_tokens > 0
        assert victim.reason
    owned = sum(view.num_evictable_tokens for view in shot.streams.values())
    spare = shot.memory.num_free_tokens + shot.memory.num_evictable_tokens - owned
    needed = num_new_tokens(shot, plan) - spare
    freed = [victim.num_freed_tokens for victim in plan.victims]
    there_is = sum(
        view.num_evictable_tokens - view.num_shared_tokens
        for view in shot.streams.values()
        if not view.in_flight and view.stream_id not in running
    )
    if needed <= 0:
        assert not freed
    else:
        assert sum(freed) >= min(needed, there_is)
        assert sum(freed[:-1]) < needed


@each_policy
@many
@given(snapshots(), st.randoms(use_true_random=False))
def test_plan_depends_on_the_set_of_streams_only(spec: str, shot: Snapshot, random: Random) -> None:
    """The same snapshot gives the same plan, in whatever order the streams came into the table."""
    views = list(shot.streams.values())
    random.shuffle(views)
    assert policy(spec).decide(as_table(shot, views)) == policy(spec).decide(shot)


def as_table(shot: Snapshot, views: list[StreamView]) -> Snapshot:
    """The snapshot, from another table with these streams."""
    return StreamTable(views).snapshot(
        memory=shot.memory,
        token_budget=shot.token_budget,
        max_requests=shot.max_requests,
        now_s=shot.now_s,
        experience=shot.experience,
        standing_order=shot.standing_order,
    )


@each_policy
@many
@given(snapshots())
def test_deciding_changes_nothing(spec: str, shot: Snapshot) -> None:
    """A policy that decides twice decides the same, and the snapshot stays as it was."""
    by = policy(spec)
    before = msgspec.structs.asdict(shot) | {"streams": dict(shot.streams)}
    assert by.decide(shot) == by.decide(shot)
    assert msgspec.structs.asdict(shot) == before
