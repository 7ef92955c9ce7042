"""The line by which a process says that it is ready: ``READY {json}``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

READY_PREFIX: Final = b"READY "


def announce_ready(info: Mapping[str, object]) -> None:
    """Say that this process is ready.

    In one write: ``print`` makes two where Python does not buffer, and a log line of another thread
    that came in between would hide this one for ever.
    """
    sys.stdout.flush()
    os.write(sys.stdout.fileno(), READY_PREFIX + msgspec.json.encode(info) + b"\n")


class ReadyLineScanner:
    """Looks for the line in a log that is being written. Reads each byte once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def scan(self) -> Mapping[str, Any] | None:
        """What the line says, or None when it has not been written to its end yet.

        A line that starts with the word but holds no JSON object is a log line like any other.
        """
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            info = parse_ready_line(line)
            if info is not None:
                return info
        return None


def parse_ready_line(line: bytes) -> Mapping[str, Any] | None:
    """The JSON object of a ``READY {json}`` line, or None for any other line."""
    if not line.startswith(READY_PREFIX):
        return None
    try:
        return msgspec.json.decode(line[len(READY_PREFIX) :], type=dict[str, Any])
    except msgspec.DecodeError:
        return None
