"""A bounded pool of staging buffers that are used again.

Reuse is what makes transfers fast: memory fresh from the kernel is received into at 0.3 GB/s
(each page faults), memory used before at over 1 GB/s.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_BLOCK_BYTES = 64 * 1024
"""Blocks are not smaller than this, so that small transfers share one size."""


@dataclass(frozen=True)
class PoolUsage:
    """Memory of a pool, in bytes of whole blocks."""

    used_bytes: int
    """Handed out and not given back."""
    cached_bytes: int
    """Kept for reuse."""
    limit_bytes: int
    """Bound of the sum of both."""
    num_used: int


class _FreeBlock(NamedTuple):
    block: Tensor
    unused: torch.cuda.Event | None
    """Recorded when it was given back. None: of plain host memory."""


def block_bytes(num_bytes: int) -> int:
    """Size of the block for ``num_bytes``: 2**n times 5, 6, 7 or 8, so under a quarter is waste."""
    if num_bytes <= SMALLEST_BLOCK_BYTES:
        return SMALLEST_BLOCK_BYTES
    step_bytes = 1 << ((num_bytes - 1).bit_length() - 3)
    return -(-num_bytes // step_bytes) * step_bytes


class StagingPool:
    """Staging buffers of one device under one memory limit. Thread-safe.

    Whoever acquired a buffer owns it until `release`; a buffer of 0 bytes belongs to nobody.
    """

    def __init__(self, limit_bytes: int, *, device: torch.device | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._device = device or torch.device("cpu")
        self._pinned = self._device.type == "cpu" and torch.cuda.is_available()
        self._lock = threading.Lock()
        self._used: dict[int, Tensor] = {}  # by address of the block
        self._cached: dict[int, list[_FreeBlock]] = {}  # by size of the block
        self._used_bytes = 0
        self._cached_bytes = 0

    def try_acquire(self, num_bytes: int) -> Tensor | None:
        """A uint8 tensor [num_bytes] of any content, or None when the limit forbids it now."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self._device)
        with self._lock:
            room_bytes = self._limit_bytes - self._used_bytes
            if num_bytes > room_bytes:
                return None
            # The last block before the limit is not rounded up beyond it.
            size_bytes = min(block_bytes(num_bytes), room_bytes)
            same_size = self._cached.get(size_bytes)
            if same_size:
                free = same_size.pop()
                self._cached_bytes -= size_bytes
                block = free.block
                self._wait_until_unused(free)
            else:
                self._drop_cached(room_bytes - size_bytes)
                block = torch.empty(
                    size_bytes, dtype=torch.uint8, device=self._device, pin_memory=self._pinned
                )
            self._used[block.data_ptr()] = block
            self._used_bytes += size_bytes
            return block[:num_bytes]

    def release(self, staging: Tensor) -> None:
        """Give a buffer back that `try_acquire` returned; nobody may touch it afterwards.

        Raises:
            ValueError: it is not from this pool, or was given back before.
        """
        if staging.numel() == 0:
            return
        with self._lock:
            block = self._used.pop(staging.data_ptr(), None)
            if block is None:
                raise ValueError(f"a buffer of {staging.numel()} bytes is not out of this pool")
            self._used_bytes -= block.numel()
            self._cached_bytes += block.numel()
            unused = None
            if block.is_cuda:
                # A copy out of it may still stand in the queue of this thread's stream.
                unused = torch.cuda.current_stream(block.device).record_event()
            elif self._pinned:
                unused = torch.cuda.current_stream().record_event()
            self._cached.setdefault(block.numel(), []).append(_FreeBlock(block, unused))

    def usage(self) -> PoolUsage:
        """What is in use now."""
        with self._lock:
            return PoolUsage(
                used_bytes=self._used_bytes,
                cached_bytes=self._cached_bytes,
                limit_bytes=self._limit_bytes,
                num_used=len(self._used),
            )

    def _wait_until_unused(self, free: _FreeBlock) -> None:
        if free.unused is None:
            return
        if free.block.is_cuda:
            # Whatever is done to it next is queued behind this, by threads with this same stream.
            torch.cuda.current_stream(self._device).wait_event(free.unused)
        else:
            free.unused.synchronize()

    def _drop_cached(self, keep_bytes: int) -> None:
        """Free cached blocks, smallest first, until ``keep_bytes`` are left. Needs the lock."""
        for size_bytes in sorted(self._cached):
            blocks = self._cached[size_bytes]
            while blocks and self._cached_bytes > keep_bytes:
                blocks.pop()
                self._cached_bytes -= size_bytes
