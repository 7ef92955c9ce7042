"""Page tables, and the runs of pages that follow each other in two pools."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.kv_transfer.page_runs import (
    PageOrder,
    PageRun,
    page_table,
    pages_of,
    runs_in_both,
    slots_of,
)

_TABLES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30
)  # small numbers, so that neighbours are frequent


@given(pairs=_TABLES)
def test_runs_carry_each_page_to_its_place(pairs: list[tuple[int, int]]) -> None:
    """Unrolled, the runs are the two tables, pair by pair and in order."""
    runs = runs_in_both([source for source, _ in pairs], [target for _, target in pairs])
    unrolled = [
        (run.source + page, run.destination + page) for run in runs for page in range(run.num_pages)
    ]
    assert unrolled == pairs


@given(pairs=_TABLES)
def test_runs_are_as_few_as_can_be(pairs: list[tuple[int, int]]) -> None:
    """No run goes on where the one before it ends on both sides."""
    runs = runs_in_both([source for source, _ in pairs], [target for _, target in pairs])
    for first, second in pairwise(runs):
        follows = (
            second.source == first.source + first.num_pages,
            second.destination == first.destination + first.num_pages,
        )
        assert follows != (True, True)


def test_a_run_ends_where_either_side_jumps() -> None:
    """Pages that follow each other on one side only are runs of their own."""
    assert runs_in_both([1, 2, 3, 7], [4, 5, 9, 10]) == [
        PageRun(1, 4, 2),
        PageRun(3, 9, 1),
        PageRun(7, 10, 1),
    ]
    assert runs_in_both([3, 2], [2, 3]) == [PageRun(3, 2, 1), PageRun(2, 3, 1)]


def test_tables_of_different_length_are_refused() -> None:
    """Both lengths are named."""
    with pytest.raises(ValueError, match="3 source and 2 other"):
        runs_in_both([1, 2, 3], [1, 2])


def test_adjacent_pages_are_one_run() -> None:
    """A new pool gives the pages behind the padding page in order."""
    table = page_table(PageOrder.ADJACENT, 5, pool_pages=6, seed=1)
    assert table == [1, 2, 3, 4, 5]
    assert runs_in_both(table, table) == [PageRun(1, 1, 5)]


def test_scattered_pages_are_nearly_all_alone() -> None:
    """They are different pages of the pool, page 0 is not among them, and hardly any follows its
    neighbour on both sides; the same seed gives the same table."""
    source, other = (page_table(PageOrder.SCATTERED, 99, pool_pages=100, seed=s) for s in (1, 2))
    assert sorted(source) == sorted(other) == list(range(1, 100))
    assert source == page_table(PageOrder.SCATTERED, 99, pool_pages=100, seed=1)
    assert len(runs_in_both(source, other)) > 95


@pytest.mark.parametrize("order", PageOrder)
def test_pool_too_small_is_refused(order: PageOrder) -> None:
    """Page 0 cannot be used, so that a pool of four pages holds three."""
    assert len(page_table(order, 3, pool_pages=4, seed=1)) == 3
    with pytest.raises(ValueError, match="4 pages do not fit into a pool of 4"):
        page_table(order, 4, pool_pages=4, seed=1)


@given(pages=st.lists(st.integers(0, 50)), page_size=st.sampled_from([1, 2, 16]))
def test_slots_and_pages_are_the_same_thing(pages: list[int], page_size: int) -> None:
    """Pages become slots and the slots become the same pages."""
    slots = slots_of(pages, page_size)
    assert len(slots) == len(pages) * page_size
    assert pages_of(slots, page_size) == pages


@pytest.mark.parametrize("slots", [[1, 2], [2, 3, 4], [3, 2], [2, 3, 4, 6]])
def test_slots_that_are_no_pages_are_refused(slots: list[int]) -> None:
    """A page that begins in the middle, is not whole, or is out of order."""
    with pytest.raises(ValueError, match="not whole pages of 2"):
        pages_of(slots, 2)
