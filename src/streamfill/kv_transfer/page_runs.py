"""Page tables of two KV pools, and the runs of pages that follow each other in both. No torch.

A slot is a token's place in a pool, a page ``page_size`` slots that follow each other. Page 0 is
padding and never used, as in SGLang's pools.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from typing import NamedTuple


class PageOrder(enum.Enum):
    """How the pages of a prompt lie in a pool."""

    ADJACENT = "adjacent"
    """One behind the other: a pool that is new."""
    SCATTERED = "scattered"
    """Anywhere: a pool after many requests came and went."""


class PageRun(NamedTuple):
    """Pages that follow each other both where they come from and where they go."""

    source: int
    """The first page in the source's pool."""
    destination: int
    """The first page in the destination's pool."""
    num_pages: int


def page_table(order: PageOrder, num_pages: int, *, pool_pages: int, seed: int) -> list[int]:
    """The pages of a prompt, in the order of its tokens.

    Args:
        order: how they lie; scattered pages are the first of a random permutation of the pool.
        num_pages: of the prompt.
        pool_pages: of the pool, page 0 included.
        seed: of the permutation.

    Raises:
        ValueError: the pool is too small.
    """
    if num_pages >= pool_pages:
        raise ValueError(f"{num_pages} pages do not fit into a pool of {pool_pages}, page 0 unused")
    if order is PageOrder.ADJACENT:
        return list(range(1, num_pages + 1))
    return random.Random(seed).sample(range(1, pool_pages), num_pages)


def slots_of(pages: Sequence[int], page_size: int) -> list[int]:
    """All slots of ``pages``, in their order."""
    return [page * page_size + offset for page in pages for offset in range(page_size)]


def pages_of(slots: Sequence[int], page_size: int) -> list[int]:
    """The pages of which ``slots`` are all slots; the inverse of `slots_of`.

    Raises:
        ValueError: they are not whole pages.
    """
    pages = [slot // page_size for slot in slots[::page_size]]
    if slots_of(pages, page_size) != list(slots):
        raise ValueError(f"{len(slots)} slots are not whole pages of {page_size} slots in order")
    return pages


def runs_in_both(source_pages: Sequence[int], destination_pages: Sequence[int]) -> list[PageRun]:
    """The fewest runs that carry each source page to the destination page of the same place.

    Raises:
        ValueError: the tables are not equally long.
    """
    if len(source_pages) != len(destination_pages):
        raise ValueError(f"{len(source_pages)} source and {len(destination_pages)} other pages")
    runs: list[PageRun] = []
    first = 0
    for end in range(1, len(source_pages) + 1):
        if (
            end == len(source_pages)
            or source_pages[end] != source_pages[end - 1] + 1
            or destination_pages[end] != destination_pages[end - 1] + 1
        ):
            runs.append(PageRun(source_pages[first], destination_pages[first], end - first))
            first = end
    return runs
