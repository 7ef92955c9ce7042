"""All policies on made-up streams in virtual time, with pools that hardly hold one of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfill.scheduling.harness import (
    ContextChange,
    Harness,
    ServerModel,
    StreamOutcome,
    StreamStory,
)
from streamfill.scheduling.plan import StepPlan
from streamfill.scheduling.snapshot import Snapshot, StepCosts, StreamView
from streamfill.stream.ids import StreamId
from tests.unit.scheduling.builders import POLICIES, TIERED, policy
from tests.unit.scheduling.strategies import servers, stories

MAX_STEPS = 2000
"""Far more than any of the stories needs; an endless exchange of KV takes more."""

each_policy = pytest.mark.parametrize("spec", POLICIES)
few = settings(max_examples=20, deadline=None)


def played(
    spec: str,
    told: list[StreamStory],
    model: ServerModel,
    on_step: Callable[[Harness, Snapshot, StepPlan], None] | None = None,
    segment_tokens: int | None = 64,
) -> Harness:
    """The harness behind the end of all stories."""

    def see(snapshot: Snapshot, plan: StepPlan) -> None:
        if on_step is not None:
            on_step(harness, snapshot, plan)

    chosen = policy(spec, segment_tokens=segment_tokens, can_interrupt=model.num_layers > 0)
    harness = Harness(chosen, model, on_step=see)
    harness.run(told, max_steps=MAX_STEPS)
    return harness


def is_answered_or_over(story: StreamStory, outcome: StreamOutcome) -> bool:
    if story.committed_s is None or outcome.is_cancelled:
        return True
    return outcome.answered_s is not None and outcome.answered_s > story.committed_s


@each_policy
@few
@given(st.data())
def test_nobody_starves(spec: str, data: st.DataObject) -> None:
    """Every stream that is committed and not cancelled is answered, however small the pool."""
    told = data.draw(stories())
    harness = played(spec, told, data.draw(servers(told)))
    for story in told:
        assert is_answered_or_over(story, harness.outcomes[story.stream_id])


@each_policy
@few
@given(st.data())
def test_work_is_conserved_and_memory_bounded(spec: str, data: st.DataObject) -> None:
    """The server idles only while there is nothing new to compute, and never holds more than its
    pool; what is planned finds its memory."""
    told = data.draw(stories())
    model = data.draw(servers(told))

    def check(harness: Harness, snapshot: Snapshot, plan: StepPlan) -> None:
        assert 0 <= harness.num_used_tokens <= model.pool_tokens
        memory = snapshot.memory
        assert memory.num_free_tokens >= 0
        assert memory.num_free_tokens + memory.num_evictable_tokens <= memory.num_total_tokens
        assert not any(view.waiting_on_memory for view in snapshot.streams.values())
        is_idle = snapshot.under_way is None and not plan.runs
        if is_idle and not any(view.in_flight for view in snapshot.streams.values()):
            assert not any(has_work(view, model.page_size) for view in snapshot.streams.values())

    harness = played(spec, told, model, check)
    assert 0 <= harness.num_used_tokens <= model.pool_tokens


def has_work(view: StreamView, page_size: int) -> bool:
    if view.committed_s is not None:
        return True
    num_pages = view.num_known_tokens // page_size
    return not view.awaits_commit and num_pages > view.num_reached_tokens // page_size


@each_policy
@few
@given(st.data())
def test_the_same_stories_end_the_same_way(spec: str, data: st.DataObject) -> None:
    """Nothing but the stories decides: two runs of them agree in every time and count."""
    told = data.draw(stories())
    model = data.draw(servers(told))
    first, second = played(spec, told, model), played(spec, told, model)
    assert first.outcomes == second.outcomes
    assert (first.now_s, first.num_steps) == (second.now_s, second.num_steps)


@each_policy
@few
@given(st.data())
def test_everything_is_given_back(spec: str, data: st.DataObject) -> None:
    """Behind the last stream a prompt as large as the pool allows is answered without a loss."""
    told = data.draw(stories(all_commit=True))
    model = data.draw(servers(told))
    last = StreamStory(
        stream_id=StreamId(99),
        opened_s=10_000.0,
        changes=(
            ContextChange(
                at_s=10_000.0,
                keep_tokens=0,
                num_new_tokens=model.pool_tokens - 2 * model.page_size,
                with_commit=True,
            ),
        ),
        committed_s=10_000.0,
    )
    harness = played(spec, [*told, last], model)
    outcome = harness.outcomes[last.stream_id]
    assert outcome.answered_s is not None
    assert outcome.num_evicted_tokens == 0
    assert outcome.num_computed_tokens == model.pool_tokens - 2 * model.page_size


@pytest.mark.parametrize("spec", TIERED)
@few
@given(st.data())
def test_commits_end_within_a_bound(spec: str, data: st.DataObject) -> None:
    """That of ``turn_policy``, for those that are committed when the last one is."""
    told = data.draw(stories(all_commit=True))
    model = data.draw(servers(told, plenty=True))
    last_s = max(story.committed_s or 0.0 for story in told)
    bounds: list[int] = []

    def check(harness: Harness, snapshot: Snapshot, plan: StepPlan) -> None:
        if snapshot.now_s < last_s or bounds:
            return
        page = model.page_size
        waiting = [v for v in snapshot.streams.values() if v.committed_s is not None]
        lacking = sum(
            v.num_known_tokens - min(v.num_computed_tokens, v.num_known_tokens - 1) // page * page
            for v in waiting
        )
        # These two end steps before they are full.
        num_shared = 1 if spec in ("adaptive", "laps") else model.max_requests
        num_steps = -(-lacking // (model.step_tokens - page + 1)) - (-len(waiting) // num_shared)
        bounds.append(harness.num_steps + num_steps)

    harness = played(spec, told, model, check)
    assert harness.num_steps <= bounds[0]


@pytest.mark.parametrize("spec", TIERED)
@few
@given(st.data())
def test_a_commit_waits_for_one_step_of_context_at_most(spec: str, data: st.DataObject) -> None:
    """From then on no step has context in it until it is answered."""
    told = data.draw(stories())
    model = data.draw(servers(told))

    def check(_: Harness, snapshot: Snapshot, plan: StepPlan) -> None:
        streams = snapshot.streams
        if any(view.committed_s is not None for view in streams.values()):
            assert all(streams[run.stream_id].committed_s is not None for run in plan.runs)

    played(spec, told, model, check)


def story(stream_id: int, *sizes: int, at_s: float = 0.0, committed_s: float) -> StreamStory:
    """Appends, a second apart."""
    return StreamStory(
        stream_id=StreamId(stream_id),
        opened_s=at_s,
        changes=tuple(
            ContextChange(at_s=at_s + i, keep_tokens=sum(sizes[:i]), num_new_tokens=size)
            for i, size in enumerate(sizes)
        ),
        committed_s=committed_s,
    )


@each_policy
def test_two_commits_that_do_not_fit_together(spec: str) -> None:
    """They do not take each other's KV for ever: one ends, then the other."""
    told = [story(1, 600, committed_s=0.0), story(2, 600, committed_s=0.0)]
    costs = StepCosts(fixed_s=0.05, per_token_s=0.01)
    harness = played(spec, told, ServerModel(step_tokens=50, pool_tokens=700, costs=costs))
    assert all(outcome.answered_s is not None for outcome in harness.outcomes.values())


@each_policy
def test_two_contexts_that_do_not_fit_together(spec: str) -> None:
    """Likewise before their commits."""
    told = [story(1, 100, 500, committed_s=99.0), story(2, 100, 500, committed_s=99.0)]
    harness = played(spec, told, ServerModel(step_tokens=100, pool_tokens=650))
    assert all(outcome.answered_s is not None for outcome in harness.outcomes.values())


@each_policy
def test_a_lone_stream_computes_each_token_once(spec: str) -> None:
    """Its last step is all that its commit waits for."""
    harness = played(spec, [story(1, 200, 100, committed_s=9.0)], ServerModel())
    outcome = harness.outcomes[StreamId(1)]
    assert outcome.num_computed_tokens == 301
    assert outcome.ttft_s == pytest.approx(0.05 + 0.0025)
