"""Shared by the tests of the router."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamfill.models.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a byte-level BPE tokenizer and a chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "bpe")


@pytest.fixture(scope="session")
def tiny_sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a sentencepiece tokenizer, which puts a BOS before a text."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "spm", tokenizer="sentencepiece")
