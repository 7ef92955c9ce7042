"""The log of each process: one file per life, the newest without a number.

A process writes its log itself, through the file handle it is given. So nothing is lost when the
launcher is killed, and a launcher that is busy holds nobody up.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Final

NUM_OLD_LOGS: Final = 5
_TAIL_BYTES: Final = 16_384


def open_log(folder: Path, name: str) -> BinaryIO:
    """A new ``name.log``; what was there becomes ``name.1.log``, that ``name.2.log``, and so on.

    The oldest of more than `NUM_OLD_LOGS` is deleted. The caller closes the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    newest = log_file(folder, name)
    if newest.exists():
        for number in range(NUM_OLD_LOGS - 1, 0, -1):
            older = folder / f"{name}.{number}.log"
            if older.exists():
                older.replace(folder / f"{name}.{number + 1}.log")
        newest.replace(folder / f"{name}.1.log")
    return newest.open("xb")


def log_file(folder: Path, name: str) -> Path:
    """Where the present life of process `name` is logged."""
    return folder / f"{name}.log"


def last_lines(path: Path, num_lines: int) -> tuple[str, ...]:
    """The last lines of a log that are not empty, oldest first; none when it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
    except OSError:  # it was never written
        return ()
    lines = tail.decode("utf-8", errors="replace").splitlines()
    return tuple(line.rstrip() for line in lines if line.strip())[-num_lines:]
