"""Model folders: what is accepted, what is refused, and what the error says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamfill.errors import ConfigError, ModelError
from streamfill.models.describe import describe_model, read_model_facts
from streamfill.models.resolve import resolve_model
from streamfill.models.tiny import make_tiny_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def folder_with(tmp_path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A folder whose config.json is LLAMA with `changes`."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny")


def test_complete_folder_is_accepted(tiny: Path) -> None:
    """A string or a path of a complete folder gives its absolute path."""
    assert resolve_model(str(tiny)) == resolve_model(tiny) == tiny.absolute()


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer.json nor tokenizer.model"),
        ("model.safetensors", "no weights"),
    ],
)
def test_missing_file_is_named(tiny: Path, missing: str, named: str) -> None:
    """Each file that is missing stops the start with key, value and file."""
    (tiny / missing).unlink()
    with pytest.raises(ConfigError, match=named) as caught:
        resolve_model(tiny)
    assert (caught.value.key, caught.value.value) == ("model", str(tiny))


def test_no_such_folder(tmp_path: Path) -> None:
    """A path that does not exist, or is a file, is refused with a remedy."""
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_model(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="this is a file"):
        resolve_model(tmp_path / "file")


def test_pointer_in_place_of_weights(tiny: Path) -> None:
    """A file that git left as a pointer is not taken for weights."""
    (tiny / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match="git lfs pull"):
        resolve_model(tiny)


def test_missing_shard_is_named(tiny: Path) -> None:
    """A half downloaded model is refused with the name of what is missing."""
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"model-00002\.safetensors is missing"):
        resolve_model(tiny)


def test_facts(tmp_path: Path) -> None:
    """What config.json leaves out is derived; generation_config.json has the say about ends."""
    facts = describe_model(folder_with(tmp_path, {"eos_token_id": [5, 7]}))
    assert facts.head_dim == 8
    assert facts.num_kv_heads == 4
    assert facts.eos_ids == (5, 7)
    assert facts.bos_id == 1
    assert facts.dtype == "bfloat16"
    assert facts.is_plain_attention
    assert facts.kv_token_bytes(element_bytes=4) == 2 * 2 * 4 * 8 * 4


def test_no_end_and_begin_tokens(tmp_path: Path) -> None:
    """A model without them has none; id 0 is a token like any other."""
    facts = describe_model(folder_with(tmp_path, eos_token_id=None, bos_token_id=0))
    assert facts.eos_ids == ()
    assert facts.bos_id == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mamba_d_state": 16}, "recurrent state"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "recurrent state"),
        ({"hybrid_override_pattern": "M-M*"}, "recurrent state"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding-window layers"),
        ({"model_type": "gpt_oss"}, "sliding-window layers"),
        ({"sliding_window": 4096}, "4096 tokens"),
        ({"kv_lora_rank": 512}, "latent"),
    ],
)
def test_other_state_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    """A model whose state is not plain paged attention KV is refused, with the reason."""
    folder = folder_with(tmp_path, **changes)
    assert not read_model_facts(folder).is_plain_attention
    with pytest.raises(ModelError, match=why):
        describe_model(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 2},
    ],
)
def test_plain_models_are_accepted(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A window that is switched off (Qwen2) does no harm."""
    assert describe_model(folder_with(tmp_path, **changes)).is_plain_attention


@pytest.mark.parametrize("changes", [{"vocab_size": 0}, {"num_hidden_layers": "2"}])
def test_unusable_entry_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    """An entry that makes no sense is named with its value."""
    with pytest.raises(ModelError, match=next(iter(changes))):
        describe_model(folder_with(tmp_path, **changes))


def test_damaged_configuration(tmp_path: Path) -> None:
    """A config.json that is no JSON object is an error with its path."""
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"config\.json"):
        describe_model(tmp_path)
