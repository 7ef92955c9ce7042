"""KV that leaves the tree for host memory and comes back, on SGLang's own pools and allocators."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")

from tests.unit.engine.kv_pools import PoolUnderTest

NUM_PAGES = 8


@pytest.fixture(params=[1, 4])
def pool(request: pytest.FixtureRequest) -> PoolUnderTest:
    return PoolUnderTest(NUM_PAGES, request.param)


def _ids(pool: PoolUnderTest, names: str) -> array[int]:
    """One whole page per letter."""
    ids = [ord(name) * 100 + place for name in names for place in range(pool.page_size)]
    return array("q", ids)


def _compute(pool: PoolUnderTest, stream_id: int, names: str) -> None:
    ids = _ids(pool, names)
    assert pool.compute(ids)
    pool.tree.tag(stream_id, ids)


def test_what_was_taken_comes_back_with_its_content(pool: PoolUnderTest) -> None:
    swap = pool.swap_to(16)
    _compute(pool, 1, "abcd")
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(4 * pool.page_size)
    assert pool.peek(_ids(pool, "abcd")) == 0
    assert pool.tree.take_losers() == {1}
    assert pool.compute(_ids(pool, "stuvwxyz"))  # its pages hold something else meanwhile
    assert pool.pool.host_tokens(_ids(pool, "abcdef"), 0) == 4 * pool.page_size
    assert pool.pool.restore(_ids(pool, "abcdef")) == 4 * pool.page_size
    pool.check()
    assert swap.stats().num_restored == 4


def test_only_streams_to_save_are_copied(pool: PoolUnderTest) -> None:
    swap = pool.swap_to(16)
    _compute(pool, 1, "ab")
    _compute(pool, 2, "cd")
    assert pool.compute(_ids(pool, "ef"))  # of nobody
    pool.tree.set_ranks({1: 0, 2: 1}, frozenset({2}))
    pool.evict(6 * pool.page_size)
    assert swap.stats().num_saved == 2
    assert pool.pool.host_tokens(_ids(pool, "cd"), 0) == 2 * pool.page_size
    assert pool.tree.take_losers() == {1, 2}


def test_a_shared_prefix_goes_last_and_once(pool: PoolUnderTest) -> None:
    swap = pool.swap_to(16)
    _compute(pool, 1, "abc")
    _compute(pool, 2, "abd")
    pool.tree.set_ranks({1: 0, 2: 1}, frozenset({1, 2}))
    pool.evict(pool.page_size)
    assert (pool.peek(_ids(pool, "abc")), pool.peek(_ids(pool, "abd"))) == (
        2 * pool.page_size,
        3 * pool.page_size,
    )
    pool.evict(3 * pool.page_size)
    assert swap.stats().num_saved == 4
    assert pool.pool.restore(_ids(pool, "abd")) == 3 * pool.page_size
    assert pool.pool.restore(_ids(pool, "abc")) == 3 * pool.page_size
    pool.check()


def test_half_of_a_sequence(pool: PoolUnderTest) -> None:
    """The end went, the beginning stayed."""
    pool.swap_to(16)
    _compute(pool, 1, "ab")
    _compute(pool, 1, "abcd")
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(2 * pool.page_size)
    ids = _ids(pool, "abcd")
    assert pool.peek(ids) == 2 * pool.page_size
    assert pool.pool.host_tokens(ids, 2 * pool.page_size) == 2 * pool.page_size
    assert pool.pool.restore(ids) == 4 * pool.page_size
    pool.check()


def test_nothing_comes_back_where_memory_is_held(pool: PoolUnderTest) -> None:
    pool.swap_to(16)
    _compute(pool, 1, "abcd")
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(4 * pool.page_size)
    pool.hold([], 6 * pool.page_size)
    assert pool.pool.restore(_ids(pool, "abcd")) == 0
    pool.check()


def test_coming_back_may_send_others_away(pool: PoolUnderTest) -> None:
    pool.swap_to(16)
    _compute(pool, 1, "abcde")
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    _compute(pool, 2, "vwxyz")
    pool.tree.set_ranks({2: 0, 1: 1}, frozenset({1, 2}))
    assert pool.pool.restore(_ids(pool, "abcde")) == 5 * pool.page_size
    pool.check()
    assert pool.peek(_ids(pool, "vwxyz")) < 5 * pool.page_size
    pool.tree.set_ranks({1: 0, 2: 1}, frozenset({1, 2}))
    assert pool.pool.restore(_ids(pool, "vwxyz")) == 5 * pool.page_size
    pool.check()


def test_a_copy_ahead_leaves_everything_where_it_is(pool: PoolUnderTest) -> None:
    swap = pool.swap_to(16)
    _compute(pool, 1, "abc")
    assert pool.pool.copy_ahead(_ids(pool, "abc")) == 3 * pool.page_size
    assert pool.peek(_ids(pool, "abc")) == 3 * pool.page_size
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(3 * pool.page_size)
    stats = swap.stats()
    assert (stats.num_saved, stats.num_saved_for_free) == (3, 3)


def test_without_host_memory_nothing_is_kept(pool: PoolUnderTest) -> None:
    _compute(pool, 1, "abc")
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(3 * pool.page_size)
    assert pool.pool.host_tokens(_ids(pool, "abc"), 0) == 0
    assert pool.pool.restore(_ids(pool, "abc")) == 0
    assert pool.pool.copy_ahead(_ids(pool, "abc")) == 0


_NAMES = st.text(alphabet="ab", min_size=1, max_size=5)
_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["compute", "evict", "restore", "ahead", "hold", "let go", "release"]),
        _NAMES,
        st.integers(1, 3),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([1, 4]), st.sampled_from([1, 3, 30]), _ACTIONS)
def test_any_order_of_events_keeps_content_and_counts(
    page_size: int, num_host_pages: int, actions: list[tuple[str, str, int]]
) -> None:
    pool = PoolUnderTest(NUM_PAGES, page_size)
    swap = pool.swap_to(num_host_pages)
    for action, names, stream_id in actions:
        ids = _ids(pool, names)
        pool.tree.set_ranks({1: 0, 2: 1, 3: 2}, frozenset({1, 3}))
        if action == "compute":
            if pool.compute(ids):
                pool.tree.tag(stream_id, ids)
        elif action == "evict":
            pool.evict(stream_id * page_size)
        elif action == "restore":
            before = pool.peek(ids)
            promised = pool.pool.host_tokens(ids, before)
            assert before <= pool.pool.restore(ids) <= before + promised
        elif action == "ahead":
            pool.pool.copy_ahead(ids)
        elif action == "hold":
            pool.hold(ids, page_size * stream_id)
        elif action == "let go" and pool.held:
            pool.let_go()
        elif action == "release":
            pool.pool.release_host(ids, 0)
        pool.check()
        assert swap.stats().num_held <= num_host_pages
