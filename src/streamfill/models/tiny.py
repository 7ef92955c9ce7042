"""Tiny random Llama models with real tokenizers, for tests.

The weights are random, but not as a training run would start them: there a model says the same
token for ever, and a test that compares outputs compares nothing. Here

- logits are wide, so that the first and the second choice differ by far more than rounding;
- attention is sharp and outweighs the token itself, so that the output depends on tokens far back,
  and a wrong or stale KV row shows in the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from streamfill.models.folder import LlamaShape, write_llama_config, write_weights
from streamfill.models.tiny_tokenizer import (
    NUM_SPECIAL_TOKENS,
    TokenizerKind,
    write_tiny_tokenizer,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from streamfill.models.folder import Weights

# Standard deviations of what a matrix puts out, given an input of unit variance.
_EMBEDDING_STD: Final = 0.5
_QUERY_KEY_STD: Final = 1.6  # scores of about 2.5: sharp, without one token taking all
_VALUE_STD: Final = 1.5
_MLP_STD: Final = 1.0
_LOGIT_STD: Final = 4.0


def make_tiny_model(
    folder: Path,
    *,
    tokenizer: TokenizerKind = "bpe",
    seed: int = 0,
    vocab_size: int = 1024,
    num_layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    max_position: int = 8192,
) -> Path:
    """Writes a Llama model folder that transformers and SGLang load, and returns it.

    The same arguments give the same files. `vocab_size` is an upper limit; what the tokenizer
    really has is in `config.json`.

    Args:
        folder: is made where missing; files of a model in it are replaced.
        tokenizer: ``"bpe"`` (`tokenizer.json`) or ``"sentencepiece"`` (`tokenizer.model`, and a
            `tokenizer.json` that gives the same ids).
        seed: of the weights; the tokenizer does not depend on it.
        vocab_size: of the tokenizer and the model, in tokens.
        num_layers: decoder layers.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        head_dim: width of a head, even.
        max_position: context length in tokens.

    Raises:
        ValueError: the sizes do not fit together.
    """
    if heads % kv_heads:
        raise ValueError(f"{heads} heads cannot share {kv_heads} KV heads evenly")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd, which rotary embeddings do not allow")
    folder.mkdir(parents=True, exist_ok=True)
    trained = write_tiny_tokenizer(folder, tokenizer, vocab_size, max_position)
    shape = LlamaShape(
        vocab_size=trained.vocab_size,
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_tokens=max_position,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        is_tied=False,
        bos_id=trained.bos_id,
        eos_id=trained.eos_id,
        pad_id=trained.pad_id,
    )
    write_llama_config(folder, shape)
    write_weights(folder, _random_weights(shape, seed))
    return folder


def _random_weights(shape: LlamaShape, seed: int) -> Weights:
    import numpy as np

    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, std: float) -> NDArray[np.float32]:
        """[rows, columns] whose product with a vector of unit variance has this deviation."""
        return random.standard_normal((rows, columns), np.float32) * np.float32(
            std / np.sqrt(columns)
        )

    width = shape.hidden_size
    queries = shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    norm = np.ones(width, np.float32)
    weights: Weights = {
        "model.embed_tokens.weight": random.standard_normal((shape.vocab_size, width), np.float32)
        * np.float32(_EMBEDDING_STD),
        "model.norm.weight": norm.copy(),
        "lm_head.weight": matrix(shape.vocab_size, width, _LOGIT_STD),
    }
    # Never a special token: a test decides by itself how long an output is.
    weights["lm_head.weight"][:NUM_SPECIAL_TOKENS] = 0
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": norm.copy(),
            f"{prefix}.self_attn.q_proj.weight": matrix(queries, width, _QUERY_KEY_STD),
            f"{prefix}.self_attn.k_proj.weight": matrix(keys, width, _QUERY_KEY_STD),
            f"{prefix}.self_attn.v_proj.weight": matrix(keys, width, _VALUE_STD),
            f"{prefix}.self_attn.o_proj.weight": matrix(width, queries, 1.0),
            f"{prefix}.post_attention_layernorm.weight": norm.copy(),
            f"{prefix}.mlp.gate_proj.weight": matrix(shape.intermediate_size, width, _MLP_STD),
            f"{prefix}.mlp.up_proj.weight": matrix(shape.intermediate_size, width, _MLP_STD),
            f"{prefix}.mlp.down_proj.weight": matrix(width, shape.intermediate_size, _MLP_STD),
        }
    return weights
