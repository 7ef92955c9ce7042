"""The token that a scrape of the metrics has to carry: the first line of a file."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from streamfill.errors import ConfigError

OPTION: Final = "metrics_token_file"
MIN_CHARS: Final = 16
"""Fewer can be guessed."""
MAX_FILE_BYTES: Final = 4096
CHALLENGE: Final = 'Bearer realm="streamfill metrics"'
_SCHEME: Final = "bearer"


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        ConfigError: the file cannot be read, or has no token that would do. It never shows what is
            in it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        remedy = f"cannot be read ({error.strerror}); make it with `openssl rand -hex 32`"
        raise ConfigError(OPTION, str(path), remedy) from error
    token = data.strip()
    is_plain = all(0x21 <= byte <= 0x7E for byte in token)
    if len(data) > MAX_FILE_BYTES or len(token) < MIN_CHARS or not is_plain:
        remedy = (
            f"must hold one line of at least {MIN_CHARS} ASCII characters without blanks; make it "
            "with `openssl rand -hex 32`"
        )
        raise ConfigError(OPTION, str(path), remedy)
    return token.decode("ascii")


def is_token_of(headers: Sequence[str], token: str) -> bool:
    """Whether the ``Authorization`` headers of a request carry ``token``. Takes as long for a
    wrong one of the same length."""
    if len(headers) != 1:
        return False
    scheme, _, given = headers[0].strip().partition(" ")
    is_equal = hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode())
    return is_equal and scheme.lower() == _SCHEME
