"""Where the KV of a transfer comes from: staging memory, or the pages of a pool.

Either is read as the bytes of a staging tensor (see ``staging``), piece by piece, so that gathering
pages goes on while the pieces before are under way, and no second copy of the whole is needed. What
lies in a long run of neighbouring pages is a piece as it is, and need not be gathered at all.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.page_copies import FEW_RUNS, IntArray, Rows, pages_of, rows_of, take
from streamfill.kv_transfer.shared_buffers import SharedBuffers

LONG_RUN_BYTES = 1 << 19
"""Of one layer's neighbouring pages, from which on sending them by themselves costs less than to
gather them into a longer piece."""

MAX_CUTS = 4096
"""Of one transfer. With more of them it is not cut at all."""


class KvSource(Protocol):
    """KV to be sent. Whoever submits it keeps it as it is until the outcome of its transfer."""

    @property
    def num_bytes(self) -> int:
        """Of the KV, all layers."""
        ...

    @property
    def cuts(self) -> Sequence[int]:
        """Offsets at which it is best cut: what is long and lies in one piece begins and ends at
        one. Ascending, at most `MAX_CUTS`, neither 0 nor the end."""
        ...

    def piece(self, begin: int, end: int) -> Tensor | None:
        """Bytes ``[begin, end)`` without a copy. None: they do not lie in one piece."""
        ...

    def read(self, begin: int, out: Tensor) -> None:
        """Copy bytes ``[begin, begin + out.numel())`` into ``out``, uint8."""
        ...


class StagedKv:
    """KV in one staging tensor, as `staging.gather` makes it."""

    def __init__(self, staging: Tensor) -> None:
        """
        Args:
            staging: uint8 [number of bytes], on any device.

        Raises:
            ValueError: it is not uint8.
        """
        if staging.dtype != torch.uint8:
            raise ValueError(f"staging is {staging.dtype}, not torch.uint8")
        self.staging = staging

    @property
    def num_bytes(self) -> int:
        """See `KvSource`."""
        return self.staging.numel()

    @property
    def cuts(self) -> Sequence[int]:
        """See `KvSource`."""
        return ()

    def piece(self, begin: int, end: int) -> Tensor:
        """See `KvSource`."""
        return self.staging[begin:end]

    def read(self, begin: int, out: Tensor) -> None:
        """See `KvSource`."""
        out.copy_(self.staging[begin : begin + out.numel()])


class PagedKv:
    """KV in pages of a pool in host memory, which nobody may write to meanwhile."""

    def __init__(
        self,
        layers: Sequence[Rows],
        pages: Sequence[int] | IntArray,
        *,
        buffers: SharedBuffers | None = None,
    ) -> None:
        """
        Args:
            layers: the pool's keys, then its values; an array of pages per layer.
            pages: in order of the tokens.
            buffers: the pool's memory, where other processes can map it.

        Raises:
            IndexError: a page is outside the pool.
        """
        self.pages: IntArray = np.asarray(pages, dtype=np.int64)
        self.buffers = buffers
        self.layers = layers
        num_pages = len(self.pages)
        if num_pages and not 0 <= self.pages.min() <= self.pages.max() < min(map(len, layers)):
            raise IndexError(f"page {self.pages.max()} is outside a pool of {len(layers[0])}")
        breaks = np.flatnonzero(np.diff(self.pages) != 1) + 1
        self._has_few_runs = (len(breaks) + 1) * FEW_RUNS <= num_pages
        self._run_ends: IntArray = np.append(breaks, num_pages)
        ends = np.cumsum([layer.itemsize * num_pages for layer in layers])
        self._ends: list[int] = ends.tolist()

    @property
    def num_bytes(self) -> int:
        """See `KvSource`."""
        return self._ends[-1]

    @functools.cached_property
    def cuts(self) -> Sequence[int]:
        """See `KvSource`."""
        num_pages = len(self.pages)
        starts = np.append(0, self._run_ends[:-1])
        row_bytes = min(layer.itemsize for layer in self.layers)
        is_long = (self._run_ends - starts) * row_bytes >= LONG_RUN_BYTES
        marks = np.union1d(starts[is_long], self._run_ends[is_long])
        if len(marks) * len(self.layers) > MAX_CUTS:
            return ()
        cuts = {
            end - (num_pages - mark) * layer.itemsize
            for layer, end in zip(self.layers, self._ends, strict=True)
            for mark in marks.tolist()
        }
        return sorted(cuts - {0, self.num_bytes})

    def piece(self, begin: int, end: int) -> Tensor | None:
        """See `KvSource`."""
        number = bisect_right(self._ends, begin)
        rows, layer_end = self.layers[number], self._ends[number]
        if end > layer_end:
            return None
        from_begin = begin - layer_end + len(self.pages) * rows.itemsize
        first, skip = divmod(from_begin, rows.itemsize)
        behind = first - (begin - end - skip) // rows.itemsize
        if behind > self._run_ends[np.searchsorted(self._run_ends, first, side="right")]:
            return None
        page = self.pages[first]
        run = rows[page : page + behind - first].view(np.uint8)
        return torch.from_numpy(run[skip : skip + end - begin])

    def read(self, begin: int, out: Tensor) -> None:
        """See `KvSource`."""
        self.read_into(begin, out.numpy())

    def read_into(self, begin: int, out: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        """As `read`, for numpy."""
        done = 0
        layer_begin = 0
        for rows, layer_end in zip(self.layers, self._ends, strict=True):
            at = begin + done
            if at < layer_end and done < len(out):
                size = min(len(out) - done, layer_end - at)
                self._read_layer(rows, at - layer_begin, out[done : done + size])
                done += size
            layer_begin = layer_end

    def _read_layer(
        self, rows: Rows, begin: int, out: np.ndarray[tuple[int], np.dtype[np.uint8]]
    ) -> None:
        """Bytes from ``begin`` on of one layer's pages. Pages that are cut go byte by byte."""
        page_bytes = rows.itemsize
        first, skip = divmod(begin, page_bytes)
        done = 0
        if skip:
            done = min(page_bytes - skip, len(out))
            page = rows[self.pages[first] : self.pages[first] + 1].view(np.uint8)
            out[:done] = page[skip : skip + done]
            first += 1
        num_whole = (len(out) - done) // page_bytes
        if num_whole:
            size = num_whole * page_bytes
            self._read_pages(rows, first, out[done : done + size].view(rows.dtype))
            done += size
        if done < len(out):
            last = self.pages[first + num_whole]
            out[done:] = rows[last : last + 1].view(np.uint8)[: len(out) - done]

    def _read_pages(self, rows: Rows, first: int, out: Rows) -> None:
        if not self._has_few_runs:
            take(rows, self.pages[first : first + len(out)], out)
            return
        done = 0
        run = int(np.searchsorted(self._run_ends, first, side="right"))
        while done < len(out):
            size = min(int(self._run_ends[run]) - first - done, len(out) - done)
            page = self.pages[first + done]
            out[done : done + size] = rows[page : page + size]
            done += size
            run += 1


