"""Cache namespaces in the real radix tree, and in host memory behind it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")

from streamfill.engine.radix import streams_of
from tests.unit.engine.kv_pools import PoolUnderTest

TENANTS = ("", "a", "b")
PAGE_SIZES = (1, 16)


@pytest.fixture(params=PAGE_SIZES, ids=lambda size: f"pages of {size}")
def pool(request: pytest.FixtureRequest) -> PoolUnderTest:
    return PoolUnderTest(64, request.param)


def _ids(pool: PoolUnderTest, num_pages: int) -> list[int]:
    return list(range(1, num_pages * pool.page_size + 1))


def _q(token_ids: list[int]) -> array[int]:
    return array("q", token_ids)


def test_a_prompt_is_found_in_its_own_namespace_only(pool: PoolUnderTest) -> None:
    ids = _ids(pool, 4)
    assert pool.compute(ids, "a")
    assert [pool.peek(ids, each) for each in TENANTS] == [0, len(ids), 0]
    assert [len(pool.pool.cached_slots(_q(ids), each)) for each in TENANTS] == [0, len(ids), 0]
    assert pool.compute(ids, "b")
    assert [pool.peek(ids, each) for each in TENANTS] == [0, len(ids), len(ids)]
    pool.check()


def test_the_same_prompt_of_two_namespaces_lies_in_different_slots(pool: PoolUnderTest) -> None:
    ids = _ids(pool, 3)
    for tenant in TENANTS:
        assert pool.compute(ids, tenant)
    slots = [set(pool.pool.cached_slots(_q(ids), each).tolist()) for each in TENANTS]
    assert len(set.union(*slots)) == 3 * len(ids)
    pool.check()


def test_namespaces_part_at_the_first_token_also_where_nodes_are_split(
    pool: PoolUnderTest,
) -> None:
    long, short = _ids(pool, 6), _ids(pool, 2)
    other = [*short, *(7000 + token for token in _ids(pool, 2))]
    for ids in (long, other):
        assert pool.compute(ids, "a")
    assert pool.tree.tag(5, _q(short), "a") == 0
    assert [pool.peek(other, each) for each in TENANTS] == [0, len(other), 0]
    assert pool.compute(short, "b")
    assert pool.peek(long, "b") == len(short)
    pool.check()


def test_tags_stay_in_their_namespace(pool: PoolUnderTest) -> None:
    """What two tenants have in common nobody calls shared, and nobody takes another's tag off."""
    ids = _ids(pool, 3)
    for stream_id, tenant in ((1, "a"), (2, "b")):
        pool.compute(ids, tenant)
        assert pool.tree.tag(stream_id, _q(ids), tenant) == 0
    pool.tree.untag(1, _q(ids), "b")
    tagged = sorted(next(iter(streams_of(node))) for node, _ in pool.paths() if streams_of(node))
    assert tagged == [1, 2]
    assert pool.tree.tag(3, _q(ids), "a") == len(ids)


def test_kv_is_exported_of_its_own_namespace_only(pool: PoolUnderTest) -> None:
    ids = _ids(pool, 3)
    pool.compute(ids, "a")
    assert pool.exports.lend(_q(ids), 0, "b") is None
    assert pool.exports.lend(_q(ids), 0, "") is None
    exported = pool.exports.lend(_q(ids), 0, "a")
    assert exported is not None
    assert exported.num_tokens == len(ids)
    pool.exports.take_back(exported)


def test_kv_is_imported_into_its_namespace(pool: PoolUnderTest) -> None:
    """And what it goes on behind has to be in the same one."""
    ids = _ids(pool, 4)
    half = len(ids) // 2
    assert pool.pool.import_kv(pool.incoming(ids[:half], namespace="a")) == half
    assert [pool.peek(ids, each) for each in TENANTS] == [0, half, 0]
    assert pool.pool.import_kv(pool.incoming(ids, half, namespace="b")) == 0
    assert pool.pool.import_kv(pool.incoming(ids, half, namespace="a")) == len(ids)
    assert [pool.peek(ids, each) for each in TENANTS] == [0, len(ids), 0]
    pool.check()


