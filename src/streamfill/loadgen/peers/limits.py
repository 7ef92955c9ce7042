"""Limits that all servers of a comparison share."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from streamfill.models.describe import describe_model

POOL_TOKENS: Final = 32_768
"""KV room of each server; what our own servers take on a CPU (``engine.process``)."""
_FLOAT32_BYTES: Final = 4


def context_tokens(model_path: Path) -> int:
    """Longest prompt plus answer: the model's, or what the pool holds where that is less."""
    return min(describe_model(model_path).context_length_tokens, POOL_TOKENS)


def pool_bytes(model_path: Path) -> int:
    """Size of a pool of ``POOL_TOKENS`` in float32."""
    return POOL_TOKENS * describe_model(model_path).kv_token_bytes(_FLOAT32_BYTES)
