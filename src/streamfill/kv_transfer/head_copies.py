"""Some heads of a rank's KV: read out of its pages or staging, written into another's pages.

A *part* is KV of some heads in the form of a staging tensor (see ``staging``), with so many heads
instead of all. On the CPU it moves by *units*: as many neighbouring heads as divide the part, its
place and a token's row, so that pages and part are both arrays of whole units, and are copied like
pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.page_copies import IntArray, copy_on_host, pages_of
from streamfill.kv_transfer.slices import HeadRange
from streamfill.kv_transfer.source import KvSource, PagedKv, StagedKv
from streamfill.kv_transfer.staging import scatter, staging_views


def layout_of_heads(layout: KvLayout, num_heads: int) -> KvLayout:
    """The layout of a part."""
    return msgspec.structs.replace(layout, num_kv_heads=num_heads)


def slice_heads(layout: KvLayout, kv: KvSource, heads: HeadRange) -> KvSource:
    """A part of some KV. Pages are read when the part is; anything else is copied now.

    Args:
        layout: of all of it.
        kv: of a rank.
        heads: counted from the rank's first.

    Returns:
        The part; ``kv`` itself where it has no more heads.
    """
    if heads.num == layout.num_kv_heads or not kv.num_bytes:
        return kv
    if isinstance(kv, PagedKv):
        # Other processes map whole rows of a pool, so a part has to be read by its owner.
        units = _units(layout, heads)
        split = layout.page_size * units.per_token
        layers = [rows.view(np.dtype((np.void, rows.itemsize // split))) for rows in kv.layers]
        slots = kv.pages[:, None] * layout.page_size + np.arange(layout.page_size)
        return PagedKv(layers, units.of_slots(slots.reshape(-1)))
    if isinstance(kv, StagedKv):
        staging = kv.staging
    else:
        staging = torch.empty(kv.num_bytes, dtype=torch.uint8)
        kv.read(0, staging)
    num_tokens = kv.num_bytes // layout.bytes_per_token
    small = layout_of_heads(layout, heads.num)
    part = staging.new_empty(num_tokens * small.bytes_per_token)
    for of_all, of_part in zip(
        staging_views(layout, staging), staging_views(small, part), strict=True
    ):
        of_part.copy_(of_all[:, :, heads.first : heads.end])
    return StagedKv(part)


def scatter_blocks(
    layout: KvLayout,
    staging: Tensor,
    k_buffers: Sequence[Tensor],
    v_buffers: Sequence[Tensor],
    slots: Tensor,
    *,
    blocks: Sequence[HeadRange],
    skip_tokens: int = 0,
) -> None:
    """As `staging.scatter`, of a staging tensor that is one part behind the other, of the heads
    ``blocks``; none: it is all heads in one."""
    if not blocks:
        scatter(layout, staging, k_buffers, v_buffers, slots, skip_tokens=skip_tokens)
        return
    bytes_per_head = staging.numel() // layout.num_kv_heads
    sizes = [heads.num * bytes_per_head for heads in blocks]
    for heads, part in zip(blocks, staging.split_with_sizes(sizes), strict=True):
        scatter_heads(
            layout, part, k_buffers, v_buffers, slots, heads=heads, skip_tokens=skip_tokens
        )


def scatter_heads(
    layout: KvLayout,
    part: Tensor,
    k_buffers: Sequence[Tensor],
    v_buffers: Sequence[Tensor],
    slots: Tensor,
    *,
    heads: HeadRange,
    skip_tokens: int = 0,
) -> None:
    """Copy a part into ``slots`` of the paged buffers, at its heads, and touch nothing else.

    Args:
        layout: of the buffers.
        part: uint8, on any device.
        k_buffers: ``num_layers`` tensors [num_slots, num_kv_heads, head_dim]; written to.
        v_buffers: ``num_layers`` tensors [num_slots, num_kv_heads, v_head_dim]; written to.
        slots: int64 [num_tokens - skip_tokens], on the buffers' device, without repetitions.
        heads: of the part, counted from the first of the buffers.
        skip_tokens: of the part, to leave out at the beginning.

    Raises:
        ValueError: the number of slots is not that of the part's tokens behind ``skip_tokens``.
        IndexError: a slot is outside the buffers.
    """
    views = staging_views(layout_of_heads(layout, heads.num), part)
    num_tokens = views.k.shape[1]
    if slots.numel() != num_tokens - skip_tokens:
        raise ValueError(f"{slots.numel()} slots for {num_tokens} staged tokens less {skip_tokens}")
    if k_buffers[0].device.type == "cpu" and part.device.type == "cpu":
        _scatter_on_host(layout, [*views.k, *views.v], [*k_buffers, *v_buffers], slots, heads)
        return
    for buffers, staged in zip((k_buffers, v_buffers), views, strict=True):
        for buffer, view in zip(buffers, staged, strict=True):
            rows = buffer.view(view.dtype)[:, heads.first : heads.end]
            rows.index_copy_(0, slots, view[skip_tokens:].to(rows.device, non_blocking=True))


def _scatter_on_host(
    layout: KvLayout,
    views: Sequence[Tensor],
    buffers: Sequence[Tensor],
    slots: Tensor,
    heads: HeadRange,
) -> None:
    if not slots.numel():
        return
    numbers: IntArray = slots.numpy()
    num_slots = len(buffers[0])
    if not 0 <= numbers.min() <= numbers.max() < num_slots:
        raise IndexError(f"slot {numbers.max()} is outside a pool of {num_slots}")
    units = _units(layout, heads)
    target = [rows.view(len(rows) * units.per_token, -1) for rows in pages_of(buffers, page_size=1)]
    source = [
        view.reshape(-1).view(torch.uint8).view(-1, rows.shape[1])
        for view, rows in zip(views, target, strict=True)
    ]
    places = units.of_slots(numbers).tolist()
    first = len(source[0]) - len(places)
    copy_on_host(source, range(first, first + len(places)), target, places)


class _Units(NamedTuple):
    per_token: int
    """Of all heads."""
    first: int
    """Of the part, within a token."""
    num: int
    """Of the part, for each token."""

    def of_slots(self, slots: IntArray) -> IntArray:
        """Those of the part, in a pool."""
        places = self.first + np.arange(self.num)
        units: IntArray = (slots[:, None] * self.per_token + places).reshape(-1)
        return units


def _units(layout: KvLayout, heads: HeadRange) -> _Units:
    size = math.gcd(layout.num_kv_heads, heads.first, heads.num)
    return _Units(layout.num_kv_heads // size, heads.first // size, heads.num // size)
