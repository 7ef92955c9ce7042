"""A tokenizer from a Hugging Face `tokenizer.json`, through the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer

from streamfill.errors import InvalidArgumentError, ModelError
from streamfill.stream.byte_alphabet import BYTE_OF_CHAR, bytes_of
from streamfill.stream.cut_rule import METASPACE, CutRule, UnprovableError
from streamfill.stream.hf_cut_rule import hf_cut_rule
from streamfill.stream.model_files import ModelFiles
from streamfill.stream.text_decoder import (
    ByteFallbackDecoder,
    ByteLevelDecoder,
    TextDecoder,
    WholeTextDecoder,
)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_FALLBACK_DECODERS = ["Replace", "ByteFallback", "Fuse"]


class HfTokenizer:
    """See `TextTokenizer`."""

    def __init__(self, tokenizer: Tokenizer, files: ModelFiles | None = None) -> None:
        """Args:
        tokenizer: owned by this object from now on; truncation and padding are switched off.
        files: what else the model folder says about special tokens.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        files = files or ModelFiles({}, {}, frozenset())
        _add_missing(tokenizer, files)
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {token_id: token.content for token_id, token in added.items()}
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self._vocab_size = max(vocab.values(), default=-1) + 1
        self._bos_id = _id_of(tokenizer, files.named_token("bos_token"))
        eos_id = _id_of(tokenizer, files.named_token("eos_token"))
        self._eos_ids = files.eos_ids | (set() if eos_id is None else {eos_id})
        spec = json.loads(tokenizer.to_str())
        self._decoder_kind = _decoder_kind(spec.get("decoder"), vocab, self._added)
        self._has_byte_tokens = _decodes_bytes(spec.get("decoder"))
        self._cut_rule: CutRule | None = None
        self._whole_only_reason = ""
        try:
            self._cut_rule = hf_cut_rule(spec, self._normalize)
        except UnprovableError as error:
            self._whole_only_reason = str(error)

    @classmethod
    def load(cls, folder: Path) -> HfTokenizer:
        """Reads `tokenizer.json` and its neighbours.

        Raises:
            ModelError: a file cannot be read.
        """
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise ModelError(f"{path} cannot be read: {error}") from error
        return cls(tokenizer, ModelFiles.read(folder))

    @property
    def vocab_size(self) -> int:
        """See `TextTokenizer`."""
        return self._vocab_size

    @property
    def eos_ids(self) -> frozenset[int]:
        """See `TextTokenizer`."""
        return self._eos_ids

    @property
    def bos_id(self) -> int | None:
        """See `TextTokenizer`."""
        return self._bos_id

    @property
    def special_ids(self) -> frozenset[int]:
        """See `TextTokenizer`."""
        return self._special_ids

    @property
    def cut_rule(self) -> CutRule | None:
        """See `TextTokenizer`."""
        return self._cut_rule

    @property
    def whole_only_reason(self) -> str:
        """See `TextTokenizer`."""
        return self._whole_only_reason

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `TextTokenizer`."""
        # A batch of one: nothing else leaves out where each token is, a sixth of the time.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)

    def affixes(self) -> tuple[list[int], list[int]] | None:
        """See `TextTokenizer`."""
        found = self._affixes
        return None if found is None else (list(found[0]), list(found[1]))

    @cached_property
    def _affixes(self) -> tuple[list[int], list[int]] | None:
        both = self.encode("", add_special_tokens=True)
        for probe in ("x", "x y", "0"):
            body = self.encode(probe, add_special_tokens=False)
            full = self.encode(probe, add_special_tokens=True)
            num_before = _find(full, body)
            if num_before is None or full[:num_before] + full[num_before + len(body) :] != both:
                return None
        return both[:num_before], both[num_before:]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """See `TextTokenizer`."""
        for token_id in ids:
            self._check(token_id)
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """See `TextTokenizer`."""
        piece = self._piece(token_id)
        if self._decoder_kind == "bytes":
            return piece if isinstance(piece, bytes) else b""
        return bytes([piece]) if isinstance(piece, int) else str(piece or "").encode("utf-8")

    def is_special(self, token_id: int) -> bool:
        """See `TextTokenizer`."""
        return token_id in self._special_ids

    def new_decoder(self, *, skip_special_tokens: bool) -> TextDecoder:
        """See `TextTokenizer`."""
        if self._decoder_kind == "whole":
            return WholeTextDecoder(
                lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens)
            )

        def hidden(token_id: int) -> bool:
            return skip_special_tokens and token_id in self._special_ids

        if self._decoder_kind == "bytes":
            return ByteLevelDecoder(lambda i: b"" if hidden(i) else self.token_bytes(i))

        def text_piece(token_id: int) -> str | int | None:
            piece = None if hidden(token_id) else self._piece(token_id)
            return None if isinstance(piece, bytes) else piece

        return ByteFallbackDecoder(
            text_piece,
            strip_first_space=self._decoder_kind == "fallback-strip",
            run_is_one=True,
        )

    def _piece(self, token_id: int) -> str | int | bytes | None:
        self._check(token_id)
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return None
        if self._decoder_kind == "bytes":
            return bytes_of(token)
        byte = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        return int(byte[1], 16) if byte else str(token.replace(METASPACE, " "))

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < self._vocab_size:
            raise InvalidArgumentError(
                f"token id {token_id} is outside the vocabulary of {self._vocab_size}",
                details={"token_id": token_id, "vocab_size": self._vocab_size},
            )

    def _normalize(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))


def _decoder_kind(
    spec: Mapping[str, Any] | None, vocab: Mapping[str, int], added: Mapping[int, str]
) -> str:
    """Which `TextDecoder` does what the library's decoder does; "whole" when none is known."""
    parts = _parts(spec)
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return "bytes"
    if kinds[-1:] == ["ByteLevel"] and set(kinds[:-1]) <= {"ByteFallback", "Fuse", "Replace"}:
        # Fused tokens are read as one: a single character outside the alphabet would turn all of
        # them into plain text. With no such character the other parts have nothing to do.
        plain = all(char in BYTE_OF_CHAR for text in (*vocab, *added.values()) for char in text)
        replaces = [part for part in parts if part["type"] == "Replace"]
        harmless = all(_replaces_metaspace(part) for part in replaces)
        no_byte_tokens = not any(_BYTE_TOKEN.fullmatch(token) for token in vocab)
        return "bytes" if plain and harmless and no_byte_tokens else "whole"
    if kinds[:3] == _FALLBACK_DECODERS and _replaces_metaspace(parts[0]):
        if len(kinds) == 3:
            return "fallback"
        strip = parts[3]
        if kinds[3:] == ["Strip"] and (strip["content"], strip["start"], strip["stop"]) == (
            " ",
            1,
            0,
        ):
            return "fallback-strip"
    return "whole"


