"""A Llama forward pass in numpy: a second opinion on model folders, without torch.

After "LLaMA: Open and Efficient Foundation Language Models", https://arxiv.org/abs/2302.13971, with
grouped-query attention and Hugging Face's order of rotary halves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float32]


class NumpyLlama:
    """Recomputes the whole sequence for each token; for sequences of some hundred tokens."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights: dict[str, Array] = load_file(folder / "model.safetensors")

    def logits(self, ids: list[int]) -> Array:
        """Logits of the next token at each position, [tokens, vocab]."""
        hidden = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            normed = self._norm(hidden, f"{prefix}.input_layernorm.weight")
            hidden = hidden + self._attention(normed, f"{prefix}.self_attn")
            normed = self._norm(hidden, f"{prefix}.post_attention_layernorm.weight")
            hidden = hidden + self._mlp(normed, f"{prefix}.mlp")
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        return self._linear(self._norm(hidden, "model.norm.weight"), head)

    def greedy(self, ids: list[int], num_tokens: int) -> list[int]:
        """The next `num_tokens` most likely tokens."""
        out = list(ids)
        for _ in range(num_tokens):
            out.append(int(self.logits(out)[-1].argmax()))
        return out[len(ids) :]

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        normed: Array = x / scale * self.weights[name]
        return normed

    def _mlp(self, x: Array, prefix: str) -> Array:
        gate = self._linear(x, f"{prefix}.gate_proj")
        return self._linear(
            gate / (1 + np.exp(-gate)) * self._linear(x, f"{prefix}.up_proj"), f"{prefix}.down_proj"
        )

    def _attention(self, x: Array, prefix: str) -> Array:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        query = self._rotate(self._heads(x, f"{prefix}.q_proj"))
        key = np.repeat(self._rotate(self._heads(x, f"{prefix}.k_proj")), heads // kv_heads, 0)
        value = np.repeat(self._heads(x, f"{prefix}.v_proj"), heads // kv_heads, 0)
        scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ value
        return self._linear(mixed.swapaxes(0, 1).reshape(len(x), -1), f"{prefix}.o_proj")

    def _heads(self, x: Array, name: str) -> Array:
        """[heads, tokens, head_dim]"""
        return self._linear(x, name).reshape(len(x), -1, self.config["head_dim"]).swapaxes(0, 1)

    def _rotate(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        frequencies = self.config["rope_theta"] ** (-np.arange(half) / half)
        angles = np.arange(x.shape[1])[:, None] * frequencies
        left, right = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        rotated = np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
        return rotated.astype(np.float32)
