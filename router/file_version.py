"""Whether a file was changed or replaced since it was read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class FileVersion(NamedTuple):
    """Of a file; one that was replaced has another number."""

    modified_ns: int
    num_bytes: int
    inode: int


def version_of(path: Path) -> FileVersion | None:
    """None: it is not there, or not for us."""
    try:
        found = path.stat()
    except OSError:
        return None
    return FileVersion(found.st_mtime_ns, found.st_size, found.st_ino)
