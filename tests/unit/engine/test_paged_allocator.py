"""The CPU's page allocator: random sequences that grow, decode and end on one pool."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sglang")

from streamfill.engine.paged_allocator import CpuPagedAllocator

_PAGE_SIZES = st.sampled_from([1, 2, 3, 7, 16, 64])


def _allocator(num_pages: int, page_size: int, *, need_sort: bool = False) -> CpuPagedAllocator:
    return CpuPagedAllocator(
        num_pages * page_size,
        page_size=page_size,
        dtype=torch.float32,
        device="cpu",
        kvcache=None,
        need_sort=need_sort,
    )


@dataclass
class _Pool:
    """An allocator and what a scheduler would know of the slots that it gave out."""

    allocator: CpuPagedAllocator
    sequences: list[list[int]] = field(default_factory=list)

    def extend(self, lengths: list[tuple[int, int]]) -> bool:
        """Grows each sequence `(index, num_tokens)` in one call, as a prefill batch does."""
        prefixes = torch.tensor([len(self.sequences[index]) for index, _ in lengths])
        ends = prefixes + torch.tensor([num for _, num in lengths])
        last = [self.sequences[index][-1] if self.sequences[index] else -1 for index, _ in lengths]
        slots = self.allocator.alloc_extend(
            prefixes,
            prefixes,
            ends,
            ends,
            torch.tensor(last, dtype=torch.int32),  # what req_to_token holds
            int((ends - prefixes).sum()),
        )
        if slots is None:
            return False
        assert slots.dtype == torch.int64
        given_out = iter(slots.tolist())
        for index, num in lengths:
            self.sequences[index].extend(next(given_out) for _ in range(num))
        assert next(given_out, None) is None
        return True

    def decode(self, indices: list[int]) -> bool:
        """One more token for each sequence of `indices`."""
        ends = torch.tensor([len(self.sequences[index]) + 1 for index in indices])
        last = torch.tensor([self.sequences[index][-1] for index in indices], dtype=torch.int32)
        slots = self.allocator.alloc_decode(ends, ends, last)
        if slots is None:
            return False
        assert slots.dtype == torch.int64
        for index, slot in zip(indices, slots.tolist(), strict=True):
            self.sequences[index].append(slot)
        return True

    def end(self, index: int) -> None:
        self.allocator.free(torch.tensor(self.sequences.pop(index), dtype=torch.int64))

    def check(self, num_pages: int, page_size: int) -> None:
        """Every page has one owner; a sequence's tokens lie in its pages in order."""
        owned: list[int] = []
        for sequence in self.sequences:
            for token, slot in enumerate(sequence):
                assert slot % page_size == token % page_size
                if token % page_size:
                    assert slot == sequence[token - 1] + 1
                else:
                    owned.append(slot // page_size)
        free = self.allocator.free_pages.tolist() + self.allocator.release_pages.tolist()
        assert sorted(owned + free) == list(range(1, num_pages + 1))
        assert self.allocator.available_size() == len(free) * page_size


@given(data=st.data(), page_size=_PAGE_SIZES, need_sort=st.booleans())
def test_every_page_always_has_exactly_one_owner(
    data: st.DataObject, page_size: int, need_sort: bool
) -> None:
    """Over any mixture of extends, decodes and ends no page is lost or given out twice."""
    num_pages = data.draw(st.integers(1, 12))
    pool = _Pool(_allocator(num_pages, page_size, need_sort=need_sort))
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["new", "extend", "decode", "end"]))
        indices = list(range(len(pool.sequences)))
        if action == "new":
            pool.sequences.append([])
            wanted = [(len(indices), data.draw(st.integers(0, 3 * page_size)))]
            if not pool.extend(wanted):
                pool.sequences.pop()
        elif action == "extend" and indices:
            chosen = data.draw(st.lists(st.sampled_from(indices), unique=True, min_size=1))
            pool.extend([(i, data.draw(st.integers(0, 2 * page_size + 1))) for i in chosen])
        elif action == "decode":
            started = [i for i in indices if pool.sequences[i]]
            if started:
                pool.decode(data.draw(st.lists(st.sampled_from(started), unique=True, min_size=1)))
        elif action == "end" and indices:
            pool.end(data.draw(st.sampled_from(indices)))
        pool.check(num_pages, page_size)
    while pool.sequences:
        pool.end(0)
    assert pool.allocator.available_size() == num_pages * page_size


@given(page_size=_PAGE_SIZES, num_pages=st.integers(1, 6), data=st.data())
def test_an_exhausted_pool_refuses_and_loses_nothing(
    page_size: int, num_pages: int, data: st.DataObject
) -> None:
    """One page too many is answered with None, and the same pages can be had afterwards."""
    pool = _Pool(_allocator(num_pages, page_size), [[]])
    too_many = num_pages * page_size + data.draw(st.integers(1, 2 * page_size))
    assert not pool.extend([(0, too_many)])
    assert pool.allocator.available_size() == num_pages * page_size
    assert pool.extend([(0, num_pages * page_size)])
    assert not pool.decode([0])
    pool.check(num_pages, page_size)


def test_lengths_that_contradict_the_count_are_refused() -> None:
    """A caller whose lengths do not add up is told so before a page moves."""
    allocator = _allocator(4, 16)
    lens = torch.tensor([0])
    with pytest.raises(ValueError, match="ask for 5 slots, not 6"):
        allocator.alloc_extend(
            lens, lens, torch.tensor([5]), torch.tensor([5]), torch.tensor([-1]), 6
        )
    assert allocator.available_size() == 64


def test_whole_pages_of_the_base_class_fit_in() -> None:
    """`alloc`, which hand-offs and page size 1 use, takes from the same pages."""
    pool = _Pool(_allocator(4, 4), [[]])
    assert pool.extend([(0, 6)])
    slots = pool.allocator.alloc(8)
    assert slots is not None
    pool.sequences.append(slots.tolist())
    pool.check(4, 4)
