"""What a policy remembers only makes it faster: it decides as a new one would."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfill.scheduling.policy import Policy
from streamfill.scheduling.snapshot import MemoryView, Snapshot, StreamTable
from streamfill.stream.ids import StreamId
from tests.unit.scheduling.builders import POLICIES, policy, stream
from tests.unit.scheduling.strategies import EXPERIENCES, made_view, seeds

each_policy = pytest.mark.parametrize("spec", POLICIES)


def shot_of(
    table: StreamTable, budget: int, free: int, *, page_size: int = 4, experience: int = 0
) -> Snapshot:
    num_owned = sum(view.num_evictable_tokens for view in table.streams.values())
    return table.snapshot(
        memory=MemoryView(
            num_free_tokens=free,
            num_evictable_tokens=num_owned,
            num_total_tokens=10_000,
            page_size=page_size,
        ),
        token_budget=budget,
        max_requests=5,
        now_s=9.0,
        experience=EXPERIENCES[experience],
    )


@each_policy
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), seeds)
def test_following_changes_is_as_good_as_starting_anew(
    spec: str, num_steps: int, seed: int
) -> None:
    """Streams come, change and go, experience grows, some snapshots are missed."""
    table = StreamTable()
    follower = policy(spec, segment_tokens=32)
    random = Random(seed)
    experience = 0
    for _ in range(num_steps):
        for _ in range(random.randint(0, 5)):
            stream_id = random.randint(0, 8)
            if random.random() < 0.3:
                table.remove(StreamId(stream_id))
            else:
                table.put(made_view(stream_id, random))
        if random.random() < 0.1:
            experience = random.randrange(len(EXPERIENCES))
        if random.random() < 0.8:
            assert_decides_as_new(
                follower,
                spec,
                table,
                budget=random.randint(0, 400),
                free=random.randint(0, 500),
                page_size=random.choice((4, 4, 4, 4, 1)),
                experience=experience,
            )


def assert_decides_as_new(
    follower: Policy,
    spec: str,
    table: StreamTable,
    *,
    budget: int = 300,
    free: int = 100,
    page_size: int = 4,
    experience: int = 0,
) -> None:
    shot = shot_of(table, budget, free, page_size=page_size, experience=experience)
    fresh = policy(spec, segment_tokens=32).decide(shot)
    copied = StreamTable(shot.streams.values())
    elsewhere = policy(spec, segment_tokens=32).decide(
        shot_of(copied, budget, free, page_size=page_size, experience=experience)
    )
    assert follower.decide(shot) == fresh == elsewhere


@each_policy
@pytest.mark.parametrize("num_changes", [1000, 1060, 3000])
def test_missing_more_than_the_log_keeps_is_no_harm(spec: str, num_changes: int) -> None:
    """A policy that was not asked for long starts over from the whole table."""
    table = StreamTable(stream(i, 100, 50, evictable=50, arrival_s=i) for i in range(5))
    follower = policy(spec, segment_tokens=32)
    assert_decides_as_new(follower, spec, table)
    table.remove(StreamId(0))
    table.put(stream(9, 80, committed_s=3.0))
    for number in range(num_changes):
        table.put(stream(number % 3 + 1, 100 + number, number % 90, arrival_s=number % 7))
    assert_decides_as_new(follower, spec, table)
    table.put(stream(2, 5000, 4000, committed_s=0.5))
    assert_decides_as_new(follower, spec, table)


@each_policy
def test_another_table_is_another_story(spec: str) -> None:
    """A policy may be asked about one table, then about another."""
    one = StreamTable([stream(1, 100), stream(2, 100, committed_s=1.0)])
    other = StreamTable([stream(3, 100), stream(1, 50, 10, committed_s=1.0)])
    follower = policy(spec, segment_tokens=32)
    for table in (one, other, one):
        assert_decides_as_new(follower, spec, table)


@each_policy
def test_a_stream_that_is_over_is_forgotten(spec: str) -> None:
    """Neither runs nor victims name it, and one of the same id later is a new one."""
    table = StreamTable([stream(1, 100, 50, evictable=50), stream(2, 100)])
    follower = policy(spec, segment_tokens=32)
    assert_decides_as_new(follower, spec, table, free=0)
    table.remove(StreamId(1))
    table.remove(StreamId(1))
    plan = follower.decide(shot_of(table, 300, 0))
    assert 1 not in {*(run.stream_id for run in plan.runs), *(v.stream_id for v in plan.victims)}
    table.put(stream(1, 40, committed_s=1.0))
    assert_decides_as_new(follower, spec, table, free=500)
