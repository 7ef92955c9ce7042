"""The swap engine on the device at hand: what comes in is what went out, within the bound of host
memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_server.host_index import block_keys
from prefill_server.lanes import BLOCK_BYTES, staging_blocks
from prefill_server.swap import SwapEngine, host_blocks
from streamfill.kv_transfer.page_copies import copy_on_host, host_side, pages_of, runs_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_LAYERS, NUM_SLOTS, PAGE = 3, 17 * 16 + 16, 16
"""18 pages of one block: the last slots are those that SGLang adds for its padding."""


class _Pool:
    """A paged KV pool, its keys and values of different width."""

    def __init__(self, dtype: Any = torch.float32) -> None:
        self.k = [self._buffer(2, dtype) for _ in range(NUM_LAYERS)]
        self.v = [self._buffer(3, dtype) for _ in range(NUM_LAYERS)]

    @staticmethod
    def _buffer(dim: int, dtype: Any) -> Any:
        return torch.zeros(NUM_SLOTS, 1, dim, dtype=dtype, device=DEVICE)

    def fill(self, page: int, number: int) -> None:
        """Every element of the page tells ``number``, layer and side."""
        for side, buffers in enumerate((self.k, self.v)):
            for layer, buffer in enumerate(buffers):
                buffer[page * PAGE : (page + 1) * PAGE] = number + 30 * layer + 100 * side

    def number(self, page: int) -> int:
        """What ``fill`` wrote there; fails where it is torn."""
        rows = slice(page * PAGE, (page + 1) * PAGE)
        numbers = {
            float(value) - 30 * layer - 100 * side
            for side, buffers in enumerate((self.k, self.v))
            for layer, buffer in enumerate(buffers)
            for value in buffer[rows].flatten()
        }
        assert len(numbers) == 1, f"page {page} is torn: {numbers}"
        return int(numbers.pop())

    def engine(self, num_host_blocks: int) -> SwapEngine:
        return SwapEngine(self.k, self.v, page_size=PAGE, num_host_blocks=num_host_blocks)


def _keys(*names: int) -> list[bytes]:
    """Keys of a sequence of pages."""
    return block_keys(array("q", [name for name in names for _ in range(PAGE)]), PAGE)


def _t(pages: Sequence[int]) -> Any:
    return torch.tensor(pages, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("pages", [[1, 2, 3, 4], [9, 2, 12, 5]], ids=["neighbours", "scattered"])
def test_out_and_in_again(dtype: Any, pages: list[int]) -> None:
    pool = _Pool(dtype)
    engine = pool.engine(8)
    keys = _keys(1, 2, 3, 4)
    for number, page in enumerate(pages):
        pool.fill(page, number)
    assert engine.save(keys, _t(pages)) == 4
    for page in range(16):
        pool.fill(page, 20)
    back = [7, 15, 0, 6]
    engine.restore(keys, _t(back))
    assert [pool.number(page) for page in back] == [0, 1, 2, 3]
    assert all(pool.number(page) == 20 for page in range(16) if page not in back)


def test_the_second_time_is_free() -> None:
    pool = _Pool()
    engine = pool.engine(8)
    keys = _keys(1, 2)
    engine.save(keys, _t([3, 4]))
    engine.restore(keys, _t([5, 6]))
    engine.save(keys, _t([5, 6]))
    engine.wait()
    engine.poll()
    stats = engine.stats()
    assert (stats.num_saved, stats.num_saved_for_free, stats.num_restored) == (2, 2, 2)
    assert stats.saved_bytes == 2 * engine.block_bytes == 2 * PAGE * NUM_LAYERS * 5 * 4


def test_a_shared_beginning_is_kept_once() -> None:
    engine = _Pool().engine(8)
    engine.save(_keys(1, 2, 3), _t([3, 4, 5]))
    assert engine.save(_keys(1, 2, 9), _t([3, 4, 8])) == 3
    assert engine.stats().num_held == 4


@pytest.mark.parametrize(("num_host_blocks", "held"), [(0, 0), (2, 2), (100, 4)])
def test_host_memory_is_bounded(num_host_blocks: int, held: int) -> None:
    pool = _Pool()
    engine = pool.engine(num_host_blocks)
    keys = _keys(1, 2, 3, 4)
    for page in range(4):
        pool.fill(page, page)
    assert engine.save(keys, _t([0, 1, 2, 3])) == held
    assert engine.num_present(keys) == held
    engine.restore(keys[:held], _t(list(range(8, 8 + held))))
    assert [pool.number(page) for page in range(8, 8 + held)] == list(range(held))


def test_what_is_not_there_cannot_be_restored() -> None:
    pool = _Pool()
    engine = pool.engine(8)
    engine.save(_keys(1), _t([0]))
    with pytest.raises(KeyError):
        engine.restore(_keys(1, 2), _t([4, 5]))
    assert engine.stats().num_restored == 0


def test_restoring_needs_as_many_pages() -> None:
    engine = _Pool().engine(8)
    engine.save(_keys(1, 2), _t([0, 1]))
    with pytest.raises(ValueError, match="2 blocks are 2 pages, not 1"):
        engine.restore(_keys(1, 2), _t([4]))


def test_copies_are_reported_once() -> None:
    engine = _Pool().engine(8)
    engine.save(_keys(1, 2), _t([0, 1]))
    engine.restore(_keys(1), _t([4]))
    engine.wait()
    out, back = engine.poll()
    assert (out.out, out.num_bytes) == (True, 2 * engine.block_bytes)
    assert (back.out, back.num_bytes) == (False, engine.block_bytes)
    assert out.seconds > 0
    assert engine.poll() == []


def test_clear_forgets() -> None:
    engine = _Pool().engine(8)
    engine.save(_keys(1, 2), _t([0, 1]))
    engine.clear()
    assert engine.num_present(_keys(1, 2)) == 0


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_copies_under_way_do_not_mix(data: st.DataObject) -> None:
    """Saves, restores and new content follow each other without a wait in between, as a server has
    them; more is saved than host memory holds, so that its blocks change hands while in use."""
    pool = _Pool()
    engine = pool.engine(6)
    content: dict[int, int] = {}
    """What each page of the device pool holds."""
    saved: set[int] = set()
    for number in range(1, 1 + data.draw(st.integers(1, 25))):
        pages = data.draw(st.lists(st.integers(0, 15), min_size=1, max_size=4, unique=True))
        if data.draw(st.booleans()) or not saved:
            for page in pages:
                pool.fill(page, number)
                content[page] = number
            engine.save(_keys(*[number] * len(pages)), _t(pages))
            saved.add(number)
        else:
            old = data.draw(st.sampled_from(sorted(saved)))
            keys = _keys(*[old] * len(pages))
            number_here = engine.num_present(keys)
            engine.restore(keys[:number_here], _t(pages[:number_here]))
            content.update(dict.fromkeys(pages[:number_here], old))
    assert {page: pool.number(page) for page in content} == content


def test_a_buffer_in_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        pages_of([torch.zeros(8, 4, 2).transpose(1, 2)], 2)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=10))
def test_runs_cover_every_pair_once(pairs: list[tuple[int, int]]) -> None:
    source, target = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    covered = [
        (first + offset, to + offset)
        for first, to, number in runs_of(source, target)
        for offset in range(number)
    ]
    assert covered == pairs


@settings(deadline=None)
@given(
    st.permutations(range(12)),
    st.permutations(range(12)),
    st.integers(0, 12),
    st.sampled_from([8, 6]),
)
def test_copies_touch_nothing_else(
    source_order: Sequence[int], target_order: Sequence[int], number: int, page_bytes: int
) -> None:
    like = [torch.zeros(1, page_bytes, dtype=torch.uint8)]
    source, target = host_side(like, 12), host_side(like, 12)
    for page in range(12):
        source[0][page] = page
        target[0][page] = 100 + page
    from_pages, to_pages = list(source_order[:number]), list(target_order[:number])
    copy_on_host(source, from_pages, target, to_pages)
    expected = {page: 100 + page for page in range(12)}
    expected.update(zip(to_pages, from_pages, strict=True))
    assert [int(row[0]) for row in target[0]] == [expected[page] for page in range(12)]
    assert all(len(set(row.tolist())) == 1 for row in target[0])


def test_small_pages_move_in_blocks() -> None:
    """Four pages a block; the first block's beginning may be there already."""
    buffers = [torch.arange(64.0, device=DEVICE).view(64, 1, 1)]
    engine = SwapEngine(buffers, [buffers[0].clone()], page_size=4, num_host_blocks=2)
    keys = engine.keys(array("q", range(40)))
    assert (engine.block_tokens, len(keys)) == (16, 2)
    engine.save(keys, _t([8, 9, 10, 11, 0, 1, 2, 3]))
    before = buffers[0].clone()
    engine.restore(keys, _t([4, 5, 6, 7, 12]), skip_pages=3)
    after = buffers[0].view(16, 4)
    expected = before.view(16, 4).clone()
    for target, source in zip([4, 5, 6, 7, 12], [11, 0, 1, 2, 3], strict=True):
        expected[target] = before.view(16, 4)[source]
    assert torch.equal(after, expected)


