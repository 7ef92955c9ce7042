"""Which model folder the user means, checked before any server is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from streamfill.errors import ConfigError
from streamfill.models.default import ensure_default_model
from streamfill.models.folder import CONFIG_FILE, SENTENCEPIECE_FILE, TOKENIZER_FILE
from streamfill.models.progress import Progress, no_progress

_KEY: Final = "model"
_WEIGHT_PATTERNS: Final = ("*.safetensors", "*.bin", "*.pt")
_WEIGHT_INDEXES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SMALLEST_WEIGHTS_BYTES: Final = 1024
"""Below this a file is the pointer that git leaves where a large file was not fetched."""


def resolve_model(path: str | Path | None, progress: Progress = no_progress) -> Path:
    """The absolute folder of the model to serve.

    Args:
        path: a Hugging Face model folder; None means the default model, which is converted first
            where that was not done yet.
        progress: of that conversion.

    Raises:
        ConfigError: the folder, or one of the files in it, is missing; the key is ``model``.
        ModelError: the default model cannot be converted.
    """
    if path is None:
        return ensure_default_model(progress)
    folder = Path(path).expanduser().absolute()
    if not folder.exists():
        raise ConfigError(
            _KEY,
            str(path),
            "no such folder; name the folder of a downloaded Hugging Face model, or leave the "
            "option out for the default model",
        )
    if not folder.is_dir():
        raise ConfigError(_KEY, str(path), f"this is a file; name its folder, {folder.parent}")
    _check_files(folder, str(path))
    return folder


def _check_files(folder: Path, value: str) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            _KEY, value, f"the folder has no {CONFIG_FILE}; is it a Hugging Face model folder?"
        )
    if not any((folder / name).is_file() for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE)):
        raise ConfigError(
            _KEY,
            value,
            f"the folder has neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE}; "
            "copy the model's tokenizer files into it",
        )
    weights = [file for pattern in _WEIGHT_PATTERNS for file in sorted(folder.glob(pattern))]
    if not weights:
        raise ConfigError(
            _KEY, value, "the folder has no weights (*.safetensors); download them into it"
        )
    for file in weights:
        if file.stat().st_size < _SMALLEST_WEIGHTS_BYTES:
            raise ConfigError(
                _KEY, value, f"{file.name} is too small for weights; fetch it (`git lfs pull`)"
            )
    for missing in _missing_shards(folder, value):
        raise ConfigError(_KEY, value, f"the weights are incomplete: {missing} is missing")


def _missing_shards(folder: Path, value: str) -> list[str]:
    """Names of weight files that an index lists and the folder lacks."""
    for name in _WEIGHT_INDEXES:
        index = folder / name
        if not index.is_file():
            continue
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(_KEY, value, f"{name} cannot be read; fetch it again") from error
        return sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
    return []
