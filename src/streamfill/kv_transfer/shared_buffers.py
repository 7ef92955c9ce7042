"""KV buffers of a server rank that other processes of the machine can map.

An anonymous file holds all keys, layer by layer, then all values, each layer at a multiple of
``ALIGN_BYTES``: a process that knows layout and number of slots finds everything. It is sealed
against shrinking, so that whoever maps it cannot be killed by its owner's mistake, and readers map
it for reading only.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import weakref

import numpy as np
import torch
from torch import Tensor

from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.page_copies import Rows

ALIGN_BYTES = 4096


class SharedBuffers:
    """Of the rank that owns the KV."""

    def __init__(self, layout: KvLayout, num_slots: int) -> None:
        """
        Args:
            layout: of the buffers.
            num_slots: of each layer; zero to begin with.

        Raises:
            OSError: the memory cannot be had, or this system has no such files.
        """
        self.layout = layout
        self.num_slots = num_slots
        offsets, num_bytes = _places(layout, num_slots)
        self.file = _sealed_file(num_bytes)
        self._close = weakref.finalize(self, os.close, self.file)
        memory = torch.frombuffer(mmap.mmap(self.file, num_bytes), dtype=torch.uint8)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        buffers: list[Tensor] = []
        for offset, dim in zip(offsets, _dims(layout), strict=True):
            size = num_slots * layout.num_kv_heads * dim * layout.item_bytes
            flat = memory[offset : offset + size].view(dtype)
            buffers.append(flat.view(num_slots, layout.num_kv_heads, dim))
        self.k_buffers = buffers[: layout.num_layers]
        """A tensor [num_slots, num_kv_heads, head_dim] per layer."""
        self.v_buffers = buffers[layout.num_layers :]
        """A tensor [num_slots, num_kv_heads, v_head_dim] per layer."""

    def close(self) -> None:
        """Nobody new may map it. The memory lives as long as somebody uses it. Idempotent."""
        self._close()


def map_layers(file: int, layout: KvLayout, num_slots: int) -> list[Rows]:
    """Another rank's buffers as `source.PagedKv` wants them; the file may be closed afterwards.

    Args:
        file: descriptor of the other's `SharedBuffers.file`.
        layout: of the other; the same as one's own.
        num_slots: of the other.

    Raises:
        OSError: it is no such file, or smaller than it should be.
    """
    offsets, num_bytes = _places(layout, num_slots)
    if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise OSError("the file of the KV buffers could be cut off while it is read")
    if os.fstat(file).st_size != num_bytes:
        raise OSError(f"{os.fstat(file).st_size} bytes are no KV buffers of {num_bytes} bytes")
    memory = np.frombuffer(mmap.mmap(file, num_bytes, prot=mmap.PROT_READ), dtype=np.uint8)
    layers: list[Rows] = []
    for offset, dim in zip(offsets, _dims(layout), strict=True):
        page_bytes = layout.page_size * layout.num_kv_heads * dim * layout.item_bytes
        num_pages = num_slots // layout.page_size
        rows = memory[offset : offset + num_pages * page_bytes]
        layers.append(rows.view(np.dtype((np.void, page_bytes))))
    return layers


def _dims(layout: KvLayout) -> list[int]:
    return [layout.head_dim] * layout.num_layers + [layout.v_head_dim] * layout.num_layers


def _places(layout: KvLayout, num_slots: int) -> tuple[list[int], int]:
    """Where each layer begins, and where the last one ends."""
    offsets: list[int] = []
    end = 0
    for dim in _dims(layout):
        offsets.append(end)
        size = num_slots * layout.num_kv_heads * dim * layout.item_bytes
        end += math.ceil(size / ALIGN_BYTES) * ALIGN_BYTES
    return offsets, end


def _sealed_file(num_bytes: int) -> int:
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no anonymous files")
    file = os.memfd_create("streamfill-kv-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, num_bytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        os.close(file)
        raise
    return file
