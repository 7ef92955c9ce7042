"""Our radix tree and KV import on SGLang's own pools and allocators, page sizes 1 and 16."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import get_radix_cache_factory

from streamfill.engine import radix
from streamfill.engine.exports import KvExports
from streamfill.engine.interface import ExportedKv
from streamfill.engine.radix import streams_of
from tests.unit.engine.kv_pools import PoolUnderTest

KINDS = [(1, False), (1, True), (16, True)]
"""(page size, whether by streamfill's paged allocator)"""


@pytest.fixture(params=KINDS, ids=["tokens", "pages of 1", "pages of 16"])
def pool(request: pytest.FixtureRequest) -> PoolUnderTest:
    page_size, paged = request.param
    return PoolUnderTest(16, page_size, paged=paged)


def _pages(pool: PoolUnderTest, names: str, rest: int = 0) -> list[int]:
    """A sequence of whole pages, one per letter, and ``rest`` tokens more."""
    ids = [ord(name) * 100 + place for name in names for place in range(pool.page_size)]
    return ids + [7] * rest


def _q(token_ids: list[int]) -> array[int]:
    return array("q", token_ids)


def _export(pool: PoolUnderTest, token_ids: list[int]) -> tuple[int, torch.Tensor]:
    exported = pool.exports.lend(_q(token_ids), 0)
    if exported is None:
        return 0, torch.empty(0, dtype=torch.uint8)
    staging = _content(exported)
    pool.exports.take_back(exported)
    return exported.num_tokens, staging


def _content(exported: ExportedKv) -> torch.Tensor:
    staging = torch.empty(exported.kv.num_bytes, dtype=torch.uint8)
    exported.kv.read(0, staging)
    return staging


# Looking


def test_peek_sees_the_longest_cached_prefix_in_whole_pages(pool: PoolUnderTest) -> None:
    """Within a node too."""
    pool.compute(_pages(pool, "abcd"))
    page = pool.page_size
    assert pool.peek(_pages(pool, "abcd")) == 4 * page
    assert pool.peek(_pages(pool, "abxd")) == 2 * page
    assert pool.peek(_pages(pool, "abcde")) == 4 * page
    assert pool.peek(_pages(pool, "x")) == pool.peek([]) == 0
    assert pool.peek(_pages(pool, "abc")[:-1]) == 3 * page - (1 if page == 1 else page)


def test_peek_changes_nothing(pool: PoolUnderTest) -> None:
    """No node is split, none counts as used."""
    pool.compute(_pages(pool, "abcd"))

    def state() -> list[tuple[int, list[int], float, int]]:
        return [(node.id, ids, node.last_access_time, node.lock_ref) for node, ids in pool.paths()]

    before = state()
    for names in ("ab", "abxx", "abcdef", "x"):
        pool.peek(_pages(pool, names))
    assert state() == before


# Tags


def _tags(pool: PoolUnderTest) -> dict[str, set[int]]:
    """Streams of each page, by the letters up to it."""
    tags: dict[str, set[int]] = {}
    for node, ids in pool.paths():
        names = "".join(chr(ids[i] // 100) for i in range(0, len(ids), pool.page_size))
        for end in range(len(names) - len(node.key) // pool.page_size + 1, len(names) + 1):
            tags[names[:end]] = set(streams_of(node))
    return tags


def test_a_tag_is_on_the_pages_of_its_sequence_and_no_others(pool: PoolUnderTest) -> None:
    """A node that holds more is split at the end of the sequence."""
    pool.compute(_pages(pool, "abcd"))
    pool.tree.tag(1, _q(_pages(pool, "ab")))
    pool.tree.tag(2, _q(_pages(pool, "abcx")))
    assert _tags(pool) == {"a": {1, 2}, "ab": {1, 2}, "abc": {2}, "abcd": set()}
    pool.check()


def test_tags_survive_splits(pool: PoolUnderTest) -> None:
    """Both halves keep them, and each may then change by itself."""
    pool.compute(_pages(pool, "abcd"))
    pool.tree.tag(1, _q(_pages(pool, "abcd")))
    pool.compute(_pages(pool, "abx"))
    assert _tags(pool) == {"a": {1}, "ab": {1}, "abc": {1}, "abcd": {1}, "abx": set()}
    pool.tree.tag(2, _q(_pages(pool, "ab")))
    assert _tags(pool)["abcd"] == {1}


def test_untag_takes_a_stream_off_its_whole_sequence(pool: PoolUnderTest) -> None:
    """And leaves the others'."""
    pool.compute(_pages(pool, "abcd"))
    for stream_id in (1, 2):
        pool.tree.tag(stream_id, _q(_pages(pool, "abcd")))
    pool.tree.untag(1, _q(_pages(pool, "abcdef")))
    assert set().union(*_tags(pool).values()) == {2}
    pool.tree.untag(3, _q(_pages(pool, "abcd")))


# Victims


def test_nodes_of_no_open_stream_go_first_then_by_rank(pool: PoolUnderTest) -> None:
    """Whatever was used last; of equals the least recently used one."""
    for names in ("ab", "cd", "ef", "gh", "ij"):
        pool.compute(_pages(pool, names))
    pool.tree.tag(1, _q(_pages(pool, "ab")))
    pool.tree.tag(2, _q(_pages(pool, "cd")))
    pool.tree.tag(9, _q(_pages(pool, "ef")))  # closed by now: it has no rank
    pool.tree.set_ranks({1: 1, 2: 0})
    pool.peek(_pages(pool, "ef"))
    order = []
    for _ in range(5):
        pool.evict(2 * pool.page_size)
        left = [names for names in ("ab", "cd", "ef", "gh", "ij") if pool.peek(_pages(pool, names))]
        order.append("".join(left))
        pool.check()
    assert order[-2:] == ["ab", ""]
    assert order[2] == "abcd"
    assert order[0] == "abcdefij", "g and h were used before e and f were tagged"


def test_a_shared_node_is_as_safe_as_its_best_protected_stream(pool: PoolUnderTest) -> None:
    """The victim of a plan gives up what is its own."""
    pool.compute(_pages(pool, "abc"))
    pool.compute(_pages(pool, "abd"))
    pool.compute(_pages(pool, "x"))
    pool.tree.tag(1, _q(_pages(pool, "abc")))
    pool.tree.tag(2, _q(_pages(pool, "abd")))
    pool.tree.tag(3, _q(_pages(pool, "x")))
    pool.tree.set_ranks({1: 0, 3: 1, 2: 2})
    pool.evict(1)
    assert pool.peek(_pages(pool, "abc")) == 2 * pool.page_size
    pool.evict(1)
    assert pool.peek(_pages(pool, "x")) == 0
    assert pool.peek(_pages(pool, "abd")) == 3 * pool.page_size


def test_evicted_tokens_are_counted(pool: PoolUnderTest) -> None:
    """Since the start."""
    pool.compute(_pages(pool, "abcd"))
    pool.evict(1)
    num_first = pool.tree.num_evicted_tokens
    assert num_first == 4 * pool.page_size - pool.peek(_pages(pool, "abcd"))
    pool.compute(_pages(pool, "xy"))
    pool.evict(1000)
    assert pool.tree.num_evicted_tokens == 6 * pool.page_size
    assert pool.allocator.available_size() == pool.num_tokens


# Import and export


def test_kv_goes_from_one_pool_to_another(pool: PoolUnderTest) -> None:
    """Equal bytes, found by the tree; whole pages only."""
    ids = _pages(pool, "abc", rest=3)
    pool.compute(ids)
    num_tokens, staging = _export(pool, ids)
    assert num_tokens == (6 if pool.page_size == 1 else 48)
    other = PoolUnderTest(8, pool.page_size)
    incoming = other.incoming(ids[:num_tokens])
    assert torch.equal(incoming.staging, staging)
    assert other.pool.import_kv(incoming) == num_tokens
    assert other.peek(ids) == num_tokens
    other.check()
    assert torch.equal(_export(other, ids)[1], staging)


@pytest.mark.parametrize("num_cached", [0, 1, 3])
def test_an_import_writes_only_what_is_missing(pool: PoolUnderTest, num_cached: int) -> None:
    """What the tree has keeps its slots; slots that were not free are not touched."""
    pool.compute(_pages(pool, "abcd"[:num_cached] + "xy"))
    pool.compute(_pages(pool, "q"))
    pool.hold(_pages(pool, "q"), 2 * pool.page_size)
    before, owned = pool.rows(), set(pool.tree_slots()) | set(pool.held[0].slots.tolist())
    num_free = pool.allocator.available_size()
    assert pool.pool.import_kv(pool.incoming(_pages(pool, "abcd"))) == 4 * pool.page_size
    assert num_free - pool.allocator.available_size() == (4 - num_cached) * pool.page_size
    changed = (pool.rows() != before).any(dim=(0, 2, 3)).nonzero().view(-1).tolist()
    assert not owned.intersection(changed)
    assert len(changed) == (4 - num_cached) * pool.page_size
    pool.let_go()
    pool.check()


def test_an_import_of_what_is_there_changes_nothing(pool: PoolUnderTest) -> None:
    """Not even the order of eviction."""
    pool.compute(_pages(pool, "abcd"))
    before = pool.rows()
    assert pool.pool.import_kv(pool.incoming(_pages(pool, "abc"))) == 3 * pool.page_size
    assert torch.equal(pool.rows(), before)
    pool.check()


def test_an_import_behind_a_prefix_needs_that_prefix(pool: PoolUnderTest) -> None:
    """Without it nothing is imported; with more than it, only what is missing."""
    ids, page = _pages(pool, "abcd"), pool.page_size
    assert pool.pool.import_kv(pool.incoming(ids, first_token=2 * page)) == 0
    pool.compute(_pages(pool, "a"))
    assert pool.pool.import_kv(pool.incoming(ids, first_token=2 * page)) == page
    pool.check()
    pool.compute(_pages(pool, "abc"))
    assert pool.pool.import_kv(pool.incoming(ids, first_token=2 * page)) == 4 * page
    pool.check()
    assert pool.allocator.available_size() == 12 * page


def test_an_import_makes_room_by_eviction(pool: PoolUnderTest) -> None:
    """But not at the cost of its own prefix, which is not in the transfer."""
    ids = _pages(pool, "abcdefgh")
    pool.compute(ids[: 2 * pool.page_size])
    for names in ("qrst", "uvwx", "yz12"):
        pool.compute(_pages(pool, names))
    pool.tree.tag(1, _q(_pages(pool, "qrstuvwxyz")))
    assert pool.pool.import_kv(pool.incoming(ids, first_token=2 * pool.page_size)) == len(ids)
    assert pool.peek(ids) == len(ids)
    pool.check()


def test_an_import_without_room_imports_nothing(pool: PoolUnderTest) -> None:
    """And holds nothing afterwards; the server recomputes."""
    pool.compute(_pages(pool, "ab"))
    pool.hold([], 12 * pool.page_size)
    ids = _pages(pool, "abcdef12")
    assert pool.pool.import_kv(pool.incoming(ids)) == 2 * pool.page_size
    assert pool.peek(ids) == 2 * pool.page_size
    pool.check()
    assert pool.tree.protected_size() == 0


def test_an_import_that_breaks_holds_nothing(pool: PoolUnderTest) -> None:
    """A transfer of the wrong size is a bug, not a leak."""
    incoming = pool.incoming(_pages(pool, "abc"))
    shorter = pool.incoming(_pages(pool, "ab"))
    broken = type(incoming)(**{**vars(incoming), "staging": shorter.staging})
    with pytest.raises(ValueError, match="slots for"):
        pool.pool.import_kv(broken)
    pool.check()
    assert pool.allocator.available_size() == pool.num_tokens


_NAMES = st.text(alphabet="ab", min_size=1, max_size=5)


@pytest.mark.parametrize(("page_size", "paged"), KINDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_slot_always_has_one_owner(page_size: int, paged: bool, data: st.DataObject) -> None:
    """free + evictable + protected + held by requests == total, and all KV is that of its tokens,
    after any mixture of requests, tags, evictions, exports and imports. What is lent stays."""
    pool = PoolUnderTest(8, page_size, paged=paged)
    actions = ["compute", "compute", "tag", "untag", "evict", "import", "lend", "hold", "let go"]
    lent: list[tuple[ExportedKv, torch.Tensor]] = []
    for _ in range(data.draw(st.integers(1, 15))):
        names = data.draw(_NAMES)
        ids = _pages(pool, names, rest=data.draw(st.integers(0, page_size - 1)))
        stream_id = data.draw(st.integers(1, 3))
        match data.draw(st.sampled_from(actions)):
            case "compute":
                if pool.compute(ids):
                    assert pool.peek(ids) == len(ids) // page_size * page_size
            case "tag":
                pool.tree.tag(stream_id, _q(ids))
            case "untag":
                pool.tree.untag(stream_id, _q(ids))
            case "evict":
                ranks = data.draw(st.permutations([1, 2, 3]))
                pool.tree.set_ranks({stream: rank for rank, stream in enumerate(ranks)})
                pool.evict(data.draw(st.integers(1, 3)) * page_size)
            case "import":
                first = data.draw(st.integers(0, len(names))) * page_size
                whole = _pages(pool, names)
                cached = pool.pool.import_kv(pool.incoming(whole, first_token=first))
                assert pool.peek(whole) == cached
            case "lend":
                first = data.draw(st.integers(0, len(names))) * page_size
                exported = pool.exports.lend(_q(ids), first)
                assert (exported is not None) == (pool.peek(ids) > first)
                if exported is not None:
                    assert exported.num_tokens == pool.peek(ids)
                    content = pool.incoming(ids[: exported.num_tokens], first).staging
                    lent.append((exported, content))
            case "hold":
                pool.hold(ids, data.draw(st.integers(0, 2)) * page_size)
            case _:
                if pool.held:
                    pool.let_go()
        pool.check()
        assert all(torch.equal(_content(exported), content) for exported, content in lent)
        gives_back = data.draw(st.booleans())
        if lent and gives_back:
            pool.exports.take_back(lent.pop(0)[0])
    for exported, _ in lent:
        pool.exports.take_back(exported)
    while pool.held:
        pool.let_go()
    pool.evict(pool.num_tokens)
    assert pool.allocator.available_size() == pool.num_tokens


def test_a_match_within_a_locked_node_splits_the_lock_too(pool: PoolUnderTest) -> None:
    """A tag set while a request runs on the node leaves the accounts right."""
    pool.compute(_pages(pool, "abcd"))
    pool.hold(_pages(pool, "abcd"), 0)
    pool.tree.tag(1, _q(_pages(pool, "ab")))
    assert pool.tree.protected_size() == 4 * pool.page_size
    pool.let_go()
    assert pool.tree.protected_size() == 0
    pool.check()


def test_the_backend_is_registered_once() -> None:
    """Under its name, and what SGLang builds by it is our tree."""
    radix.register_backend()
    radix.register_backend()
    assert get_radix_cache_factory(radix.BACKEND_NAME) is not None


def test_match_prefix_is_still_sglangs(pool: PoolUnderTest) -> None:
    """Requests find what our import put there."""
    ids = _pages(pool, "abc")
    pool.pool.import_kv(pool.incoming(ids))
    match = pool.tree.match_prefix(MatchPrefixParams(key=RadixKey(_q(_pages(pool, "abx")))))
    assert len(match.device_indices) == 2 * pool.page_size
    pool.check()


def test_what_several_ranks_lend_is_a_copy(pool: PoolUnderTest) -> None:
    """Since each hears by itself when it comes back, nothing of the pool may depend on that."""
    exports = KvExports(pool.pool, pool.tree, staging_limit_bytes=1 << 20, may_lock=False)
    ids = _pages(pool, "ab")
    pool.compute(ids)
    exported = exports.lend(_q(ids), 0)
    assert exported is not None
    assert len(exports) == 0
    before = _content(exported).clone()
    pool.evict(len(ids))
    assert pool.tree.peek(_q(ids)) == 0
    pool.compute(_pages(pool, "cd"))
    assert torch.equal(_content(exported), before)
    exports.take_back(exported)
    with pytest.raises(ValueError, match="not out of this pool"):
        exports.take_back(exported)
