"""Turns a GGUF file of Llama architecture with a byte-level BPE tokenizer into a model folder.

transformers can read such a file too, but needs torch and half a minute for it, and its tokenizer
is not the model's: it splits numbers differently, decodes "▁" as a space and swaps the end token.
The layout of GGUF is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md .
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from streamfill.errors import ModelError
from streamfill.models.folder import (
    TOKENIZER_FILE,
    LlamaShape,
    SpecialTokens,
    write_llama_config,
    write_tokenizer_config,
    write_weights,
)
from streamfill.models.progress import Progress, no_progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from streamfill.models.folder import Weights

_CONTROL_TOKEN: Final = 3
"""GGUF's token type for tokens that never come out of ordinary text."""

_TENSOR_NAMES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSOR_NAMES: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class _Source:
    """The key-value part of a GGUF file."""

    path: Path
    fields: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The value of `key`; its absence means that the file is of another kind."""
        try:
            return self.fields[key].contents()
        except KeyError as error:
            raise ModelError(f"{self.path.name} has no entry {key!r}") from error


def import_gguf(source: Path, target: Path, progress: Progress = no_progress) -> None:
    """Writes the model folder `target`, which exists and is empty, from the file `source`.

    Quantised weights become float32, so the folder is several times as large as the file.

    Raises:
        ModelError: the file is damaged or not of the kind that is understood here.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except (ValueError, OSError) as error:
        raise ModelError(f"{source} cannot be read as GGUF: {error}") from error
    entries = _Source(source, reader.fields)
    for key, understood in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if (found := entries.get(key)) != understood:
            raise ModelError(f"{source.name}: {key} is {found!r}, understood is {understood!r}")
    shape = _read_shape(entries, is_tied=all(t.name != "output.weight" for t in reader.tensors))
    write_llama_config(target, shape)
    _write_tokenizer(entries, target, shape)
    write_weights(target, _read_weights(reader.tensors, shape, progress))


def _read_shape(entries: _Source, *, is_tied: bool) -> LlamaShape:
    hidden_size = int(entries.get("llama.embedding_length"))
    num_heads = int(entries.get("llama.attention.head_count"))
    return LlamaShape(
        vocab_size=int(entries.get("llama.vocab_size")),
        num_layers=int(entries.get("llama.block_count")),
        hidden_size=hidden_size,
        intermediate_size=int(entries.get("llama.feed_forward_length")),
        num_heads=num_heads,
        num_kv_heads=int(entries.get("llama.attention.head_count_kv")),
        head_dim=hidden_size // num_heads,
        max_position_tokens=int(entries.get("llama.context_length")),
        rope_theta=float(entries.get("llama.rope.freq_base")),
        # Stored as float32: 1e-5 reads back as 9.99…e-6.
        rms_norm_eps=float(f"{entries.get('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        is_tied=is_tied,
        bos_id=int(entries.get("tokenizer.ggml.bos_token_id")),
        eos_id=int(entries.get("tokenizer.ggml.eos_token_id")),
        pad_id=int(entries.get("tokenizer.ggml.padding_token_id")),
    )


def _read_weights(tensors: Any, shape: LlamaShape, progress: Progress) -> Weights:
    import numpy as np
    from gguf.quants import dequantize

    weights: Weights = {}
    for index, tensor in enumerate(tensors):
        progress(index, len(tensors))
        array: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
        array = array.astype(np.float32, copy=False)
        if ".attn_q." in tensor.name:
            array = _undo_rope_order(array, shape.num_heads)
        elif ".attn_k." in tensor.name:
            array = _undo_rope_order(array, shape.num_kv_heads)
        weights[_hugging_face_name(tensor.name)] = np.ascontiguousarray(array)
    progress(len(tensors), len(tensors))
    return weights


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight` there."""
    parts = name.split(".")
    try:
        if parts[0] == "blk":
            _, layer, tensor, kind = parts
            return f"model.layers.{int(layer)}.{_LAYER_TENSOR_NAMES[tensor]}.{kind}"
        tensor, kind = parts
        return f"{_TENSOR_NAMES[tensor]}.{kind}"
    except (KeyError, ValueError) as error:
        raise ModelError(f"a Llama model has no tensor {name!r}") from error


def _undo_rope_order(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of a query or key matrix, [heads * head_dim, hidden], in Hugging Face order.

    GGUF keeps the two halves of each rotated pair side by side, Hugging Face keeps all first
    halves of a head before all second ones.
    """
    rows, columns = weight.shape
    pairs = rows // num_heads // 2
    by_pair = weight.reshape(num_heads, pairs, 2, columns)
    return by_pair.swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(entries: _Source, target: Path, shape: LlamaShape) -> None:
    """Writes the tokenizer as SmolLM2's own: single digits, then GPT-2's byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = entries.get("tokenizer.ggml.tokens")
    types: list[int] = entries.get("tokenizer.ggml.token_type")
    merges: list[str] = entries.get("tokenizer.ggml.merges")
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[_split_merge(merge) for merge in merges],
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, True, True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(target / TOKENIZER_FILE))
    special = SpecialTokens(
        bos=tokens[shape.bos_id],
        eos=tokens[shape.eos_id],
        pad=tokens[shape.pad_id],
        unk=tokens[int(entries.get("tokenizer.ggml.unknown_token_id"))],
        additional=(tokens[shape.bos_id], tokens[shape.eos_id]),
        chat_template=entries.get("tokenizer.chat_template"),
        adds_bos=bool(entries.get("tokenizer.ggml.add_bos_token")),
    )
    write_tokenizer_config(
        target,
        special,
        tokenizer_class="PreTrainedTokenizerFast",
        max_tokens=shape.max_position_tokens,
    )


def _split_merge(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right
