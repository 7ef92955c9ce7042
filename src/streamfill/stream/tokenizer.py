"""What the router needs of a tokenizer, and how one is read from a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from streamfill.errors import InvalidArgumentError, ModelError
from streamfill.stream.cut_rule import CutRule
from streamfill.stream.text_decoder import TextDecoder


class TextTokenizer(Protocol):
    """A model's tokenizer. Called by the router's loop, any number of times; holds no state.

    The fakes of the tests are real, tiny tokenizers trained on the spot.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id, added tokens included."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer, of the tokenizer and of the model's generation settings."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are markup, not text."""

    @property
    def cut_rule(self) -> CutRule | None:
        """Where texts may be cut; None when nothing could be proved."""

    @property
    def whole_only_reason(self) -> str:
        """Why there is no `cut_rule`; empty when there is one."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a whole text.

        Args:
            text: valid Unicode, see `checked_text`.
            add_special_tokens: with what the tokenizer puts before and behind a text (BOS, EOS).
        """

    def affixes(self) -> tuple[list[int], list[int]] | None:
        """What `add_special_tokens` puts before and behind every text.

        None when it does something else than that.
        """

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `ids`; broken characters are replaced by U+FFFD.

        Raises:
            InvalidArgumentError: an id is outside the vocabulary.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for inside a text, as UTF-8, for log probabilities and tools.

        Raises:
            InvalidArgumentError: the id is outside the vocabulary.
        """

    def is_special(self, token_id: int) -> bool:
        """Whether a token is markup, not text."""

    def new_decoder(self, *, skip_special_tokens: bool) -> TextDecoder:
        """A decoder for one output."""


def load_tokenizer(model_dir: str | Path) -> TextTokenizer:
    """Reads `tokenizer.json`, or else `tokenizer.model` (sentencepiece), and checks itself.

    A tokenizer whose cuts fail the check, or about which nothing can be proved, tokenises whole
    texts only; a warning says so once.

    Raises:
        ModelError: the folder holds no tokenizer that can be read.
    """
    from streamfill.stream.self_check import without_wrong_cuts

    folder = Path(model_dir)
    if (folder / "tokenizer.json").is_file():
        from streamfill.stream.hf_tokenizer import HfTokenizer

        return without_wrong_cuts(HfTokenizer.load(folder))
    if (folder / "tokenizer.model").is_file():
        from streamfill.stream.sentencepiece_tokenizer import SentencePieceTokenizer

        return without_wrong_cuts(SentencePieceTokenizer.load(folder))
    raise ModelError(f"{folder} holds neither tokenizer.json nor tokenizer.model")


def checked_text(text: str, what: str = "text") -> str:
    """`text` itself if it is valid Unicode.

    Raises:
        InvalidArgumentError: a lone surrogate; names `what` and the place.
    """
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{what} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} "
            f"at character {error.start}",
            details={"character": error.start},
        ) from error
    return text


def text_from_utf8(data: bytes, what: str = "text") -> str:
    """`data` as text.

    Raises:
        InvalidArgumentError: not UTF-8; names `what` and the place.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            f"{what} is not UTF-8: byte 0x{data[error.start]:02X} at offset {error.start}",
            details={"offset_bytes": error.start},
        ) from error
