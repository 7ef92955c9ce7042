"""First come, first served: what holds for every snapshot, and how long anybody waits."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from streamfill.scheduling.fcfs import FcfsPolicy
from streamfill.scheduling.plan import DeferReason, RunReason
from streamfill.scheduling.snapshot import Snapshot, StreamView
from tests.unit.scheduling.builders import snapshot, stream

policy = FcfsPolicy()


@st.composite
def views(draw: st.DrawFn, stream_id: int) -> StreamView:
    known = draw(st.integers(1, 400))
    computed = draw(st.integers(0, known))
    committed = draw(st.booleans())
    in_flight = draw(st.integers(0, 4)) == 0
    return stream(
        stream_id,
        known,
        computed,
        committed_s=draw(st.integers(0, 5)) * 1.0 if committed else None,
        pending_since_s=draw(st.integers(0, 5)) * 1.0,
        reached=draw(st.integers(computed, known)),
        evictable=0 if in_flight else draw(st.integers(0, computed)),
        priority=draw(st.integers(-1, 1)),
        in_flight=in_flight,
        waiting_on_memory=in_flight and draw(st.booleans()),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    streams = [draw(views(i)) for i in range(draw(st.integers(0, 8)))]
    return snapshot(
        *streams,
        budget=draw(st.integers(0, 600)),
        max_requests=draw(st.integers(0, 6)),
        free=draw(st.integers(0, 1200)),
        evictable=draw(st.integers(0, 600)),
        page_size=draw(st.sampled_from([1, 4, 16])),
    )


def pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size) * page_size


@given(snapshots(), st.integers(1, 200))
def test_uncommitted_streams_keep_to_their_part(shot: Snapshot, segment_tokens: int) -> None:
    """Half as much again at most, never more than the step, and commits run as without a limit."""
    plan = FcfsPolicy(segment_tokens).decide(shot)
    assert plan.num_tokens <= shot.token_budget
    committed = {view.stream_id for view in shot.streams if view.committed_s is not None}
    num_uncommitted = sum(run.num_tokens for run in plan.runs if run.stream_id not in committed)
    assert num_uncommitted <= max(segment_tokens * 3 // 2, shot.memory.page_size * 3 // 2)
    assert [run for run in plan.runs if run.stream_id in committed] == [
        run for run in policy.decide(shot).runs if run.stream_id in committed
    ]


@given(snapshots())
def test_limits_are_kept(shot: Snapshot) -> None:
    """Budget and slots are never exceeded; memory only by a first commit that runs alone."""
    plan = policy.decide(shot)
    assert plan.num_tokens <= shot.token_budget
    assert len(plan.runs) <= shot.max_requests
    by_id = {each.stream_id: each for each in shot.streams}
    page = shot.memory.page_size
    need = sum(
        pages(run.num_tokens, page) + page + by_id[run.stream_id].num_evictable_tokens
        for run in plan.runs
    )
    if any(run.reason is RunReason.COMMIT_TRIED for run in plan.runs):
        assert len(plan.runs) == 1
    else:
        assert need <= shot.memory.num_free_tokens + shot.memory.num_evictable_tokens or not need


@given(snapshots())
def test_runs_are_sound(shot: Snapshot) -> None:
    """Each stream at most once; each run starts at a page, computes something, and ends well."""
    plan = policy.decide(shot)
    mentioned = [run.stream_id for run in plan.runs] + [each.stream_id for each in plan.deferred]
    assert len(set(mentioned)) == len(mentioned)
    by_id = {each.stream_id: each for each in shot.streams}
    page = shot.memory.page_size
    for run in plan.runs:
        view = by_id[run.stream_id]
        assert not view.in_flight
        start = run.up_to - run.num_tokens
        assert run.num_tokens >= 1
        assert start % page == 0
        assert start <= view.num_computed_tokens < start + page or start + page >= run.up_to
        assert run.is_commit == (
            view.committed_s is not None and run.up_to == view.num_known_tokens
        )
        assert run.is_commit or run.up_to % page == 0
        assert run.up_to <= view.num_known_tokens


@given(snapshots())
def test_commits_go_first(shot: Snapshot) -> None:
    """Every committed stream's turn comes before that of any uncommitted one."""
    plan = policy.decide(shot)
    committed = {each.stream_id for each in shot.streams if each.committed_s is not None}
    turns = [run.stream_id in committed for run in plan.runs]
    assert turns == sorted(turns, reverse=True)
    if any(
        each.stream_id in committed and each.reason is DeferReason.NO_MEMORY
        for each in plan.deferred
    ):
        assert all(turns)


