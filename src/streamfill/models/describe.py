"""Facts about a model, read from its folder by processes that hold no model: the router, the CLI.

Only `config.json` and `generation_config.json` are read; neither torch nor transformers is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streamfill.errors import ModelError
from streamfill.models.folder import CONFIG_FILE, GENERATION_CONFIG_FILE

_STATE_SPACE_MARKS: Final = (
    "mamba_",
    "ssm_",
    "linear_attn_config",
    "linear_conv_kernel_dim",
    "linear_num_key_heads",
    "conv_L_cache",
    "hybrid_override_pattern",
    "attn_layer_period",
    "rwkv",
    "time_step_rank",
)
"""Beginnings of keys that only models with recurrent state (Mamba, linear attention) have."""

_RECURRENT_LAYERS: Final = ("mamba", "linear", "conv", "recurrent", "rwkv")
_WINDOW_POOL_TYPES: Final = frozenset(
    {
        "deepseek_v4",
        "gemma4",
        "gemma4_text",
        "gpt_oss",
        "inkling",
        "laguna",
        "llama4",
        "llama4_text",
        "mellum",
        "mimo_v2_flash",
        "step3p5",
    }
)
"""Model types for which SGLang 0.5.16 keeps a second pool for sliding-window layers."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What streamfill must know of a model besides its weights and its tokenizer."""

    path: Path
    architecture: str  # class name, e.g. LlamaForCausalLM
    vocab_size: int  # token ids are 0 … vocab_size - 1
    context_length_tokens: int
    eos_ids: tuple[int, ...]  # each of them ends an output; may be empty
    bos_id: int | None
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # of the weights on disk, e.g. bfloat16
    not_plain_because: str | None  # why its KV is not plain paged attention KV

    @property
    def is_plain_attention(self) -> bool:
        """Whether all state is paged attention KV: one K and one V row per token and layer."""
        return self.not_plain_because is None

    def kv_token_bytes(self, element_bytes: int) -> int:
        """Size of the K and V rows of one token in all layers, on one rank that holds all heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


def describe_model(folder: Path) -> ModelFacts:
    """Reads the facts and refuses a model that streamfill cannot serve yet.

    Raises:
        ModelError: `config.json` cannot be understood, or the model keeps state that is not plain
            paged attention KV (Mamba, linear attention, sliding-window pools, latent attention).
    """
    facts = read_model_facts(folder)
    if facts.not_plain_because is not None:
        raise ModelError(
            f"{facts.architecture} in {folder} cannot be served: {facts.not_plain_because}; "
            "streamfill serves models whose only state is plain paged attention KV for now"
        )
    return facts


def read_model_facts(folder: Path) -> ModelFacts:
    """Reads the facts of any model, also of one that cannot be served.

    Raises:
        ModelError: `config.json` is missing, damaged, or lacks an entry.
    """
    outer = _read_json(folder / CONFIG_FILE)
    # Multimodal models keep the language model's configuration one level down.
    config: Mapping[str, Any] = outer.get("text_config") or outer
    generation_file = folder / GENERATION_CONFIG_FILE
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    architectures = outer.get("architectures") or ["unknown"]
    num_heads = _positive(folder, config, "num_attention_heads")
    head_dim = config.get("head_dim")
    if head_dim is None:
        head_dim = _positive(folder, config, "hidden_size") // num_heads
    return ModelFacts(
        path=folder,
        architecture=str(architectures[0]),
        vocab_size=_positive(folder, config, "vocab_size"),
        context_length_tokens=_positive(folder, config, "max_position_embeddings"),
        eos_ids=_ids(generation, "eos_token_id") or _ids(config, "eos_token_id"),
        bos_id=next(iter(_ids(generation, "bos_token_id") or _ids(config, "bos_token_id")), None),
        num_layers=_positive(folder, config, "num_hidden_layers"),
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(head_dim),
        dtype=_dtype(outer, config),
        not_plain_because=_why_not_plain(config),
    )


def _why_not_plain(config: Mapping[str, Any]) -> str | None:
    """What in the configuration tells that there is other state than plain KV."""
    for key, value in config.items():
        if value not in (None, False, 0) and key.startswith(_STATE_SPACE_MARKS):
            return f"it has recurrent state ({key} in {CONFIG_FILE})"
    layer_types = {str(kind) for kind in config.get("layer_types") or ()}
    for kind in sorted(layer_types):
        if kind.startswith(_RECURRENT_LAYERS):
            return f"it has recurrent state (layer type {kind})"
    if "sliding_attention" in layer_types:
        return "it has sliding-window layers (layer type sliding_attention)"
    if config.get("model_type") in _WINDOW_POOL_TYPES:
        return f"it has sliding-window layers (model type {config['model_type']})"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return f"it attends through a sliding window of {config['sliding_window']} tokens"
    if config.get("kv_lora_rank"):
        return f"its KV is latent (kv_lora_rank = {config['kv_lora_rank']})"
    return None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def _positive(folder: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"{folder / CONFIG_FILE}: {key} is {value!r}, expected a positive number")
    return value


def _ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """One id, a list of ids, or nothing, as a tuple."""
    value = config.get(key)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _dtype(outer: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    for source in (config, outer):
        for key in ("dtype", "torch_dtype"):  # the second until transformers 4
            if source.get(key):
                return str(source[key])
    return "float32"
