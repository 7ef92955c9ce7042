"""KV that leaves the tree for host memory and comes back, on SGLang's own pools and allocators."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")

from tests.unit.engine.kv_pools import PoolUnderTest

NUM_BLOCKS = 8
BLOCK = 16


@pytest.fixture(params=[1, 4])
def pool(request: pytest.FixtureRequest) -> PoolUnderTest:
    return PoolUnderTest(NUM_BLOCKS * BLOCK // request.param, request.param)


def _ids(names: str, length: int = BLOCK) -> array[int]:
    """So many tokens per letter."""
    return array("q", [ord(name) * 100 + place for name in names for place in range(length)])


def _compute(pool: PoolUnderTest, stream_id: int, names: str) -> None:
    _compute_ids(pool, stream_id, _ids(names))


def test_what_was_taken_comes_back_with_its_content(pool: PoolUnderTest) -> None:
    swap = pool.swap_to(16)
    _compute(pool, 1, "abcd")
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(4 * BLOCK)
    assert pool.peek(_ids("abcd")) == 0
    assert pool.tree.take_losers() == {1}
    assert pool.compute(_ids("stuvwxyz"))  # its pages hold something else meanwhile
    assert pool.pool.host_tokens(_ids("abcdef"), 0) == 4 * BLOCK
    assert pool.pool.restore(_ids("abcdef")) == 4 * BLOCK
    pool.check()
    assert swap.stats().num_restored == 4
    (restore,) = pool.pool.take_restores()
    assert (restore.out, restore.num_bytes) == (False, 4 * BLOCK * pool.pool.layout.bytes_per_token)
    assert restore.seconds > 0
    assert pool.pool.take_restores() == []


def test_only_streams_to_save_are_copied(pool: PoolUnderTest) -> None:
    swap = pool.swap_to(16)
    _compute(pool, 1, "ab")
    _compute(pool, 2, "cd")
    assert pool.compute(_ids("ef"))  # of nobody
    pool.tree.set_ranks({1: 0, 2: 1}, frozenset({2}))
    pool.evict(6 * BLOCK)
    assert swap.stats().num_saved == 2
    assert pool.pool.host_tokens(_ids("cd"), 0) == 2 * BLOCK
    assert pool.tree.take_losers() == {1, 2}


def test_a_shared_prefix_goes_last_and_once(pool: PoolUnderTest) -> None:
    swap = pool.swap_to(16)
    _compute(pool, 1, "abc")
    _compute(pool, 2, "abd")
    pool.tree.set_ranks({1: 0, 2: 1}, frozenset({1, 2}))
    pool.evict(BLOCK)
    assert (pool.peek(_ids("abc")), pool.peek(_ids("abd"))) == (
        2 * BLOCK,
        3 * BLOCK,
    )
    pool.evict(3 * BLOCK)
    assert swap.stats().num_saved == 4
    assert pool.pool.restore(_ids("abd")) == 3 * BLOCK
    assert pool.pool.restore(_ids("abc")) == 3 * BLOCK
    pool.check()


def test_half_of_a_sequence(pool: PoolUnderTest) -> None:
    """The end went, the beginning stayed."""
    pool.swap_to(16)
    _compute(pool, 1, "ab")
    _compute(pool, 1, "abcd")
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(2 * BLOCK)
    ids = _ids("abcd")
    assert pool.peek(ids) == 2 * BLOCK
    assert pool.pool.host_tokens(ids, 2 * BLOCK) == 2 * BLOCK
    assert pool.pool.restore(ids) == 4 * BLOCK
    pool.check()


def test_nothing_comes_back_where_memory_is_held(pool: PoolUnderTest) -> None:
    pool.swap_to(16)
    _compute(pool, 1, "abcd")
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(4 * BLOCK)
    pool.hold([], 6 * BLOCK)
    assert pool.pool.restore(_ids("abcd")) == 0
    pool.check()


def test_coming_back_may_send_others_away(pool: PoolUnderTest) -> None:
    pool.swap_to(16)
    _compute(pool, 1, "abcde")
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    _compute(pool, 2, "vwxyz")
    pool.tree.set_ranks({2: 0, 1: 1}, frozenset({1, 2}))
    assert pool.pool.restore(_ids("abcde")) == 5 * BLOCK
    pool.check()
    assert pool.peek(_ids("vwxyz")) < 5 * BLOCK
    pool.tree.set_ranks({1: 0, 2: 1}, frozenset({1, 2}))
    assert pool.pool.restore(_ids("vwxyz")) == 5 * BLOCK
    pool.check()


def test_making_room_does_not_cost_what_comes_back(pool: PoolUnderTest) -> None:
    """Host memory has too little room for all, and the oldest in it is what is wanted."""
    pool.swap_to(11)
    _compute(pool, 1, "abcde")
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(5 * BLOCK)
    _compute(pool, 3, "xyz")
    pool.pool.copy_ahead(_ids("xyz"))
    pool.evict(3 * BLOCK)
    for stream_id, names in ((2, "mno"), (4, "pqr"), (5, "st")):
        _compute(pool, stream_id, names)
    pool.tree.set_ranks({2: 0, 4: 1, 5: 2, 1: 3}, frozenset({2, 4, 5}))
    assert pool.pool.restore(_ids("abcde")) == 5 * BLOCK
    pool.check()


def test_a_copy_ahead_leaves_everything_where_it_is(pool: PoolUnderTest) -> None:
    swap = pool.swap_to(16)
    _compute(pool, 1, "abc")
    assert pool.pool.copy_ahead(_ids("abc")) == 3 * BLOCK
    assert pool.peek(_ids("abc")) == 3 * BLOCK
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(3 * BLOCK)
    stats = swap.stats()
    assert (stats.num_saved, stats.num_saved_for_free) == (3, 3)


def test_copies_behind_a_gap_do_not_count_as_copied_ahead(pool: PoolUnderTest) -> None:
    """They do not come back without what is before them."""
    swap = pool.swap_to(2)
    _compute(pool, 1, "abc")
    ids = _ids("abc")
    behind = pool.pool.cached_slots(ids)[BLOCK :: pool.page_size] // pool.page_size
    assert swap.save(swap.keys(ids)[1:], behind) == 2
    assert pool.pool.host_tokens(ids, 0) == 0
    assert pool.pool.copy_ahead(ids) == 0


def test_without_host_memory_nothing_is_kept(pool: PoolUnderTest) -> None:
    _compute(pool, 1, "abc")
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(3 * BLOCK)
    assert pool.pool.host_tokens(_ids("abc"), 0) == 0
    assert pool.pool.restore(_ids("abc")) == 0
    assert pool.pool.copy_ahead(_ids("abc")) == 0


_NAMES = st.text(alphabet="ab", min_size=1, max_size=5)
_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["compute", "evict", "restore", "ahead", "hold", "let go", "release"]),
        _NAMES,
        st.integers(1, 3),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([1, 4]), st.sampled_from([1, 3, 30]), st.sampled_from([8, 20]), _ACTIONS)
def test_any_order_of_events_keeps_content_and_counts(
    page_size: int, num_host_blocks: int, length: int, actions: list[tuple[str, str, int]]
) -> None:
    """With nodes that begin and end in the middle of blocks."""
    pool = PoolUnderTest(96 // page_size, page_size)
    swap = pool.swap_to(num_host_blocks)
    for action, names, stream_id in actions:
        ids = _ids(names, length)
        pool.tree.set_ranks({1: 0, 2: 1, 3: 2}, frozenset({1, 3}))
        if action == "compute":
            if pool.compute(ids):
                pool.tree.tag(stream_id, ids)
        elif action == "evict":
            pool.evict(stream_id * 12)
        elif action == "restore":
            before = pool.peek(ids)
            promised = pool.pool.host_tokens(ids, before)
            assert before <= pool.pool.restore(ids) <= before + promised
        elif action == "ahead":
            pool.pool.copy_ahead(ids)
        elif action == "hold":
            pool.hold(ids, 12 * stream_id)
        elif action == "let go" and pool.held:
            pool.let_go()
        elif action == "release":
            pool.pool.release_host(ids, 0)
        pool.check()
        assert swap.stats().num_held <= num_host_blocks


def test_a_block_that_begins_before_the_branch_is_completed(pool: PoolUnderTest) -> None:
    """The first part of the block stays, in the parent's node."""
    swap = pool.swap_to(16)
    trunk, branch = _ids("ab", 8), _ids("abcd", 8)
    assert pool.compute(_ids("a", 8))
    _compute_ids(pool, 1, trunk)
    _compute_ids(pool, 1, branch)
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(24)
    assert pool.peek(branch) == 8
    assert swap.stats().num_held == 2
    assert pool.pool.host_tokens(branch, 8) == 24
    assert pool.pool.restore(branch) == 32
    pool.check()


def _compute_ids(pool: PoolUnderTest, stream_id: int, ids: array[int]) -> None:
    assert pool.compute(ids)
    pool.tree.tag(stream_id, ids)