@pytest.mark.parametrize(
    ("configured", "memory_bytes", "blocks"),
    [
        (None, 10**12, 2 * 1000 // 16),
        (None, 1600 * 100, 0.15 * 1600 * 100 // 1600),
        (None, 0, 0),
        (0, 10**12, 0),
        (15, 10**12, 0),
        (640, 0, 40),
    ],
)
def test_size_of_the_host_pool(configured: int | None, memory_bytes: int, blocks: float) -> None:
    """As configured, else by the pool and the machine."""
    found = host_blocks(
        configured,
        num_device_tokens=1000,
        page_size=1,
        bytes_per_token=100,
        memory_bytes=memory_bytes,
    )
    assert found == int(blocks)


@pytest.mark.parametrize(
    ("pool_bytes", "page_bytes", "blocks"),
    [
        (1 << 20, 4096, 4),
        (4 << 30, 1 << 21, 8),
        (4 << 30, 1 << 26, 4),
        (60 << 30, 1 << 21, 16),
        (500 << 30, 1 << 21, 16),
    ],
)
def test_staging_on_a_gpu(pool_bytes: int, page_bytes: int, blocks: int) -> None:
    """Enough for both directions to go on at once, and little beside the pool."""
    assert staging_blocks(pool_bytes, page_bytes) == blocks
    assert blocks * BLOCK_BYTES <= max(4 * BLOCK_BYTES, pool_bytes // 16)
