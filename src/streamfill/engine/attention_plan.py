"""Where each sequence of a batch finds its queries, keys and values: read once, used by all layers.

Dependences on SGLang 0.5.16: `ForwardBatch.seq_lens`, `req_pool_indices`, `extend_seq_lens`,
`forward_mode`. On a CPU these are CPU tensors, so reading them waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """Where one sequence of a batch finds its queries, keys and values. Valid for one forward.

    Attributes:
        first_row: its first new token among the batch's new tokens.
        num_new_tokens: its number of new tokens, at least 0.
        num_prefix_tokens: how many tokens were in the cache before them.
        slots: int64 [num_prefix_tokens + num_new_tokens], the KV slot of each token.
        first_slot: the first of `slots` where they are adjacent and ascending, else None.
    """

    first_row: int
    num_new_tokens: int
    num_prefix_tokens: int
    slots: torch.Tensor
    first_slot: int | None

    def rows_of(self, cache: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Tokens `start` to `stop` out of `cache` [num_slots, num_heads, head_dim], in order."""
        if self.first_slot is not None:
            return cache[self.first_slot + start : self.first_slot + stop]
        return cache.index_select(0, self.slots[start:stop])


def plan_batch(forward_batch: ForwardBatch, req_to_token: torch.Tensor) -> tuple[SequencePlan, ...]:
    """Plans one forward.

    Args:
        forward_batch: an extend, a decode, a mixture of both or an idle batch.
        req_to_token: int32 [num_requests, max_tokens], the slot of each token of each request.

    Returns:
        One plan for each sequence, in the batch's order.
    """
    seq_lens: list[int] = forward_batch.seq_lens.tolist()
    if forward_batch.forward_mode.is_decode():
        new_lens = [1] * len(seq_lens)
    elif forward_batch.extend_seq_lens is None:  # an idle batch
        new_lens = [0] * len(seq_lens)
    else:
        new_lens = forward_batch.extend_seq_lens.tolist()
    plans: list[SequencePlan] = []
    first_row = 0
    for request, seq_len, new_len in zip(
        forward_batch.req_pool_indices.tolist(), seq_lens, new_lens, strict=True
    ):
        slots = req_to_token[request, :seq_len].long()
        plans.append(
            SequencePlan(
                first_row=first_row,
                num_new_tokens=new_len,
                num_prefix_tokens=seq_len - new_len,
                slots=slots,
                first_slot=_first_of_adjacent(slots),
            )
        )
        first_row += new_len
    return tuple(plans)


def _first_of_adjacent(slots: torch.Tensor) -> int | None:
    num_slots = slots.shape[0]
    if num_slots == 0:
        return None
    first = int(slots[0])
    if int(slots[-1]) - first != num_slots - 1:
        return None
    return first if bool((slots.diff() == 1).all()) else None
