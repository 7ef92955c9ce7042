"""Queues of turns against the simplest thing that does the same: sorting everything each time."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfill.scheduling.snapshot import (
    NO_EXPERIENCE,
    Experience,
    Snapshot,
    StepCosts,
    StreamTable,
    StreamView,
)
from streamfill.scheduling.turn_queue import Key, TurnQueue
from streamfill.scheduling.turns import RankIndex, TurnIndex
from streamfill.stream.ids import StreamId
from tests.unit.scheduling.builders import snapshot, stream
from tests.unit.scheduling.strategies import made_view, seeds

keys = st.tuples(st.integers(0, 3).map(float), st.integers(0, 3).map(float))
operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 9), keys),
        st.tuples(st.just("discard"), st.integers(0, 9), keys),
        st.tuples(st.just("look"), st.integers(0, 9), keys),
        st.tuples(st.just("clear"), st.just(0), keys),
    ),
    max_size=120,
)


@settings(deadline=None)
@given(operations)
def test_queue_is_a_sorted_dictionary(told: list[tuple[str, int, Key]]) -> None:
    """Whatever was put, moved and taken out: ids come by key, of equal keys the older id first."""
    queue = TurnQueue()
    model: dict[int, Key] = {}
    for what, number, key in told:
        if what == "put":
            queue.put(StreamId(number), key)
            model[number] = key
        elif what == "discard":
            queue.discard(StreamId(number))
            model.pop(number, None)
        elif what == "clear" and len(model) > 8:
            queue.clear()
            model.clear()
        else:
            assert list(queue) == sorted(model, key=lambda i: (model[i], i))
        assert len(queue) == len(model)
        assert (StreamId(number) in queue) == (number in model)
    assert list(queue) == sorted(model, key=lambda i: (model[i], i))


def test_queue_that_is_read_half_stays_whole() -> None:
    """A step that is full leaves the iteration; the next one begins at the front again."""
    queue = TurnQueue()
    for number in range(10):
        queue.put(StreamId(number), (float(number), 0.0))
    queue.discard(StreamId(0))
    queue.put(StreamId(9), (-1.0, 0.0))
    for stream_id in queue:
        if stream_id == 3:
            break
    assert list(queue) == [9, 1, 2, 3, 4, 5, 6, 7, 8]


def test_queue_keeps_no_more_than_it_needs() -> None:
    """Entries of old keys go away however often one stream moves."""
    queue = TurnQueue()
    for number in range(10_000):
        queue.put(StreamId(number % 7), (float(number), 0.0))
    assert len(queue) == 7
    assert len(queue._entries) < 100


def commit_key(view: StreamView, experience: Experience) -> Key:
    del experience
    return view.arrival_s, 0.0


def context_key(view: StreamView, experience: Experience) -> Key:
    return -view.arrival_s, experience.costs.fixed_s


def expected(shot: Snapshot, kind: str) -> list[int]:
    """By the words of ``TurnIndex``, from all streams."""
    page = shot.memory.page_size
    chosen: list[StreamView] = []
    for view in shot.streams.values():
        is_committed = view.committed_s is not None
        lacks = view.num_known_tokens // page > view.num_computed_tokens // page
        is_new = view.num_known_tokens // page > view.num_reached_tokens // page
        if view.in_flight or (not is_committed and (view.awaits_commit or not lacks)):
            continue
        if kind == ("commits" if is_committed else "context" if is_new else "recompute"):
            chosen.append(view)
    sign = 1 if kind == "commits" else -1
    chosen.sort(key=lambda view: (sign * view.arrival_s, view.stream_id))
    return [view.stream_id for view in chosen]


def check_index(index: TurnIndex, shot: Snapshot) -> None:
    for kind in ("commits", "context", "recompute"):
        assert list(getattr(index, kind)) == expected(shot, kind)
    assert index.num_context_tokens == sum(
        view.num_known_tokens - view.num_computed_tokens
        for view in shot.streams.values()
        if view.stream_id in expected(shot, "context")
    )
    assert index.blocked == {
        view.stream_id
        for view in shot.streams.values()
        if view.committed_s is not None and view.in_flight and view.waiting_on_memory
    }


@settings(deadline=None)
@given(st.integers(1, 40), seeds)
def test_indices_follow_the_table(num_steps: int, seed: int) -> None:
    """After any changes the queues hold what the snapshot says, and the tokens are counted."""
    random = Random(seed)
    table = StreamTable()
    index = TurnIndex(commit_key, context_key, is_tiered=True)
    ranks = RankIndex(commit_key)
    for _ in range(num_steps):
        for _ in range(random.randint(0, 4)):
            stream_id = random.randint(0, 8)
            if random.random() < 0.3:
                table.remove(StreamId(stream_id))
            else:
                table.put(made_view(stream_id, random))
        if random.random() < 0.7:
            shot = shot_of(table, random.choice((1, 4)))
            index.follow(shot)
            check_index(index, shot)
        if random.random() < 0.5:
            shot = shot_of(table, 4)
            holders = [
                view
                for view in table.streams.values()
                if view.num_evictable_tokens and not view.in_flight
            ]
            holders.sort(key=lambda view: (view.arrival_s, view.stream_id))
            assert list(ranks.follow(shot)) == [view.stream_id for view in holders]


def shot_of(
    table: StreamTable, page_size: int = 4, experience: Experience = NO_EXPERIENCE
) -> Snapshot:
    return table.snapshot(
        memory=snapshot(page_size=page_size).memory,
        token_budget=100,
        max_requests=4,
        now_s=9.0,
        experience=experience,
    )


def test_untiered_index_has_one_queue_for_both() -> None:
    """By the key of context, committed or not; what was lost stays apart."""
    table = StreamTable(
        [
            stream(1, 100, arrival_s=1.0, committed_s=5.0),
            stream(2, 100, 60, arrival_s=2.0),
            stream(3, 100, 50, reached=100, arrival_s=3.0),
        ]
    )
    index = TurnIndex(commit_key, context_key, is_tiered=False)
    index.follow(shot_of(table))
    assert index.commits is index.context
    assert list(index.context) == [2, 1]
    assert list(index.recompute) == [3]
    assert index.num_context_tokens == 140


def test_index_takes_streams_from_the_place_where_they_were() -> None:
    """A stream goes from context to in flight, to recompute, to a commit, and away."""
    table = StreamTable()
    index = TurnIndex(commit_key, context_key, is_tiered=True)
    life = [
        stream(1, 100),
        stream(1, 100, in_flight=True),
        stream(1, 100, 40, reached=100),
        stream(1, 120, 100, reached=100),
        stream(1, 120, 120, reached=120),
        stream(1, 120, 120, committed_s=1.0),
        stream(1, 120, 120, committed_s=1.0, in_flight=True, waiting_on_memory=True),
        stream(1, 120, 120, committed_s=1.0, in_flight=True),
    ]
    for view in life:
        table.put(view)
        shot = shot_of(table)
        index.follow(shot)
        check_index(index, shot)
    table.remove(StreamId(1))
    index.follow(shot_of(table))
    check_index(index, shot_of(table))


@pytest.mark.parametrize("page_size", [1, 4])
def test_another_page_size_makes_the_queues_anew(page_size: int) -> None:
    """Though no stream changed: three tokens are some pages of one and none of four."""
    table = StreamTable([stream(1, 3, arrival_s=1.0), stream(2, 9, arrival_s=2.0)])
    index = TurnIndex(commit_key, context_key, is_tiered=True)
    index.follow(shot_of(table, 5 - page_size))
    shot = shot_of(table, page_size)
    index.follow(shot)
    check_index(index, shot)


def test_other_experience_makes_the_orders_anew() -> None:
    """Though no stream changed, since keys may depend on it."""

    def by_costs(view: StreamView, experience: Experience) -> Key:
        return view.arrival_s * experience.costs.fixed_s, 0.0

    held = [stream(i, 9, 3, evictable=3, arrival_s=float(i), committed_s=1.0) for i in (1, 2)]
    held += [stream(i, 9, 3, arrival_s=float(i)) for i in (3, 4)]
    table = StreamTable(held)
    index = TurnIndex(by_costs, by_costs, is_tiered=True)
    ranks = RankIndex(by_costs)
    reversing = Experience(costs=StepCosts(fixed_s=-1.0, per_token_s=0.0))
    for experience, step in ((NO_EXPERIENCE, 1), (reversing, -1), (NO_EXPERIENCE, 1)):
        shot = shot_of(table, experience=experience)
        index.follow(shot)
        assert list(index.commits) == [1, 2][::step]
        assert list(index.context) == [3, 4][::step]
        assert list(ranks.follow(shot)) == [1, 2][::step]
