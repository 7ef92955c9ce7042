"""Both directions of the swap engine on a GPU, each on a CUDA stream of its own.

Host memory is one pinned tensor ``[number of pages, bytes of a page]``. Pages are gathered into a
block of device memory and cross the bus from there, neighbours of host memory in one copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from prefill_server.page_copies import runs_of
from prefill_server.page_kernels import PageBlocks

STAGING_BYTES = 64 << 20
"""Device memory per direction. A copy of this size takes over a millisecond on the fastest bus, a
hundred times what it costs to start."""


class _Lane:
    """One direction: a CUDA stream and a block of device memory for what is under way."""

    def __init__(self, device: torch.device, page_bytes: int) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.max_pages = max(1, STAGING_BYTES // page_bytes)
        self.block = torch.empty(self.max_pages * page_bytes, dtype=torch.uint8, device=device)
        self.under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event, list[int]]] = deque()
        """Began, done, host pages."""

    def uses(self, host_pages: list[int]) -> bool:
        """Whether a copy that is not known to be over reads or writes one of these."""
        wanted = set(host_pages)
        return any(not wanted.isdisjoint(pages) for _, _, pages in self.under_way)


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
        self._blocks = PageBlocks(layers)
        self._page_bytes = self._blocks.page_bytes
        self._host = torch.empty(
            (num_host_pages, self._page_bytes), dtype=torch.uint8, pin_memory=num_host_pages > 0
        )
        self._out = _Lane(self._device, self._page_bytes)
        self._in = _Lane(self._device, self._page_bytes)

    def save(self, source: Tensor, target: list[int]) -> None:
        """Copy pages of the pool to pages of host memory."""
        lane = self._out
        compute = torch.cuda.current_stream(self._device)
        for start in range(0, len(source), lane.max_pages):
            some = source[start : start + lane.max_pages]
            to = target[start : start + lane.max_pages]
            if self._in.uses(to):  # a host page that was given up may still be on its way in
                lane.stream.wait_stream(self._in.stream)
            lane.stream.wait_stream(compute)
            with torch.cuda.stream(lane.stream):
                began = _event()
                block = lane.block[: len(to) * self._page_bytes]
                self._blocks.gather(some, block)
                gathered = _event()
                rows = block.view(len(to), self._page_bytes)
                for first, page, number in runs_of(range(len(to)), to):
                    self._host[page : page + number].copy_(
                        rows[first : first + number], non_blocking=True
                    )
                lane.under_way.append((began, _event(), to))
            compute.wait_event(gathered)

    def restore(self, source: list[int], target: Tensor) -> None:
        """Copy pages of host memory to pages of the pool."""
        lane = self._in
        compute = torch.cuda.current_stream(self._device)
        for start in range(0, len(source), lane.max_pages):
            some = source[start : start + lane.max_pages]
            to = target[start : start + lane.max_pages]
            if self._out.uses(some):
                lane.stream.wait_stream(self._out.stream)
            with torch.cuda.stream(lane.stream):
                began = _event()
                block = lane.block[: len(some) * self._page_bytes]
                rows = block.view(len(some), self._page_bytes)
                for page, first, number in runs_of(some, range(len(some))):
                    rows[first : first + number].copy_(
                        self._host[page : page + number], non_blocking=True
                    )
                # Up to here nothing touches the pool: only now wait for who used the pages before.
                lane.stream.wait_stream(compute)
                self._blocks.scatter(block, to)
                done = _event()
                lane.under_way.append((began, done, some))
            compute.wait_event(done)

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
        self._out.stream.synchronize()
        self._in.stream.synchronize()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
