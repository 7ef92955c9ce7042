"""Builds attention calls without a model: pools, a batch, a layer and random tensors.

Tests and the benchmark drive SGLang's backend and ours with the same case. The pools, the layer and
the forward mode are SGLang's own; the batch carries only the fields that a backend reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One batch in one model.

    Attributes:
        num_heads: query heads, a multiple of `num_kv_heads`.
        num_kv_heads: key and value heads.
        head_dim: size of a head, the same for keys and values.
        lengths: `(cached tokens, new tokens)` of each sequence; new is 1 in a decode.
        decode: whether the batch is a decode instead of an extend.
        window: sliding window in tokens, or None.
        page_size: tokens whose slots are adjacent; pages are scattered over the pool.
        num_layers: layers of the pool; each has its own random keys and values.
        scattered: False puts all tokens of a sequence in adjacent slots.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    lengths: tuple[tuple[int, int], ...]
    decode: bool = False
    window: int | None = None
    page_size: int = 1
    num_layers: int = 1
    scattered: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """A shape filled with random numbers: all that a backend needs for one forward.

    Attributes:
        model_runner: stands for SGLang's; has the attributes that a backend's constructor reads.
        layers: one attention layer for each layer of the pool.
        batch: stands for SGLang's `ForwardBatch`.
        query: [num_new_tokens, num_heads * head_dim].
        key: [num_new_tokens, num_kv_heads, head_dim].
        value: like `key`.
    """

    model_runner: Any
    layers: tuple[Any, ...]
    batch: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def run(self, backend: Any) -> torch.Tensor:
        """One forward of all layers; returns the last one's [num_new_tokens, heads * head_dim]."""
        backend.init_forward_metadata(self.batch)
        output = self.query
        for layer in self.layers:
            output = backend.forward(self.query, self.key, self.value, layer, self.batch)
        return output


def build_case(shape: AttentionShape, seed: int = 0) -> AttentionCase:
    """Random pools that hold the cached tokens of `shape`; equal seeds give equal numbers."""
    generator = torch.Generator().manual_seed(seed)
    seq_lens = [cached + new for cached, new in shape.lengths]
    num_new = sum(new for _, new in shape.lengths)
    pages_of = [-(-seq_len // shape.page_size) for seq_len in seq_lens]
    num_pages = 2 * sum(pages_of) + 1
    order = torch.arange(1, num_pages)
    if shape.scattered:
        order = order[torch.randperm(num_pages - 1, generator=generator)]
    requests = ReqToTokenPool(len(seq_lens), max(seq_lens) + 1, "cpu", enable_memory_saver=False)
    new_slots: list[torch.Tensor] = []
    first_page = 0
    for index, (cached, new) in enumerate(shape.lengths):
        pages = order[first_page : first_page + pages_of[index]]
        first_page += pages_of[index]
        slots = (pages.unsqueeze(1) * shape.page_size + torch.arange(shape.page_size)).view(-1)
        requests.req_to_token[index + 1, : cached + new] = slots[: cached + new].int()
        new_slots.append(slots[cached : cached + new])
    pool = MHATokenToKVPool(
        num_pages * shape.page_size,
        page_size=shape.page_size,
        dtype=torch.float32,
        head_num=shape.num_kv_heads,
        head_dim=shape.head_dim,
        layer_num=shape.num_layers,
        device="cpu",
        enable_memory_saver=False,
    )
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.normal_(generator=generator)
    layers = tuple(
        RadixAttention(
            shape.num_heads,
            shape.head_dim,
            shape.head_dim**-0.5,
            num_kv_heads=shape.num_kv_heads,
            layer_id=layer_id,
            sliding_window_size=-1 if shape.window is None else shape.window,
        )
        for layer_id in range(shape.num_layers)
    )
    kv_shape = (num_new, shape.num_kv_heads, shape.head_dim)
    return AttentionCase(
        model_runner=SimpleNamespace(
            device="cpu", req_to_token_pool=requests, token_to_kv_pool=pool
        ),
        layers=layers,
        batch=SimpleNamespace(
            forward_mode=ForwardMode.DECODE if shape.decode else ForwardMode.EXTEND,
            req_pool_indices=torch.arange(1, len(seq_lens) + 1),
            seq_lens=torch.tensor(seq_lens),
            extend_prefix_lens=torch.tensor([cached for cached, _ in shape.lengths]),
            extend_seq_lens=torch.tensor([new for _, new in shape.lengths]),
            encoder_lens=None,
            out_cache_loc=torch.cat(new_slots),
        ),
        query=torch.randn(num_new, shape.num_heads * shape.head_dim, generator=generator),
        key=torch.randn(kv_shape, generator=generator),
        value=torch.randn(kv_shape, generator=generator),
    )
