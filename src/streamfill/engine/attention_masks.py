"""Causal and sliding-window masks for tiles of query rows, cut out of one buffer per window.

A tile holds up to `TILE_ROWS` consecutive tokens as queries. In front of them lie `num_before`
keys, then the tokens themselves. Its mask is lower-right triangular: zeros over the keys in front,
a triangle at the right end. The masks of all tiles are therefore slices of one buffer that has many
zeros and one triangle; with a window, of one buffer that has a band. Nothing is built per forward
or layer.
"""

from __future__ import annotations

from typing import Final

import torch

TILE_ROWS: Final = 64
"""New rows computed at once. Measured best or near it for 50 to 1,550 rows (docs/benchmarks)."""

_MIN_KEYS: Final = 2048


class TileMasks:
    """Owns the mask buffers of one attention backend. They grow by doubling and are never freed."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int | None, torch.dtype, torch.device], torch.Tensor] = {}

    def tile_mask(
        self,
        window: int | None,
        num_rows: int,
        num_before: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """The additive mask of a tile: 0 where a key is seen, -inf where it is not.

        Args:
            window: how many keys before its own a row sees; None for all.
            num_rows: rows of the tile, 1 to `TILE_ROWS`.
            num_before: keys in front of the tile's first token, at most `window`.
            dtype: the dtype of the queries, which the mask must share.
            device: where the queries are.

        Returns:
            [num_rows, num_before + num_rows], a view that must not be written to.
        """
        buffer = self._buffer(window, num_before, dtype, device)
        num_zeros = buffer.shape[1] - TILE_ROWS
        return buffer[:num_rows, num_zeros - num_before : num_zeros + num_rows]

    def _buffer(
        self, window: int | None, num_before: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """[TILE_ROWS, num_zeros + TILE_ROWS] with `num_zeros >= num_before`."""
        owner = (window, dtype, device)
        buffer = self._buffers.get(owner)
        if buffer is not None and buffer.shape[1] - TILE_ROWS >= num_before:
            return buffer
        num_zeros = window
        if num_zeros is None:
            num_zeros = _MIN_KEYS
            while num_zeros < num_before:
                num_zeros *= 2
        row = torch.arange(TILE_ROWS, device=device).unsqueeze(1)
        key = torch.arange(num_zeros + TILE_ROWS, device=device).unsqueeze(0) - num_zeros
        hidden = key > row
        if window is not None:
            hidden |= key < row - window
        buffer = torch.zeros(hidden.shape, dtype=dtype, device=device)
        buffer.masked_fill_(hidden, float("-inf"))
        self._buffers[owner] = buffer
        return buffer
