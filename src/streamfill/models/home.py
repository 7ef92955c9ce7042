"""The folder where streamfill keeps converted models, logs and run files."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from streamfill.errors import ConfigError

HOME_VARIABLE: Final = "STREAMFILL_HOME"
DEFAULT_HOME: Final = Path("~/.cache/streamfill")


def streamfill_home() -> Path:
    """The folder named by `STREAMFILL_HOME`, else `~/.cache/streamfill`; made where missing.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    named = os.environ.get(HOME_VARIABLE)
    home = Path(named).expanduser() if named else DEFAULT_HOME.expanduser()
    home = home.absolute()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            HOME_VARIABLE, str(home), f"name a folder that can be written to ({error.strerror})"
        ) from error
    if not os.access(home, os.W_OK | os.X_OK):
        raise ConfigError(HOME_VARIABLE, str(home), "name a folder that can be written to")
    return home


def models_folder() -> Path:
    """Where converted models lie, one folder each; made where missing."""
    folder = streamfill_home() / "models"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Holds `lock_file` against all other processes of this machine.

    Waits without a limit, since only another live process can hold it: the operating system
    releases the lock of a process that died.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends without an error.

    A reader sees the old folder, none, or the whole new one, never a part. Call it under
    `exclusive`. What an interrupted call left behind is swept away by the next.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.part-"
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    part.chmod(0o755)
    try:
        yield part
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            target.rename(old / target.name)
            part.rename(target)
            shutil.rmtree(old)
        else:
            part.rename(target)
    finally:
        if part.exists():
            shutil.rmtree(part)
