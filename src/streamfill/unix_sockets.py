"""Unix sockets as gRPC addresses them: ``unix:PATH``, where the path is part of a URI."""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import quote

from streamfill.errors import ConfigError

UNIX_PREFIX: Final = "unix:"
MAX_UNIX_PATH_BYTES: Final = 107
"""unix(7), without the zero at the end."""


def unix_target(path: str | os.PathLike[str]) -> str:
    """The address of the socket at this path, whatever characters a URI gives a meaning are in
    it."""
    return UNIX_PREFIX + quote(os.fsencode(path))


def check_unix_path(path: str | os.PathLike[str], key: str) -> None:
    """That the kernel takes this path for a socket, and gRPC's clients find it: they take what is
    behind a comma for another address, however the comma is written.

    Raises:
        ConfigError: one of them does not; `key` is what to change.
    """
    name = os.fspath(path)
    num_bytes = len(os.fsencode(name))
    if num_bytes > MAX_UNIX_PATH_BYTES:
        remedy = (
            f"is {num_bytes} bytes long, and a Unix socket's path at most {MAX_UNIX_PATH_BYTES}; "
            "name a folder with a shorter path"
        )
        raise ConfigError(key, name, remedy)
    if "," in name:
        remedy = "has a comma, which gRPC cannot have in a socket's path; name another folder"
        raise ConfigError(key, name, remedy)
