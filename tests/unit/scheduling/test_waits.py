"""How long a stream may wait for others: what the docstrings of the policies state."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfill.scheduling.adaptive import (
    AGEING,
    DEFAULT_SLO_S,
    MAX_HORIZON_S,
    MAX_SLO_S,
    PRIORITY_S,
)
from streamfill.scheduling.harness import Harness
from streamfill.scheduling.plan import StepPlan
from streamfill.scheduling.snapshot import Experience, Snapshot, StepCosts, StreamView
from streamfill.stream.ids import StreamId
from tests.unit.scheduling.builders import policy, snapshot, stream
from tests.unit.scheduling.strategies import EXPERIENCES, servers, stories

few = settings(max_examples=60, deadline=None)

workloads = st.lists(
    st.tuples(
        st.integers(0, 12),  # step in which it arrives
        st.integers(1, 300),  # tokens
        st.booleans(),  # committed
    ),
    min_size=1,
    max_size=10,
)


@few
@given(workloads, st.sampled_from([1, 4]), st.integers(16, 128), st.integers(1, 4))
def test_fcfs_keeps_the_stated_bound(
    workload: list[tuple[int, int, bool]], page: int, budget: int, max_requests: int
) -> None:
    """Each commit starts within the bound of ``turn_policy``; other work finishes too.

    The bound counts tokens and streams that were ahead at its arrival, and itself.
    """
    by = policy("fcfs")
    waiting: dict[int, StreamView] = {}
    deadlines: dict[int, int] = {}
    arrivals = sorted((at, i, known, commits) for i, (at, known, commits) in enumerate(workload))
    for step in range(10_000):
        while arrivals and arrivals[0][0] <= step:
            at, number, known, is_committed = arrivals.pop(0)
            waiting[number] = stream(
                number, known, committed_s=float(at) if is_committed else None, arrival_s=float(at)
            )
            if is_committed:
                ahead = [each for each in waiting.values() if each.committed_s is not None]
                lacking = sum(each.num_known_tokens - each.num_computed_tokens for each in ahead)
                num_steps = -(-lacking // (budget - page + 1)) + -(-len(ahead) // max_requests)
                deadlines[number] = step + num_steps
        plan = by.decide(
            snapshot(*waiting.values(), budget=budget, max_requests=max_requests, page_size=page)
        )
        for run in plan.runs:
            if run.is_commit:
                assert step < deadlines.pop(run.stream_id)
                del waiting[run.stream_id]
            else:
                waiting[run.stream_id] = msgspec.structs.replace(
                    waiting[run.stream_id], num_computed_tokens=run.up_to
                )
        if not arrivals and not plan.runs:
            break
    assert not deadlines
    assert all(each.committed_s is None for each in waiting.values())
    assert all(each.num_known_tokens - each.num_computed_tokens < page for each in waiting.values())


def slo_s(view: StreamView) -> float:
    return DEFAULT_SLO_S if view.ttft_slo_s is None else min(view.ttft_slo_s, MAX_SLO_S)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_adaptive_lets_few_commits_pass(data: st.DataObject) -> None:
    """Before a commit only those go that came before it, or so little later as is stated."""
    told = data.draw(stories())
    model = data.draw(servers(told, plenty=True))
    rest_s: dict[StreamId, float] = {}

    def check(shot: Snapshot, plan: StepPlan) -> None:
        commits = [view for view in shot.streams.values() if view.committed_s is not None]
        for view in commits:
            num_lacking = max(1, view.num_known_tokens - view.num_computed_tokens)
            rest_s.setdefault(view.stream_id, model.costs.step_s(num_lacking))
        ending = {run.stream_id for run in plan.runs if run.is_commit}
        running = {run.stream_id for run in plan.runs}
        for view in commits:
            if view.stream_id in ending or view.in_flight:
                continue
            assert view.committed_s is not None
            for other in commits:
                if other.stream_id in running and other is not view:
                    assert other.committed_s is not None
                    grace_s = AGEING * rest_s[view.stream_id]
                    grace_s += PRIORITY_S * (other.priority - view.priority)
                    grace_s += slo_s(view) - slo_s(other)
                    # Whoever has a part in the step that the other one fills up is not passed.
                    is_passed = other.stream_id not in running_behind(plan, view.stream_id)
                    if is_passed:
                        assert other.committed_s <= view.committed_s + grace_s + 1e-9

    harness = Harness(policy("adaptive", segment_tokens=64), model, on_step=check)
    harness.run(told, max_steps=2000)


def running_behind(plan: StepPlan, stream_id: StreamId) -> set[StreamId]:
    """Who runs in the same step, later in turn."""
    ids = [run.stream_id for run in plan.runs]
    return set(ids[ids.index(stream_id) :]) if stream_id in ids else set()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 200).map(float),
            st.lists(st.sampled_from([0.0, 1.0, 30.0, 300.0]), max_size=3).map(tuple),
            st.integers(1, 5),
            st.integers(-2, 2),
        ),
        min_size=2,
        max_size=8,
    ),
    st.sampled_from(EXPERIENCES),
)
def test_adaptive_lets_little_context_pass(
    facts: list[tuple[float, tuple[float, ...], int, int]], experience: Experience
) -> None:
    """No segment goes before a stream whose own newest one is older by more than is stated."""
    views = [
        stream(i, 100, last_segment_s=at_s, gaps_s=gaps_s, num_segments=number, priority=priority)
        for i, (at_s, gaps_s, number, priority) in enumerate(facts)
    ]
    shot = snapshot(*views, budget=100_000, experience=experience)
    plan = policy("adaptive").decide(shot)
    turns = [shot.streams[run.stream_id] for run in plan.runs]
    assert len(turns) == len(views)
    for place, view in enumerate(turns):
        for other in turns[:place]:
            grace_s = MAX_HORIZON_S + PRIORITY_S * (other.priority - view.priority)
            assert other.last_segment_s <= view.last_segment_s + grace_s


@pytest.mark.parametrize("gap_s", [1.0, 1000.0])
def test_adaptive_forgets_no_slow_stream(gap_s: float) -> None:
    """A stream whose commit is expected in an hour counts as if it came within the horizon."""
    slow = stream(1, 100, last_segment_s=0.0, gaps_s=(gap_s,) * 3)
    for behind_s, first in ((-5.0, 2), (MAX_HORIZON_S + 5.0, 1)):
        quick = stream(2, 100, last_segment_s=behind_s, gaps_s=(0.1,) * 3)
        assert policy("adaptive").decide(snapshot(slow, quick)).runs[0].stream_id == first


def test_adaptive_keeps_no_long_prompt_waiting_for_short_ones() -> None:
    """Short commits come without end, faster than they can run together with a long one."""
    by = policy("adaptive")
    costs = StepCosts(fixed_s=0.05, per_token_s=0.0025)
    long = stream(0, 2000, committed_s=0.0)
    bound_s = AGEING * costs.step_s(2000)
    now_s, number = 0.0, 0
    short: dict[int, StreamView] = {}
    while long.num_computed_tokens == 0:
        while number * 0.2 <= now_s:
            number += 1
            short[number] = stream(number, 60, committed_s=number * 0.2)
        plan = by.decide(snapshot(long, *short.values(), now_s=now_s))
        now_s += costs.step_s(plan.num_tokens)
        for run in plan.runs:
            if run.stream_id == 0:
                long = msgspec.structs.replace(long, num_computed_tokens=run.up_to)
            elif run.is_commit:
                del short[run.stream_id]
    assert now_s < 2 * bound_s
