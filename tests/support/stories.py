"""Random stories: how the context of one stream arrives, and what prompt it comes to in the end."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from random import Random

from streamfill.api.types import Mode
from streamfill.models.tiny_corpus import CORPUS
from streamfill.stream.tokenizer import TextTokenizer

Piece = str | tuple[int, ...]
"""Text or token ids."""

_SHARE_OF_IDS = 0.2
"""Of pieces that are sent as token ids."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """One stream's context, piece by piece."""

    mode: Mode
    pieces: tuple[Piece, ...]
    """At least one. Of an update stream each is the whole context."""
    gaps_s: tuple[float, ...]
    """Pause before each piece."""
    commit_brings_last: bool
    """The last piece travels with the commit."""

    @property
    def text(self) -> str | None:
        """The final prompt as one text; None when token ids are part of it."""
        pieces = self._final_pieces()
        texts = [piece for piece in pieces if isinstance(piece, str)]
        return "".join(texts) if len(texts) == len(pieces) else None

    def token_ids(self, tokenizer: TextTokenizer) -> list[int]:
        """The final prompt: each run of text tokenised at once, token ids as they are."""
        ids: list[int] = []
        pieces = [piece for piece in self._final_pieces() if piece]
        for is_text, run in groupby(pieces, lambda piece: isinstance(piece, str)):
            if is_text:
                text = "".join(piece for piece in run if isinstance(piece, str))
                ids += tokenizer.encode(text, add_special_tokens=not ids)
            else:
                ids += [
                    token_id for piece in run if not isinstance(piece, str) for token_id in piece
                ]
        return ids

    def _final_pieces(self) -> tuple[Piece, ...]:
        return self.pieces if self.mode == "append" else self.pieces[-1:]


class StoryTeller:
    """Makes stories up; the same seed tells the same ones."""

    def __init__(self, tokenizer: TextTokenizer, seed: int, *, longest_gap_s: float = 0.05) -> None:
        self._tokenizer = tokenizer
        self._random = Random(seed)
        self._longest_gap_s = longest_gap_s

    def story(self, mode: Mode, num_pieces: int, num_tokens: int) -> Story:
        """A story whose prompt has about ``num_tokens`` tokens in the end."""
        random = self._random
        if mode == "append":
            texts = self._cut(self.text(num_tokens), num_pieces)
        else:
            texts = self._versions(num_pieces, num_tokens)
        pieces = tuple(self._maybe_as_ids(text) for text in texts)
        if not any(pieces[-1:] if mode == "update" else pieces):
            pieces = (*pieces[:-1], "Why?")
        return Story(
            mode=mode,
            pieces=pieces,
            gaps_s=tuple(random.uniform(0, self._longest_gap_s) for _ in pieces),
            commit_brings_last=random.random() < 0.5,
        )

    def text(self, num_tokens: int) -> str:
        """Sentences of many languages, about ``num_tokens`` tokens of them."""
        random = self._random
        sentences: list[str] = []
        length = 0
        while length < max(1, num_tokens):
            sentences.append(random.choice(CORPUS) + random.choice([" ", "\n", "\n\n", "  ", ""]))
            length += len(self._tokenizer.encode(sentences[-1], add_special_tokens=False))
        text = "".join(sentences)
        return text[: max(1, len(text) * num_tokens // length)]

    def _cut(self, text: str, num_pieces: int) -> list[str]:
        """Anywhere between two code points: inside words, clusters, and twice at one place too."""
        places = sorted(self._random.randint(0, len(text)) for _ in range(num_pieces - 1))
        return [text[begin:end] for begin, end in pairwise([0, *places, len(text)])]

    def _versions(self, num_versions: int, num_tokens: int) -> list[str]:
        """Ever new rankings and edits of the same context."""
        random = self._random
        versions = [self.text(num_tokens)]
        while len(versions) < num_versions:
            old = versions[-1]
            place = random.randint(0, len(old))
            match random.randrange(6):
                case 0:  # grows
                    new = old + self.text(num_tokens // 4)
                case 1:  # loses its end
                    new = old[:place]
                case 2:  # is edited
                    new = old[:place] + self.text(num_tokens // 8) + old[place + 20 :]
                case 3:  # is ranked anew
                    new = old[place:] + old[:place]
                case 4:  # goes back to what it was
                    new = random.choice(versions)
                case _:  # is another one
                    new = self.text(num_tokens)
            longest = 2 * len(versions[0])
            versions.append(new[:longest])
        return versions

    def _maybe_as_ids(self, text: str) -> Piece:
        if self._random.random() < _SHARE_OF_IDS:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return text
