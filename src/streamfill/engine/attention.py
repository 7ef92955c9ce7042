"""Attention on the CPU that computes only the new rows of an extend.

SGLang's `torch_native` backend pads the queries of an extend to the whole sequence, so a segment
of 50 tokens behind 1,500 cached ones costs as much as all 1,550. Streaming appends many small
segments, so that is the work it exists to save. What is different here, per forward and sequence:

1. `init_forward_metadata` reads the batch's lengths and slots once; all layers use that plan.
2. New rows are taken in tiles of `TILE_ROWS`. A tile attends to the keys up to its own last row, so
   neither cached queries nor the masked half of the scores are computed.
3. A tile's mask is a slice of one buffer that lives as long as the backend (`TileMasks`).
4. A single row (decode, "prompt + first token") needs no mask: the queries that share a
   key head become the rows of one small product.
5. Keys and values that lie in adjacent slots are read in place, others are gathered.

Encoder-only and cross attention, encoder-decoder batches and SGLang's sliding-window pools go to
SGLang's own code. Logit soft-capping, which that code ignores without a word, is refused.
Dependences on SGLang 0.5.16: `TorchNativeAttnBackend` and its attributes `req_to_token_pool`,
`token_to_kv_pool`, `use_sliding_window_kv_pool`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

from streamfill.engine.attention_masks import TILE_ROWS, TileMasks
from streamfill.engine.attention_plan import SequencePlan, plan_batch

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

ATTENTION_BACKEND_NAME: Final = "torch_native"
"""SGLang's name for attention without Triton. Ours takes it over instead of adding a name, because
SGLang chooses Triton-free code for slots, positions and graphs by comparing with this very name."""


class StreamfillCpuAttention(TorchNativeAttnBackend):  # type: ignore[misc]
    """SGLang attention backend for the CPU; owned by the model runner, used by its thread only."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        self._masks = TileMasks()
        self._planned_batch: ForwardBatch | None = None
        self._plan: tuple[SequencePlan, ...] = ()

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plans the batch. SGLang calls it once before the layers of a forward."""
        super().init_forward_metadata(forward_batch)
        self._planned_batch = forward_batch
        self._plan = plan_batch(forward_batch, self.req_to_token_pool.req_to_token)

    def forward_extend(  # noqa: PLR0917 - SGLang's signature
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of all new tokens of a batch in one layer.

        Args:
            q: [num_new_tokens, num_heads * qk_head_dim].
            k: [num_new_tokens, num_kv_heads, qk_head_dim], or None where the cache has it already.
            v: [num_new_tokens, num_kv_heads, v_head_dim], or None like `k`.
            layer: the layer; its heads, scale and window are used.
            forward_batch: the batch that `init_forward_metadata` saw.
            save_kv_cache: whether `k` and `v` are to be written to their slots first.

        Returns:
            [num_new_tokens, num_heads * v_head_dim], in the dtype of `q`.

        Raises:
            NotImplementedError: the layer caps its logits.
        """
        if self._is_for_parent(layer, forward_batch):
            attended: torch.Tensor = super().forward_extend(
                q, k, v, layer, forward_batch, save_kv_cache
            )
            return attended
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache)

    def forward_decode(  # noqa: PLR0917 - SGLang's signature
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Like `forward_extend`, with exactly one new token for each sequence."""
        if self._is_for_parent(layer, forward_batch):
            attended: torch.Tensor = super().forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache
            )
            return attended
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache)

    def _is_for_parent(self, layer: RadixAttention, forward_batch: ForwardBatch) -> bool:
        if layer.logit_cap > 0:
            raise NotImplementedError(
                f"layer {layer.layer_id} caps its logits at {layer.logit_cap}, which no CPU "
                "attention here computes; serve this model on a GPU"
            )
        return bool(
            layer.is_cross_attention
            or layer.attn_type == AttentionType.ENCODER_ONLY
            or forward_batch.encoder_lens is not None
            or self.use_sliding_window_kv_pool
        )

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        *,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        if self._planned_batch is not forward_batch:  # some paths of SGLang skip the call
            self.init_forward_metadata(forward_batch)
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output = q.new_empty(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        key_cache = pool.get_key_buffer(layer.layer_id)
        value_cache = pool.get_value_buffer(layer.layer_id)
        for sequence in self._plan:
            self._attend(sequence, layer, query, key_cache, value_cache, output=output)
        return output.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _attend(
        self,
        sequence: SequencePlan,
        layer: RadixAttention,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        *,
        output: torch.Tensor,
    ) -> None:
        """Fills the sequence's rows of `output` [num_new_tokens, num_heads, v_head_dim]."""
        window = layer.sliding_window_size if layer.sliding_window_size > -1 else None
        num_prefix = sequence.num_prefix_tokens
        num_tokens = num_prefix + sequence.num_new_tokens
        oldest = 0 if window is None else max(0, num_prefix - window)
        keys = sequence.rows_of(key_cache, oldest, num_tokens).to(query.dtype)
        values = sequence.rows_of(value_cache, oldest, num_tokens).to(query.dtype)
        for tile_start in range(0, sequence.num_new_tokens, TILE_ROWS):
            num_rows = min(TILE_ROWS, sequence.num_new_tokens - tile_start)
            first_token = num_prefix + tile_start
            from_token = 0 if window is None else max(0, first_token - window)
            row = sequence.first_row + tile_start
            tile_keys = keys[from_token - oldest : first_token + num_rows - oldest]
            tile_values = values[from_token - oldest : first_token + num_rows - oldest]
            tile_query = query[row : row + num_rows]
            if num_rows == 1:
                output[row] = _attend_one_row(tile_query, tile_keys, tile_values, layer.scaling)
                continue
            mask = self._masks.tile_mask(
                window, num_rows, first_token - from_token, query.dtype, query.device
            )
            output[row : row + num_rows] = scaled_dot_product_attention(
                tile_query.transpose(0, 1).unsqueeze(0),
                tile_keys.transpose(0, 1).unsqueeze(0),
                tile_values.transpose(0, 1).unsqueeze(0),
                attn_mask=mask,
                scale=layer.scaling,
                enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            )[0].transpose(0, 1)


def create_attention(model_runner: ModelRunner) -> StreamfillCpuAttention:
    """The factory that SGLang's attention registry calls, once for each model runner."""
    return StreamfillCpuAttention(model_runner)


def _attend_one_row(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of one query row to all keys, without a mask.

    Args:
        query: [1, num_heads, qk_head_dim]; as many heads in a row share a key head as there are
            heads for each.
        keys: [num_tokens, num_kv_heads, qk_head_dim].
        values: [num_tokens, num_kv_heads, v_head_dim].
        scaling: factor of the scores.

    Returns:
        [num_heads, v_head_dim].
    """
    num_heads, num_kv_heads = query.shape[1], keys.shape[1]
    return scaled_dot_product_attention(
        query.reshape(1, num_kv_heads, num_heads // num_kv_heads, query.shape[2]),
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        scale=scaling,
    ).reshape(num_heads, values.shape[2])
