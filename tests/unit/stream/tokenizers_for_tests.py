"""Tiny real tokenizers, trained in a moment on a text of many scripts."""

from __future__ import annotations

import io
import json
import os
from functools import lru_cache
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre

from streamfill.stream.hf_tokenizer import HfTokenizer
from streamfill.stream.self_check import SAMPLE
from streamfill.stream.sentencepiece_tokenizer import SentencePieceTokenizer
from streamfill.stream.tokenizer import TextTokenizer

CORPUS = [
    *SAMPLE.splitlines(keepends=True),
    "the there these those other another the the thing things nothing something anything\n",
    "don't can't won't they're we've I'll I'd it's that's you're he'll she'd we're they've\n",
    "1 12 123 1234 12345 123456 2024 1999 3.14 0.5 100 1000 10000 \n",
    "    if x == 1:\n        return foo(bar)\n\n\n    else:\n        pass\n\t\tdone\n",
    "今天天气很好。今天我们去公园。天气很好!世界很大,世界很好。\n",
    "नमस्ते दुनिया नमस्ते कैसे हैं आप कैसे हैं दुनिया। สวัสดี ภาษาไทย สวัสดี ชาวโลก\n",
    "مرحبا بالعالم مرحبا كيف حالك بالعالم 👩‍👩‍👧‍👦 👍🏽 👍 🇩🇪 e\u0301tude cafe\u0301 café\n",
] * 4

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
SMOLLM2_FOLDERS = (
    os.environ.get("STREAMFILL_HOME", ""),
    str(Path.home() / ".cache" / "streamfill"),
)


def smollm2_folder() -> Path | None:
    """The converted default model, if this machine has it."""
    found = (Path(home) / "models" / "SmolLM2-135M-Instruct" for home in SMOLLM2_FOLDERS if home)
    return next((folder for folder in found if (folder / "tokenizer.json").is_file()), None)


@lru_cache
def byte_level_bpe() -> Tokenizer:
    """GPT-2's kind, with BOS, an EOS behind, and added tokens that look at their neighbours."""
    tokenizer = _train_bytes(pre.ByteLevel(add_prefix_space=False, use_regex=True))
    tokenizer.add_tokens(
        [
            AddedToken("<mask>", lstrip=True, rstrip=False, normalized=False),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("word", single_word=True, normalized=True),
            AddedToken("  ", normalized=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")],
    )
    return tokenizer


@lru_cache
def llama3_bpe() -> Tokenizer:
    """Llama 3's kind: split by a pattern, NFC, whole pieces looked up first."""
    tokenizer = _train_bytes(_split(LLAMA3_PATTERN), normalizers.NFC())
    tokenizer.model.ignore_merges = True
    return tokenizer


@lru_cache
def o200k_bpe() -> Tokenizer:
    """GPT-4o's kind."""
    return _train_bytes(_split(O200K_PATTERN))


@lru_cache
def smollm_like_bpe() -> Tokenizer:
    """SmolLM2's kind: single digits, then GPT-2's pattern."""
    return _train_bytes(
        pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    )


@lru_cache
def deepseek_bpe() -> Tokenizer:
    """DeepSeek V3's kind: three patterns one after the other, and a prefix space."""
    patterns = [
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
        r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
    splits = [pre.Split(Regex(pattern), "isolated") for pattern in patterns]
    return _train_bytes(
        pre.Sequence([*splits, pre.ByteLevel(add_prefix_space=True, use_regex=False)])
    )


@lru_cache
def metaspace_bpe(split: bool = False, scheme: str = "first") -> Tokenizer:
    """Llama 2's kind as a tokenizer.json: BPE over the whole text, bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre.Metaspace("▁", scheme, split=split)
    tokenizer.decoder = _fallback_decoder()
    tokenizer = _train_pieces(tokenizer, pre.Metaspace("▁", scheme, split=True))
    tokenizer.pre_tokenizer = pre.Metaspace("▁", scheme, split=split)
    return tokenizer


@lru_cache
def prepend_bpe() -> Tokenizer:
    """Llama 2's older kind: the dummy space and the ▁ come from the normaliser."""
    tokenizer = Tokenizer(models.BPE(fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    tokenizer = _train_pieces(tokenizer, pre.Metaspace("▁", "always", split=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = _fallback_decoder()
    return tokenizer


@lru_cache
def metaspace_unigram() -> Tokenizer:
    """T5's kind: unigram within words, NFKC."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre.Metaspace("▁", "always", split=True)
    tokenizer.decoder = decoders.Metaspace("▁", "always")
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=[*SPECIALS, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@lru_cache
def sentencepiece_model(kind: str) -> bytes:
    """A model file: "bpe" (bytes for the rest, identity) or "unigram" or "bpe-nfkc"."""
    out = io.BytesIO()
    plain = kind == "bpe"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line.strip("\n") for line in CORPUS if line.strip()]),
        model_writer=out,
        model_type=kind.partition("-")[0],
        vocab_size=800,
        byte_fallback=plain,
        character_coverage=0.98,
        normalization_rule_name="identity" if plain else "nmt_nfkc",
        remove_extra_whitespaces=not plain,
        user_defined_symbols=["<tool>", "    "] if plain else ["<tool>"],
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


def all_tokenizers() -> dict[str, TextTokenizer]:
    """Every kind, by name."""
    found: dict[str, TextTokenizer] = {
        "byte-level": HfTokenizer(byte_level_bpe()),
        "llama3": HfTokenizer(llama3_bpe()),
        "o200k": HfTokenizer(o200k_bpe()),
        "smollm-like": HfTokenizer(smollm_like_bpe()),
        "deepseek": HfTokenizer(deepseek_bpe()),
        "metaspace": HfTokenizer(metaspace_bpe()),
        "metaspace-split": HfTokenizer(metaspace_bpe(split=True, scheme="always")),
        "prepend": HfTokenizer(prepend_bpe()),
        "metaspace-unigram": HfTokenizer(metaspace_unigram()),
        "sentencepiece-bpe": SentencePieceTokenizer(sentencepiece_model("bpe")),
        "sentencepiece-bpe-nfkc": SentencePieceTokenizer(sentencepiece_model("bpe-nfkc")),
        "sentencepiece-unigram": SentencePieceTokenizer(sentencepiece_model("unigram")),
    }
    folder = smollm2_folder()
    if folder is not None:
        found["smollm2"] = HfTokenizer.load(folder)
    return found


def _train_bytes(
    splitter: pre.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIALS,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _split(pattern: str) -> pre.PreTokenizer:
    return pre.Sequence(
        [
            pre.Split(Regex(pattern), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _train_pieces(tokenizer: Tokenizer, splitter: pre.PreTokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=120,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The trainer knows no byte pieces, so they went in as special tokens; real vocabularies have
    # them as ordinary pieces that are not looked for in the text.
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(spec))


def _fallback_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
