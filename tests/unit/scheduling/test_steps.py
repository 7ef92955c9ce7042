"""What fits into a step, example by example. The same for all policies; FCFS stands for them."""

from __future__ import annotations

import pytest

from streamfill.scheduling.plan import DeferReason, RunReason, StepPlan
from streamfill.scheduling.policy import PolicyContext
from streamfill.scheduling.published import FcfsPolicy
from tests.unit.scheduling.builders import policy, runs, said, snapshot, stream

fcfs = policy("fcfs")


def test_nothing_to_do() -> None:
    """Without streams, or with everything computed, the plan is empty."""
    assert fcfs.decide(snapshot()) == StepPlan((), ())
    idle = snapshot(stream(1, 50, 50))
    assert fcfs.decide(idle) == StepPlan((), ())
    assert said(fcfs.decide(idle), idle) == {1: DeferReason.IDLE}


def test_several_streams_share_a_step() -> None:
    """Streams run in turn until the budget is spent; the last one gets what is left."""
    shot = snapshot(*(stream(i, 100) for i in range(1, 5)), budget=256)
    assert runs(fcfs, shot) == [(1, 100, False), (2, 100, False), (3, 56, False)]
    assert said(fcfs.decide(shot), shot)[4] is DeferReason.NO_BUDGET


@pytest.mark.parametrize(("page_size", "num_tokens"), [(1, 1), (16, 16)])
def test_wholly_cached_commit_computes_its_last_page(page_size: int, num_tokens: int) -> None:
    """A commit with nothing left to compute still runs, for the logits of its last token."""
    plan = fcfs.decide(snapshot(stream(1, 160, 160, committed_s=1.0), page_size=page_size))
    (run,) = plan.runs
    assert (run.up_to, run.num_tokens, run.is_commit) == (160, num_tokens, True)


def test_long_commit_runs_in_chunks() -> None:
    """A committed prompt longer than the budget fills the cache first and commits with the rest."""
    chunk = fcfs.decide(snapshot(stream(1, 600, committed_s=1.0))).runs
    assert chunk == ((1, 256, 256, False, RunReason.COMMIT_CHUNK, 0),)
    rest = fcfs.decide(snapshot(stream(1, 600, 512, committed_s=1.0))).runs
    assert rest == ((1, 88, 600, True, RunReason.COMMIT, 0),)


def test_commit_that_fits_no_more_starts_as_a_chunk() -> None:
    """What an earlier commit leaves of the budget is used for the next one's cache."""
    shot = snapshot(stream(1, 200, committed_s=1.0), stream(2, 100, committed_s=2.0))
    assert runs(fcfs, shot) == [(1, 200, True), (2, 56, False)]


def test_segment_runs_end_at_pages() -> None:
    """A part of a page is left for the commit, and is no reason to run."""
    assert runs(fcfs, snapshot(stream(1, 100), page_size=16)) == [(1, 96, False)]
    assert fcfs.decide(snapshot(stream(1, 100, 96), page_size=16)) == StepPlan((), ())


def test_unaligned_prefix_is_recomputed_from_its_page() -> None:
    """Only whole pages of what is computed count, so a run starts at a page."""
    (run,) = fcfs.decide(snapshot(stream(1, 64, 20), page_size=16)).runs
    assert (run.num_tokens, run.up_to) == (48, 64)


@pytest.mark.parametrize("committed_s", [None, 1.0])
def test_stream_in_flight_gets_no_second_run(committed_s: float | None) -> None:
    """A stream whose run is with the engine waits; others go on."""
    shot = snapshot(
        stream(1, 100, committed_s=committed_s, in_flight=True),
        stream(2, 100, committed_s=committed_s),
    )
    assert [run[0] for run in runs(fcfs, shot)] == [2]
    assert said(fcfs.decide(shot), shot)[1] is DeferReason.IN_FLIGHT


