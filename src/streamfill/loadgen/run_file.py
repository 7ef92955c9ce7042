"""Files of runs: one JSON line for each run, and beside it the records that it was made from.

``runs.jsonl`` has the figures, for people and programs. ``runs.records.jsonl.gz``, where it is
wanted, has everything that is known of each request, so that figures can be computed and pages
drawn again. Both grow: a run is appended behind what is there.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from streamfill.errors import ConfigError
from streamfill.loadgen.environment import Environment, LoadAverage
from streamfill.loadgen.goodput import Goodput
from streamfill.loadgen.metrics import RunSummary, flat
from streamfill.loadgen.records import RunResult

_OPTION: Final = "--output-file"


class SavedRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that is known of a run: one line of a file of records."""

    schema: Literal[1] = 1
    result: RunResult
    environment: Environment
    load: LoadAverage
    config: dict[str, Any] = {}
    goodput: Goodput | None = None


class RunFile:
    """Appends runs to a file of figures, and to the file of records beside it."""

    def __init__(self, path: Path, *, saves_records: bool) -> None:
        """
        Raises:
            ConfigError: the file cannot be written, which is better known before the runs.
        """
        self._path = path
        self._records = records_path(path) if saves_records else None
        _append(path, b"", _OPTION)

    def add(self, saved: SavedRun, summary: RunSummary) -> None:
        """One more run.

        Raises:
            ConfigError: the file cannot be written.
        """
        line = {
            **flat(summary),
            "load_average": msgspec.to_builtins(saved.load),
            "environment": msgspec.to_builtins(saved.environment),
            "config": saved.config,
        }
        _append(self._path, json.dumps(line, allow_nan=False).encode() + b"\n", _OPTION)
        if self._records is not None:
            packed = gzip.compress(msgspec.json.encode(saved) + b"\n", mtime=0)
            _append(self._records, packed, _OPTION)


def records_path(path: Path) -> Path:
    """The file of records that belongs to a file of figures."""
    return path.with_name(f"{path.stem}.records.jsonl.gz")


def read_records(path: Path) -> Iterator[SavedRun]:
    """The runs of a file of records, in the order in which they were made.

    Args:
        path: the file of records, or the file of figures that it stands beside.

    Raises:
        ConfigError: there is none, or a line of it is no run.
    """
    records = path if path.name.endswith(".gz") else records_path(path)
    decode = msgspec.json.Decoder(SavedRun).decode
    try:
        with gzip.open(records, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    saved = decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    where = f"{records.name}, line {number}"
                    raise ConfigError("FILE", str(path), f"{where} is no run: {error}") from error
                yield saved
    except FileNotFoundError as error:
        remedy = f"{records.name} is not there; compare with --save-records to have it"
        raise ConfigError("FILE", str(path), remedy) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError("FILE", str(path), f"cannot be read: {error}") from error


def _append(path: Path, content: bytes, option: str) -> None:
    try:
        with path.open("ab") as file:
            file.write(content)
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}); name a file in a folder that exists"
        raise ConfigError(option, str(path), remedy) from error