def paged_kv(
    layout: KvLayout,
    k_buffers: Sequence[Tensor],
    v_buffers: Sequence[Tensor],
    slots: Tensor,
    *,
    buffers: SharedBuffers | None = None,
) -> PagedKv:
    """KV of some tokens of a pool, without a copy.

    Args:
        layout: of the buffers.
        k_buffers: ``num_layers`` tensors [num_slots, num_kv_heads, head_dim], on the CPU.
        v_buffers: ``num_layers`` tensors [num_slots, num_kv_heads, v_head_dim], on the CPU.
        slots: int64 [num_tokens], whole pages.
        buffers: the memory of both, where other processes can map it.

    Raises:
        IndexError: a slot is outside the buffers.
        ValueError: the slots are not whole pages.
    """
    pages = page_numbers(slots, layout.page_size)
    layers = [rows_of(layer) for layer in pages_of([*k_buffers, *v_buffers], layout.page_size)]
    return PagedKv(layers, pages, buffers=buffers)


def page_numbers(slots: Tensor, page_size: int) -> IntArray:
    """Numbers of the pages that slots, int64 [num_tokens], are the whole of.

    Raises:
        ValueError: they are not whole pages.
    """
    numbers: IntArray = slots.numpy()
    if page_size == 1:
        return numbers
    if len(numbers) % page_size:
        raise ValueError(f"{len(numbers)} slots are not whole pages of {page_size}")
    by_page = numbers.reshape(-1, page_size)
    first = by_page[:, 0]
    if (first % page_size).any() or (by_page != first[:, None] + np.arange(page_size)).any():
        raise ValueError(f"the slots are not whole pages of {page_size}")
    return first // page_size
