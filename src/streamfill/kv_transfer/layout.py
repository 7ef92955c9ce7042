"""How a server rank keeps the KV of a token, and whether two ranks can exchange it. No torch."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Positive = Annotated[int, msgspec.Meta(gt=0)]


class KvLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of one rank's KV. Two ranks exchange KV only when their layouts are equal, but for the
    KV heads: of those they exchange what both hold (``slices``)."""

    num_layers: _Positive
    """Layers whose KV this rank holds."""
    num_kv_heads: _Positive
    """KV heads of this rank: already divided by the tensor-parallel size."""
    head_dim: _Positive
    v_head_dim: _Positive
    """Differs from ``head_dim`` in some models."""
    dtype: str
    """torch's name without the prefix: ``float32``, ``bfloat16``, ``float8_e4m3fn``."""
    item_bytes: _Positive
    """Bytes of one element of ``dtype``."""
    page_size: _Positive
    """Tokens per KV page. Transfers are whole pages."""

    @property
    def k_bytes_per_token(self) -> int:
        """Bytes of one token's keys over all layers."""
        return self.num_layers * self.num_kv_heads * self.head_dim * self.item_bytes

    @property
    def v_bytes_per_token(self) -> int:
        """Bytes of one token's values over all layers."""
        return self.num_layers * self.num_kv_heads * self.v_head_dim * self.item_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return self.k_bytes_per_token + self.v_bytes_per_token

    def mismatch(self, other: KvLayout) -> str | None:
        """Why KV of ``other`` is of no use here, with both values of each field; None if it can.

        Page sizes must be equal too: a radix tree holds whole pages only, so with unequal sizes
        the two trees would not agree on which prefixes exist.
        """
        differing = [
            f"{field} is {getattr(self, field)} here and {getattr(other, field)} there"
            for field in self.__struct_fields__
            if getattr(self, field) != getattr(other, field)
        ]
        return "; ".join(differing) or None

    def transfer_problem(
        self, *, num_token_ids: int, first_token: int, num_tokens: int, num_bytes: int
    ) -> str | None:
        """What is wrong with a transfer of these sizes, naming the numbers; None if nothing is.

        Args:
            num_token_ids: length of the whole sequence, the prefix that the receiver has included.
            first_token: offset of the first token whose KV is carried.
            num_tokens: tokens whose KV is carried; may be 0.
            num_bytes: bytes of their KV.
        """
        if first_token < 0 or num_tokens < 0:
            return f"negative size: first token {first_token}, {num_tokens} tokens"
        if first_token + num_tokens != num_token_ids:
            return (
                f"first token {first_token} and {num_tokens} tokens do not add up "
                f"to the {num_token_ids} token ids"
            )
        if first_token % self.page_size or num_tokens % self.page_size:
            return (
                f"first token {first_token} and {num_tokens} tokens are not whole pages "
                f"of {self.page_size} tokens"
            )
        expected_bytes = num_tokens * self.bytes_per_token
        if num_bytes != expected_bytes:
            return f"{num_tokens} tokens take {expected_bytes} bytes, not {num_bytes}"
        return None
