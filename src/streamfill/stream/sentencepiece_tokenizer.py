"""A tokenizer from a sentencepiece `tokenizer.model`.

Added tokens are cut out of the text first (leftmost, longest), the model encodes what is between
them. Like `transformers` does for such models, control pieces such as ``<s>`` count as added
tokens. The dummy space is put before each part that the model sees.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from streamfill.errors import InvalidArgumentError, ModelError
from streamfill.stream.cut_rule import METASPACE, AddedToken, CutRule, UnprovableError
from streamfill.stream.model_files import DeclaredToken, ModelFiles
from streamfill.stream.sentencepiece_cut_rule import SentencePieceSpec, sentencepiece_cut_rule
from streamfill.stream.text_decoder import ByteFallbackDecoder, TextDecoder


class SentencePieceTokenizer:
    """See `TextTokenizer`."""

    def __init__(self, model: bytes, files: ModelFiles | None = None) -> None:
        """Args:
        model: the content of `tokenizer.model`.
        files: what else the model folder says about special tokens.
        """
        files = files or ModelFiles({}, {}, frozenset())
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(model)
        proto = model_pb2.ModelProto.FromString(model)
        num_pieces = self._model.get_piece_size()
        declared = _declared_tokens(self._model, files)
        self._added_ids = {each.token.content: each.token_id for each in declared}
        self._added_texts = {each.token_id: each.token.content for each in declared}
        self._special_ids = frozenset(each.token_id for each in declared if each.special)
        self._vocab_size = max([num_pieces - 1, *self._added_texts]) + 1
        longest_first = sorted(self._added_ids, key=len, reverse=True)
        self._added_pattern = (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
            if longest_first
            else None
        )
        self._bos_id = self._named_id(files.named_token("bos_token"), self._model.bos_id())
        eos_id = self._named_id(files.named_token("eos_token"), self._model.eos_id())
        self._eos_ids = files.eos_ids | (set() if eos_id is None else {eos_id})
        wants_bos = bool(files.tokenizer_config.get("add_bos_token", True))
        wants_eos = bool(files.tokenizer_config.get("add_eos_token", False))
        self._prefix = [self._bos_id] if wants_bos and self._bos_id is not None else []
        self._suffix = [eos_id] if wants_eos and eos_id is not None else []
        normalizer = proto.normalizer_spec
        self._strip_first_space = bool(
            normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
        )
        self._strip_leading = bool(normalizer.remove_extra_whitespaces)
        self._cut_rule: CutRule | None = None
        self._whole_only_reason = ""
        spec = SentencePieceSpec(
            is_bpe=proto.trainer_spec.model_type == model_pb2.TrainerSpec.BPE,
            pieces={piece.piece: n for n, piece in enumerate(proto.pieces)},
            normalizer_name=normalizer.name,
            has_char_map=bool(normalizer.precompiled_charsmap),
            whitespace_is_suffix=proto.trainer_spec.treat_whitespace_as_suffix,
        )
        try:
            self._cut_rule = sentencepiece_cut_rule(
                spec, self._model.normalize, (each.token for each in declared)
            )
        except UnprovableError as error:
            self._whole_only_reason = str(error)

    @classmethod
    def load(cls, folder: Path) -> SentencePieceTokenizer:
        """Reads `tokenizer.model` and its neighbours.

        Raises:
            ModelError: a file cannot be read.
        """
        path = folder / "tokenizer.model"
        try:
            return cls(path.read_bytes(), ModelFiles.read(folder))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error

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
        ids: list[int] = []
        parts = [text] if self._added_pattern is None else self._added_pattern.split(text)
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(self._added_ids[part])
            elif part:
                ids.extend(self._model.encode(part, out_type=int))
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def affixes(self) -> tuple[list[int], list[int]] | None:
        """See `TextTokenizer`."""
        return list(self._prefix), list(self._suffix)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """See `TextTokenizer`."""
        decoder = self.new_decoder(skip_special_tokens=skip_special_tokens)
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def token_bytes(self, token_id: int) -> bytes:
        """See `TextTokenizer`."""
        piece = self._piece(token_id)
        return bytes([piece]) if isinstance(piece, int) else piece.encode("utf-8")

    def is_special(self, token_id: int) -> bool:
        """See `TextTokenizer`."""
        return token_id in self._special_ids

    def new_decoder(self, *, skip_special_tokens: bool) -> TextDecoder:
        """See `TextTokenizer`."""

        def piece_of_id(token_id: int) -> str | int | None:
            if skip_special_tokens and token_id in self._special_ids:
                return None
            return self._piece(token_id)

        return ByteFallbackDecoder(
            piece_of_id,
            strip_first_space=self._strip_first_space or self._strip_leading,
            run_is_one=False,
        )

    def _piece(self, token_id: int) -> str | int:
        if not 0 <= token_id < self._vocab_size:
            raise InvalidArgumentError(
                f"token id {token_id} is outside the vocabulary of {self._vocab_size}",
                details={"token_id": token_id, "vocab_size": self._vocab_size},
            )
        added = self._added_texts.get(token_id)
        if added is not None or token_id >= self._model.get_piece_size():
            return added or ""
        piece = str(self._model.id_to_piece(token_id))
        if self._model.is_byte(token_id):
            return int(piece[3:5], 16)
        return piece.replace(METASPACE, " ")

    def _named_id(self, text: str | None, model_id: int) -> int | None:
        if text is not None and text in self._added_ids:
            return self._added_ids[text]
        return model_id if model_id >= 0 else None


def _declared_tokens(
    model: sentencepiece.SentencePieceProcessor, files: ModelFiles
) -> list[DeclaredToken]:
    """Added tokens of the folder's files and the model's own control and unknown pieces."""
    found = {each.token_id: each for each in files.declared_tokens()}
    for token_id in range(model.get_piece_size()):
        if token_id not in found and (model.is_control(token_id) or model.is_unknown(token_id)):
            token = AddedToken(str(model.id_to_piece(token_id)))
            found[token_id] = DeclaredToken(token_id, token, special=True)
    unsupported = [
        each.token.content
        for each in found.values()
        if each.token.lstrip or each.token.rstrip or each.token.single_word
    ]
    if unsupported:
        raise ModelError(
            f"added tokens {unsupported} use lstrip, rstrip or single_word, which a folder with "
            "only tokenizer.model cannot have here; convert it to tokenizer.json"
        )
    return [found[token_id] for token_id in sorted(found)]
