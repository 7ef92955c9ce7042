"""The swap engine: KV pages between the device pool and a bounded pool of host memory.

Torch only. It knows pages and keys (``host_index``), neither streams nor a radix tree. Host memory
is kept in blocks of ``BLOCK_TOKENS`` tokens or more, whole pages:

* ``save``     blocks go out. What host memory has already is not copied again, so that a stream
               that is swapped out, in and out again pays for the second time nothing;
* ``restore``  blocks come in. The host copy stays, and stays valid: KV of a prefix never changes.

On a GPU both are asynchronous, each on a CUDA stream of its own, so that out and in run at once.
Pages are gathered into one block of device memory first and cross the bus in large copies to and
from pinned memory (after FastSwitch). The compute stream waits for the gathering alone, which runs
at the speed of device memory, before the freed pages can be written to; and for a restore before
the next forward pass can read. The caller never waits. On the CPU both are plain copies.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefill_server.host_index import BlockKey, HostIndex, block_keys
from prefill_server.page_copies import (
    copy_on_host,
    gather_pages,
    host_side,
    pages_of,
    runs_of,
    scatter_pages,
)
from streamfill.engine.interface import CopyReport

STAGING_BYTES = 64 << 20
"""Device memory per direction. A copy of this size takes over a millisecond on the fastest bus, a
hundred times what it costs to start."""


DEFAULT_HOST_POOLS = 2
"""Size of the host pool unless it is configured, in device pools."""
MOST_OF_HOST = 0.15
"""And at most this share of the machine's memory, for all ranks of a server together. Of its whole
memory, which all ranks see alike: what they decide has to be the same."""
BLOCK_TOKENS = 16
"""Of a block of host memory, where pages are smaller. Looking for a prefix costs about a
microsecond a block, and what is less than a block at the end of a sequence is not kept."""


def block_tokens(page_size: int) -> int:
    """Tokens of a block: whole pages, at least ``BLOCK_TOKENS``."""
    return -(-BLOCK_TOKENS // page_size) * page_size


def host_blocks(
    host_pool_tokens: int | None,
    *,
    num_device_tokens: int,
    page_size: int,
    bytes_per_token: int,
    memory_bytes: int,
) -> int:
    """Blocks of the host pool: as many as configured, or the default above.

    Args:
        memory_bytes: of the machine, divided by the number of ranks.
    """
    num_tokens = block_tokens(page_size)
    if host_pool_tokens is not None:
        return host_pool_tokens // num_tokens
    wanted = DEFAULT_HOST_POOLS * num_device_tokens // num_tokens
    most = int(MOST_OF_HOST * memory_bytes) // (bytes_per_token * num_tokens)
    return max(0, min(wanted, most))


@dataclass(frozen=True, kw_only=True)
class SwapStats:
    """Of one swap engine, since its start; blocks unless the name says otherwise."""

    num_host_blocks: int
    num_held: int
    num_saved: int
    """Copied out."""
    num_saved_for_free: int
    """Were still in host memory when they were to be copied out."""
    num_restored: int
    num_dropped: int
    """Given up in host memory to make room."""
    saved_bytes: int
    """By copies that are known to be over, as the next three."""
    restored_bytes: int
    save_s: float
    restore_s: float


class SwapEngine:
    """Owned by one thread: the scheduler's."""

    def __init__(
        self,
        k_buffers: Sequence[Tensor],
        v_buffers: Sequence[Tensor],
        *,
        page_size: int,
        num_host_blocks: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            k_buffers, v_buffers: one tensor ``[number of slots, heads, dim]`` per layer; the pool.
            page_size: slots per page.
            num_host_blocks: bound of host memory. 0: nothing is ever kept.
            clock: seconds, for the CPU's copies.

        Raises:
            ValueError: a buffer is not contiguous.
            RuntimeError: the host memory cannot be had (pinned memory may be limited).
        """
        self._layers = pages_of([*k_buffers, *v_buffers], page_size)
        self._index = HostIndex(num_host_blocks)
        self.block_tokens = block_tokens(page_size)
        self._block_pages = self.block_tokens // page_size
        self._page_bytes = sum(layer.shape[1] for layer in self._layers)
        self._host = host_side(self._layers, num_host_blocks * self._block_pages)
        self._clock = clock
        self._num_saved = self._num_free_saves = self._num_restored = 0
        self._saved_bytes = self._restored_bytes = 0
        self._save_s = self._restore_s = 0.0
        self._copied: list[CopyReport] = []
        device = self._layers[0].device
        self._lanes = _Lanes(self._layers, self._host, device) if device.type == "cuda" else None

    @property
    def block_bytes(self) -> int:
        """Of KV, all layers."""
        return self._block_pages * self._page_bytes

    def keys(self, token_ids: array[int]) -> list[BlockKey]:
        """Keys of all whole blocks of a prompt; see ``host_index.block_keys``."""
        return block_keys(token_ids, self.block_tokens)

    def num_present(self, keys: Sequence[BlockKey]) -> int:
        """How many of ``keys`` host memory holds without a gap, from the first one on."""
        return self._index.num_present(keys)

    @property
    def num_held(self) -> int:
        """Blocks in host memory."""
        return len(self._index)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """They are used now: others are given up before them."""
        self._index.touch(keys)

    def demote(self, keys: Sequence[BlockKey] | None) -> None:
        """Nobody is expected to need them (None: any): they are given up before others."""
        self._index.demote(keys)

    def room(self) -> tuple[int, int]:
        """Blocks in all, and of them free ones or demoted ones."""
        index = self._index
        return index.num_blocks, index.num_free + index.num_demoted

    def save(self, keys: Sequence[BlockKey], device_pages: Tensor) -> int:
        """Keep a copy of the blocks ``keys``, which lie in ``device_pages``, int64
        ``[len(keys) * pages of a block]``, in order.

        The pages may be given to others as soon as this returns: on a GPU whatever is put on the
        current stream afterwards comes after the reading. Returns how many of ``keys`` host memory
        holds now; less than all where there is too little of it.

        Raises:
            ValueError: not as many pages as the blocks have.
        """
        self._check(keys, device_pages, 0)
        position = {key: number for number, key in enumerate(keys)}
        new = self._index.put(keys)
        num_here = self._index.num_present_total(keys)
        self._num_free_saves += num_here - len(new)
        if not new:
            return num_here
        target = self._pages_of([block for _, block in new])
        if len(new) < len(keys):
            chosen = self._pages_of([position[key] for key, _ in new])
            device_pages = device_pages[torch.tensor(chosen, device=device_pages.device)]
        if self._lanes is not None:
            self._lanes.save(device_pages, target)
        else:
            start_s = self._clock()
            copy_on_host(self._layers, device_pages.tolist(), self._host, target)
            self._note(True, len(target), self._clock() - start_s)
        self._num_saved += len(new)
        return num_here

    def restore(self, keys: Sequence[BlockKey], device_pages: Tensor, skip_pages: int = 0) -> None:
        """Copy blocks into ``device_pages``, int64 ``[len(keys) * pages of a block - skip_pages]``.
        On a GPU what is put on the current stream afterwards finds them there.

        Args:
            skip_pages: of the first block, which are there already.

        Raises:
            KeyError: a block is not in host memory; nothing was copied.
            ValueError: not as many pages as the blocks have.
        """
        self._check(keys, device_pages, skip_pages)
        source = self._pages_of(self._index.find(keys))[skip_pages:]
        if not source:
            return
        if self._lanes is not None:
            self._lanes.restore(source, device_pages)
        else:
            start_s = self._clock()
            copy_on_host(self._host, source, self._layers, device_pages.tolist())
            self._note(False, len(source), self._clock() - start_s)
        self._num_restored += len(keys)

    def poll(self) -> list[CopyReport]:
        """Groups whose copies are over, since the last call."""
        if self._lanes is not None:
            for is_save, num_pages, seconds in self._lanes.poll():
                self._note(is_save, num_pages, seconds)
        copied, self._copied = self._copied, []
        return copied

    def clear(self) -> None:
        """Forget everything in host memory."""
        if self._lanes is not None:
            self._lanes.wait()
        self._index.clear()

    def wait(self) -> None:
        """Until all copies are over. For measurements and tests."""
        if self._lanes is not None:
            self._lanes.wait()

    def stats(self) -> SwapStats:
        """What was done so far."""
        return SwapStats(
            num_host_blocks=self._index.num_blocks,
            num_held=len(self._index),
            num_saved=self._num_saved,
            num_saved_for_free=self._num_free_saves,
            num_restored=self._num_restored,
            num_dropped=self._index.num_dropped,
            saved_bytes=self._saved_bytes,
            restored_bytes=self._restored_bytes,
            save_s=self._save_s,
            restore_s=self._restore_s,
        )

    def _check(self, keys: Sequence[BlockKey], device_pages: Tensor, skip_pages: int) -> None:
        num_pages = len(keys) * self._block_pages - skip_pages
        if device_pages.numel() != num_pages:
            raise ValueError(f"{len(keys)} blocks are {num_pages} pages, not {len(device_pages)}")

    def _pages_of(self, blocks: Sequence[int]) -> list[int]:
        """Numbers of the pages of some blocks, in order."""
        size = self._block_pages
        if size == 1:
            return list(blocks)
        return [page for block in blocks for page in range(block * size, (block + 1) * size)]

    def _note(self, is_save: bool, num_pages: int, seconds: float) -> None:
        num_bytes = num_pages * self._page_bytes
        if is_save:
            self._saved_bytes += num_bytes
            self._save_s += seconds
        else:
            self._restored_bytes += num_bytes
            self._restore_s += seconds
        self._copied.append(CopyReport(is_save, num_bytes, seconds))


class _Lane:
    """One direction on a GPU: a CUDA stream and a block of device memory for what is under way."""

    def __init__(self, device: torch.device, page_bytes: int) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.max_pages = max(1, STAGING_BYTES // page_bytes)
        self.staging = torch.empty(self.max_pages * page_bytes, dtype=torch.uint8, device=device)
        self.under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event, list[int]]] = deque()
        """Began, done, host pages."""

    def uses(self, host_pages: list[int]) -> bool:
        """Whether a copy that is not known to be over reads or writes one of these."""
        wanted = set(host_pages)
        return any(not wanted.isdisjoint(pages) for _, _, pages in self.under_way)


class _Lanes:
    """Both directions."""

    def __init__(
        self, layers: Sequence[Tensor], host: Sequence[Tensor], device: torch.device
    ) -> None:
        self._layers, self._host, self._device = layers, host, device
        page_bytes = sum(layer.shape[1] for layer in layers)
        self._out, self._in = _Lane(device, page_bytes), _Lane(device, page_bytes)
        self._page_bytes = page_bytes

    def save(self, source: Tensor, target: list[int]) -> None:
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
                staged = lane.staging[: len(some) * self._page_bytes]
                gather_pages(self._layers, some, staged)
                gathered = _event()
                self._to_host(staged, to)
                lane.under_way.append((began, _event(), to))
            compute.wait_event(gathered)

    def restore(self, source: list[int], target: Tensor) -> None:
        lane = self._in
        compute = torch.cuda.current_stream(self._device)
        for start in range(0, len(source), lane.max_pages):
            some = source[start : start + lane.max_pages]
            to = target[start : start + lane.max_pages]
            if self._out.uses(some):
                lane.stream.wait_stream(self._out.stream)
            with torch.cuda.stream(lane.stream):
                began = _event()
                staged = lane.staging[: len(some) * self._page_bytes]
                self._from_host(some, staged)
                # Up to here nothing touches the pool: only now wait for who used the pages before.
                lane.stream.wait_stream(compute)
                scatter_pages(self._layers, to, staged)
                done = _event()
                lane.under_way.append((began, done, some))
            compute.wait_event(done)

    def poll(self) -> list[tuple[bool, int, float]]:
        finished: list[tuple[bool, int, float]] = []
        for is_save, lane in ((True, self._out), (False, self._in)):
            while lane.under_way and lane.under_way[0][1].query():  # type: ignore[no-untyped-call]
                began, done, pages = lane.under_way.popleft()
                finished.append((is_save, len(pages), began.elapsed_time(done) / 1e3))
        return finished

    def wait(self) -> None:
        self._out.stream.synchronize()
        self._in.stream.synchronize()

    def _to_host(self, staged: Tensor, pages: list[int]) -> None:
        for layer, block in self._blocks(staged, len(pages)):
            for first, to, number in runs_of(range(len(pages)), pages):
                self._host[layer][to : to + number].copy_(
                    block[first : first + number], non_blocking=True
                )

    def _from_host(self, pages: list[int], staged: Tensor) -> None:
        for layer, block in self._blocks(staged, len(pages)):
            for first, to, number in runs_of(pages, range(len(pages))):
                block[to : to + number].copy_(
                    self._host[layer][first : first + number], non_blocking=True
                )

    def _blocks(self, staged: Tensor, num_pages: int) -> list[tuple[int, Tensor]]:
        blocks: list[tuple[int, Tensor]] = []
        position = 0
        for number, layer in enumerate(self._layers):
            num_bytes = num_pages * layer.shape[1]
            block = staged[position : position + num_bytes].view(num_pages, layer.shape[1])
            blocks.append((number, block))
            position += num_bytes
        return blocks


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
