"""The one SGLang version that streamfill is written against, checked before SGLang is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from streamfill.errors import EngineVersionError

PINNED_SGLANG_VERSION: Final = "0.5.16"
"""`engine/` depends on insides of SGLang that change between its releases."""


def check_sglang_version() -> None:
    """Refuses any SGLang but the pinned one. Reads package metadata only, so it costs milliseconds.

    Raises:
        EngineVersionError: SGLang is missing or of another version; names both and the remedy.
    """
    try:
        found = version("sglang")
    except PackageNotFoundError as error:
        raise EngineVersionError(_message("no sglang is installed")) from error
    public_version = found.partition("+")[0]
    if public_version != PINNED_SGLANG_VERSION:
        raise EngineVersionError(_message(f"found sglang {found}"))


def _message(found: str) -> str:
    return (
        f"{found}, streamfill needs sglang {PINNED_SGLANG_VERSION}; "
        f"run `make setup`, or `pip install --no-deps sglang=={PINNED_SGLANG_VERSION}`"
    )
