"""Between paged KV buffers and one contiguous staging tensor.

A staging tensor is one-dimensional uint8 of ``num_tokens * layout.bytes_per_token`` bytes: all keys
as ``[num_layers, num_tokens, num_kv_heads, head_dim]``, then all values as ``[num_layers,
num_tokens, num_kv_heads, v_head_dim]``. Both sides of a transfer have equal layouts, so it needs no
header. Of ranks that hold different KV heads see ``head_copies``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.page_copies import copy_on_host, pages_of
from streamfill.kv_transfer.source import page_numbers, paged_kv

_CARRIER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Elements move as integers of the same size: not every kernel exists for every float8."""


class StagingViews(NamedTuple):
    """A staging tensor seen as keys and values, without a copy."""

    k: Tensor
    """[num_layers, num_tokens, num_kv_heads, head_dim], integers of ``item_bytes``."""
    v: Tensor
    """[num_layers, num_tokens, num_kv_heads, v_head_dim], integers of ``item_bytes``."""


def layout_of(
    k_buffers: Sequence[Tensor], v_buffers: Sequence[Tensor], *, page_size: int
) -> KvLayout:
    """The layout of KV buffers, one tensor ``[num_slots, num_kv_heads, dim]`` per layer.

    Raises:
        ValueError: there are no layers, or they differ from each other.
    """
    if not k_buffers or len(k_buffers) != len(v_buffers):
        raise ValueError(f"{len(k_buffers)} key and {len(v_buffers)} value layers")
    for buffers in (k_buffers, v_buffers):
        kinds = {(buffer.shape, buffer.dtype) for buffer in buffers}
        if len(kinds) != 1:
            raise ValueError(f"layers differ: {sorted(map(str, kinds))}")
    k, v = k_buffers[0], v_buffers[0]
    if k.dtype != v.dtype or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"keys {k.shape} {k.dtype} do not go with values {v.shape} {v.dtype}")
    return KvLayout(
        num_layers=len(k_buffers),
        num_kv_heads=k.shape[1],
        head_dim=k.shape[2],
        v_head_dim=v.shape[2],
        dtype=str(k.dtype).removeprefix("torch."),
        item_bytes=k.dtype.itemsize,
        page_size=page_size,
    )


def staging_views(layout: KvLayout, staging: Tensor) -> StagingViews:
    """``staging`` (see the module) as keys and values.

    Raises:
        ValueError: it is not a whole number of tokens long.
    """
    num_tokens, rest_bytes = divmod(staging.numel(), layout.bytes_per_token)
    if staging.dtype != torch.uint8 or rest_bytes:
        raise ValueError(
            f"staging of {staging.numel()} {staging.dtype} is not whole tokens "
            f"of {layout.bytes_per_token} bytes"
        )
    carrier = _CARRIER[layout.item_bytes]
    num_k_bytes = num_tokens * layout.k_bytes_per_token
    shape = (layout.num_layers, num_tokens, layout.num_kv_heads)
    return StagingViews(
        k=staging[:num_k_bytes].view(carrier).view(*shape, layout.head_dim),
        v=staging[num_k_bytes:].view(carrier).view(*shape, layout.v_head_dim),
    )


def gather(
    layout: KvLayout,
    k_buffers: Sequence[Tensor],
    v_buffers: Sequence[Tensor],
    slots: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Copy the KV of ``slots`` out of the paged buffers.

    Args:
        layout: of the buffers.
        k_buffers: ``num_layers`` tensors [num_slots, num_kv_heads, head_dim].
        v_buffers: ``num_layers`` tensors [num_slots, num_kv_heads, v_head_dim].
        slots: int64 [num_tokens], on the buffers' device; whole pages.
        out: staging tensor to write to; pinned memory or the buffers' device is fast. None
            allocates one.

    Returns:
        The staging tensor.

    Raises:
        ValueError: ``out`` has the wrong length, or the slots are not whole pages.
        IndexError: a slot is outside the buffers; ``out`` may then be half written.
    """
    num_bytes = slots.numel() * layout.bytes_per_token
    if out is None:
        out = torch.empty(num_bytes, dtype=torch.uint8, device=k_buffers[0].device)
    elif out.numel() != num_bytes:
        raise ValueError(
            f"staging of {out.numel()} bytes, {num_bytes} needed for {slots.numel()} tokens"
        )
    if k_buffers[0].device.type == "cpu" and out.device.type == "cpu":
        paged_kv(layout, k_buffers, v_buffers, slots).read(0, out)
        return out
    for buffers, views in zip((k_buffers, v_buffers), staging_views(layout, out), strict=True):
        for buffer, view in zip(buffers, views, strict=True):
            rows = buffer.view(view.dtype)
            if rows.device == view.device:
                torch.index_select(rows, 0, slots, out=view)
            else:
                view.copy_(rows.index_select(0, slots), non_blocking=True)
    return out


def scatter(
    layout: KvLayout,
    staging: Tensor,
    k_buffers: Sequence[Tensor],
    v_buffers: Sequence[Tensor],
    slots: Tensor,
    *,
    skip_tokens: int = 0,
) -> None:
    """Copy a staging tensor into ``slots`` of the paged buffers, and touch no other slot.

    Args:
        layout: of the buffers.
        staging: as `gather` makes it; on any device.
        k_buffers: ``num_layers`` tensors [num_slots, num_kv_heads, head_dim]; written to.
        v_buffers: ``num_layers`` tensors [num_slots, num_kv_heads, v_head_dim]; written to.
        slots: int64 [num_tokens - skip_tokens], on the buffers' device; whole pages, without
            repetitions.
        skip_tokens: staged tokens to leave out at the beginning: the receiver has them already.

    Raises:
        ValueError: the number of slots is not that of the staged tokens behind ``skip_tokens``.
        IndexError: a slot is outside the buffers.
    """
    views = staging_views(layout, staging)
    if slots.numel() != views.k.shape[1] - skip_tokens:
        raise ValueError(
            f"{slots.numel()} slots for {views.k.shape[1]} staged tokens less {skip_tokens}"
        )
    if k_buffers[0].device.type == "cpu" and staging.device.type == "cpu":
        _scatter_on_host(layout, views, [*k_buffers, *v_buffers], slots, skip_tokens)
        return
    for buffers, staged in zip((k_buffers, v_buffers), views, strict=True):
        for buffer, view in zip(buffers, staged, strict=True):
            rows = buffer.view(view.dtype)
            rows.index_copy_(0, slots, view[skip_tokens:].to(rows.device, non_blocking=True))


def _scatter_on_host(
    layout: KvLayout, views: StagingViews, buffers: Sequence[Tensor], slots: Tensor, skip: int
) -> None:
    page_size = layout.page_size
    if not slots.numel():
        return
    if skip % page_size:
        raise ValueError(f"{skip} tokens are not whole pages of {page_size}")
    target = pages_of(buffers, page_size)
    pages = page_numbers(slots, page_size)
    if not 0 <= pages.min() <= pages.max() < len(target[0]):
        raise IndexError(f"page {pages.max()} is outside a pool of {len(target[0])}")
    staged = [
        view.reshape(-1).view(torch.uint8).view(-1, layer.shape[1])
        for view, layer in zip((*views.k, *views.v), target, strict=True)
    ]
    first = skip // page_size
    copy_on_host(staged, range(first, first + len(pages)), target, pages.tolist())
