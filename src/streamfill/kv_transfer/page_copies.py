"""Copies of whole KV pages between two sets of layers, on the CPU.

A *side* is a list of tensors, one for the keys and one for the values of each layer, each ``[number
of pages, bytes of a page]`` uint8: a view of the paged buffers (``pages_of``), or host memory of
the same form. Pages move whole, so how tokens lie inside one does not matter.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Rows: TypeAlias = "npt.NDArray[np.void]"
"""Pages of one layer, [number of pages]."""
IntArray: TypeAlias = npt.NDArray[np.int64]

FEW_RUNS = 4
"""Pages per run of neighbours from which on one copy per run is faster than one per page; on one
core, rows of 12 kB, the two are equal at about three."""


def pages_of(buffers: Sequence[Tensor], page_size: int) -> list[Tensor]:
    """Paged buffers as a side, without a copy.

    Args:
        buffers: one tensor ``[number of slots, ...]`` per layer, contiguous. Slots behind the last
            whole page are left out.
        page_size: slots per page.

    Raises:
        ValueError: a buffer is not contiguous.
    """
    pages: list[Tensor] = []
    for buffer in buffers:
        if not buffer.is_contiguous():
            raise ValueError("a KV buffer is not contiguous, so its pages are not rows of bytes")
        num_pages = buffer.shape[0] // page_size
        rows = buffer[: num_pages * page_size].view(torch.uint8)
        pages.append(rows.reshape(num_pages, -1))
    return pages


def host_side(like: Sequence[Tensor], num_pages: int) -> list[Tensor]:
    """Host memory for so many pages of each layer of ``like``."""
    return [_huge_pages(num_pages, layer.shape[1]) for layer in like]


def runs_of(source: Sequence[int], target: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbouring pages that stay neighbours: (first of source, first of target, number)."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for index in range(1, len(source) + 1):
        if (
            index == len(source)
            or source[index] != source[index - 1] + 1
            or target[index] != target[index - 1] + 1
        ):
            runs.append((source[start], target[start], index - start))
            start = index
    return runs


def copy_on_host(
    source: Sequence[Tensor],
    source_pages: Sequence[int],
    target: Sequence[Tensor],
    target_pages: Sequence[int],
) -> None:
    """Copy pages between two sides in host memory. Page ``source_pages[i]`` of each layer becomes
    ``target_pages[i]``; the target's other pages are not touched."""
    if not source_pages:
        return
    runs = runs_of(source_pages, target_pages)
    views = [(rows_of(s), rows_of(t)) for s, t in zip(source, target, strict=True)]
    if len(runs) * FEW_RUNS <= len(source_pages):
        for old, new in views:
            for first, to, number in runs:
                new[to : to + number] = old[first : first + number]
        return
    picked, placed = np.asarray(source_pages), np.asarray(target_pages)
    from_one_block, to_one_block = _is_run(source_pages), _is_run(target_pages)
    for old, new in views:
        if to_one_block:
            take(old, picked, new[target_pages[0] : target_pages[0] + len(target_pages)])
        elif from_one_block:
            new[placed] = old[source_pages[0] : source_pages[0] + len(source_pages)]
        else:
            new[placed] = old[picked]


def rows_of(layer: Tensor) -> Rows:
    """A layer of a side as an array of whole pages, which numpy moves by one copy each."""
    rows: Rows = layer.numpy().view(np.dtype((np.void, layer.shape[1])))[:, 0]
    return rows


def take(rows: Rows, pages: IntArray, out: Rows) -> None:
    """``out[i] = rows[pages[i]]``. Pages have to be there: one beyond the end is the last one."""
    # Any other mode has numpy copy everything twice.
    np.take(rows, pages, out=out, mode="clip")


def _is_run(pages: Sequence[int]) -> bool:
    return all(page == pages[0] + index for index, page in enumerate(pages))


def _huge_pages(num_pages: int, page_bytes: int) -> Tensor:
    """Memory that the kernel gives in large pages where it can: the first touch of small ones costs
    more than the copy."""
    num_bytes = max(1, num_pages * page_bytes)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat[: num_pages * page_bytes].view(num_pages, page_bytes)