def test_stream_whose_commit_is_on_its_way_waits_for_it() -> None:
    """One step does both, the newest segment and the commit."""
    shot = snapshot(stream(1, 100, awaits_commit=True))
    assert not fcfs.decide(shot).runs
    assert said(fcfs.decide(shot), shot) == {1: DeferReason.AWAITS_COMMIT}


def test_slots_limit_runs() -> None:
    """No more runs than free request slots, the first in turn first."""
    shot = snapshot(stream(1, 10), stream(2, 10), stream(3, 10), max_requests=2)
    assert [run[0] for run in runs(fcfs, shot)] == [1, 2]
    assert said(fcfs.decide(shot), shot)[3] is DeferReason.NO_SLOT


def test_a_commit_shares_its_step_with_no_uncommitted_stream() -> None:
    """Context that nobody asked about yet would make the first token wait for it."""
    shot = snapshot(stream(1, 10), stream(2, 10, committed_s=1.0))
    assert [run[0] for run in runs(fcfs, shot)] == [2]
    assert said(fcfs.decide(shot), shot)[1] is DeferReason.YIELDS


def test_memory_limits_uncommitted_work() -> None:
    """New tokens and a page per run fit into what is free or can be evicted; the rest waits."""
    shot = snapshot(
        stream(1, 64), stream(2, 64), stream(3, 64), free=64, evictable=80, page_size=16
    )
    assert runs(fcfs, shot) == [(1, 64, False), (2, 48, False)]
    assert said(fcfs.decide(shot), shot)[3] is DeferReason.NO_MEMORY


def test_own_prefix_makes_no_room() -> None:
    """A stream's own evictable prefix is locked by its run and cannot be counted on."""
    shot = snapshot(stream(1, 200, 100, evictable=100), evictable=150, free=0)
    assert runs(fcfs, shot) == [(1, 149, False)]


def test_first_commit_is_tried_without_memory() -> None:
    """The first commit goes to the engine even if memory looks short; later ones wait for it."""
    shot = snapshot(
        stream(1, 100, committed_s=1.0), stream(2, 1, committed_s=2.0), stream(3, 1), free=0
    )
    plan = fcfs.decide(shot)
    assert plan.runs == ((1, 100, 100, True, RunReason.COMMIT_TRIED, 0),)
    assert said(plan, shot) == {
        1: RunReason.COMMIT_TRIED,
        2: DeferReason.NO_MEMORY,
        3: DeferReason.YIELDS,
    }


def test_long_commit_is_tried_by_the_chunk() -> None:
    """A commit over the budget is tried with whole pages of the budget, not all at once."""
    shot = snapshot(stream(1, 600, committed_s=1.0), budget=250, free=3, page_size=16)
    assert fcfs.decide(shot).runs == ((1, 240, 240, False, RunReason.COMMIT_TRIED, 0),)


@pytest.mark.parametrize("in_flight", [True, False])
def test_uncommitted_work_yields_to_a_commit_that_waits_for_memory(in_flight: bool) -> None:
    """Nobody takes the memory that a committed stream waits for, here or inside the engine."""
    waiting = stream(1, 100, committed_s=1.0, in_flight=in_flight, waiting_on_memory=in_flight)
    shot = snapshot(waiting, stream(2, 10), free=50)
    assert said(fcfs.decide(shot), shot)[2] is DeferReason.YIELDS


def test_evicted_kv_comes_back_only_into_spare_memory() -> None:
    """Recomputing for an idle stream may not cost another stream its KV; new context may."""
    other = stream(2, 100, 100, reached=100, evictable=100)
    evicted = stream(1, 100, 0, reached=100)
    shot = snapshot(evicted, other, free=0, evictable=101)
    assert said(fcfs.decide(shot), shot)[1] is DeferReason.NO_MEMORY
    grown = stream(1, 101, 0, reached=100)
    assert runs(fcfs, snapshot(grown, other, free=0, evictable=101)) == [(1, 100, False)]
    (run,) = fcfs.decide(snapshot(evicted, other, free=101, evictable=100)).runs
    assert (run.up_to, run.reason) == (100, RunReason.RECOMPUTE)


