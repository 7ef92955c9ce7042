"""BM25 over a handful of texts or a whole site. The one border to bm25s."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class TextRanker:
    """Scores texts against search terms."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        # It logs each index that it builds.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._num_texts = len(texts)
        self._tokenize: Any = bm25s.tokenize
        tokens = self._tokenize(list(texts), stopwords="en", show_progress=False)
        self._vocabulary = frozenset(tokens.vocab)
        self._index: Any = None
        if any(len(ids) for ids in tokens.ids):
            self._index = bm25s.BM25()
            self._index.index(tokens, show_progress=False)

    def scores(self, terms: str) -> npt.NDArray[np.float32]:
        """One score per text, shape (number of texts,); 0 where no term occurs."""
        words = self._tokenize([terms], stopwords="en", show_progress=False, return_ids=False)[0]
        known = [word for word in words if word in self._vocabulary]
        if self._index is None or not known:
            return np.zeros(self._num_texts, dtype=np.float32)
        return np.asarray(self._index.get_scores(known), dtype=np.float32)

    def best(self, terms: str, most: int) -> list[int]:
        """Numbers of the texts that match, best first; of equal ones the first."""
        scores = self.scores(terms)
        order = np.argsort(-scores, kind="stable")[:most]
        return [int(number) for number in order if scores[number] > 0]


def filtered_passages(passages: Sequence[str], terms: str, *, most: int, floor: float) -> list[str]:
    """The passages that match best, in their order in the text.

    Args:
        most: at most so many.
        floor: those whose score is below the best one's times this are left out.
    """
    if not passages:
        return []
    ranker = TextRanker(passages)
    scores = ranker.scores(terms)
    best = float(scores.max())
    if best <= 0:
        return []
    kept = [number for number in ranker.best(terms, most) if scores[number] >= floor * best]
    return [passages[number] for number in sorted(kept)]
