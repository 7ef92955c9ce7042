"""What can go wrong in starting a cluster besides its configuration."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamfill.errors import ConfigError, StreamfillError


class LaunchError(StreamfillError):
    """A process of the cluster did not start, or the cluster cannot go on without it.

    Attributes:
        process: name of the process, such as ``prefill-0``.
        log_tail: the last lines that it wrote, oldest first.
    """

    def __init__(self, process: str, reason: str, log_tail: tuple[str, ...] = ()) -> None:
        text = f"{process} {reason}"
        if log_tail:
            text += "; its last lines were:\n" + "\n".join(f"  {line}" for line in log_tail)
        super().__init__(text)
        self.process = process
        self.log_tail = log_tail


@contextmanager
def written_in(folder: Path, key: str) -> Iterator[None]:
    """For a block that writes files of this folder, which the option `key` names.

    Raises:
        ConfigError: one cannot be written, as on a full disk.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "make room on its disk, or name another one" if full else "name one that can be"
        remedy = f"files of this folder cannot be written ({error.strerror}); {what}"
        raise ConfigError(key, str(folder), remedy) from error
