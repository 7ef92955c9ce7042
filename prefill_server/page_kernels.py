"""Pages of all layers to and from one block of GPU memory, in one kernel launch.

A block is ``[number of pages, bytes of a page]``: what all layers hold of a page lies together, so
that a run of pages crosses the bus in one copy. One launch per layer instead would cost more time
on the host than the copy takes: seen on an H200, half of the bus for 64 tensors
(docs/benchmarks/swap.md). Triton comes with torch where there is a GPU; without it the layers are
copied one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover  a build of torch without it
    triton = None

_WORD_BYTES = 8
_BLOCK_WORDS = 256


class PageBlocks:
    """Between the pages of a side (see ``page_copies``) on a GPU and blocks."""

    def __init__(self, layers: Sequence[Tensor]) -> None:
        """
        Args:
            layers: ``[number of pages, bytes of a page]`` uint8 each, contiguous; not moved later.
        """
        self._layers = list(layers)
        self._ends = list(accumulate((layer.shape[1] for layer in layers), initial=0))
        self.page_bytes = self._ends[-1]
        self.by_kernel = triton is not None and all(
            layer.data_ptr() % _WORD_BYTES == 0 and layer.shape[1] % _WORD_BYTES == 0
            for layer in layers
        )
        device = layers[0].device
        addresses = [layer.data_ptr() for layer in layers]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        words = [end // _WORD_BYTES for end in self._ends]
        self._first_words = torch.tensor(words, dtype=torch.int64, device=device)

    def gather(self, pages: Tensor, block: Tensor) -> None:
        """Copy ``pages``, int64 ``[n]``, into ``block``, uint8 ``[n * page_bytes]``."""
        if self.by_kernel:
            self._launch(pages, block, is_gather=True)
            return
        for layer, part in self._parts(block):
            part.copy_(layer.index_select(0, pages))

    def scatter(self, block: Tensor, pages: Tensor) -> None:
        """The way back of ``gather``; ``pages`` without repetitions."""
        if self.by_kernel:
            self._launch(pages, block, is_gather=False)
            return
        for layer, part in self._parts(block):
            layer.index_copy_(0, pages, part)

    def _parts(self, block: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = block.view(-1, self.page_bytes)
        return [
            (layer, rows[:, self._ends[number] : self._ends[number + 1]])
            for number, layer in enumerate(self._layers)
        ]

    def _launch(self, pages: Tensor, block: Tensor, *, is_gather: bool) -> None:
        grid = (pages.numel(), len(self._layers))
        if not pages.numel():
            return
        _copy_pages[grid](
            self._addresses,
            self._first_words,
            pages,
            block.view(torch.int64),
            self.page_bytes // _WORD_BYTES,
            IS_GATHER=is_gather,
            BLOCK_WORDS=_BLOCK_WORDS,
        )


def _kernel(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_kernel
def _copy_pages(  # type: ignore[no-untyped-def]  # noqa: PLR0917  Triton's own language
    addresses,
    first_words,
    pages,
    block,
    page_words,
    IS_GATHER: tl.constexpr,  # noqa: N803
    BLOCK_WORDS: tl.constexpr,  # noqa: N803
):
    """One page of one layer: program (index in ``pages``, layer)."""
    index = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    first = tl.load(first_words + layer)
    num_words = tl.load(first_words + layer + 1) - first
    page = tl.load(pages + index)
    in_pool = tl.load(addresses + layer).to(tl.pointer_type(tl.int64)) + page * num_words
    in_block = block + index * page_words + first
    for start in range(0, num_words, BLOCK_WORDS):
        words = start + tl.arange(0, BLOCK_WORDS)
        is_inside = words < num_words
        if IS_GATHER:
            tl.store(in_block + words, tl.load(in_pool + words, mask=is_inside), mask=is_inside)
        else:
            tl.store(in_pool + words, tl.load(in_block + words, mask=is_inside), mask=is_inside)