def _decodes_bytes(spec: Mapping[str, Any] | None) -> bool:
    return any(part["type"] == "ByteFallback" for part in _parts(spec))


def _parts(spec: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if spec is None:
        return []
    return list(spec["decoders"]) if spec["type"] == "Sequence" else [spec]


def _replaces_metaspace(part: Mapping[str, Any]) -> bool:
    return bool(part["pattern"] == {"String": METASPACE} and part["content"] == " ")


def _add_missing(tokenizer: Tokenizer, files: ModelFiles) -> None:
    """Adds the tokens that only `tokenizer_config.json` knows, in the order of their ids."""
    known = tokenizer.get_added_tokens_decoder()
    for declared in files.declared_tokens():
        if declared.token_id in known:
            continue
        token = LibraryToken(
            declared.token.content,
            single_word=declared.token.single_word,
            lstrip=declared.token.lstrip,
            rstrip=declared.token.rstrip,
            normalized=declared.token.normalized,
            special=declared.special,
        )
        if declared.special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])


def _id_of(tokenizer: Tokenizer, text: str | None) -> int | None:
    return None if text is None else tokenizer.token_to_id(text)


def _find(ids: list[int], part: list[int]) -> int | None:
    """Where `part` stands in `ids`, if anywhere."""
    ends = len(ids) - len(part) + 1
    return next((n for n in range(ends) if ids[n : n + len(part)] == part), None)
