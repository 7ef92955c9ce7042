"""Searches an index step by step, wider each time. The one border to faiss."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from streamfill.traces.collect.embedding import Vectors

_HNSW_NEIGHBOURS: Final = 4
_HNSW_BUILD_BREADTH: Final = 16
"""A sparse graph, as a large one is in proportion: few thousand vectors in a dense graph are found
at the first step."""
_HNSW_MAX_BREADTH: Final = 1024
_CELLS_PER_ROOT: Final = 4
"""Cells of the IVF index, times the root of the number of vectors: the advice of faiss."""


class IndexKind(StrEnum):
    """What is widened from step to step."""

    IVF = "ivf"
    """Cells that are probed: 1, 2, 4, … all of them."""
    HNSW = "hnsw"
    """Candidates that are kept: k, 2k, 4k, …"""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Step:
    """
    Attributes:
        breadth: cells or candidates.
        found: numbers of the nearest vectors, nearest first.
        search_ms: how long this step took.
    """

    breadth: int
    found: tuple[int, ...]
    search_ms: float


class StepwiseIndex:
    """An index in memory over vectors of unit length."""

    def __init__(self, kind: IndexKind, vectors: Vectors, *, seed: int, num_threads: int) -> None:
        """Builds it; on one thread, so that the same seed gives the same index."""
        import faiss

        num_vectors, dimension = vectors.shape
        self._kind = kind
        faiss.omp_set_num_threads(1)
        if kind is IndexKind.IVF:
            num_cells = min(_CELLS_PER_ROOT * math.isqrt(num_vectors), num_vectors)
            quantizer: Any = faiss.IndexFlatIP(dimension)
            self._index: Any = faiss.IndexIVFFlat(
                quantizer, dimension, num_cells, faiss.METRIC_INNER_PRODUCT
            )
            self._index.cp.seed = seed
            # A small corpus has few vectors per cell; faiss would print a warning.
            self._index.cp.min_points_per_centroid = 1
            self._index.train(vectors)
            self._max_breadth = num_cells
        else:
            self._index = faiss.IndexHNSWFlat(
                dimension, _HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT
            )
            self._index.hnsw.efConstruction = _HNSW_BUILD_BREADTH
            self._max_breadth = min(_HNSW_MAX_BREADTH, num_vectors)
        self._index.add(vectors)
        faiss.omp_set_num_threads(num_threads)

    def steps(self, query: Vectors, top_k: int) -> Iterator[Step]:
        """The search of one query, shape (1, dimension), wider at each step."""
        breadth = 1 if self._kind is IndexKind.IVF else min(top_k, self._max_breadth)
        while True:
            if self._kind is IndexKind.IVF:
                self._index.nprobe = breadth
            else:
                self._index.hnsw.efSearch = breadth
            started_s = time.monotonic()
            _, numbers = self._index.search(query, top_k)
            search_ms = 1000.0 * (time.monotonic() - started_s)
            # -1 stands for a place that could not be filled.
            found = tuple(int(number) for number in numbers[0] if number >= 0)
            yield Step(breadth=breadth, found=found, search_ms=search_ms)
            if breadth >= self._max_breadth:
                return
            breadth = min(2 * breadth, self._max_breadth)
