"""The files that are imported: found, opened, read by the line, with the bytes read so far."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, cast

from streamfill.errors import TraceError
from streamfill.models.progress import Progress

_BUFFER_BYTES: Final = 1 << 20
_LINES_PER_REPORT: Final = 4096
"""Of a file; often enough for a bar, too seldom to cost anything."""
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class ReadProgress:
    """Tells how many bytes of all files are read."""

    def __init__(self, show: Progress) -> None:
        self._show = show
        self._total_bytes = 0
        self._finished_bytes = 0

    def expect(self, paths: Iterable[Path]) -> None:
        """These files will be read. Called before the first of them is opened."""
        self._total_bytes += sum(path.stat().st_size for path in paths if path.is_file())

    def restart(self) -> None:
        """All files will be read again; what is read so far stays read: no bar goes back."""
        self._total_bytes = self._finished_bytes

    def reached(self, position: int) -> None:
        """So many bytes of the current file are read."""
        done = min(self._finished_bytes + position, self._total_bytes)
        self._show(done, self._total_bytes)

    def finished(self, num_bytes: int) -> None:
        """The current file is read, or passed over."""
        self._finished_bytes += num_bytes
        self.reached(0)


def find_files(paths: tuple[Path, ...], pattern: str) -> tuple[Path, ...]:
    """The files that were named, and those of the folders that were, in the order of the numbers
    in their names.

    Args:
        pattern: what the files in a folder are called, such as ``query_*.csv``.

    Raises:
        TraceError: a path is missing, or no file of a folder is called so.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob(pattern), key=_by_number)
            if not inside:
                raise TraceError(f"{path}: has no file {pattern}")
            found += inside
        else:
            check_is_file(path)
            found.append(path)
    return tuple(found)


def check_is_file(path: Path) -> None:
    """
    Raises:
        TraceError: there is no such file, or it is a folder.
    """
    if path.is_dir():
        raise TraceError(f"{path}: is a folder; name its files")
    if not path.exists():
        raise TraceError(f"{path}: no such file")


@contextmanager
def open_source(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The content of a file, and the file itself, whose position is the progress. They differ when
    the name ends in ``.gz``.

    Raises:
        TraceError: it cannot be read, or turns out to be no gzip file.
    """
    try:
        with path.open("rb", _BUFFER_BYTES) as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=raw) as content:
                    yield cast(IO[bytes], content), raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise TraceError(f"{path}: cannot be read: {reason}") from error


def read_lines(path: Path, progress: ReadProgress) -> Iterator[bytes]:
    """The lines of a file with their ends, without a byte order mark.

    Raises:
        TraceError: it cannot be read.
    """
    with open_source(path) as (content, raw):
        try:
            for number, line in enumerate(content):
                if number % _LINES_PER_REPORT == 0:
                    progress.reached(raw.tell())
                yield line.removeprefix(_BYTE_ORDER_MARK) if number == 0 else line
        finally:
            progress.finished(raw.tell())


def _by_number(path: Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)], path.name