@given(snapshots())
def test_work_is_conserved(shot: Snapshot) -> None:
    """A step is empty only if no stream's work fits on its own, or a commit is waited for."""
    plan = policy.decide(shot)
    if plan.runs or shot.max_requests < 1:
        return
    page = shot.memory.page_size
    available = shot.memory.num_free_tokens + shot.memory.num_evictable_tokens
    owned = sum(each.num_evictable_tokens for each in shot.streams)
    commit_waits = any(
        each.committed_s is not None and each.waiting_on_memory for each in shot.streams
    )
    for view in shot.streams:
        if view.in_flight:
            continue
        if view.committed_s is not None:
            computed = min(view.num_computed_tokens, view.num_known_tokens - 1)
            lacking = view.num_known_tokens - computed // page * page
            assert shot.token_budget < min(lacking, page)
        elif not commit_waits:
            start = view.num_computed_tokens // page * page
            end = view.num_known_tokens // page * page
            room = available - view.num_evictable_tokens
            if view.num_reached_tokens // page * page >= end:
                room = min(room, available - owned)
            assert end <= start or shot.token_budget < page or room < 2 * page


@given(snapshots(), st.randoms(use_true_random=False))
def test_plan_depends_on_the_set_of_streams_only(shot: Snapshot, random: object) -> None:
    """The same snapshot gives the same plan, in whatever order the streams are listed."""
    shuffled = list(shot.streams)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert policy.decide(replace(shot, streams=shuffled)) == policy.decide(shot)


workloads = st.lists(
    st.tuples(
        st.integers(0, 12),  # step in which it arrives
        st.integers(1, 300),  # tokens
        st.booleans(),  # committed
    ),
    min_size=1,
    max_size=10,
)


@given(workloads, st.sampled_from([1, 4]), st.integers(16, 128), st.integers(1, 4))
def test_nobody_starves(
    workload: list[tuple[int, int, bool]], page: int, budget: int, max_requests: int
) -> None:
    """Each commit starts within the bound that the module states; other work finishes too.

    The bound counts tokens and streams that were ahead at its arrival, and itself.
    """
    waiting: dict[int, StreamView] = {}
    deadlines: dict[int, int] = {}
    arrivals = sorted(
        (at, number, known, is_committed)
        for number, (at, known, is_committed) in enumerate(workload)
    )
    for step in range(10_000):
        while arrivals and arrivals[0][0] <= step:
            at, number, known, is_committed = arrivals.pop(0)
            waiting[number] = stream(
                number,
                known,
                committed_s=float(at) if is_committed else None,
                pending_since_s=float(at),
            )
            if is_committed:
                ahead = [each for each in waiting.values() if each.committed_s is not None]
                lacking = sum(each.num_known_tokens - each.num_computed_tokens for each in ahead)
                num_steps = -(-lacking // (budget - page + 1)) + -(-len(ahead) // max_requests)
                deadlines[number] = step + num_steps
        plan = policy.decide(
            snapshot(*waiting.values(), budget=budget, max_requests=max_requests, page_size=page)
        )
        for run in plan.runs:
            if run.is_commit:
                assert step < deadlines.pop(run.stream_id)
                del waiting[run.stream_id]
            else:
                waiting[run.stream_id] = replace(
                    waiting[run.stream_id], num_computed_tokens=run.up_to
                )
        if not arrivals and not plan.runs:
            break
    assert not deadlines
    assert all(each.committed_s is None for each in waiting.values())
    assert all(each.num_known_tokens - each.num_computed_tokens < page for each in waiting.values())
