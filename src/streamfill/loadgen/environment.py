"""Where and with what a run was measured. Nothing that names the machine or its folders."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Final

import msgspec

from streamfill.engine.host_memory import read_host_memory
from streamfill.errors import TraceError

_PACKAGES: Final = ("streamfill", "sglang", "torch", "msgspec", "grpcio")
_DIGEST_CHARACTERS: Final = 16
_READ_BYTES: Final = 1 << 20
_GIT_TIMEOUT_S: Final = 10.0
"""Of a command that takes milliseconds; a hanging network folder must not stop a measurement."""


class Environment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What does not change during a comparison; None or empty where it is not known.

    Attributes:
        num_cores: cores that this process may use.
        memory_bytes: memory that it may use.
        versions: of Python and of the packages that matter.
        commit: of the source tree, with ``-dirty`` where it was changed.
        trace: name of the trace file, without its folder.
        trace_digest: start of its SHA-256.
        model: name of the model.
    """

    cpu: str
    num_cores: int
    memory_bytes: int
    platform: str
    versions: dict[str, str]
    commit: str | None = None
    trace: str = ""
    trace_digest: str = ""
    model: str = ""


class LoadAverage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Processes that wanted to compute, over the last minute, before and after a run."""

    start: float
    end: float


def environment(*, trace: Path | None = None, model: str = "") -> Environment:
    """This machine, now. ``model`` may be a folder; its last part is kept.

    Raises:
        TraceError: the trace cannot be read.
    """
    return Environment(
        cpu=_cpu(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=read_host_memory().total_bytes,
        platform=f"{platform.system()} {platform.machine()}",
        versions=_versions(),
        commit=_commit(Path(__file__).parents[3]),
        trace="" if trace is None else trace.name,
        trace_digest="" if trace is None else file_digest(trace),
        model=Path(model).name,
    )


def load_average() -> float:
    """Over the last minute."""
    return os.getloadavg()[0]


def file_digest(path: Path) -> str:
    """Start of the file's SHA-256, in hexadecimal digits.

    Raises:
        TraceError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:_DIGEST_CHARACTERS]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit(root: Path) -> str | None:
    """The commit of the source tree at ``root``; None where it is not one, or git is missing."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
