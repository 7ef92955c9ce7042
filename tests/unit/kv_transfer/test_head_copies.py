"""Some heads of KV, read and written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from streamfill.kv_transfer.head_copies import layout_of_heads, scatter_heads, slice_heads
from streamfill.kv_transfer.interface import OutgoingTransfer
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.shared_buffers import SharedBuffers
from streamfill.kv_transfer.slices import HeadRange
from streamfill.kv_transfer.source import StagedKv, paged_kv
from streamfill.kv_transfer.staging import gather, staging_views
from tests.unit.kv_transfer.builders import LAYOUT, bytes_of

NUM_PAGES = 12


def _pool(layout: KvLayout, seed: int) -> SharedBuffers:
    pool = SharedBuffers(layout, NUM_PAGES * layout.page_size)
    generator = torch.Generator().manual_seed(seed)
    for buffer in (*pool.k_buffers, *pool.v_buffers):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    pool.close()
    return pool


def _part(pool: SharedBuffers, slots: torch.Tensor, heads: HeadRange) -> torch.Tensor:
    """Put together the slow way."""
    small = layout_of_heads(pool.layout, heads.num)
    part = torch.empty(slots.numel() * small.bytes_per_token, dtype=torch.uint8)
    for buffers, views in zip(
        (pool.k_buffers, pool.v_buffers), staging_views(small, part), strict=True
    ):
        for buffer, view in zip(buffers, views, strict=True):
            for place, slot in enumerate(slots.tolist()):
                for head in range(heads.num):
                    view[place, head] = buffer.view(torch.int32)[slot, heads.first + head]
    return part


@st.composite
def _cases(draw: st.DrawFn) -> tuple[KvLayout, torch.Tensor, HeadRange]:
    """A layout, the slots of some pages in any order, and some of its heads."""
    page_size = draw(st.sampled_from([1, 16]))
    num_heads = draw(st.integers(1, 6))
    first = draw(st.integers(0, num_heads - 1))
    heads = HeadRange(first, draw(st.integers(1, num_heads - first)))
    pages = draw(
        st.one_of(
            st.lists(st.integers(0, NUM_PAGES - 1), unique=True, min_size=1),
            st.integers(1, NUM_PAGES - 1).map(lambda number: list(range(1, number + 1))),
        )
    )
    slots = [page * page_size + offset for page in pages for offset in range(page_size)]
    layout = replace(LAYOUT, num_kv_heads=num_heads, page_size=page_size)
    return layout, torch.tensor(slots, dtype=torch.int64), heads


@settings(deadline=None, max_examples=60)
@given(_cases(), st.data())
def test_a_part_is_the_bytes_of_its_heads(
    case: tuple[KvLayout, torch.Tensor, HeadRange], data: st.DataObject
) -> None:
    """Out of pages, piece by piece, and out of staging."""
    layout, slots, heads = case
    pool = _pool(layout, seed=1)
    expected = _part(pool, slots, heads)
    paged = paged_kv(layout, pool.k_buffers, pool.v_buffers, slots, buffers=pool)
    staged = StagedKv(gather(layout, pool.k_buffers, pool.v_buffers, slots))
    for kv in (paged, staged):
        part = slice_heads(layout, kv, heads)
        assert part.num_bytes == expected.numel()
        begin = data.draw(st.integers(0, part.num_bytes - 1))
        end = data.draw(st.integers(begin + 1, part.num_bytes))
        out = torch.empty(end - begin, dtype=torch.uint8)
        part.read(begin, out)
        assert torch.equal(out, expected[begin:end])
        assert (part is kv) == (heads.num == layout.num_kv_heads)


@settings(deadline=None, max_examples=60)
@given(_cases(), st.data())
def test_a_part_lands_at_its_heads_only(
    case: tuple[KvLayout, torch.Tensor, HeadRange], data: st.DataObject
) -> None:
    """In the given slots; all other heads and slots keep theirs, and tokens can be left out."""
    layout, slots, heads = case
    source, target = _pool(layout, seed=1), _pool(layout, seed=2)
    size = layout.page_size
    skip = data.draw(st.integers(0, len(slots) // size)) * size
    order = data.draw(st.permutations(range(NUM_PAGES)))[: (len(slots) - skip) // size]
    to_slots = torch.tensor(
        [page * size + offset for page in order for offset in range(size)], dtype=torch.int64
    )
    expected = [buffer.clone() for buffer in (*target.k_buffers, *target.v_buffers)]
    for theirs, ours in zip((*source.k_buffers, *source.v_buffers), expected, strict=True):
        for old, new in zip(slots.tolist()[skip:], to_slots.tolist(), strict=True):
            ours[new, heads.first : heads.end] = theirs[old, heads.first : heads.end]
    part = _part(source, slots, heads)
    scatter_heads(
        layout, part, target.k_buffers, target.v_buffers, to_slots, heads=heads, skip_tokens=skip
    )
    found = (*target.k_buffers, *target.v_buffers)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_slots_that_do_not_fit_are_refused() -> None:
    """Nothing is written outside, and nothing is left out unasked."""
    pool = _pool(LAYOUT, seed=1)
    part = torch.zeros(2 * LAYOUT.bytes_per_token // 2, dtype=torch.uint8)
    for slots in ([1, NUM_PAGES], [-1, 1]):
        with pytest.raises(IndexError, match="outside a pool of 12"):
            scatter_heads(
                LAYOUT,
                part,
                pool.k_buffers,
                pool.v_buffers,
                torch.tensor(slots),
                heads=HeadRange(1, 1),
            )
    with pytest.raises(ValueError, match="1 slots for 2 staged tokens"):
        scatter_heads(
            LAYOUT, part, pool.k_buffers, pool.v_buffers, torch.tensor([1]), heads=HeadRange(1, 1)
        )


def test_other_sources_can_be_sliced_too() -> None:
    """Whatever can be read; and nothing at all."""

    class Other:
        num_bytes = 3 * LAYOUT.bytes_per_token
        cuts = ()

        def piece(self, begin: int, end: int) -> None:
            del begin, end

        def read(self, begin: int, out: torch.Tensor) -> None:
            out.copy_(torch.arange(begin, begin + out.numel()).to(torch.uint8))

    content = torch.empty(Other.num_bytes, dtype=torch.uint8)
    Other().read(0, content)
    sliced = [slice_heads(LAYOUT, kv, HeadRange(1, 1)) for kv in (Other(), StagedKv(content))]
    left, right = (
        bytes_of(OutgoingTransfer(transfer_id=1, stream_id=1, token_ids=(), first_token=0, kv=kv))
        for kv in sliced
    )
    assert torch.equal(left, right)
    nothing = StagedKv(content[:0])
    assert slice_heads(LAYOUT, nothing, HeadRange(1, 1)) is nothing
