"""Who runs where: the file ``cluster.json`` that `streamfill status` and `streamfill down` read.

The launcher is its only writer, and holds a lock beside it as long as it lives. A reader takes the
file for true while the process that wrote it lives, recognised by process id *and* start time,
since ids are used again.
"""

from __future__ import annotations

import enum
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from streamfill.errors import ConfigError
from streamfill.launcher.errors import written_in
from streamfill.models.home import HOME_VARIABLE, streamfill_home

STATE_FILE: Final = "cluster.json"
_LOCK_FILE: Final = "cluster.lock"
_RUN_LOCK_FILE: Final = "processes.lock"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ClusterPhase(enum.Enum):
    """How far the launcher is."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a cluster."""

    name: str
    kind: str
    state: str
    pid: int | None
    num_restarts: int
    log_file: str
    metrics_address: str | None = None
    """``host:port`` of its ``/metrics`` for this machine. None: it has none."""


class ClusterState(msgspec.Struct, frozen=True, kw_only=True):
    """What ``cluster.json`` says."""

    name: str
    address: str
    model_path: str
    phase: ClusterPhase
    launcher_pid: int
    launcher_start_ticks: int
    """Start time of the launcher in clock ticks since the machine started."""
    run_dir: str
    """Where logs and process configurations lie."""
    startup_s: float | None
    """From the launcher's start to readiness; None until then."""
    processes: tuple[ProcessRecord, ...]
    http_url: str | None = None
    """None: the router serves no HTTP."""
    operator_address: str | None = None
    """As in `ClusterPlan`."""

    @property
    def own_address(self) -> str:
        """Where the user who started the cluster reaches the router, without a key."""
        return self.operator_address or self.address

    @property
    def is_alive(self) -> bool:
        """Whether the launcher that wrote this still runs."""
        return start_ticks(self.launcher_pid) == self.launcher_start_ticks


def cluster_folder(name: str) -> Path:
    """Where the state of the cluster `name` is kept, made or not.

    Raises:
        ConfigError: the name cannot be one of a folder.
    """
    if not _NAME.fullmatch(name):
        remedy = "use up to 64 letters, digits, dots, dashes and underscores"
        raise ConfigError("name", name, remedy)
    return streamfill_home() / "run" / name


def find_cluster(folder: Path) -> ClusterState | None:
    """The living cluster whose state is in `folder`; None when there is none, or it died."""
    state = read_state(folder)
    return state if state is not None and state.is_alive else None


def read_state(folder: Path) -> ClusterState | None:
    """What was last written in `folder`, by a living launcher or a dead one."""
    try:
        content = (folder / STATE_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return msgspec.json.decode(content, type=ClusterState)
    except msgspec.DecodeError:  # of another version of streamfill
        return None


def write_state(folder: Path, state: ClusterState) -> None:
    """Replaces the file in one step, so that a reader never sees half of it."""
    part = folder / f".{STATE_FILE}.part"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
    part.replace(folder / STATE_FILE)


def check_free(folder: Path, name: str) -> None:
    """For whoever touches a file of the cluster before it is `claimed`.

    Raises:
        ConfigError: a cluster of this name, with its state in `folder`, runs.
    """
    state = find_cluster(folder)
    if state is not None:
        raise _taken(name, state)


def _taken(name: str, state: ClusterState | None) -> ConfigError:
    by = f"process {state.launcher_pid}" if state else "another process"
    remedy = (
        f"a cluster of this name is run by {by}; "
        f"stop it with `streamfill down --name {name}`, or choose another name"
    )
    return ConfigError("name", name, remedy)


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[None]:
    """Holds `folder` for this launcher, and removes the state file at the end.

    The operating system gives the lock back when the launcher dies, so a stale one cannot be.

    Raises:
        ConfigError: another launcher that is alive holds it, or its lock cannot be written.
    """
    with written_in(folder, HOME_VARIABLE):
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / _LOCK_FILE).open("a")
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(name, read_state(folder)) from error
        try:
            yield
        finally:
            (folder / STATE_FILE).unlink(missing_ok=True)


@contextmanager
def claimed_run_dir(folder: Path) -> Iterator[None]:
    """Holds the folder for logs and configurations of the processes, which two clusters of other
    names may be given alike: a process that is restarted would read what the other one wrote.

    Raises:
        ConfigError: another launcher that is alive holds it, or its lock cannot be written.
    """
    key = "launcher.run_dir"
    with written_in(folder, key):
        opened = (folder / _RUN_LOCK_FILE).open("a")
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "another cluster that runs has its files there; name another folder"
            raise ConfigError(key, str(folder), remedy) from error
        yield


def own_start_ticks() -> int:
    """`start_ticks` of this process."""
    ticks = start_ticks(os.getpid())
    if ticks is None:
        raise ConfigError("/proc", "unreadable", "the launcher needs Linux with /proc mounted")
    return ticks


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since the machine did; None when there is none.

    A process that ended and was not yet waited for counts as gone. Source: proc(5), fields 3 and
    22 of ``/proc/PID/stat``; the name before them may hold blanks and brackets.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    state, ticks = fields[0], int(fields[19])
    return None if state in ("Z", "X") else ticks
