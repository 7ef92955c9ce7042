"""The policies of Stream2LLM, example by example."""

from __future__ import annotations

import pytest

from streamfill.scheduling.plan import DeferReason
from streamfill.scheduling.snapshot import Snapshot, StreamView
from tests.unit.scheduling.builders import order, policy, runs, said, snapshot, stream, victims

PUBLISHED = ("default", "fcfs", "lcas", "lcas(order=newest)", "mcps")


def test_default_is_arrival_order_whatever_is_committed() -> None:
    """vLLM's own order does not look at commits; both kinds share a step."""
    shot = snapshot(
        stream(1, 100, 10, arrival_s=3.0, committed_s=4.0),
        stream(2, 100, arrival_s=1.0, last_segment_s=9.0),
        stream(3, 100, 90, arrival_s=2.0, committed_s=8.0),
    )
    assert runs(policy("default"), shot) == [(2, 100, False), (3, 100, True), (1, 100, True)]


def test_fcfs_is_committed_first_each_by_arrival() -> None:
    """Neither the time of the commit nor that of a segment counts, only when a stream came."""
    fcfs = policy("fcfs")
    commits = (
        stream(1, 100, arrival_s=3.0, committed_s=4.0, last_segment_s=4.0),
        stream(2, 100, arrival_s=1.0, committed_s=9.0, last_segment_s=9.0),
    )
    context = (
        stream(3, 100, arrival_s=0.5, last_segment_s=8.0),
        stream(4, 100, arrival_s=0.0, last_segment_s=9.0),
    )
    assert order(fcfs, *commits, *context) == [2, 1]
    assert order(fcfs, *context) == [4, 3]


@pytest.mark.parametrize(("spec", "first"), [("lcas", 2), ("lcas(order=newest)", 1)])
def test_lcas_is_committed_first_each_by_last_chunk(spec: str, first: int) -> None:
    """The published code takes the oldest last chunk, its docstring says the newest."""
    lcas = policy(spec)
    last = 3 - first
    commits = (
        stream(1, 100, arrival_s=1.0, committed_s=7.0, last_segment_s=7.0),
        stream(2, 100, arrival_s=2.0, committed_s=9.0, last_segment_s=3.0),
    )
    context = (stream(3, 100, arrival_s=0.0, last_segment_s=8.0),)
    assert order(lcas, *commits, *context) == [first, last]
    assert order(lcas, *context, stream(4, 100, last_segment_s=1.0)) == (
        [4, 3] if spec == "lcas" else [3, 4]
    )


def test_mcps_is_most_computed_first_whatever_is_committed() -> None:
    """Of streams with as much computed the earlier arrival goes first."""
    shot = snapshot(
        stream(1, 200, 10, arrival_s=3.0, committed_s=4.0),
        stream(2, 200, 100, arrival_s=5.0),
        stream(3, 200, 100, arrival_s=2.0, committed_s=8.0),
        budget=1000,
    )
    assert runs(policy("mcps"), shot) == [(3, 200, True), (2, 200, False), (1, 200, True)]


@pytest.mark.parametrize("spec", PUBLISHED)
def test_equals_go_by_id(spec: str) -> None:
    """Ids grow with time, so the older stream goes first where nothing else tells."""
    assert order(policy(spec), stream(2, 10), stream(1, 10), stream(3, 10)) == [1, 2, 3]


@pytest.mark.parametrize("spec", PUBLISHED)
@pytest.mark.parametrize("committed_s", [None, 9.0])
def test_priority_goes_before_the_published_order(spec: str, committed_s: float | None) -> None:
    """Within a tier a higher priority goes first, whoever has come or computed what."""
    views = [
        stream(i, 100, computed, arrival_s=at_s, committed_s=committed_s, last_segment_s=at_s)
        for i, computed, at_s in ((1, 50, 1.0), (2, 50, 3.0))
    ]
    urgent = stream(3, 100, arrival_s=2.0, committed_s=committed_s, last_segment_s=2.0, priority=1)
    assert order(policy(spec), *views, urgent)[0] == 3


def test_priority_does_not_lift_context_over_commits() -> None:
    """The tiers come first."""
    shot = snapshot(stream(1, 10, priority=9), stream(2, 10, committed_s=1.0, priority=-9))
    for spec in ("fcfs", "lcas", "lcas(order=newest)"):
        assert runs(policy(spec), shot) == [(2, 10, True)]


