"""Real tokenizers of small vocabulary, trained on `tiny_corpus` in a fraction of a second.

Two kinds, because they differ where incremental tokenisation is hard:

- byte-level BPE, as in GPT-2 and Llama 3: a regular expression cuts the text before the merges;
- sentencepiece BPE with byte fallback, as in Llama 2: no cuts but spaces, a space before the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from streamfill.models.folder import (
    SENTENCEPIECE_FILE,
    TOKENIZER_FILE,
    SpecialTokens,
    write_tokenizer_config,
)
from streamfill.models.tiny_corpus import CORPUS

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

TokenizerKind = Literal["bpe", "sentencepiece"]

NUM_SPECIAL_TOKENS: Final = 3
"""Both kinds have their special tokens at ids 0, 1 and 2."""

_CHATML_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHATML_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA_TOKENS: Final = ("<unk>", "<s>", "</s>")
_LLAMA_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)
_CHARACTER_COVERAGE: Final = 0.985
"""Below 1, so that the rarest characters of the corpus go through the byte fallback."""


@dataclass(frozen=True)
class TinyTokenizer:
    """What the model must know of the tokenizer that was written."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int


def write_tiny_tokenizer(
    folder: Path, kind: TokenizerKind, vocab_size: int, max_tokens: int
) -> TinyTokenizer:
    """Trains a tokenizer and writes its files and `tokenizer_config.json` into `folder`.

    The same arguments give the same tokenizer. The corpus has only so many merges: a byte-level
    tokenizer then stays smaller than `vocab_size`, sentencepiece refuses it.

    Raises:
        ValueError: `vocab_size` is too small or too large for the kind, or `kind` is unknown.
    """
    if kind == "bpe":
        return _write_byte_level(folder, vocab_size, max_tokens)
    if kind == "sentencepiece":
        return _write_sentencepiece(folder, vocab_size, max_tokens)
    raise ValueError(f"tokenizer {kind!r} is neither 'bpe' nor 'sentencepiece'")


def _write_byte_level(folder: Path, vocab_size: int, max_tokens: int) -> TinyTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = 256 + len(_CHATML_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is below {smallest}: bytes and special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(_CHATML_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    unk, bos, eos = _CHATML_TOKENS
    tokens = SpecialTokens(
        bos=bos,
        eos=eos,
        pad=eos,
        unk=unk,
        additional=(bos, eos),
        chat_template=_CHATML_TEMPLATE,
        adds_bos=False,
    )
    write_tokenizer_config(
        folder, tokens, tokenizer_class="PreTrainedTokenizerFast", max_tokens=max_tokens
    )
    return TinyTokenizer(vocab_size=tokenizer.get_vocab_size(), bos_id=1, eos_id=2, pad_id=2)


def _write_sentencepiece(folder: Path, vocab_size: int, max_tokens: int) -> TinyTokenizer:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=_CHARACTER_COVERAGE,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size {vocab_size}: {error}") from error
    (folder / SENTENCEPIECE_FILE).write_bytes(model.getvalue())
    pieces = SentencePieceProcessor(model_proto=model.getvalue())
    _write_fast_twin(folder, pieces)
    unk, bos, eos = _LLAMA_TOKENS
    tokens = SpecialTokens(
        bos=bos,
        eos=eos,
        pad=eos,
        unk=unk,
        additional=(),
        chat_template=_LLAMA_TEMPLATE,
        adds_bos=True,
    )
    write_tokenizer_config(
        folder, tokens, tokenizer_class="PreTrainedTokenizerFast", max_tokens=max_tokens
    )
    return TinyTokenizer(vocab_size=pieces.get_piece_size(), bos_id=1, eos_id=2, pad_id=2)


def _write_fast_twin(folder: Path, pieces: SentencePieceProcessor) -> None:
    """Writes the `tokenizer.json` that gives the same ids as `tokenizer.model`.

    A piece of sentencepiece is learned as a merge of two others; its id tells when. So every way to
    put a piece together from two known ones is a merge, ranked by the id of the result.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    names: list[str] = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for index, name in enumerate(names)
        if not (pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index))
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    unk, bos, eos = _LLAMA_TOKENS
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
    )
    specials = [AddedToken(name, special=True, normalized=False) for name in (unk, bos, eos)]
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / TOKENIZER_FILE))
