"""Both directions of the swap engine on a GPU, each on CUDA streams of its own.

Host memory is one pinned tensor ``[number of pages, bytes of a page]``. Pages are gathered into
blocks of device memory and cross the bus from there, neighbours of host memory in one copy; the way
back likewise. While one block is on the bus, others are gathered or scattered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor

from prefill_server.page_kernels import PageBlocks
from streamfill.kv_transfer.page_copies import runs_of

BLOCK_BYTES = 32 << 20
"""A copy of this size takes half a millisecond on the fastest bus, some fifty times what it costs
to start."""
FEWEST_BLOCKS = 4
MOST_BLOCKS = 16
POOL_PER_BLOCKS = 16
"""Blocks of a direction take this fraction of the pool's memory, within the two bounds. What is
saved in one go is out of the pool's way as soon as it is gathered, which takes a twentieth of the
time on the bus, so long as there are blocks for it; and what comes in at the same time crosses the
bus meanwhile, so long as there are blocks for that."""


def staging_blocks(pool_bytes: int, page_bytes: int) -> int:
    """Blocks of each direction, for a pool of so many bytes. A block holds a page at least."""
    wanted = pool_bytes // (POOL_PER_BLOCKS * max(BLOCK_BYTES, page_bytes))
    return max(FEWEST_BLOCKS, min(MOST_BLOCKS, wanted))


class _Block:
    """Device memory for some pages on their way."""

    def __init__(self, num_pages: int, page_bytes: int, device: torch.device) -> None:
        self._page_bytes = page_bytes
        self._memory = torch.empty(num_pages * page_bytes, dtype=torch.uint8, device=device)
        self.free: torch.cuda.Event | None = None
        """When its content is not needed any more; None: never used."""

    def of(self, num_pages: int) -> Tensor:
        return self._memory[: num_pages * self._page_bytes]

    def rows(self, num_pages: int) -> Tensor:
        return self.of(num_pages).view(num_pages, self._page_bytes)


class _Lane:
    """One direction: a stream for the pool's side, one for the bus, and the blocks between them."""

    def __init__(self, device: torch.device, page_bytes: int, num_blocks: int) -> None:
        self.pool_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.bus_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.max_pages = max(1, BLOCK_BYTES // page_bytes)
        blocks = [_Block(self.max_pages, page_bytes, device) for _ in range(num_blocks)]
        self.blocks: Iterator[_Block] = cycle(blocks)
        self.under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event, list[int]]] = deque()
        """Began, done, host pages."""

    def let_wait(self, stream: torch.cuda.Stream, host_pages: list[int]) -> None:
        """Whatever is put on ``stream`` from now on comes after the copies under way here that read
        or write one of these, and after no others, so that both directions go on at once."""
        if not self.under_way:
            return
        wanted = set(host_pages)
        for _, done, pages in self.under_way:
            if not wanted.isdisjoint(pages):
                stream.wait_event(done)

    def parts(self, num_pages: int) -> Iterator[tuple[int, int, _Block]]:
        """(first page, last page + 1, block) for each block that so many pages take."""
        for start in range(0, num_pages, self.max_pages):
            yield start, min(start + self.max_pages, num_pages), next(self.blocks)


class Lanes:
    """Both directions, and the host memory. Owned by one thread."""

    def __init__(self, layers: Sequence[Tensor], num_host_pages: int) -> None:
        """
        Args:
            layers: the pool, as ``page_copies.pages_of`` gives it.
            num_host_pages: of host memory.

        Raises:
            RuntimeError: so much pinned memory cannot be had.
        """
        self._device = layers[0].device
        self._pages = PageBlocks(layers)
        page_bytes = self._pages.page_bytes
        self._host = torch.empty(
            (num_host_pages, page_bytes), dtype=torch.uint8, pin_memory=num_host_pages > 0
        )
        blocks = staging_blocks(sum(layer.nbytes for layer in layers), page_bytes)
        self._out = _Lane(self._device, page_bytes, blocks)
        self._in = _Lane(self._device, page_bytes, blocks)

    def save(self, source: Tensor, target: list[int]) -> None:
        """Copy pages of the pool to pages of host memory."""
        lane = self._out
        compute = torch.cuda.current_stream(self._device)
        lane.pool_stream.wait_stream(compute)
        for start, end, block in lane.parts(len(target)):
            to = target[start:end]
            with torch.cuda.stream(lane.pool_stream):
                if block.free is not None:
                    lane.pool_stream.wait_event(block.free)
                began = _event()
                self._pages.gather(source[start:end], block.of(end - start))
                gathered = _event()
            compute.wait_event(gathered)
            with torch.cuda.stream(lane.bus_stream):
                lane.bus_stream.wait_event(gathered)
                # A host page that was given up may still be on its way in.
                self._in.let_wait(lane.bus_stream, to)
                rows = block.rows(end - start)
                for first, page, number in runs_of(range(end - start), to):
                    self._host[page : page + number].copy_(
                        rows[first : first + number], non_blocking=True
                    )
                block.free = done = _event()
            lane.under_way.append((began, done, to))

    def restore(self, source: list[int], target: Tensor) -> None:
        """Copy pages of host memory to pages of the pool."""
        lane = self._in
        compute = torch.cuda.current_stream(self._device)
        lane.pool_stream.wait_stream(compute)  # whoever used the pages before
        for start, end, block in lane.parts(len(source)):
            some = source[start:end]
            with torch.cuda.stream(lane.bus_stream):
                if block.free is not None:
                    lane.bus_stream.wait_event(block.free)
                self._out.let_wait(lane.bus_stream, some)
                began = _event()
                rows = block.rows(end - start)
                for page, first, number in runs_of(some, range(end - start)):
                    rows[first : first + number].copy_(
                        self._host[page : page + number], non_blocking=True
                    )
                arrived = _event()
            with torch.cuda.stream(lane.pool_stream):
                lane.pool_stream.wait_event(arrived)
                self._pages.scatter(block.of(end - start), target[start:end])
                block.free = done = _event()
            lane.under_way.append((began, done, some))
        compute.wait_stream(lane.pool_stream)

    def poll(self) -> list[tuple[bool, int, float]]:
        """Copies that are over since the last call: (whether out, pages, seconds)."""
        finished: list[tuple[bool, int, float]] = []
        for is_save, lane in ((True, self._out), (False, self._in)):
            while lane.under_way and lane.under_way[0][1].query():  # type: ignore[no-untyped-call]
                began, done, pages = lane.under_way.popleft()
                finished.append((is_save, len(pages), began.elapsed_time(done) / 1e3))
        return finished

    def wait(self) -> None:
        """Until all copies are over."""
        for lane in (self._out, self._in):
            lane.bus_stream.synchronize()
            lane.pool_stream.synchronize()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
