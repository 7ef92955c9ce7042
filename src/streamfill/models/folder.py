"""The files of a Hugging Face model folder of Llama architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Weights = dict[str, NDArray[np.float32]]
    """Tensors by their Hugging Face names."""

CONFIG_FILE: Final = "config.json"
GENERATION_CONFIG_FILE: Final = "generation_config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
SENTENCEPIECE_FILE: Final = "tokenizer.model"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
WEIGHTS_FILE: Final = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Everything that `config.json` of a Llama model says about it."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_tokens: int
    rope_theta: float
    rms_norm_eps: float
    is_tied: bool  # the output matrix is the embedding matrix
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """What `tokenizer_config.json` says beside the tokenizer itself."""

    bos: str
    eos: str
    pad: str
    unk: str
    additional: tuple[str, ...]
    chat_template: str
    adds_bos: bool  # every encoded text starts with `bos`


def write_llama_config(folder: Path, shape: LlamaShape) -> None:
    """Writes `config.json` and `generation_config.json`."""
    ids = {
        "bos_token_id": shape.bos_id,
        "eos_token_id": shape.eos_id,
        "pad_token_id": shape.pad_id,
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_tokens,
        "mlp_bias": False,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.is_tied,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
        **ids,
    }
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / GENERATION_CONFIG_FILE, ids)


def write_tokenizer_config(
    folder: Path, tokens: SpecialTokens, *, tokenizer_class: str, max_tokens: int
) -> None:
    """Writes `tokenizer_config.json` with the chat template inside.

    Args:
        folder: the model folder.
        tokens: the special tokens.
        tokenizer_class: `PreTrainedTokenizerFast` makes transformers take `tokenizer.json` as it
            is; a named class would rebuild the pre-tokenizer after its own idea.
        max_tokens: the longest prompt that the model was made for.
    """
    config = {
        "add_bos_token": tokens.adds_bos,
        "add_eos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(tokens.additional),
        "bos_token": tokens.bos,
        "chat_template": tokens.chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens.eos,
        "legacy": False,
        "model_max_length": max_tokens,
        "pad_token": tokens.pad,
        "tokenizer_class": tokenizer_class,
        "unk_token": tokens.unk,
    }
    write_json(folder / TOKENIZER_CONFIG_FILE, config)


def write_weights(folder: Path, weights: Weights) -> None:
    """Writes `model.safetensors`, float32 and contiguous, readable by transformers and SGLang."""
    from safetensors.numpy import save_file

    # transformers refuses a file that does not say which framework its layout follows.
    path = folder / WEIGHTS_FILE
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library makes it private, unlike the other files of the folder


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as an indented UTF-8 JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
