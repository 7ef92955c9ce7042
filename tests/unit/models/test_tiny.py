"""Tiny models: real tokenizers, varied output that depends on the whole prompt."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from streamfill.models.describe import describe_model
from streamfill.models.resolve import resolve_model
from streamfill.models.tiny import make_tiny_model
from streamfill.models.tiny_corpus import CORPUS
from streamfill.models.tiny_tokenizer import TokenizerKind
from tests.unit.models.numpy_llama import NumpyLlama

KINDS: tuple[TokenizerKind, ...] = ("bpe", "sentencepiece")


def random_texts(count: int) -> list[str]:
    """Pieces of many scripts, some cut and joined in the middle of words, some pure noise."""
    rng = random.Random(0)
    letters = "".join(CORPUS) + "𝔘龍\u200d\r"
    texts = []
    for index in range(count):
        line = rng.choice(CORPUS)
        start = rng.randrange(len(line))
        joined = line[start : start + 50] + " " * rng.randrange(3) + rng.choice(CORPUS)[:20]
        texts.append("".join(rng.choices(letters, k=30)) if index % 2 else joined)
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_folder_is_a_servable_model(tmp_path: Path, kind: TokenizerKind) -> None:
    """The router's checks accept it, and its facts are those asked for."""
    folder = make_tiny_model(tmp_path, tokenizer=kind, num_layers=3, max_position=512)
    facts = describe_model(resolve_model(folder))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert facts.vocab_size == tokenizer.get_vocab_size()
    assert (facts.num_layers, facts.num_kv_heads, facts.head_dim) == (3, 2, 16)
    assert facts.context_length_tokens == 512
    assert facts.eos_ids == (2,)


@pytest.mark.parametrize("kind", KINDS)
def test_text_survives(tmp_path: Path, kind: TokenizerKind) -> None:
    """Text of any script comes back from its ids."""
    folder = make_tiny_model(tmp_path, tokenizer=kind)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in random_texts(200):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_both_forms_of_sentencepiece_agree(tmp_path: Path) -> None:
    """tokenizer.json and tokenizer.model give the same ids."""
    folder = make_tiny_model(tmp_path, tokenizer="sentencepiece")
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    slow = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in random_texts(400):
        assert fast.encode(text, add_special_tokens=False).ids == slow.encode(text)


@pytest.mark.parametrize("seed", range(3))
def test_output_is_varied(tmp_path: Path, seed: int) -> None:
    """Greedy output is neither one token nor a short loop, and never a special token."""
    model = NumpyLlama(make_tiny_model(tmp_path, seed=seed))
    output = model.greedy(list(range(300, 340)), 48)
    assert len(set(output)) > 24
    assert min(output) >= 3


def test_output_depends_on_the_first_token(tmp_path: Path) -> None:
    """One other token at the far end of the prompt changes the text: stale KV would show."""
    model = NumpyLlama(make_tiny_model(tmp_path))
    rng = random.Random(0)
    prompt = [rng.randrange(3, 1000) for _ in range(200)]
    other = [prompt[0] + 1, *prompt[1:]]
    assert model.greedy(prompt, 16) != model.greedy(other, 16)


def test_same_arguments_same_files(tmp_path: Path) -> None:
    """A model is made of its arguments alone; the seed changes the weights only."""
    one, two, three = (
        make_tiny_model(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for file in sorted(path.name for path in one.iterdir()):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    assert (one / "model.safetensors").read_bytes() != (three / "model.safetensors").read_bytes()
    assert (one / "tokenizer.json").read_bytes() == (three / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3, "kv_heads": 2}, "3 heads"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"vocab_size": 100}, "vocab_size 100"),
        ({"vocab_size": 300, "tokenizer": "sentencepiece"}, "vocab_size 300"),
        ({"tokenizer": "words"}, "'words'"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    """An impossible size is refused with its value."""
    with pytest.raises(ValueError, match=message):
        make_tiny_model(tmp_path, **arguments)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same(tmp_path: Path, kind: TokenizerKind) -> None:
    """transformers loads folder and tokenizer, and its logits equal the numpy model's."""
    import torch

    from streamfill.engine.torchvision_fix import install

    install()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_tiny_model(tmp_path, tokenizer=kind)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(CORPUS[0] + CORPUS[-1]).ids
    assert AutoTokenizer.from_pretrained(folder)(CORPUS[0] + CORPUS[-1]).input_ids == ids
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
    expected = torch.from_numpy(NumpyLlama(folder).logits(ids))
    torch.testing.assert_close(logits, expected.float(), atol=2e-3, rtol=1e-3)
