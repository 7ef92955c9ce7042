"""What the small JSON files of a model folder say about its special tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamfill.errors import ModelError
from streamfill.stream.cut_rule import AddedToken

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_ID_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class DeclaredToken:
    """An added token as `tokenizer_config.json` or `added_tokens.json` declares it."""

    token_id: int
    token: AddedToken
    special: bool


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The parsed files; a missing one is empty."""

    tokenizer_config: Mapping[str, Any]
    added_tokens: Mapping[str, int]
    eos_ids: frozenset[int]
    """End tokens by number, of the model's and the generation's configuration."""

    @classmethod
    def read(cls, folder: Path) -> ModelFiles:
        """Raises ModelError when a file is there but is no JSON object."""
        eos_ids: set[int] = set()
        for name in _ID_FILES:
            value = read_json(folder / name).get("eos_token_id")
            eos_ids.update(value if isinstance(value, list) else [] if value is None else [value])
        return cls(
            tokenizer_config=read_json(folder / "tokenizer_config.json"),
            added_tokens=read_json(folder / "added_tokens.json"),
            eos_ids=frozenset(eos_ids),
        )

    def named_token(self, name: str) -> str | None:
        """The text of `bos_token`, `eos_token`, …"""
        value = self.tokenizer_config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def named_tokens(self) -> dict[str, str]:
        """All tokens that have a name, as chat templates see them."""
        found = {name: self.named_token(name) for name in _NAMED_TOKENS}
        return {name: text for name, text in found.items() if text is not None}

    def declared_tokens(self) -> list[DeclaredToken]:
        """All added tokens, by rising id; `tokenizer_config.json` has the last word."""
        found = {
            token_id: DeclaredToken(token_id, AddedToken(content), special=False)
            for content, token_id in self.added_tokens.items()
        }
        for key, value in (self.tokenizer_config.get("added_tokens_decoder") or {}).items():
            token = AddedToken(
                content=value["content"],
                normalized=bool(value.get("normalized")),
                lstrip=bool(value.get("lstrip")),
                rstrip=bool(value.get("rstrip")),
                single_word=bool(value.get("single_word")),
            )
            found[int(key)] = DeclaredToken(int(key), token, bool(value.get("special")))
        return [found[token_id] for token_id in sorted(found)]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value
