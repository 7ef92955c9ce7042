"""A wall clock that a test sets, for the processes of a cluster; see ``clock/sitecustomize.py``."""

from __future__ import annotations

import os
import struct
from pathlib import Path

_FOLDER = Path(__file__).parent / "clock"


class WallClock:
    """The clock of all processes that are started with ``environment``."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.write_bytes(struct.pack("d", 0.0))
        self.shift_s = 0.0
        """From the true time."""

    @property
    def environment(self) -> dict[str, str]:
        """What a process must find in its environment."""
        paths = [str(_FOLDER), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        return {"STREAMFILL_TEST_CLOCK": str(self._file), "PYTHONPATH": os.pathsep.join(paths)}

    def jump(self, by_s: float) -> None:
        """Set it forward, or back where ``by_s`` is below 0."""
        self.shift_s += by_s
        with self._file.open("r+b") as file:
            file.write(struct.pack("d", self.shift_s))
