"""The real default model: its tokenizer, and (slow) its weights against known output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from streamfill.errors import ModelError
from streamfill.models.default import ensure_default_model
from streamfill.models.gguf_import import _hugging_face_name, _undo_rope_order, import_gguf
from tests.unit.models.numpy_llama import NumpyLlama


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!\n\n\tTabs and  spaces   ",
        "Grüße, żółć, ёлка, αβγ, שלום, مرحبا, नमस्ते, 你好，世界, こんにちは, 안녕",
        "🙂👨‍👩‍👧🇩🇪 e\u0301 ▁ literal \u2581 \ufffd",
        "<|im_start|>user\nHi<|im_end|>\n",
    ],
)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    """Any text comes back byte for byte, the sentencepiece space too."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.slow
def test_tokens_are_those_of_smollm2(tokenizer: Tokenizer) -> None:
    """Digits stand alone, special tokens are single ids, and nothing is put in front."""
    assert tokenizer.encode("12345").tokens == list("12345")
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids == [1, 4093, 2]
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.get_vocab_size() == 49152


@pytest.mark.slow
def test_ends_with_im_end(folder: Path) -> None:
    """Generation stops at <|im_end|>, and the chat template comes along."""
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in config["chat_template"]


@pytest.mark.slow
def test_weights_give_the_known_answer(folder: Path, tokenizer: Tokenizer) -> None:
    """A forward pass written from the paper finds Paris, so no matrix is permuted or swapped."""
    ids = tokenizer.encode("The capital of France is").ids
    assert tokenizer.decode(NumpyLlama(folder).greedy(ids, 2)) == " Paris."


def test_rope_order_is_undone() -> None:
    """Rows that GGUF keeps as pairs become first halves, then second halves, head by head."""
    rows = np.arange(16, dtype=np.float32).reshape(16, 1)
    undone = _undo_rope_order(rows, num_heads=2)[:, 0]
    assert undone.tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


def test_tensor_names() -> None:
    """Names follow Hugging Face; an unknown tensor is an error, not a silent loss."""
    assert _hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"
    assert _hugging_face_name("blk.7.ffn_up.weight") == "model.layers.7.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=r"blk\.0\.attn_q_norm"):
        _hugging_face_name("blk.0.attn_q_norm.weight")


def test_damaged_file(tmp_path: Path) -> None:
    """A file that is no GGUF is refused with its name."""
    source = tmp_path / "broken.gguf"
    source.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        import_gguf(source, tmp_path)
