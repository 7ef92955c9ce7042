"""Token ids to text one by one, without ever showing half a character.

A `TextDecoder` is fed pieces of one output; what it returns, put together, is what its tokenizer's
`decode` makes of all of them at once. It holds back what a later token may still change: the bytes
of an unfinished character, a run of byte tokens, a dummy space at the very beginning.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

REPLACEMENT = "\ufffd"

MAX_HELD_BYTES = 64
"""A run of byte tokens is judged as a whole by `ByteFallback`; texts in a script that the
vocabulary lacks are such runs, and a client must not wait for their end. Behind so many bytes the
finished characters are shown. Only a longer run with invalid bytes then reads differently."""


class TextDecoder(Protocol):
    """Made by `TextTokenizer.new_decoder`, fed by `IncrementalDetokenizer` with every token."""

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token; often empty."""

    def flush(self) -> str:
        """The rest; afterwards nothing is pushed any more."""


class ByteLevelDecoder:
    """For byte-level BPE: tokens are bytes, the text is their UTF-8, broken parts are replaced."""

    def __init__(self, bytes_of_id: Callable[[int], bytes]) -> None:
        self._bytes_of_id = bytes_of_id
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._utf8.decode(self._bytes_of_id(token_id))

    def flush(self) -> str:
        """A replacement character if the last character is broken."""
        return self._utf8.decode(b"", final=True)


class ByteFallbackDecoder:
    """For sentencepiece-like vocabularies: tokens are text, or single bytes of rare characters.

    Args:
        piece_of_id: the text of a token, its byte, or None for a token that shows nothing.
        strip_first_space: one space at the very beginning is the dummy prefix and is not shown.
        run_is_one: a run of byte tokens is valid as a whole or not at all (`ByteFallback`);
            otherwise each broken byte is replaced by itself (sentencepiece).
    """

    def __init__(
        self,
        piece_of_id: Callable[[int], str | int | None],
        *,
        strip_first_space: bool,
        run_is_one: bool,
    ) -> None:
        self._piece_of_id = piece_of_id
        self._strip_next_space = strip_first_space
        self._run_is_one = run_is_one
        self._run = bytearray()

    def push(self, token_id: int) -> str:
        """The text of this token and of the run of bytes that it ends."""
        piece = self._piece_of_id(token_id)
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._run.append(piece)
            if self._run_is_one and len(self._run) <= MAX_HELD_BYTES:
                return ""
            return self._shown(self._finished_characters())
        return self._shown(self._end_run() + piece)

    def flush(self) -> str:
        """The run of bytes at the end."""
        return self._shown(self._end_run())

    def _shown(self, text: str) -> str:
        if text and self._strip_next_space:
            self._strip_next_space = False
            return text.removeprefix(" ")
        return text

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        if self._run_is_one:
            try:
                return run.decode("utf-8")
            except UnicodeDecodeError:
                return REPLACEMENT * len(run)
        return _decode_per_byte(run)

    def _finished_characters(self) -> str:
        """Takes the characters off the run that no later byte can change."""
        try:
            self._run.decode("utf-8")
        except UnicodeDecodeError as error:
            unfinished = error.end == len(self._run) and error.reason == "unexpected end of data"
            end = error.start if unfinished else len(self._run)
        else:
            end = len(self._run)
        done, self._run = bytes(self._run[:end]), self._run[end:]
        return _decode_per_byte(done)


class WholeTextDecoder:
    """For decoders of unknown make: decodes everything anew for each token.

    Correct as far as more tokens only add to the text; its cost grows with the square of the
    output, which is why it is the last resort.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token_id: int) -> str:
        """What is new in the text, without an unfinished character at its end."""
        self._ids.append(token_id)
        return self._show(self._decode(self._ids).rstrip(REPLACEMENT))

    def flush(self) -> str:
        """The rest of the text."""
        return self._show(self._decode(self._ids))

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new


def _decode_per_byte(data: bytes) -> str:
    """UTF-8 in which every byte of a broken character is replaced by itself."""
    text: list[str] = []
    while data:
        try:
            text.append(data.decode("utf-8"))
            break
        except UnicodeDecodeError as error:
            text.append(data[: error.start].decode("utf-8"))
            text.append(REPLACEMENT)
            data = data[error.start + 1 :]
    return "".join(text)
