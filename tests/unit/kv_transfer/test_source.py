"""KV read piece by piece out of the pages of a pool."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from streamfill.kv_transfer.interface import OutgoingTransfer
from streamfill.kv_transfer.page_runs import runs_in_both
from streamfill.kv_transfer.shared_buffers import SharedBuffers, map_layers
from streamfill.kv_transfer.source import PagedKv, StagedKv, page_numbers, paged_kv
from streamfill.kv_transfer.staging import staging_views
from tests.unit.kv_transfer.builders import LAYOUT, address_of, arrivals_of, bytes_of, outcomes_of
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender

NUM_PAGES = 24


def _pool(page_size: int, *, seed: int = 1) -> SharedBuffers:
    """A pool of random bytes."""
    pool = SharedBuffers(replace(LAYOUT, page_size=page_size), NUM_PAGES * page_size)
    generator = torch.Generator().manual_seed(seed)
    for buffer in (*pool.k_buffers, *pool.v_buffers):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return pool


def _slots(pages: list[int], page_size: int) -> torch.Tensor:
    return torch.tensor(
        [page * page_size + offset for page in pages for offset in range(page_size)],
        dtype=torch.int64,
    )


def _expected(pool: SharedBuffers, slots: torch.Tensor) -> torch.Tensor:
    """The staging form, put together the slow way."""
    staging = torch.empty(slots.numel() * pool.layout.bytes_per_token, dtype=torch.uint8)
    for buffers, views in zip(
        (pool.k_buffers, pool.v_buffers), staging_views(pool.layout, staging), strict=True
    ):
        for buffer, view in zip(buffers, views, strict=True):
            view.copy_(buffer.view(torch.int32)[slots])
    return staging


def _places(pool: SharedBuffers, slots: torch.Tensor) -> torch.Tensor:
    """The address of each byte of the staging form, int64 [number of bytes]."""
    places: list[int] = []
    for buffer in (*pool.k_buffers, *pool.v_buffers):
        size = buffer[0].numel() * buffer.itemsize
        for slot in slots.tolist():
            begin = buffer.data_ptr() + slot * size
            places += range(begin, begin + size)
    return torch.tensor(places)


_page_tables = st.one_of(
    st.lists(st.integers(0, NUM_PAGES - 1), unique=True, min_size=1, max_size=NUM_PAGES),
    st.integers(0, NUM_PAGES - 9).map(lambda first: [*range(first, first + 9), 2]),
    st.permutations(range(NUM_PAGES)).map(lambda pages: [*range(12), *pages]),
)
"""Scattered pages, runs of neighbours, and both."""


@settings(deadline=None, max_examples=80)
@given(data=st.data(), page_size=st.sampled_from([1, 16]), pages=_page_tables)
def test_any_piece_is_as_in_the_staging_form(
    data: st.DataObject, page_size: int, pages: list[int]
) -> None:
    """Also pieces that begin and end in the middle of a page, or of a number."""
    pool = _pool(page_size)
    slots = _slots(pages, page_size)
    kv = paged_kv(pool.layout, pool.k_buffers, pool.v_buffers, slots)
    expected = _expected(pool, slots)
    pool.close()
    assert kv.num_bytes == expected.numel()
    begin = data.draw(st.integers(0, kv.num_bytes - 1))
    end = data.draw(st.integers(begin + 1, kv.num_bytes))
    out = torch.empty(end - begin, dtype=torch.uint8)
    kv.read(begin, out)
    assert torch.equal(out, expected[begin:end])


@settings(deadline=None, max_examples=80)
@given(data=st.data(), page_size=st.sampled_from([1, 16]), pages=_page_tables)
def test_a_piece_is_the_memory_of_the_pool_itself(
    data: st.DataObject, page_size: int, pages: list[int]
) -> None:
    """Wherever all its bytes are neighbours there, and nowhere else."""
    pool = _pool(page_size)
    slots = _slots(pages, page_size)
    kv = paged_kv(pool.layout, pool.k_buffers, pool.v_buffers, slots)
    places = _places(pool, slots)
    pool.close()
    begin = data.draw(st.integers(0, kv.num_bytes - 1))
    end = data.draw(st.integers(begin + 1, min(kv.num_bytes, begin + 9 * page_size * 64)))
    piece = kv.piece(begin, end)
    is_one = bool((places[begin:end].diff() == 1).all())
    assert (piece is not None) is is_one
    if piece is not None:
        assert piece.data_ptr() == places[begin]
        assert torch.equal(piece, _expected(pool, slots)[begin:end])


@settings(deadline=None, max_examples=60)
@given(page_size=st.sampled_from([1, 16]), pages=_page_tables, long_pages=st.integers(1, 12))
def test_what_is_long_lies_between_two_cuts(
    page_size: int, pages: list[int], long_pages: int
) -> None:
    """Each run of at least so many pages is one piece; the rest is cut nowhere."""
    pool = _pool(page_size)
    slots = _slots(pages, page_size)
    kv = paged_kv(pool.layout, pool.k_buffers, pool.v_buffers, slots)
    pool.close()
    row_bytes = [layer.itemsize for layer in kv.layers]
    with mock.patch(f"{PagedKv.__module__}.LONG_RUN_BYTES", long_pages * min(row_bytes)):
        cuts = kv.cuts
    expected: set[int] = set()
    layer_begin = 0
    for size in row_bytes:
        for run in runs_in_both(pages, pages):
            begin, layer_begin = layer_begin, layer_begin + run.num_pages * size
            if run.num_pages >= long_pages:
                assert kv.piece(begin, layer_begin) is not None
                expected |= {begin, layer_begin}
    assert list(cuts) == sorted(expected - {0, kv.num_bytes})


def test_too_many_cuts_are_none() -> None:
    """An offer has to hold them all."""
    pool = _pool(1)
    slots = _slots([1, 2, 5, 6, 9, 10], 1)
    kv = paged_kv(pool.layout, pool.k_buffers, pool.v_buffers, slots)
    other = paged_kv(pool.layout, pool.k_buffers, pool.v_buffers, slots)
    pool.close()
    with (
        mock.patch(f"{PagedKv.__module__}.LONG_RUN_BYTES", 1),
        mock.patch(f"{PagedKv.__module__}.MAX_CUTS", 16),
    ):
        assert len(kv.cuts) == 11
        with mock.patch(f"{PagedKv.__module__}.MAX_CUTS", 15):
            assert other.cuts == ()


@settings(deadline=None, max_examples=20)
@given(page_size=st.sampled_from([1, 16]), pages=_page_tables)
def test_another_process_finds_the_same(page_size: int, pages: list[int]) -> None:
    """Given the file, the layout and the number of slots."""
    pool = _pool(page_size)
    file = os.dup(pool.file)
    pool.close()
    layers = map_layers(file, pool.layout, pool.num_slots)
    os.close(file)
    kv = PagedKv(layers, pages)
    out = torch.empty(kv.num_bytes, dtype=torch.uint8)
    kv.read(0, out)
    assert torch.equal(out, _expected(pool, _slots(pages, page_size)))


def test_other_files_are_not_mapped() -> None:
    """One that could be cut off, one of another size."""
    pool = _pool(1)
    with pytest.raises(OSError, match="are no KV buffers of"):
        map_layers(pool.file, pool.layout, pool.num_slots + 10_000)
    file = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, os.fstat(pool.file).st_size)
    with pytest.raises(OSError, match="cut off"):
        map_layers(file, pool.layout, pool.num_slots)
    os.close(file)
    pool.close()


def test_slots_that_are_no_pages_are_refused() -> None:
    """Such a transfer would carry other tokens."""
    with pytest.raises(ValueError, match="whole pages of 16"):
        page_numbers(torch.arange(8, 24), 16)
    with pytest.raises(ValueError, match="not whole pages of 16"):
        page_numbers(torch.arange(30), 16)
    with pytest.raises(IndexError, match="page 24"):
        paged_kv(LAYOUT, *_buffers_of(_pool(1)), torch.tensor([3, 24]))
    with pytest.raises(IndexError):
        paged_kv(LAYOUT, *_buffers_of(_pool(1)), torch.tensor([3, -1]))


def _buffers_of(pool: SharedBuffers) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    pool.close()
    return pool.k_buffers, pool.v_buffers


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("is_shared", [False, True])
def test_pages_arrive_whichever_way_they_take(
    make_receiver: MakeReceiver,
    make_sender: MakeSender,
    page_size: int,
    *,
    same_host: bool,
    is_shared: bool,
) -> None:
    """Through Gloo, the ring, or mapped memory; staged transfers between them take their own."""
    pool = _pool(page_size)
    receiver = make_receiver(layout=pool.layout)
    sender = make_sender(layout=pool.layout, chunk_bytes=1000, same_host=same_host)
    generator = torch.Generator().manual_seed(3)
    for number in range(12):
        pages = torch.randperm(NUM_PAGES, generator=generator)[: number + 1].tolist()
        slots = _slots(pages, page_size)
        kv = paged_kv(
            pool.layout,
            pool.k_buffers,
            pool.v_buffers,
            slots,
            buffers=pool if is_shared else None,
        )
        sent = OutgoingTransfer(
            transfer_id=number,
            stream_id=1,
            token_ids=range(slots.numel()),
            first_token=0,
            kv=StagedKv(_expected(pool, slots)) if number % 5 == 4 else kv,
        )
        sender.submit(address_of(receiver), sent)
        assert outcomes_of(sender)[number].ok
        incoming = arrivals_of(receiver)[number]
        assert torch.equal(incoming.staging, _expected(pool, slots))
        assert torch.equal(incoming.staging, bytes_of(sent))
        receiver.release(incoming)
    assert sender.stats().num_sessions == 1
    pool.close()