def short_of_memory(*holders: StreamView, missing: int = 30) -> Snapshot:
    """A commit needs ``missing`` tokens, a page of one included, and all memory is the holders'."""
    needs = stream(99, missing - 1, committed_s=1.0, priority=9)
    return snapshot(needs, *holders, free=0, evictable=sum(v.num_evictable_tokens for v in holders))


def holder(stream_id: int, tokens: int = 20, **facts: float) -> StreamView:
    """An idle stream whose KV can be taken."""
    committed_s = facts.get("committed_s")
    return stream(
        stream_id,
        tokens,
        tokens,
        evictable=tokens,
        reached=tokens,
        arrival_s=facts.get("arrival_s", 0.0),
        last_segment_s=facts.get("last_segment_s", 0.0),
        committed_s=committed_s,
        priority=int(facts.get("priority", 0)),
    )


def test_default_takes_memory_from_the_newest_arrival() -> None:
    """vLLM's LIFO victim, committed or not, and no more victims than are needed."""
    holders = (
        holder(1, arrival_s=1.0),
        holder(2, arrival_s=3.0),
        holder(3, arrival_s=2.0),
    )
    shot = short_of_memory(*holders)
    assert victims(policy("default"), shot) == [(2, 20), (3, 20)]
    assert {v.reason for v in policy("default").decide(shot).victims} == {"the newest arrival"}


def test_fcfs_takes_memory_from_the_last_in_turn() -> None:
    """Uncommitted streams give first, newest arrival first; then committed ones likewise."""
    holders = (
        holder(1, 10, arrival_s=1.0),
        holder(2, 10, arrival_s=4.0, committed_s=9.0),
        holder(3, 10, arrival_s=3.0),
        holder(4, 10, arrival_s=2.0, committed_s=9.0),
    )
    shot = short_of_memory(*holders)
    commits_do_not_fit = snapshot(*shot.streams.values(), free=0, evictable=40, max_requests=1)
    assert victims(policy("fcfs"), commits_do_not_fit) == [(3, 10), (1, 10), (2, 10)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("lcas", [3, 1, 2]), ("lcas(order=newest)", [1, 3, 4])],
)
def test_lcas_takes_memory_from_the_last_in_turn(spec: str, expected: list[int]) -> None:
    """Uncommitted first; whose last chunk puts it last gives first."""
    holders = (
        holder(1, 10, last_segment_s=1.0),
        holder(2, 10, last_segment_s=8.0, committed_s=9.0),
        holder(3, 10, last_segment_s=3.0),
        holder(4, 10, last_segment_s=2.0, committed_s=9.0),
    )
    shot = snapshot(
        *short_of_memory(*holders).streams.values(), free=0, evictable=40, max_requests=1
    )
    assert [stream_id for stream_id, _ in victims(policy(spec), shot)] == expected


def test_mcps_takes_memory_from_the_fewest_computed() -> None:
    """Whoever has least loses it first; of equals the newer arrival."""
    holders = (holder(1, 30), holder(2, 10, arrival_s=1.0), holder(3, 10, arrival_s=2.0))
    assert victims(policy("mcps"), short_of_memory(*holders)) == [(3, 10), (2, 10), (1, 30)]


@pytest.mark.parametrize("spec", PUBLISHED)
def test_higher_priority_keeps_its_memory_longer(spec: str) -> None:
    """The order of giving up is that of the turns, from its end."""
    shot = short_of_memory(holder(1, 40, priority=1), holder(2, 40, priority=0))
    assert victims(policy(spec), shot) == [(2, 40)]


@pytest.mark.parametrize("spec", PUBLISHED)
def test_no_victims_while_memory_of_nobody_suffices(spec: str) -> None:
    """What is free, or cached for streams that are over, goes first."""
    held = holder(1, 40)
    needs = stream(2, 29, committed_s=1.0)
    assert victims(policy(spec), snapshot(needs, held, free=30, evictable=40)) == []
    assert victims(policy(spec), snapshot(needs, held, free=0, evictable=70)) == []
    assert victims(policy(spec), snapshot(needs, held, free=0, evictable=69)) == [(1, 40)]


def test_published_context_takes_the_whole_step() -> None:
    """Untiered policies do not hold context to small steps, since they cannot tell it apart."""
    for spec in ("default", "mcps"):
        small = policy(spec, segment_tokens=16)
        assert runs(small, snapshot(stream(1, 200))) == [(1, 200, False)]
    shot = snapshot(stream(1, 200))
    assert runs(policy("fcfs", segment_tokens=16), shot) == [(1, 16, False)]
    assert said(policy("fcfs").decide(shot), shot) != {1: DeferReason.NO_BUDGET}
