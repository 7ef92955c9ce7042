"""What a radix tree says of its blocks is what is in it."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")

from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from streamfill.engine.tree_blocks import TreeBlocks
from streamfill.stream.prefix_blocks import BlockKey, block_keys
from tests.unit.engine.kv_pools import PoolUnderTest

_NAMES = st.text(alphabet="ab", min_size=1, max_size=6)


def _pages(names: str, page_size: int) -> list[int]:
    return [ord(name) * 100 + place for name in names for place in range(page_size)]


def _truth(pool: PoolUnderTest, block_tokens: int) -> set[BlockKey]:
    """Of every path through the tree, by its tokens alone."""
    return {key for _, ids in pool.paths() for key in block_keys(ids, block_tokens)}


@pytest.mark.parametrize("page_size", [1, 4])
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_changes_add_up_to_what_is_there(page_size: int, data: st.DataObject) -> None:
    """After any mixture of requests, tags, imports, evictions and flushes, with blocks of any size,
    looked at from any moment on: all blocks are the tree's, and whoever follows the changes has
    them too."""
    pool = PoolUnderTest(10, page_size)
    block_tokens = data.draw(st.integers(1, 9))
    followed: set[BlockKey] = set()
    for _ in range(data.draw(st.integers(1, 14))):
        ids = _pages(data.draw(_NAMES), page_size)
        match data.draw(st.sampled_from(["compute", "compute", "tag", "evict", "import", "flush"])):
            case "compute":
                pool.compute(ids)
            case "tag":
                pool.tree.tag(1, array("q", ids))
            case "evict":
                pool.evict(data.draw(st.integers(1, 3)) * page_size)
            case "import":
                pool.pool.import_kv(pool.incoming(ids))
            case _:
                pool.evict(pool.num_tokens)
                pool.tree.reset()
        blocks = pool.tree.blocks
        if blocks is None:
            if data.draw(st.booleans()):
                pool.tree.blocks = blocks = TreeBlocks(block_tokens, pool.tree.root_node)
                followed = set(blocks.all(pool.tree.root_node))
                assert followed == _truth(pool, block_tokens)
        elif data.draw(st.booleans()):
            changes = blocks.take()
            assert not changes.cleared or not changes.removed
            followed = set() if changes.cleared else followed
            assert not followed & set(changes.stored)
            assert followed >= set(changes.removed)
            followed = (followed - set(changes.removed)) | set(changes.stored)
            assert followed == _truth(pool, block_tokens)
            everything = blocks.all(pool.tree.root_node)
            assert len(everything) == len(followed)
            assert set(everything) == followed


def test_namespaces_are_told_apart() -> None:
    """The same tokens under another extra key are other blocks."""
    pool = PoolUnderTest(8, 1)
    pool.tree.blocks = TreeBlocks(2, pool.tree.root_node)
    ids = array("q", [1, 2, 3, 4])
    for namespace in (None, "tenant"):
        slots = pool.allocator.alloc(4)
        pool.tree.insert(InsertParams(key=RadixKey(ids, namespace), value=slots))
    stored = set(pool.tree.blocks.take().stored)
    assert stored == {*block_keys(ids, 2), *block_keys(ids, 2, "tenant")}
    assert len(stored) == 4


def test_nothing_is_recorded_unasked() -> None:
    """A server whose router does not want to know has no record."""
    pool = PoolUnderTest(8, 1)
    pool.compute([1, 2, 3])
    assert pool.tree.blocks is None
    assert not any(hasattr(node, "block_keys") for node, _ in pool.paths())