@pytest.mark.parametrize("ahead", [False, True], ids=["taken", "copied ahead"])
def test_what_is_in_host_memory_comes_back_to_its_own_namespace_only(
    pool: PoolUnderTest, ahead: bool
) -> None:
    swap = pool.swap_to(16)
    ids = _ids(pool, 32)
    pool.compute(ids, "a")
    pool.tree.tag(1, _q(ids), "a")
    if ahead:
        assert pool.pool.copy_ahead(_q(ids), "b") == 0
        assert pool.pool.copy_ahead(_q(ids), "a") > 0
    pool.tree.set_ranks({1: 0}, frozenset({1}))
    pool.evict(len(ids))
    assert swap.num_held > 0
    assert pool.pool.host_tokens(_q(ids), 0, "a") > 0
    for other in ("", "b"):
        assert pool.pool.host_tokens(_q(ids), 0, other) == 0
        assert pool.pool.restore(_q(ids), other) == 0
    pool.pool.release_host(_q(ids), 0, "b")
    assert swap.room()[1] == swap.room()[0] - swap.num_held, "another's blocks were demoted"
    back = pool.pool.restore(_q(ids), "a")
    assert back == pool.peek(ids, "a") > 0
    assert pool.peek(ids, "b") == pool.peek(ids) == 0
    pool.check()


_STEPS = st.tuples(
    st.sampled_from(("compute", "import", "evict", "restore", "ahead", "tag", "untag")),
    st.sampled_from(TENANTS),
    st.integers(0, 2),
    st.integers(1, 8),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PAGE_SIZES), st.lists(_STEPS, max_size=25))
def test_whatever_happens_nothing_of_one_namespace_is_seen_in_another(
    page_size: int, steps: list[tuple[str, str, int, int]]
) -> None:
    """Each namespace knows at most what came into it: its longest prompt of each family."""
    pool = PoolUnderTest(64, page_size)
    pool.swap_to(8)
    families = [[1000 * family + token for token in range(8 * 16)] for family in range(3)]
    most: dict[tuple[str, int], int] = {}
    numbers: Iterator[int] = count(1)
    for action, tenant, family, num_pages in steps:
        ids = families[family][: num_pages * page_size]
        came = most.get((tenant, family), 0)
        if action == "compute":
            pool.compute(ids, tenant)
            came = max(came, len(ids))
        elif action == "import":
            pool.pool.import_kv(pool.incoming(ids, namespace=tenant))
            came = max(came, len(ids))
        elif action == "evict":
            pool.evict(num_pages * page_size)
        elif action == "restore":
            assert pool.pool.restore(_q(ids), tenant) <= came
        elif action == "ahead":
            assert pool.pool.copy_ahead(_q(ids), tenant) <= came
        elif action == "tag":
            stream_id = next(numbers)
            pool.tree.tag(stream_id, _q(ids), tenant)
            pool.tree.set_ranks({stream_id: 0}, frozenset({stream_id}))
        else:
            pool.tree.untag(1, _q(ids), tenant)
        most[tenant, family] = came
        for each in TENANTS:
            for number, prompt in enumerate(families):
                seen = most.get((each, number), 0)
                assert pool.peek(prompt, each) <= seen
                assert pool.pool.host_tokens(_q(prompt), 0, each) <= seen
        pool.check()


def test_keys_of_blocks_in_host_memory_depend_on_the_namespace() -> None:
    """From the first one on, and not on that of the shared one being named."""
    pool = PoolUnderTest(4, 16)
    swap = pool.swap_to(4)
    ids = _q(list(range(64)))
    keys = [swap.keys(ids, tenant) for tenant in TENANTS]
    assert all(len(each) == 4 for each in keys)
    assert len({key for each in keys for key in each}) == 12
    assert swap.keys(ids) == keys[0]
