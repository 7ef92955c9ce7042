"""The staging pool's memory accounts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamfill.kv_transfer.pool import SMALLEST_BLOCK_BYTES, StagingPool, block_bytes

_LIMIT = 40 * SMALLEST_BLOCK_BYTES


@given(num_bytes=st.integers(1, 1 << 40))
def test_a_block_holds_its_bytes_and_wastes_less_than_a_quarter(num_bytes: int) -> None:
    """Few sizes, so that blocks are used again, but not much larger than needed."""
    size = block_bytes(num_bytes)
    assert size >= num_bytes
    assert size == SMALLEST_BLOCK_BYTES or size < 1.25 * num_bytes
    assert block_bytes(size) == size


@given(
    steps=st.lists(
        st.one_of(st.integers(0, _LIMIT + 1), st.none()),
        max_size=30,
    )
)
def test_accounts_are_exact_and_the_limit_holds(steps: list[int | None]) -> None:
    """A number acquires so many bytes, None gives the oldest buffer back."""
    pool = StagingPool(_LIMIT)
    held: list[torch.Tensor] = []
    for step in steps:
        if step is None:
            if held:
                pool.release(held.pop(0))
        else:
            room_bytes = _LIMIT - pool.usage().used_bytes
            staging = pool.try_acquire(step)
            assert (staging is not None) == (step <= room_bytes)
            if staging is not None:
                assert staging.numel() == step
                held.append(staging)
        usage = pool.usage()
        assert usage.used_bytes + usage.cached_bytes <= _LIMIT
        assert usage.num_used == sum(1 for staging in held if staging.numel())
    for staging in held:
        pool.release(staging)
    assert pool.usage().used_bytes == 0
    assert pool.usage().num_used == 0


def test_memory_is_used_again() -> None:
    """Fresh memory is several times slower to receive into."""
    pool = StagingPool(_LIMIT)
    first = pool.try_acquire(100_000)
    assert first is not None
    address = first.data_ptr()
    pool.release(first)
    second = pool.try_acquire(99_000)
    assert second is not None
    assert second.data_ptr() == address


def test_giving_back_twice_is_an_error() -> None:
    """The buffer may belong to somebody else by then."""
    pool = StagingPool(_LIMIT)
    staging = pool.try_acquire(10)
    assert staging is not None
    pool.release(staging)
    with pytest.raises(ValueError, match="not out of this pool"):
        pool.release(staging)
