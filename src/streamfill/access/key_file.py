"""The file of API keys: JSON Lines, one ``keys.KeyEntry`` each. It holds hashes, no keys.

Whoever changes it replaces it in one step, so that a router that reads it never sees half of it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from streamfill.access.keys import KeyEntry, problem_of
from streamfill.errors import ConfigError
from streamfill.models.home import exclusive, streamfill_home

DEFAULT_NAME: Final = "api_keys.jsonl"
MAX_FILE_BYTES: Final = 16 * 1024 * 1024
"""Forty thousand keys. More is not a key file, and reading it would stop the router for seconds."""


def default_key_file() -> Path:
    """Where `streamfill keys` keeps keys when it is not told."""
    return streamfill_home() / DEFAULT_NAME


def read_keys(path: Path, option: str) -> tuple[KeyEntry, ...]:
    """The keys of a file, in its order.

    Args:
        path: of the file.
        option: what named it, for the error.

    Raises:
        ConfigError: it cannot be read, or a line is no key; says which line and never what is in
            it, since somebody may have written a key itself there.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        remedy = f"cannot be read ({error.strerror}); make it with `streamfill keys add NAME`"
        raise ConfigError(option, str(path), remedy) from error
    if len(data) > MAX_FILE_BYTES:
        remedy = f"is larger than {MAX_FILE_BYTES} bytes, so it is no key file"
        raise ConfigError(option, str(path), remedy)
    entries: list[KeyEntry] = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=KeyEntry)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            remedy = f"line {number} is no key entry: {error}"
            raise ConfigError(option, str(path), remedy) from None
        problem = problem_of(entry)
        if problem is None and any(each.name == entry.name for each in entries):
            problem = f"the name {entry.name} is there twice"
        if problem is None and any(each.id == entry.id for each in entries):
            problem = f"the id {entry.id} is there twice"
        if problem is not None:
            raise ConfigError(option, str(path), f"line {number}: {problem}")
        entries.append(entry)
    return tuple(entries)


def change_keys(
    path: Path, change: Callable[[tuple[KeyEntry, ...]], Sequence[KeyEntry]], option: str
) -> None:
    """Replaces the file by what ``change`` makes of its keys; it need not be there yet.

    Only its owner may read or write it afterwards. Two changes at the same time wait for each
    other.

    Raises:
        ConfigError: as ``read_keys``, or the file cannot be written; or what ``change`` raises.
    """
    path = path.expanduser().resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_name(f".{path.name}.lock")):
            before = read_keys(path, option) if path.exists() else ()
            _replace(path, change(before))
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}); name a file in a folder of yours"
        raise ConfigError(option, str(path), remedy) from error


def _replace(path: Path, entries: Sequence[KeyEntry]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.part-", dir=path.parent)  # mode 0600
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            for entry in entries:
                file.write(msgspec.json.encode(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
