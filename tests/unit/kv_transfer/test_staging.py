"""Gather and scatter between paged buffers and one staging tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamfill.kv_transfer.staging import gather, layout_of, scatter, staging_views

_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8]


def _buffers(
    num_slots: int, dim: int, dtype: torch.dtype, *, seed: int, num_layers: int = 3
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = dim * dtype.itemsize
    return [
        torch.randint(0, 256, (num_slots, 2, size), dtype=torch.uint8, generator=generator).view(
            dtype
        )
        for _ in range(num_layers)
    ]


def _bytes_of(buffers: list[Tensor]) -> list[Tensor]:
    """Bytes, since NaN differs from itself."""
    return [buffer.view(torch.uint8).clone() for buffer in buffers]


@settings(deadline=None)
@given(
    data=st.data(),
    page_size=st.sampled_from([1, 16]),
    dtype=st.sampled_from(_DTYPES),
    v_dim=st.sampled_from([4, 6]),
)
def test_round_trip_lands_in_the_given_slots_only(
    data: st.DataObject, page_size: int, dtype: torch.dtype, v_dim: int
) -> None:
    """Tokens keep their bytes in other slots of another pool; all other slots keep theirs,
    the padding page 0 among them."""
    num_pages = 8
    num_slots = (num_pages + 1) * page_size

    def pages() -> Tensor:
        chosen = data.draw(st.permutations(range(1, num_pages + 1)))[:count]
        return torch.tensor(
            [page * page_size + offset for page in chosen for offset in range(page_size)],
            dtype=torch.int64,
        )

    count = data.draw(st.integers(0, num_pages))
    from_slots, to_slots = pages(), pages()
    k_from, v_from = (_buffers(num_slots, dim, dtype, seed=dim) for dim in (4, v_dim))
    k_to, v_to = (_buffers(num_slots, dim, dtype, seed=dim + 100) for dim in (4, v_dim))
    layout = layout_of(k_from, v_from, page_size=page_size)
    expected = [_bytes_of(k_to), _bytes_of(v_to)]
    for side, source in zip(expected, (k_from, v_from), strict=True):
        for layer, buffer in zip(side, source, strict=True):
            layer[to_slots] = buffer.view(torch.uint8)[from_slots]

    staging = gather(layout, k_from, v_from, from_slots)
    assert staging.numel() == count * page_size * layout.bytes_per_token
    scatter(layout, staging, k_to, v_to, to_slots)

    for side, target in zip(expected, (k_to, v_to), strict=True):
        for layer, buffer in zip(side, _bytes_of(target), strict=True):
            assert torch.equal(layer, buffer)


def test_gather_writes_into_the_tensor_it_is_given() -> None:
    """The pool's memory is used again, so nothing may be allocated beside it."""
    k, v = _buffers(9, 4, torch.float32, seed=1), _buffers(9, 2, torch.float32, seed=2)
    layout = layout_of(k, v, page_size=1)
    out = torch.empty(3 * layout.bytes_per_token, dtype=torch.uint8)
    slots = torch.tensor([8, 1, 3])
    staging = gather(layout, k, v, slots, out=out)
    assert staging.data_ptr() == out.data_ptr()
    views = staging_views(layout, out)
    assert views.k.shape == (3, 3, 2, 4)
    assert views.v.shape == (3, 3, 2, 2)
    assert torch.equal(views.v[1, 0], v[1].view(torch.int32)[8])


def test_wrong_lengths_are_refused() -> None:
    """A staging tensor of other tokens must not be spread over these slots."""
    k = _buffers(9, 4, torch.float32, seed=1)
    layout = layout_of(k, k, page_size=1)
    with pytest.raises(ValueError, match="needed for 2 tokens"):
        gather(layout, k, k, torch.tensor([1, 2]), out=torch.empty(10, dtype=torch.uint8))
    staging = gather(layout, k, k, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="3 slots for 2 staged tokens"):
        scatter(layout, staging, k, k, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="whole tokens"):
        scatter(layout, staging[:-1], k, k, torch.tensor([1, 2]))


def test_a_slot_outside_the_buffers_is_refused() -> None:
    """Not read from, not written to."""
    k = _buffers(9, 4, torch.float32, seed=1)
    layout = layout_of(k, k, page_size=1)
    with pytest.raises(IndexError):
        gather(layout, k, k, torch.tensor([9]))


def test_layers_that_differ_have_no_layout() -> None:
    """A model with layers of several kinds is refused at the start."""
    k = _buffers(9, 4, torch.float32, seed=1)
    with pytest.raises(ValueError, match="differ"):
        layout_of(k, [*k[:2], *_buffers(9, 8, torch.float32, seed=1, num_layers=1)], page_size=1)
    with pytest.raises(ValueError, match="3 key and 2 value layers"):
        layout_of(k, k[:2], page_size=1)
