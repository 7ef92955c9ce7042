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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefill_server.host_index import BlockKey, HostIndex, block_keys
from streamfill.engine.interface import CopyReport
from streamfill.kv_transfer.page_copies import copy_on_host, host_side, pages_of
from streamfill.messages.common import SHARED_NAMESPACE

if TYPE_CHECKING:
    from prefill_server.lanes import Lanes

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
        self._clock = clock
        self._num_saved = self._num_free_saves = self._num_restored = 0
        self._saved_bytes = self._restored_bytes = 0
        self._save_s = self._restore_s = 0.0
        self._copied: list[CopyReport] = []
        num_host_pages = num_host_blocks * self._block_pages
        self._host: list[Tensor] = []
        self._lanes: Lanes | None = None
        if self._layers[0].device.type == "cuda":
            from prefill_server.lanes import Lanes

            self._lanes = Lanes(self._layers, num_host_pages)
        else:
            self._host = host_side(self._layers, num_host_pages)

    @property
    def block_bytes(self) -> int:
        """Of KV, all layers."""
        return self._block_pages * self._page_bytes

    def keys(self, token_ids: array[int], namespace: str = SHARED_NAMESPACE) -> list[BlockKey]:
        """Keys of all whole blocks of a prompt; see ``host_index.block_keys``."""
        return block_keys(token_ids, self.block_tokens, namespace)

    def num_present(self, keys: Sequence[BlockKey]) -> int:
        """How many of ``keys`` host memory holds without a gap, from the first one on."""
        return self._index.num_present(keys)

    @property
    def num_held(self) -> int:
        """Blocks in host memory."""
        return len(self._index)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """They will be used: they are not given up for others."""
        self._index.touch(keys)

    def demote(self, keys: Sequence[BlockKey] | None) -> None:
        """Nobody is expected to need them (None: any): they are given up before others."""
        self._index.demote(keys)

    def room(self) -> tuple[int, int]:
        """Blocks in all, and of them those that new ones may have."""
        return self._index.num_blocks, self._index.num_spare

    def save(
        self, keys: Sequence[BlockKey], device_pages: Tensor, *, is_resident: bool = False
    ) -> int:
        """Keep a copy of the blocks ``keys``, which lie in ``device_pages``, int64
        ``[len(keys) * pages of a block]``, in order.

        The pages may be given to others as soon as this returns: on a GPU whatever is put on the
        current stream afterwards comes after the reading. Returns how many of ``keys`` host memory
        holds now; less than all where there is too little of it.

        Args:
            is_resident: the pages stay what they are, so the copy is the first to go when there is
                no room.

        Raises:
            ValueError: not as many pages as the blocks have.
        """
        self._check(keys, device_pages, 0)
        position = {key: number for number, key in enumerate(keys)}
        new = self._index.put(keys, is_resident=is_resident)
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