def test_spare_memory_is_given_once() -> None:
    """What one recomputation takes of the spare memory is not there for the next."""
    shot = snapshot(
        stream(1, 100, 0, reached=100),
        stream(2, 100, 0, reached=100),
        stream(3, 200, 200, reached=200, evictable=200),
        free=150,
        evictable=200,
    )
    assert runs(fcfs, shot) == [(1, 100, False), (2, 48, False)]


def test_plan_counts_its_tokens() -> None:
    """A plan's token count is that of its runs."""
    assert fcfs.decide(snapshot(stream(1, 10), stream(2, 20))).num_tokens == 30


def test_uncommitted_streams_get_small_steps() -> None:
    """So that a commit that comes meanwhile waits for little; a context's small rest is added."""
    small = FcfsPolicy(PolicyContext(segment_tokens=96))
    assert runs(small, snapshot(stream(1, 200))) == [(1, 96, False)]
    assert runs(small, snapshot(stream(1, 140))) == [(1, 140, False)]
    shared = runs(small, snapshot(stream(1, 80), stream(2, 60), stream(3, 60)))
    assert shared == [(1, 80, False), (2, 60, False)]
    assert runs(small, snapshot(stream(1, 200), budget=100)) == [(1, 96, False)]
    assert runs(small, snapshot(stream(1, 100), budget=100)) == [(1, 100, False)]
    assert runs(small, snapshot(stream(1, 200), page_size=128)) == [(1, 128, False)]


def test_commits_get_the_whole_budget_all_the_same() -> None:
    """Only context that nobody asked about is held to small steps."""
    shot = snapshot(stream(1, 600, committed_s=1.0), stream(2, 100))
    assert runs(FcfsPolicy(PolicyContext(segment_tokens=96)), shot) == [(1, 256, False)]


def test_what_is_in_host_memory_is_room_and_not_work() -> None:
    """The step's budget goes to what has to be computed; memory to that and to what comes back."""
    shot = snapshot(stream(1, 1000, 100, on_host=800, committed_s=1.0), budget=256)
    (run,) = fcfs.decide(shot).runs
    assert (run.num_tokens, run.num_restored, run.up_to, run.is_commit) == (100, 800, 1000, True)


def test_what_comes_back_needs_memory() -> None:
    """There is room for the new tokens, but not for what they build on."""
    first = stream(1, 64, committed_s=1.0)
    second = stream(2, 1000, 100, on_host=800, committed_s=2.0)
    plan = fcfs.decide(snapshot(first, second, budget=256, free=600))
    assert [run.stream_id for run in plan.runs] == [1]
    assert said(plan, snapshot(first, second))[2] is DeferReason.NO_MEMORY
    context = stream(3, 1000, 100, on_host=800)
    assert fcfs.decide(snapshot(context, budget=256, free=600)).runs == ()


def test_what_comes_back_is_taken_from_victims() -> None:
    """Others give memory for what is restored too."""
    idle = stream(1, 700, 700, evictable=700, arrival_s=5.0)
    back = stream(2, 1000, 100, on_host=800, committed_s=2.0)
    plan = fcfs.decide(snapshot(idle, back, budget=256, free=400, evictable=700))
    assert [victim.stream_id for victim in plan.victims] == [1]


def test_context_that_is_all_in_host_memory_waits_there() -> None:
    """Nobody computes for it, so it need not come back yet."""
    shot = snapshot(stream(1, 100, 20, on_host=80))
    plan = fcfs.decide(shot)
    assert plan.runs == ()
    assert said(plan, shot) == {1: DeferReason.IDLE}


def test_a_commit_that_is_all_in_host_memory_computes_its_last_token() -> None:
    """For its logits; the rest comes back."""
    (run,) = fcfs.decide(snapshot(stream(1, 100, on_host=100, committed_s=1.0))).runs
    assert (run.num_tokens, run.num_restored, run.is_commit) == (1, 99, True)
